"""The result of the toy lab, in memory and as files of its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from massact.records.errors import UserError
from massact.records.lab_tables import LAB_TABLES
from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import jsonable
from massact.records.sidecars import Sidecar, read_sidecar, write_sidecar
from massact.records.tables import frame, read_table, write_table

LAB_VERSION = 1


@dataclass
class LabInfo(Sidecar):
    """The record of a toy lab: lab.json.

    Args:
        variants: attention variant -> key_std (scale at which k' was drawn, where that was measured) and
            uniform_attention (on the first position, of a head that looks everywhere alike).
    """

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema_version: int = LAB_VERSION


@dataclass(repr=False)
class Lab(ShownInNotebooks):
    """What a toy lab gave.

    Args:
        info: what was trained.
        lab, lab_effects: see `massact.records.tables`.
        directory: of its files; the models are in its folders `model-VARIANT`.
    """

    info: LabInfo
    lab: pd.DataFrame = field(default_factory=lambda: frame("lab"))
    lab_effects: pd.DataFrame = field(default_factory=lambda: frame("lab_effects"))
    directory: Path | None = None

    @property
    def variants(self) -> list[str]:
        """Names of the attention variants, in the order they were asked for."""
        return list(self.info.variants)

    def last(self, variant: str) -> pd.Series:
        """The measurement of a variant at the end."""
        return self.lab[self.lab["variant"] == variant].iloc[-1]

    def effect(self, variant: str, edit: str, position: int, targets: str = "far") -> pd.Series | None:
        """The effect of one edit after block 1; None where it was not measured (a model of one block)."""
        wanted = {"variant": variant, "edit": edit, "position": position, "targets": targets, "layer": 1}
        rows = self.lab_effects
        for column, value in wanted.items():
            rows = rows[rows[column] == value]
        return rows.iloc[0] if len(rows) else None

    def save(self, directory: str | Path) -> Path:
        """Write the tables, lab.json last.

        Raises:
            OSError: the directory cannot be written.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        for name in LAB_TABLES:
            write_table(path, name, getattr(self, name))
        write_sidecar(path / "lab.json", self.info)
        return path

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able records."""
        tables = {name: getattr(self, name).to_dict(orient="records") for name in LAB_TABLES}
        return jsonable(asdict(self.info) | tables)


def open_lab(directory: str | Path) -> Lab | None:
    """Read the toy lab in a directory; None where there is none.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    path, again = Path(directory), "Run the toy lab again, or delete the directory."
    info = read_sidecar(path / "lab.json", LabInfo, LAB_VERSION, again)
    if info is None:
        return None
    lab = Lab(info, **{name: read_table(path, name) for name in LAB_TABLES}, directory=path)
    lost = [v for v in lab.variants if v not in set(lab.lab["variant"])]
    if lost:
        raise UserError(f"{path / 'lab.parquet'} has no rows of {lost[0]!r}.", do=again)
    return lab
