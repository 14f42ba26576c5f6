"""What a toy lab gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.errors import UserError
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

# NaN: not there (an extra slot), never zero.
TABLES: dict[str, Columns] = {
    "lab": {
        "variant": ("string", "attention variant"),
        "step": ("int64", "optimizer steps done"),
        "nats": ("float64", "held-out loss of all targets but those after BOS"),
        "backcopy_nats": ("float64", "of targets that repeat the token before a trigger; 0 is perfect"),
        "bigram_excess_nats": ("float64", "of all others, beyond the uncertainty of the chain; 0 is perfect"),
        "first_attention": ("float64", "weight on the first position of queries from 8 on, mean over all heads"),
        "first_attention_max": ("float64", "the same of the head with most"),
        "slot_mass": ("float64", "probability of the extra slot, or of a sink token, mean over all heads"),
        "norm_ratio": ("float64", "norm of the first state over the others' mean, greatest of those that are read"),
        "top1": ("float64", "greatest |h| after any block, in any sequence"),
        "ratio": ("float64", "greatest |h| / median |h|, mean over sequences, greatest of the blocks"),
        "wall_s": ("float64", "seconds since the start of this training"),
    },
    "lab_effects": {
        "variant": ("string", "attention variant"),
        "layer": ("int64", "the state after this block was edited"),
        "position": ("int64", "at this position: 0, or the ordinary one that it is compared with"),
        "edit": ("string", "zero, or mean (over the sequences)"),
        "targets": ("string", "far: predicted from position 13 on, the same for both; next: the 7 behind the position"),
        "baseline_nats": ("float64", "loss of these targets without the edit"),
        "delta_nats": ("float64", "its change"),
        "ci_low": ("float64", "95 % interval over sequences, of one training"),
        "ci_high": ("float64", "its upper end"),
        "cosine": ("float64", "of the state and its mean, mean over sequences: 1 for a constant"),
        "n_sequences": ("int64", "held-out sequences"),
    },
}


@dataclass
class LabInfo(Sidecar):
    """The record of a toy lab: lab.json.

    Args:
        variants: attention variant -> key_std (scale at which k' was drawn, where that was measured) and
            uniform_attention (on the first position, of a head that looks everywhere alike).
    """

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema_version: int = 1


@dataclass(repr=False)
class Lab(Result):
    """What a toy lab gave.

    Args:
        info: what was trained.
        lab, lab_effects: see `TABLES`.
        directory: of its files; the models are in its folders `model-VARIANT`.
    """

    KIND: ClassVar[str] = "lab"
    VERB: ClassVar[str] = "toy lab"
    FILE: ClassVar[str] = "lab.json"
    INFO: ClassVar[type[Any]] = LabInfo
    TABLES: ClassVar = TABLES
    ALONE: ClassVar[bool] = True
    AGAIN: ClassVar[str] = "Run the toy lab again, or delete the directory."
    PLACE: ClassVar[int] = 7

    info: LabInfo
    lab: pd.DataFrame = table("lab")
    lab_effects: pd.DataFrame = table("lab_effects")
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

    def check(self, path: Path) -> None:
        """Refuse tables without rows of some variant."""
        lost = [v for v in self.variants if v not in set(self.lab["variant"])]
        if lost:
            raise UserError(f"{path / 'lab.parquet'} has no rows of {lost[0]!r}.", do=self.AGAIN)
