"""The first three sentences of an answer: what and where, what happens without it, what it costs and what to do."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.clusters import MASSIVE
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.cluster_words import CLASSES
from massact.reports.kinds.scan.views import StackView, model_name, rule_of, views
from massact.reports.spelling import counted, number, real, signed, visible

WITHOUT = "What happens without it: massact intervene RUN."
COST = "What it costs in low precision: massact quantise RUN; to remove it from the weights: massact fold RUN."


def opening(scan: ScanResult, without: str = "", cost: str = "") -> list[str]:
    """Three sentences for someone new to the field; [] where nothing is a massive activation.

    Args:
        scan: of a model.
        without: what happens without it, where that was measured.
        cost: what it costs and what to do, where that was measured.
    """
    found = [(view, view.main) for view in views(scan) if view.main is not None and view.main["label"] == MASSIVE]
    if not found or rule_of(scan).kind != "element":
        return []
    view, cluster = max(found, key=lambda pair: real(pair[1]["ratio"]))
    return [_what(scan, view, cluster), without or WITHOUT, cost or COST]


def _what(scan: ScanResult, view: StackView, cluster: pd.Series) -> str:
    name = model_name(scan) or "the model"
    where = CLASSES.get(str(cluster["position_class"]), visible(str(cluster["position_class"])))
    widths = scan.info.model.get("d_model")
    width = widths.get(view.stack) if isinstance(widths, dict) else None
    of = f" of {width:,}" if isinstance(width, int) else ""
    inside = f" in {view.label}" if view.label else ""
    share = real(cluster["share"])
    often = f"{round(share * view.n_sequences):,} of " if math.isfinite(share) else "some of "
    return (
        f"Yes: {name} has massive activations{inside}: dim {int(cluster['dim'])}{of} is about "
        f"{signed(cluster['mean'])} {where} in {often}{counted(view.n_sequences, 'sequence')}, "
        f"{number(cluster['ratio'])} times a typical value, from layer {int(cluster['onset'])} to "
        f"{int(cluster['offset'])} of {view.n_layers}."
    )
