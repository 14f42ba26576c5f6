"""Where the findings are: dims and tokens (Sun 2024, section 2.2); without any, how far the nearest is."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from massact.records.answer import Peak
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.curves import titled, unmeasured
from massact.reports.kinds.scan.views import Rule, StackView, census, rule_of, views
from massact.reports.lettering import CLASSES, LIMIT, MEDIAN, PLAIN, lettered, quoted_label, says
from massact.reports.spelling import counted, number

MOST_DIMS, MOST_TOKENS, MOST_NEAR_MISSES = 10, 12, 8


def draw_census(result: ScanResult) -> Figure:
    """Findings of the peak layer by dim and by token, one row of panels for each stack."""
    stacks, rule = [v for v in views(result) if v.n_sequences or len(v.findings)], rule_of(result)
    if not stacks:
        return unmeasured()
    figure = Figure(figsize=(8.6, sum(_height(v) for v in stacks)), layout="constrained")
    rows = figure.subfigures(len(stacks), 1, squeeze=False, height_ratios=[_height(v) for v in stacks])[:, 0]
    for view, part in zip(stacks, rows, strict=True):
        if len(view.findings):
            at_peak = view.findings[view.findings["layer"] == view.peak_layer]
            dims, tokens = part.subplots(1, 2, width_ratios=[1, 1.35])
            dims.set_title(f"{titled(result, view)}, layer {view.peak_layer}")
            _by_dim(dims, at_peak, _bars(view))
            _by_token(tokens, at_peak, _bars(view))
        else:
            axes = part.subplots()
            axes.set_title(titled(result, view))
            _nearest(axes, view, rule)
    return figure


def _bars(view: StackView) -> int:
    """The number of bars in the tallest panel of a stack."""
    if not len(view.findings):
        return min(len(view.near_misses), MOST_NEAR_MISSES)
    at_peak = view.findings[view.findings["layer"] == view.peak_layer]
    return max(
        min(at_peak["dim"].nunique(), MOST_DIMS),
        min(len(at_peak[["token", "position_class"]].drop_duplicates()), MOST_TOKENS),
    )


def _height(view: StackView) -> float:
    return 1.35 + 0.21 * max(_bars(view), 4)


def _by_dim(axes: Axes, findings: pd.DataFrame, slots: int) -> None:
    counts = findings["dim"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    labels = [str(d) if d >= 0 else "whole token" for d in counts.index[:MOST_DIMS]]
    _bar_panel(axes, labels, counts.to_numpy()[:MOST_DIMS], [PLAIN] * len(labels), slots)
    axes.set_ylabel("Dim")
    _counts(axes, "Findings", len(counts) - len(labels), "dims")


def _by_token(axes: Axes, findings: pd.DataFrame, slots: int) -> None:
    counts = census(findings)
    top = counts.iloc[:MOST_TOKENS]
    classes = [str(c) for _, c in top.index]
    _bar_panel(
        axes,
        [quoted_label(t) for t, _ in top.index],
        top.to_numpy(),
        [CLASSES.get(c, MEDIAN) for c in classes],
        slots,
    )
    axes.set_ylabel("Token")
    _counts(axes, "Positions with findings", len(counts) - len(top), "tokens")
    present = [c for c in CLASSES if c in classes]
    # Above the bars: inside, it would cover the last of twelve equal ones.
    axes.legend(
        [Patch(color=CLASSES[c]) for c in present],
        present,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(CLASSES),
        handlelength=1.0,
        handleheight=0.8,
        borderpad=0.2,
        columnspacing=1.2,
    )


def _bar_panel(axes: Axes, labels: list[str], counts: np.ndarray, colours: list[str], slots: int) -> None:
    """Horizontal bars with their counts, the longest on top; room for `slots`: all bars are equally thick."""
    places = np.arange(len(labels))
    axes.barh(places, counts, color=colours, height=0.72)
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(slots, 4) - 0.4, -0.6)
    most = float(counts.max()) if len(counts) else 1.0
    axes.set_xlim(0, most * 1.16)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
    for place, count in zip(places, counts, strict=True):
        axes.text(
            float(count) + most * 0.012,
            float(place),
            f"{int(count):,}",
            va="center",
            fontsize=8,
            color="#444444",
        )


def _counts(axes: Axes, unit: str, left: int, noun: str) -> None:
    """What the bars count, and how many more there are."""
    axes.set_xlabel(unit + (f" ({left:,} more {noun} not shown)" if left > 0 else ""))


def _nearest(axes: Axes, view: StackView, rule: Rule) -> None:
    """No findings: the largest ratio in words, and the near misses as bars."""
    said = f"No findings under {lettered(rule.name, 30)}"
    best = view.largest
    if best is not None and not math.isnan(float(best.ratio)):
        said += f"; largest ratio {number(best.ratio)} at {_address(best)}"
    near = view.near_misses[np.isfinite(view.near_misses["ratio"].to_numpy(float))].iloc[:MOST_NEAR_MISSES]
    near = near[near["ratio"] > 0]
    if not len(near):
        count = len(view.near_misses)
        says(axes, f"{said}.\n{counted(count, 'near miss', 'near misses') if count else 'No near misses'}.")
        return
    places, ratios = np.arange(len(near)), near["ratio"].to_numpy(float)
    low = 10.0 ** np.floor(np.log10(ratios.min()) - 0.3)
    axes.barh(places, ratios - low, left=low, color=MEDIAN, height=0.72)
    axes.set_xscale("log")
    axes.set_xlim(low, max(ratios.max(), rule.ratio or 0.0) * 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(
        places,
        [f"layer {r.layer}, pos {r.pos}, dim {r.dim}, {quoted_label(r.token)}" for r in near.itertuples()],
    )
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(near), 4) - 0.4, -0.6)
    for place, row in zip(places, near.itertuples(), strict=True):
        axes.text(
            float(row.ratio) * 1.03,
            float(place),
            f"{number(row.ratio)}  (|h| {number(row.magnitude)})",
            va="center",
            fontsize=8,
            color="#444444",
        )
    if rule.ratio is not None:
        axes.axvline(rule.ratio, color=LIMIT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(
            rule.ratio,
            -0.55,
            f"needs {number(rule.ratio, 6)} ",
            color=LIMIT,
            fontsize=8,
            ha="right",
            va="top",
        )
    axes.set_xlabel("|h| / median of near misses")
    axes.set_title(f"{axes.get_title('left')}\n{said}", fontsize=9)


def _address(peak: Peak) -> str:
    parts = [("layer", peak.layer), ("pos", peak.pos), ("dim", peak.dim)]
    return ", ".join(f"{name} {int(value)}" for name, value in parts if value >= 0)
