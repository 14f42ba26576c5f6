"""What Ctrl-C leaves behind, and how to go on: said for the verb that was interrupted."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from massact.records.errors import MassactError

AGAIN = "Run the same command again."
RESUME = "go on with the same command and --resume."


class Interrupted(MassactError):
    """Ctrl-C, with what it left behind."""

    exit_code = 130


def told(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb; where it is interrupted, what is kept and how to go on are told."""

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        try:
            verb(**given)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. {how_to_go_on(verb.__name__, given)}") from None

    return run


def how_to_go_on(verb: str, given: dict[str, Any]) -> str:
    """What an interrupted verb has kept, and what to do next.

    Args:
        verb: its name.
        given: its arguments.
    """
    out = given.get("out")
    if verb in ("scan", "train"):
        return _resumed(out, f"A {verb if verb == 'scan' else 'training'}")
    if verb == "reproduce":
        run = given.get("target") if _holds(given.get("target"), "run.json") else out
        return _by_itself(run)
    if verb in ("explain", "intervene"):
        return f"Nothing of it was kept, and the scan in {given.get('run')} is as it was. {AGAIN}"
    if verb == "classics":
        if _holds(out, "run.json"):
            return f"The scan in {out} is kept: go on with massact classics {out}"
        return f"Nothing of it was kept. {AGAIN}"
    return AGAIN


def _resumed(out: Path | None, what: str) -> str:
    if out is None:
        return f"Nothing was saved. {what} with --out DIR can be gone on with."
    if _holds(out, "run.json", "trajectory.json", "train.json"):
        return f"What was finished is kept in {out}: {RESUME}"
    return f"It had not begun, and nothing was written. {AGAIN}"


def _by_itself(run: Any) -> str:
    if run is None:
        return "Nothing was saved. With --out DIR it can be gone on with."
    if _holds(run, "run.json", "reproduce.json"):
        return f"What was finished is kept in {run}. {AGAIN} It goes on by itself."
    return f"It had not begun, and nothing was written. {AGAIN}"


def _holds(folder: Any, *names: str) -> bool:
    return folder is not None and any(os.path.isfile(os.path.join(folder, name)) for name in names)
