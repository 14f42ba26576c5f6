"""Time left, against a clock that is known."""

from __future__ import annotations

import pytest

from massact.cli.progress import BEHIND, Clock, clock_time


def test_time_left_is_of_the_whole_verb() -> None:
    now = [0.0]
    clock = Clock("scan", lambda: now[0])
    assert clock.left("load", 0, 1) is None and clock.left("scan", 0, 10) is None
    for done in range(1, 11):
        now[0] = 3.0 * done
        assert clock.left("scan", done, 10) == pytest.approx(30 - 3 * done + BEHIND * 30)
    clock.left("null twin", 0, 2)
    now[0] += 2
    assert clock.left("null twin", 1, 2) == pytest.approx(BEHIND * 30 - 2)
    now[0] += 100
    assert clock.left("null twin", 2, 2) == pytest.approx(0)


def test_times_as_they_are_read() -> None:
    assert [clock_time(s) for s in (None, 4.4, 95, 3725)] == ["", "0:04", "1:35", "1:02:05"]
