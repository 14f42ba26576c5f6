"""The result of an intervention, in memory and as files beside the scan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import jsonable
from massact.records.sidecars import Sidecar, read_sidecar, save_beside
from massact.records.tables import frame, read_table

INTERVENE_VERSION = 2  # 2: number of targets


@dataclass
class InterveneInfo(Sidecar):
    """The record of an intervention: intervene.json.

    Args:
        target: site, dims, cuts and means of the massive activations that were edited.
        estimated_on, evaluated_on: sequences that the means are of, and that the effects are of.
    """

    target: dict[str, Any] = field(default_factory=dict)
    estimated_on: str = ""
    evaluated_on: str = ""
    schema_version: int = INTERVENE_VERSION


@dataclass(repr=False)
class Intervention(ShownInNotebooks):
    """What edits of massive activations did.

    Args:
        info: what was asked and how.
        effects: one row per edit, metric and group, see `massact.records.tables`.
    """

    info: InterveneInfo
    effects: pd.DataFrame = field(default_factory=lambda: frame("effects"))

    def save(self, directory: str | Path) -> Path:
        """Add the table to a run directory; intervene.json last.

        Raises:
            UserError: the directory cannot be written.
        """
        return save_beside(directory, "intervene.json", self.info, {"effects": self.effects})

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able records."""
        return jsonable(asdict(self.info)) | {"effects": jsonable(self.effects.to_dict(orient="records"))}


def open_intervention(directory: str | Path) -> Intervention | None:
    """Read the intervention in a run directory; None where there is none.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    path = Path(directory)
    info = read_sidecar(path / "intervene.json", InterveneInfo, INTERVENE_VERSION, "Intervene on the run again.")
    return None if info is None else Intervention(info, read_table(path, "effects"))
