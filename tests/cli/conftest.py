"""Figures cost more than most verbs: the tests of the command line render those that they look at."""

from __future__ import annotations

import pytest

from tests.cli.runs import render_nothing


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `rendered`, one of each verb, and what a whole file shares render their figures."""
    if request.node.get_closest_marker("rendered") is None:
        render_nothing(monkeypatch)
