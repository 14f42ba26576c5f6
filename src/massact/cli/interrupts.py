"""What Ctrl-C leaves behind, and how to go on: said for the verb that was interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from massact.records.errors import MassactError
from massact.verbs import OfScan, Verb

AGAIN = "Run the same command again."


class Interrupted(MassactError):
    """Ctrl-C, with what it left behind."""

    exit_code = 130


@contextmanager
def told_where_interrupted(verb: Verb, given: Mapping[str, Any]) -> Iterator[None]:
    """Where the verb is interrupted, tell what is kept and how to go on.

    Args:
        verb: that runs within.
        given: its inputs and options.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {how_to_go_on(verb, given)}") from None


def how_to_go_on(verb: Verb, given: Mapping[str, Any]) -> str:
    """What an interrupted verb has kept, and what to do next."""
    target, out = given.get("target"), given.get("out")
    place = target if _has_record(target) else out
    if issubclass(verb.inputs, OfScan) and _has_record(given.get("run")):
        return f"Nothing of it was kept, and the scan in {given.get('run')} is as it was. {AGAIN}"
    if not verb.noun:
        kept = _has_record(out)
        return f"The scan in {out} is kept: go on with massact {verb.name} {out}" if kept else (
            f"Nothing of it was kept. {AGAIN}")  # fmt: skip
    if place is None:
        return f"Nothing was saved. {verb.noun} with --out DIR can be gone on with."
    if not _has_record(place):
        return f"It had not begun, and nothing was written. {AGAIN}"
    if verb.by_itself:
        return f"What was finished is kept in {place}. {AGAIN} It goes on by itself."
    return f"What was finished is kept in {place}: go on with the same command and --resume."


def _has_record(folder: Any) -> bool:
    """Whether a folder holds the record of any kind of result."""
    from massact.records.kinds import kinds

    return folder is not None and any(os.path.isfile(os.path.join(folder, kind.FILE)) for kind in kinds().values())
