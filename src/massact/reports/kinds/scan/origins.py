"""A text that the model went on with: words, section and figure of generated tokens beside those of the prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.scan import ScanResult
from massact.reports import panels
from massact.reports.kinds.scan.curves import named
from massact.reports.kinds.scan.views import StackView, views
from massact.reports.panels import Color, Line, Panel, Sheet
from massact.reports.parts import Section, Words, parts_of, table_of
from massact.reports.spelling import counted, number, percent, real, visible

EVERY = -1  # layers
CURVES = (
    ("prompt", "start", "First token", Color.BLUE, "circle"),
    ("prompt", "behind", "Other tokens of the prompts", Color.GREY, "triangle-up"),
    ("generated", "behind", "Generated tokens", Color.ORANGE, "square"),
    ("generated", "delimiter", "Generated delimiters", Color.GREEN, "diamond"),
)


def origins(scan: ScanResult) -> Section | None:
    """Generated tokens beside those of the prompts."""
    if not len(scan.origins):
        return None
    table = table_of("origins", scan.origins, "Tokens by origin and class, of every layer", most=600)
    return Section("origins", "Generated tokens", parts_of(Words(origins_in_words(scan)), *_panels(scan), table))


def origins_in_words(scan: ScanResult) -> list[str]:
    """Whether there are massive tokens among the generated ones, and how large they are; none of other runs."""
    return [s for view in views(scan) for s in _said(_of(scan, view), view, _how(scan.info.corpus))]


def _of(scan: ScanResult, view: StackView) -> pd.DataFrame:
    rows = scan.origins
    return rows[(rows["stack"].fillna("") == view.stack) & (rows["site"] == view.site)]


def _how(corpus: Mapping[str, Any]) -> str:
    """'greedily', 'drawn at temperature 0.7'."""
    told = (corpus.get("packing") or {}).get("generated") or {}
    heat = real(told.get("temperature"))
    return "" if math.isnan(heat) else "greedily" if heat == 0 else f"drawn at temperature {number(heat)}"


def _said(rows: pd.DataFrame, view: StackView, how: str) -> list[str]:
    by = {(str(r["origin"]), str(r["position_class"])): r for _, r in rows[rows["layer"] == EVERY].iterrows()}
    mine = by.get(("generated", "behind"))
    if mine is None:
        return []
    head = f"{visible(view.label)}: of" if view.label else "Of"
    n, massive = int(mine["n_sequences"]), int(mine["n_massive"])
    said = f"{head} {counted(mine['n_tokens'], 'token')} that the model generated behind {counted(n, 'prompt')}"
    said += f" ({how})" if how else ""
    said += f" {'none is' if not massive else f'{massive:,} are' if massive > 1 else 'one is'} massive at any layer"
    low, high = percent(mine["share_low"]), percent(mine["share_high"])
    said += f" (share of sequences with one: 95% interval {low} to {high})"
    ends = by.get(("generated", "delimiter"))
    said += "" if ends is None else f"; of {counted(ends['n_tokens'], 'delimiter')} {int(ends['n_massive']):,}"
    control = by.get(("prompt", "behind"))
    if control is not None:
        said += f". The control: of the prompts' {counted(control['n_tokens'], 'token')} behind the first "
        said += f"{int(control['n_massive']):,}"
    return [said + ".", *_sizes(rows, view)]


def _sizes(rows: pd.DataFrame, view: StackView) -> list[str]:
    """How large the largest tokens of each origin are where the scan looks."""
    layer = view.shown_layer
    by = {(str(r["origin"]), str(r["position_class"])): r for _, r in rows[rows["layer"] == layer].iterrows()}
    mine, control = by.get(("generated", "behind")), by.get(("prompt", "behind"))
    first = by.get(("prompt", "start"))
    if mine is None:
        return []
    said = f"At layer {layer} the greatest |h| of a generated token is {number(mine['greatest'])}, "
    said += f"{number(mine['ratio'])} times the median of its sequence and {number(mine['ratio_so_far'])} times "
    said += "that so far"
    beside = [f"{number(row['greatest'])} {what}" for row, what in ((control, "on the prompts' other tokens"),
              (first, "on first tokens")) if row is not None]  # fmt: skip
    return [said + (f"; {', '.join(beside)}." if beside else ".")]


def draw_origins(result: ScanResult) -> Sheet | None:
    """The greatest |h| of every layer, of first tokens, of the prompts' others, of generated ones; None of others."""
    made = _panels(result)
    return Sheet(made, named(result)) if made else None


def _panels(scan: ScanResult) -> list[Panel]:
    made, sees = [], "Whether a token that the model wrote itself becomes massive: its curve would be up with the first"
    sees += " token's; it is not where it runs with the prompts' other tokens."
    for view in views(scan):
        rows = _of(scan, view)
        rows = rows[rows["layer"] != EVERY].sort_values("layer")
        lines = []
        for origin, cls, name, color, symbol in CURVES:
            mine = rows[(rows["origin"] == origin) & (rows["position_class"] == cls)]
            low, high = panels.column(mine, "max_low"), panels.column(mine, "max_high")
            y = panels.column(mine, "max")
            known = len(mine) and not np.isnan(low).any()
            band = {"low": np.fmax(low, y / 10), "high": high} if known else {}
            if len(mine):
                lines.append(Line(panels.column(mine, "layer"), y, name, color, symbol, **band))
        if lines:
            title = panels.headed(view.label, "Greatest |h| of generated tokens and of the prompts")
            caption = "Mean over sequences of the greatest |h| of such a token; bands: 95% intervals over sequences."
            y_axis = panels.log_axis(np.concatenate([line.y for line in lines]), "Greatest |h|")
            made.append(Panel(title, lines, panels.layer_axis(view.n_layers), y_axis, caption, sees=sees))
    return made
