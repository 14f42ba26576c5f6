"""What a vision toy lab gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.errors import UserError
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

# NaN: not there or not seen, never zero.
_TO = {
    "class": "the class token", "registers": "all registers together", "slot": "an extra slot",
    "top_patch": "the patch that gets most from class token and patches together",
}  # fmt: skip
_SIZES = {
    "top1": ("float64", "greatest |h|, in any image"),
    "ratio": ("float64", "greatest |h| / median |h|, mean over images"),
    "massive": ("float64", "share of images with |h| > 100 and |h| >= 1000 x median (sun2024)"),
    "patch_norm_ratio": ("float64", "norm of the largest patch / median norm of the patches, mean over images"),
    "outliers": ("float64", "share of patches whose norm is above 4 x the median of all patches of all images"),
}
TABLES: dict[str, Columns] = {
    "shapes": {
        "arm": ("string", "attention variant, with +registers where there are some"),
        "step": ("int64", "optimizer steps done"),
        "nats": ("float64", "held-out loss"),
        "accuracy": ("float64", "share of held-out images whose class is named"),
        **{name: (kind, f"{said}; of the first 64 images, greatest of the layers from 1 on")
           for name, (kind, said) in _SIZES.items()},
        "wall_s": ("float64", "seconds since the start of this training"),
    },
    "shapes_layers": {
        "arm": ("string", "attention variant, with +registers where there are some"),
        "layer": ("int64", "residual stream after this block, at the end of training; 0: before the first"),
        **_SIZES,
        "at_class": ("float64", "share of images whose greatest |h| is at the class token"),
        "at_registers": ("float64", "the same at a register"),
        "class_norm_ratio": ("float64", "norm of the class token / median norm of the patches, mean over images"),
        "register_norm_ratio": ("float64", "the same of the largest register"),
        "largest_on_background": ("float64", "share of images whose patch of largest norm holds no part of the shape"),
        **{f"{query}_to_{key}": ("float64", f"attention of {said} on {_TO[key]}, mean over heads and images, in the "
                                 "block that ends here") for query, said in
           (("class", "the class token"), ("patches", "the patches")) for key in _TO},
        "top_on_background": ("float64", "share of images whose most attended patch holds no part of the shape"),
    },
    "shapes_effects": {
        "arm": ("string", "attention variant, with +registers where there are some"),
        "layer": ("int64", "states after this block were edited"),
        "target": ("string", "registers, top patch (most attended in the next block), or what each is compared with: "
                   "other patches (as many, of the background), another patch (on the shape or not, as the top patch)"),
        "edit": ("string", "zero, or mean (over the images)"),
        "tokens": ("int64", "states that were edited in each image"),
        "cosine": ("float64", "of these states and their mean, mean over images: 1 for constants"),
        "baseline_nats": ("float64", "loss without the edit"),
        "delta_nats": ("float64", "its change"),
        "ci_low": ("float64", "95 % interval of that over images, of one training"),
        "ci_high": ("float64", "its upper end"),
        "baseline_accuracy": ("float64", "share of classes that are named without the edit"),
        "delta_accuracy": ("float64", "its change"),
        "accuracy_low": ("float64", "95 % interval of that over images, of one training"),
        "accuracy_high": ("float64", "its upper end"),
        "n_images": ("int64", "held-out images"),
    },
}  # fmt: skip
COMPARED_WITH = {"registers": "other patches", "top patch": "another patch"}


@dataclass
class ShapesInfo(Sidecar):
    """The record of a vision toy lab: shapes.json.

    Args:
        arms: arm -> attention (variant), registers (how many), key_std (scale at which k' was drawn, where that was
            measured) and uniform_attention (on one token, of a head that looks everywhere alike).
    """

    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema_version: int = 1


@dataclass(repr=False)
class ShapeLab(Result):
    """What a vision toy lab gave.

    Args:
        info: what was trained.
        shapes, shapes_layers, shapes_effects: see `TABLES`.
        directory: of its files; the models are in its folders `model-ARM`.
    """

    KIND: ClassVar[str] = "shapes"
    VERB: ClassVar[str] = "vision toy lab"
    FILE: ClassVar[str] = "shapes.json"
    INFO: ClassVar[type[Any]] = ShapesInfo
    TABLES: ClassVar = TABLES
    ALONE: ClassVar[bool] = True
    AGAIN: ClassVar[str] = "Run the toy lab again, or delete the directory."

    info: ShapesInfo
    shapes: pd.DataFrame = table("shapes")
    shapes_layers: pd.DataFrame = table("shapes_layers")
    shapes_effects: pd.DataFrame = table("shapes_effects")
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

    def check(self, path: Path) -> None:
        """Refuse tables without rows of some arm."""
        lost = [arm for arm in self.arms if not {arm} <= set(self.shapes["arm"]) & set(self.shapes_layers["arm"])]
        if lost:
            raise UserError(f"The tables in {path} have no rows of {lost[0]!r}.", do=self.AGAIN)
