"""How far a verb is and how long it still takes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FIRST_S, EVERY_S = 10.0, 20.0  # of lines
BEHIND = 0.25  # of a verb's main stage, of the same name: what comes after it (controls, tables, figures)


class Clock:
    """How long a verb still takes, from what it has done.

    Args:
        verb: its name, which its main stage has too.
        now: the time in seconds.
    """

    def __init__(self, verb: str, now: Callable[[], float] = time.monotonic) -> None:
        self.verb, self.now = verb, now
        self.began: dict[str, float] = {}
        self.main_s = 0.0  # of the main stage, as far as is known

    def left(self, stage: str, done: int, total: int) -> float | None:
        """Seconds to the end of the verb; None where nothing is known yet."""
        now = self.now()
        began = self.began.setdefault(stage, now)
        if done <= 0 or total <= 0:
            return None
        whole = (now - began) * total / done
        if stage == self.verb:
            self.main_s = whole
            return whole - (now - began) + BEHIND * whole
        behind = max(0.0, BEHIND * self.main_s - (now - began))
        return max(whole - (now - began), behind) if self.main_s else None


def clock_time(seconds: float | None) -> str:
    """'0:35' or '1:02:10'; '' where nothing is known."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def progress_of(verb: str, off: bool) -> Iterator[Callable[..., None]]:
    """A function that is told (stage, done, in all) and shows it on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, clock = Console(stderr=True), Clock(verb)
    lines = not off and not console.is_terminal
    said = time.monotonic() + FIRST_S - EVERY_S  # so that the first line comes after FIRST_S
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"), console=console, disable=off or not console.is_terminal, transient=True,
    ) as bar:  # fmt: skip
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, note: str = "") -> None:
            nonlocal said
            left = clock_time(clock.left(stage, done, total))
            left = f"{left} left" if left else ""
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, left="")
            bar.update(tasks[stage], completed=done, total=total, left=left, description=f"{stage} {note}".rstrip())
            if lines and time.monotonic() - said >= EVERY_S:
                said = time.monotonic()
                console.print(
                    f"{stage} {done:,} of {total:,}{f', {left}' if left else ''}", markup=False, highlight=False
                )

        yield update
