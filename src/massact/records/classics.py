"""The results of the classic outlier works on one model, in memory and as files beside its scan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import jsonable
from massact.records.sidecars import Sidecar, read_sidecar, save_beside
from massact.records.tables import frame, read_table

CLASSICS_VERSION = 2  # 2: number of targets of its effects
CLASSICS_TABLES = ("classics", "classic_effects")


@dataclass
class ClassicsInfo(Sidecar):
    """The record of the classics: classics.json.

    Args:
        outcomes: name of the entry -> its numbers by name, or {"unavailable": reason}.
        sources: name of the entry -> the work it is from.
    """

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    schema_version: int = CLASSICS_VERSION


@dataclass(repr=False)
class Classics(ShownInNotebooks):
    """What the works that the paper grew from find on one model.

    Args:
        info: what was asked, and the outcome of every entry.
        classics: what was measured, see `massact.records.tables`.
        classic_effects: what the entries' edits did.
    """

    info: ClassicsInfo
    classics: pd.DataFrame = field(default_factory=lambda: frame("classics"))
    classic_effects: pd.DataFrame = field(default_factory=lambda: frame("classic_effects"))

    def save(self, directory: str | Path) -> Path:
        """Add the tables to a run directory; classics.json last.

        Raises:
            UserError: the directory cannot be written.
        """
        tables = {name: getattr(self, name) for name in CLASSICS_TABLES}
        return save_beside(directory, "classics.json", self.info, tables)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able records."""
        tables = {t: jsonable(getattr(self, t).to_dict(orient="records")) for t in CLASSICS_TABLES}
        return jsonable(asdict(self.info)) | tables


def open_classics(directory: str | Path) -> Classics | None:
    """Read the classics in a run directory; None where there are none.

    Raises:
        UserError: they are damaged, or written by a newer massact.
    """
    path = Path(directory)
    info = read_sidecar(path / "classics.json", ClassicsInfo, CLASSICS_VERSION, "Run them again.")
    return None if info is None else Classics(info, **{t: read_table(path, t) for t in CLASSICS_TABLES})
