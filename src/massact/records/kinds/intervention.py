"""What edits did: the result of an intervention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

TABLES: dict[str, Columns] = {
    "effects": {
        "edit": ("string", "name of the edit"),
        "stack": ("string", "stack of the massive activations"),
        "layer": ("int64", "their layer; edits of weights, inputs and attention act where they say"),
        "metric": ("string", "perplexity, perplexity_windowed, nll, kl, top1_agreement, accuracy, attention_first (of "
                   "the layers behind the edit), repetition (of greedy samples), task/metric"),
        "group": ("string", "all, or column=label"),
        "baseline": ("float64", "without the edit"),
        "edited": ("float64", "with it"),
        "delta": ("float64", "edited - baseline"),
        "ci_low": ("float64", "of the difference: 2.5 % of 1,000 bootstraps over sequences"),
        "ci_high": ("float64", "97.5 %"),
        "n_calls": ("int64", "how often the edit ran"),
        "n_elements": ("int64", "elements that it changed"),
        "n_sequences": ("int64", "sequences evaluated"),
        "n_targets": ("float64", "predictions of the same tokens that both runs make; NaN: not of predictions"),
    },
}  # fmt: skip


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
    schema_version: int = 2  # 2: number of targets


@dataclass(repr=False)
class Intervention(Result):
    """What edits of massive activations did.

    Args:
        info: what was asked and how.
        effects: one row per edit, metric and group, see `TABLES`.
    """

    KIND: ClassVar[str] = "intervention"
    VERB: ClassVar[str] = "intervene"
    FILE: ClassVar[str] = "intervene.json"
    INFO: ClassVar[type[Any]] = InterveneInfo
    TABLES: ClassVar = TABLES
    AGAIN: ClassVar[str] = "Intervene on the run again."
    PLACE: ClassVar[int] = 2

    info: InterveneInfo
    effects: pd.DataFrame = table("effects")
