"""Traces and axes in the words of plotly, as plain dictionaries: small, and made without importing plotly.

Colours are names of the page's own (`--top1`): its script puts in what light or dark has for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from massact.reports.parts import Chart
from massact.reports.render.markup import figure_text
from massact.reports.spelling import number, real, visible

SERIES = ("--s1", "--s2", "--s3", "--s4", "--s5", "--s6")
CLASSES = {"start": "--s1", "delimiter": "--s2", "padding": "--s4", "other": "--s6"}
LARGEST = 1e200  # beyond it a number cannot be drawn


def drawable(values: Any, digits: int = 6) -> list[float | None]:
    """Numbers for JSON with some significant digits; None, which plotly leaves out, for NaN and Inf."""
    flat = np.asarray(values, float).ravel()
    return [float(f"{v:.{digits}g}") if math.isfinite(v) and abs(v) < LARGEST else None for v in flat]


def line(
    x: Any, y: Any, name: str, color: str, *, dash: str = "solid", symbol: str = "circle", text: Sequence[str] = ()
) -> dict[str, Any]:
    """A curve with its points; gaps where a value is not finite."""
    trace = {
        "type": "scatter", "mode": "lines+markers", "x": drawable(x), "y": drawable(y), "name": figure_text(name),
        "line": {"color": color, "width": 1.6, "dash": dash},
        "marker": {"color": color, "size": 5, "symbol": symbol}, "connectgaps": False,
        "hovertemplate": "%{fullData.name}<br>layer %{x}: %{y:.4~g}<extra></extra>",
    }  # fmt: skip
    if text:
        trace |= {"text": list(text), "hovertemplate": "%{text}: %{y:.4~g}<extra></extra>"}
    return trace


def bars(labels: Sequence[str], counts: Any, colors: Sequence[str], what: str) -> dict[str, Any]:
    """Horizontal bars, the first on top, at whole places: labels are ticks, so that two alike stay two."""
    shown = [figure_text(label, 22) for label in labels]
    return {
        "type": "bar", "orientation": "h", "x": drawable(counts), "y": list(range(len(shown))), "text": shown,
        "textposition": "none", "marker": {"color": list(colors)},
        "hovertemplate": f"%{{text}}<br>{what}: %{{x:,}}<extra></extra>",
    }  # fmt: skip


def bar_layout(labels: Sequence[str], title: str, slots: int = 4) -> dict[str, Any]:
    """Axes for `bars`, with room for `slots` of them: bars of figures side by side are equally thick."""
    return {
        "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
        "yaxis": {
            "tickmode": "array", "tickvals": list(range(len(labels))), "showgrid": False, "automargin": True,
            "zeroline": False,
            "ticktext": [figure_text(label, 22) for label in labels], "range": [max(len(labels), slots) - 0.5, -0.5],
        },
        "showlegend": False,
    }  # fmt: skip


def heat(values: Any, x: Sequence[Any], y: Sequence[Any], *, low: float | None = 0, high: float | None = 1,
         what: str = "", text: Any = None) -> dict[str, Any]:  # fmt: skip
    """A heat map; what is not finite is left empty."""
    rows = [drawable(row, 4) for row in np.asarray(values, float)]
    trace = {
        "type": "heatmap", "z": rows, "x": list(x), "y": list(y), "zmin": low, "zmax": high, "colorscale": "--heat",
        "hoverongaps": False, "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 0.9, "tickfont": {"size": 11}},
        "hovertemplate": f"{what}: %{{z:.4~g}}<extra></extra>",
    }  # fmt: skip
    if text is not None:
        trace |= {"text": text, "hovertemplate": f"%{{text}}<br>{what}: %{{z:.4~g}}<extra></extra>"}
    return {k: v for k, v in trace.items() if v is not None}


def layer_layout(n_layers: int, y: str, *, log: bool = False, values: Any = ()) -> dict[str, Any]:
    """Layers on x; on y a name, on a log scale over the whole decades of `values` if so."""
    every = max(1, -(-n_layers // 8))
    axis: dict[str, Any] = {"title": {"text": y}}
    if log:
        axis |= log_axis(values)
    return {"xaxis": {"title": {"text": "Layer"}, "dtick": every, "zeroline": False,
                      "range": [-0.02 * n_layers - 0.3, 1.02 * n_layers + 0.3]}, "yaxis": axis}  # fmt: skip


def log_axis(values: Any) -> dict[str, Any]:
    """A log axis over the whole decades around what can be drawn on it, with plain numbers at its ticks."""
    known = [abs(v) for v in np.asarray(values, float).ravel() if math.isfinite(v) and 1 / LARGEST < v < LARGEST]
    low, high = (math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))) if known else (0, 1)
    high = max(high, low + 1)
    ticks = [10.0**power for power in range(low, high + 1, -(-(high - low) // 8))]
    return {"type": "log", "range": [low - 0.1, high + 0.15], "tickmode": "array", "tickvals": ticks,
            "ticktext": [number(t) for t in ticks]}  # fmt: skip


def shade(first: float, last: float) -> dict[str, Any]:
    """Layers from one to another, shaded behind the curves."""
    return {"type": "rect", "xref": "x", "yref": "paper", "x0": first - 0.5, "x1": last + 0.5, "y0": 0, "y1": 1,
            "fillcolor": "--shade", "line": {"width": 0}, "layer": "below"}  # fmt: skip


def limit(value: float, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A broken line across a log axis, and its name above its left end: (shape, annotation)."""
    shape = {"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": value, "y1": value,
             "line": {"color": "--limit", "width": 1, "dash": "dash"}, "layer": "below"}  # fmt: skip
    note = {"xref": "paper", "yref": "y", "x": 0, "y": math.log10(value) if value > 0 else value, "xanchor": "left",
            "yanchor": "bottom", "text": figure_text(name), "showarrow": False,
            "font": {"color": "--limit", "size": 11}}  # fmt: skip
    return shape, note


def rows_of(table: Any, column: str) -> list[float]:
    """One column as floats."""
    return [real(v) for v in table[column]]


def heat_over_steps(rows: pd.DataFrame, x: str, column: str, title: str) -> Chart | None:
    """log10 of a column at every layer, over steps or checkpoints."""
    order = list(dict.fromkeys(rows[x]))
    table = rows.pivot_table(index="layer", columns=x, values=column, aggfunc="first", dropna=False)
    values = table.reindex(columns=order).to_numpy(float)
    log_LN = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    if not np.isfinite(log_LN).any():
        return None
    names = [f"{int(s):,}" if isinstance(s, int | float) and math.isfinite(s) else visible(str(s)) for s in order]
    text = [[figure_text(f"{x} {n}, layer {int(y)}: {v:.4g}", 90) for n, v in zip(names, row, strict=True)]
            for y, row in zip(table.index, values, strict=True)]  # fmt: skip
    data = [heat(log_LN, list(range(len(order))), [int(y) for y in table.index], low=None, high=None,
                        what="log10", text=text)]  # fmt: skip
    at = list(range(0, len(order), max(1, -(-len(order) // 8))))
    layout = {"xaxis": {"title": {"text": x.capitalize()}, "tickmode": "array", "tickvals": at, "showgrid": False,
                        "ticktext": [figure_text(names[i], 16) for i in at]},
              "yaxis": {"title": {"text": "Layer"}, "showgrid": False, "dtick": max(1, len(table) // 8)}}  # fmt: skip
    return Chart(f"{title}, log10", data, layout, "What is not finite is left empty.", 320, width="half")
