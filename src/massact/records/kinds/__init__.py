"""The kinds of results that there are: one file each, with its columns; other packages add theirs.

An entry point `NAME = "package.module:Class"` of the group `massact.results` names a `Result` of another package.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import massact.records.kinds
from massact.records.extensions import extensions, modules_in
from massact.records.kinds.comparison import TABLES as COMPARED
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.result import Result
from massact.records.run import is_folder
from massact.records.tables import Columns

__all__ = ["Result", "alone_in", "kinds", "results_in", "scan_in", "tables"]


@cache
def kinds() -> dict[str, type[Result]]:
    """Name -> kind, of all that are known, in the order in which a page tells of them.

    Raises:
        UserError: what another package names is no kind, or is called like another.
    """
    ours = [
        found
        for module in modules_in(massact.records.kinds).values()
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Result) and found.__module__ == module.__name__
    ]
    known = {kind.KIND: kind for kind in sorted(ours, key=lambda kind: kind.PLACE)}
    return extensions("massact.results", Result, known, "KIND")


def tables() -> dict[str, Columns]:
    """Every table of every kind: name -> its columns."""
    every = [*(kind.TABLES for kind in kinds().values()), COMPARED]
    return {name: columns for declared in every for name, columns in declared.items()}


def alone_in(directory: str | Path) -> list[Result]:
    """What a directory holds of the kinds that have one of their own, but for a scan.

    Raises:
        UserError: one of them is damaged, or written by a newer massact.
    """
    path = Path(directory)
    if not is_folder(path):
        return []
    opened = [kind.open(path) for kind in kinds().values() if kind.ALONE and kind is not ScanResult]
    return [one for one in opened if one is not None]


def scan_in(directory: str | Path) -> list[Result]:
    """The scan in a directory, and what later verbs put beside it.

    Raises:
        UserError: no such directory, no run in it, or one of them is damaged, not finished, or written by a newer
            massact.
    """
    path = Path(directory)
    opened = [open_run(path), *(kind.open(path) for kind in kinds().values() if not kind.ALONE)]
    return [one for one in opened if one is not None]


def results_in(directory: str | Path) -> list[Result]:
    """Everything in a run directory: what later verbs put there comes behind the scan that it is of.

    Raises:
        UserError: as `scan_in`.
    """
    path = Path(directory)
    if is_folder(path) and not (path / "run.json").is_file() and (alone := alone_in(path)):
        return alone[:1]
    return scan_in(path)
