"""The result of the vision toy lab, in memory and as files of its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from massact.records.errors import UserError
from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import jsonable
from massact.records.shape_tables import SHAPE_TABLES
from massact.records.sidecars import Sidecar, read_sidecar, save_beside
from massact.records.tables import frame, read_table

SHAPES_VERSION = 1
COMPARED_WITH = {"registers": "other patches", "top patch": "another patch"}


@dataclass
class ShapesInfo(Sidecar):
    """The record of a vision toy lab: shapes.json.

    Args:
        arms: arm -> attention (variant), registers (how many), key_std (scale at which k' was drawn, where that was
            measured) and uniform_attention (on one token, of a head that looks everywhere alike).
    """

    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema_version: int = SHAPES_VERSION


@dataclass(repr=False)
class ShapeLab(ShownInNotebooks):
    """What a vision toy lab gave.

    Args:
        info: what was trained.
        shapes, shapes_layers, shapes_effects: see `massact.records.tables`.
        directory: of its files; the models are in its folders `model-ARM`.
    """

    info: ShapesInfo
    shapes: pd.DataFrame = field(default_factory=lambda: frame("shapes"))
    shapes_layers: pd.DataFrame = field(default_factory=lambda: frame("shapes_layers"))
    shapes_effects: pd.DataFrame = field(default_factory=lambda: frame("shapes_effects"))
    directory: Path | None = None

    @property
    def arms(self) -> list[str]:
        """Names of the trainings, in the order they were asked for."""
        return list(self.info.arms)

    def last(self, arm: str) -> pd.Series:
        """The measurement of an arm at the end of training."""
        return self.shapes[self.shapes["arm"] == arm].iloc[-1]

    def layers(self, arm: str) -> pd.DataFrame:
        """The layers of an arm behind its blocks, at the end."""
        rows = self.shapes_layers
        return rows[(rows["arm"] == arm) & (rows["layer"] >= 1)]

    @property
    def middle(self) -> int:
        """The block that effects are told of in words and in the figure: half of them come before its end."""
        return max(1, int(self.shapes_layers["layer"].max()) // 2)

    def effect(self, arm: str, target: str, edit: str, layer: int | None = None) -> pd.Series | None:
        """The effect of one edit after a block, the middle one if none is named; None where it was not measured."""
        wanted = {"arm": arm, "target": target, "edit": edit, "layer": self.middle if layer is None else layer}
        rows = self.shapes_effects
        for column, value in wanted.items():
            rows = rows[rows[column] == value]
        return rows.iloc[0] if len(rows) else None

    def save(self, directory: str | Path) -> Path:
        """Write the tables, shapes.json last.

        Raises:
            UserError: the directory cannot be written.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        return save_beside(directory, "shapes.json", self.info, {name: getattr(self, name) for name in SHAPE_TABLES})

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able records."""
        tables = {name: getattr(self, name).to_dict(orient="records") for name in SHAPE_TABLES}
        return jsonable(asdict(self.info) | tables)


def open_shapes(directory: str | Path) -> ShapeLab | None:
    """Read the vision toy lab in a directory; None where there is none.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    path, again = Path(directory), "Run the toy lab again, or delete the directory."
    info = read_sidecar(path / "shapes.json", ShapesInfo, SHAPES_VERSION, again)
    if info is None:
        return None
    lab = ShapeLab(info, **{name: read_table(path, name) for name in SHAPE_TABLES}, directory=path)
    lost = [arm for arm in lab.arms if not {arm} <= set(lab.shapes["arm"]) & set(lab.shapes_layers["arm"])]
    if lost:
        raise UserError(f"The tables in {path} have no rows of {lost[0]!r}.", do=again)
    return lab
