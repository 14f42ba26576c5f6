"""What edits did: the result of an intervention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns
from massact.records.verdicts import NOT_JUDGED, VERDICTS

TABLES: dict[str, Columns] = {
    "effects": {
        "edit": ("string", "name of the edit"),
        "stack": ("string", "stack of the massive activations"),
        "layer": ("int64", "their layer, -1: none; edits of weights, inputs and attention act where they say"),
        "cluster": ("string", "what is edited: dims and classes of tokens, as 507@start; empty: other than entries"),
        "metric": ("string", "perplexity, perplexity_windowed, nll, kl, top1_agreement, accuracy, attention_first (of "
                   "the layers behind the edit), repetition (of greedy samples), task/metric"),
        "group": ("string", "all, or column=label"),
        "baseline": ("float64", "without the edit"),
        "edited": ("float64", "with it"),
        "delta": ("float64", "edited - baseline"),
        "ci_low": ("float64", "of the difference: 95 % interval over sequences, see docs/statistics.md"),
        "ci_high": ("float64", "its upper end"),
        "verdict": ("string", f"{', '.join(VERDICTS)}; {NOT_JUDGED}: neither a loss nor a share of right answers"),
        "n_needed": ("float64", "sequences that would settle the verdict, were they like these; inf: no number would"),
        "delta_nats": ("float64", "of losses: change of the log-perplexity, paired"),
        "nats_low": ("float64", "its 95 % interval"),
        "nats_high": ("float64", "its upper end"),
        "share_of_zero": ("float64", "delta_nats / that of the edit zero; NaN: zero's is not beyond the margin"),
        "share_low": ("float64", "its 95 % interval (Fieller)"),
        "share_high": ("float64", "its upper end"),
        "random_low": ("float64", "of kl and top1_agreement: 95 % interval of the difference to the edit random"),
        "random_high": ("float64", "its upper end"),
        "gap": ("float64", "of the label with most harm: how much more it is than that of the next one"),
        "gap_low": ("float64", "its 95 % interval (Welch), in nats or in answers"),
        "gap_high": ("float64", "its upper end"),
        "n_calls": ("int64", "how often the edit ran"),
        "n_elements": ("int64", "elements that it changed"),
        "change": ("float64", "greatest change of one, relative to the greater of before and after; NaN: unknown"),
        "n_sequences": ("int64", "sequences evaluated"),
        "n_targets": ("float64", "predictions of the same tokens that both runs make; NaN: not of predictions"),
    },
}  # fmt: skip


@dataclass
class InterveneInfo(Sidecar):
    """The record of an intervention: intervene.json.

    Args:
        target: site, dims, cuts and means of the massive activations that were edited; empty where the scan has none,
            and no edit asked for them.
        estimated_on, evaluated_on: sequences that the means are of, and that the effects are of.
    """

    target: dict[str, Any] = field(default_factory=dict)
    estimated_on: str = ""
    evaluated_on: str = ""
    schema_version: int = 3  # 2: number of targets; 3: nats, verdicts and what they rest on


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
