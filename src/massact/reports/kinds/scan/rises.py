"""Layers that mix tokens in several ways, in words: which they are, where clusters rise, what is kept of them."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.sites import MIXERS
from massact.reports.kinds.scan.views import StackView
from massact.reports.parts import Table, grid
from massact.reports.spelling import cell, listed, number, or_dash, portion, real, spanned, visible

MOST = 8  # rises that are told one by one
WORDS = {"ssm": "state-space scans", "linear_attn": "linear attention", "conv": "convolutions", "none": "nothing",
         "other": "something else"}  # fmt: skip


def mixed_ways(layers: pd.DataFrame) -> bool:
    """Whether the layers mix tokens in several ways."""
    return len({str(m) for m in layers["mixer"].fillna("") if m}) > 1


def mixers_in_words(view: StackView, rises: pd.DataFrame) -> list[str]:
    """What mixes the tokens where, then a sentence for each dim that rises."""
    known = {str(m) for m in view.layers["mixer"].fillna("") if m}
    if len(known) < 2 and not known - {MIXERS["attn"], "none"}:
        return []
    by: dict[str, set[int]] = {}
    for layer, mixer in zip(view.layers["layer"], view.layers["mixer"].fillna(""), strict=True):
        if mixer:
            by.setdefault(visible(mixer), set()).add(int(layer))
    told = [f"{_called(mixer)} at {spanned('layer', where)}" for mixer, where in by.items()]
    said = [f"Tokens are mixed by {listed(told)}."]
    mine = rises[(rises["stack"] == view.stack) & (rises["site"] == view.site)]
    for dim, rows in list(mine.groupby("dim", sort=False))[:MOST]:
        steps = [_rise(row) for _, row in rows.head(MOST).iterrows()]
        right = int((rows["next_attention"] == rows["layer"] + 1).sum())
        share = f"; {right} of {len(rows)} rises stand right before attention" if len(rows) > 1 else ""
        said.append(f"Dim {int(dim)} rises at {listed(steps)}{share}.")
    return said


def _called(mixer: str) -> str:
    return " and ".join(WORDS.get(part, part) for part in mixer.split("+"))


def _rise(row: pd.Series) -> str:
    """'layer 3 (state-space scans) from 2.1 to 1,200, right before attention'."""
    said = f"layer {int(row['layer'])} ({_called(visible(row['mixer']))}) from {_size(row['before'])} to "
    said += _size(row["value"])
    attention, kept = int(row["next_attention"]), real(row["kept"])
    if attention == int(row["layer"]) + 1:
        said += f", right before the attention of layer {attention}"
    elif attention > 0 and not math.isnan(kept):
        said += f"; the next attention, at layer {attention}, reads {portion([kept], 'it')}"
    left = real(row["kept_between"])
    least = "an unknown part of it" if math.isnan(left) else f"at least {portion([left], 'it')}"
    return said + f" ({least} {_until(row)})"


def _size(value: float) -> str:
    return "an unknown value" if math.isnan(real(value)) else number(value)


def _until(row: pd.Series) -> str:
    behind = int(row["next_rise"])
    return f"up to the next rise at layer {behind}" if behind > 0 else "up to the last layer"


def rises(view: StackView, table: pd.DataFrame) -> Table | None:
    """A small table of the rises."""
    mine = table[(table["stack"] == view.stack) & (table["site"] == view.site)].head(2 * MOST)
    rows = [[str(int(r["dim"])), str(int(r["layer"])), visible(r["mixer"]), cell(r["before"]), cell(r["value"]),
             visible(r["next_mixer"]) or "-", str(int(r["next_attention"])) if r["next_attention"] > 0 else "-",
             or_dash(r["kept"]), or_dash(r["kept_between"])] for _, r in mine.iterrows()]  # fmt: skip
    heads = ("dim", "layer", "<mixer", "before", "after", "<next mixer", "next\nattention", "kept\nthere",
             "kept to the\nnext rise")  # fmt: skip
    return grid("Where clusters rise, and what is kept of them (as shares of what they rise to)", heads, rows)
