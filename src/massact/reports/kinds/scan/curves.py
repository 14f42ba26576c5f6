"""Figures with the layer on the x axis: magnitudes (Fig. 4 of Sun 2024), headroom, norms."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.views import FORMATS, Rule, StackView, nonfinite_note, rule_of, views
from massact.reports.lettering import (
    LARGEST,
    LIMIT,
    MEDIAN,
    STACKS,
    TOP_1,
    TOP_2,
    TOP_3,
    WARNING,
    layer_axis,
    lettered,
    linear_axis,
    log_axis,
    says,
)
from massact.reports.spelling import number

CURVES = (
    ("top1", "Top 1", TOP_1, "o"),
    ("top2", "Top 2", TOP_2, "o"),
    ("top3", "Top 3", TOP_3, "o"),
    ("median", "Median", MEDIAN, "^"),
)


def measured(result: ScanResult) -> list[StackView]:
    """The stacks that have layers to draw."""
    return [view for view in views(result) if len(view.layers)]


def titled(result: ScanResult, view: StackView | None = None) -> str:
    """'model' or 'model, stack'."""
    model = result.info.model
    parts = [lettered(model.get("name") or model.get("id"), 48), lettered(view.label) if view else ""]
    return ", ".join(part for part in parts if part)


def unmeasured(width: float = 7.0) -> Figure:
    """The figure of a scan of nothing."""
    figure = Figure(figsize=(width, 2.0), layout="constrained")
    says(figure.subplots(), "Nothing was measured: no sequences.")
    return figure


def draw_layers(result: ScanResult) -> Figure:
    """The three largest |h| and the median of every layer, on a linear and a log axis (Sun 2024, Fig. 4)."""
    stacks, rule = measured(result), rule_of(result)
    if not stacks:
        return unmeasured()
    figure = Figure(figsize=(8.6, 2.7 * len(stacks) + 0.45), layout="constrained")
    grid = figure.subplots(len(stacks), 2, squeeze=False)
    for view, (linear, log) in zip(stacks, grid, strict=True):
        _trajectory(linear, view, rule, False)
        _trajectory(log, view, rule, True)
        linear.set_title(titled(result, view))
        note = nonfinite_note(view)
        if note:
            log.set_title(note, color=WARNING, fontsize=8.5)
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _trajectory(axes: Axes, view: StackView, rule: Rule, log: bool) -> None:
    layers = view.column("layer")
    shown = {name: _plottable(view.column(name), log) for name, *_ in CURVES}
    values = np.concatenate(list(shown.values()))
    size = 3.5 if view.n_layers <= 48 else 2.2
    if view.span:
        axes.axvspan(view.span[0] - 0.5, view.span[1] + 0.5, color="#000000", alpha=0.045, linewidth=0, zorder=0)
    for name, label, colour, marker in CURVES:
        axes.plot(
            layers,
            shown[name],
            color=colour,
            marker=marker,
            markersize=size,
            label=label,
            zorder=3 if name == "median" else 4,
        )
    if rule.magnitude is not None:
        axes.axhline(
            rule.magnitude,
            color=LIMIT,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            zorder=1,
            label=f"|h| = {number(rule.magnitude)} ({lettered(rule.name, 20)})",
        )
        values = np.append(values, rule.magnitude) if log else values
    (log_axis if log else linear_axis)(axes, values)
    layer_axis(axes, view.n_layers)
    axes.set_ylabel("Magnitude (log)" if log else "Magnitude")
    if not log and view.span:
        _mark_span(axes, view.span)


def _mark_span(axes: Axes, span: tuple[int, int]) -> None:
    """Name onset and offset at the top of the shaded layers, or beside them where they are few."""
    first, last = span
    low, high = axes.get_xlim()

    def write(x: float, text: str, side: str) -> None:
        axes.text(
            x,
            0.985,
            text,
            ha=side,
            va="top",
            transform=axes.get_xaxis_transform(),
            fontsize=7.5,
            color="#666666",
        )

    if (last - first + 1) / (high - low) > 0.4:
        write(first - 0.5, f" onset {first}", "left")
        if last > first:
            write(last + 0.5, f"offset {last} ", "right")
        return
    text = f"onset {first}, offset {last}" if last > first else f"layer {first} only"
    right = high - last > first - low
    write(
        last + 0.5 if right else first - 0.5,
        f" {text}" if right else f"{text} ",
        "left" if right else "right",
    )


def _plottable(values: np.ndarray, log: bool) -> np.ndarray:
    """NaN where a value cannot be drawn: Inf and its like, and what is not above 0 on a log axis."""
    return np.where((np.abs(values) < LARGEST) & ((values > 1 / LARGEST) | (not log)), values, np.nan)


def draw_headroom(result: ScanResult) -> Figure:
    """max|h| of every layer against the largest values that fp16 and fp8-e4m3 hold."""
    stacks = measured(result)
    if not stacks:
        return unmeasured()
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    limits = {name: limit for _, name, limit in FORMATS if limit < 1e6}
    everything = np.concatenate([view.column("max") for view in stacks] + [np.array(list(limits.values()))])
    log_axis(axes, everything)
    layer_axis(axes, max(view.n_layers for view in stacks))
    for i, view in enumerate(stacks):
        layers, most = view.column("layer"), view.column("max")
        axes.plot(
            layers,
            _plottable(most, True),
            color=STACKS[i % len(STACKS)],
            marker="o",
            zorder=3,
            label=lettered(view.label) or "max |h|",
        )
        # Above every number: layers with NaN or Inf.
        bad = layers[(view.column("nonfinite") > 0) | np.isinf(most)]
        if len(bad):
            axes.plot(
                bad,
                np.full(len(bad), 0.97),
                color=WARNING,
                marker="x",
                linestyle="none",
                markersize=5,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=4,
                label="_" if _has(axes, "NaN or Inf") else "NaN or Inf",
            )
    for name, limit in limits.items():
        axes.axhline(limit, color=LIMIT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{name}\n{number(limit, 5)}",
            (1.0, limit),
            xycoords=axes.get_yaxis_transform(),
            ha="left",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=LIMIT,
            fontsize=8,
        )
    axes.set_ylabel("max |h|")
    axes.set_title(titled(result))
    if len(stacks) > 1 or _has(axes, "NaN or Inf"):
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _has(axes: Axes, label: str) -> bool:
    return label in axes.get_legend_handles_labels()[1]


def draw_norms(result: ScanResult) -> Figure:
    """Mean L2 norm of the token at position 0 and of all others, per layer."""
    stacks = measured(result)
    if not stacks:
        return unmeasured()
    figure = Figure(figsize=(max(6.4, 4.3 * len(stacks)), 3.0), layout="constrained")
    panels = figure.subplots(1, len(stacks), squeeze=False)[0]
    for view, axes in zip(stacks, panels, strict=True):
        first, rest = view.column("norm_first"), view.column("norm_rest")
        log_axis(axes, np.concatenate([first, rest]))
        layer_axis(axes, view.n_layers)
        axes.plot(view.column("layer"), _plottable(first, True), color=TOP_1, marker="o", label="Position 0")
        axes.plot(
            view.column("layer"),
            _plottable(rest, True),
            color=MEDIAN,
            marker="^",
            label="All other positions",
        )
        axes.set_title(titled(result, view))
        axes.set_ylabel("Mean L2 norm of a token")
        if not np.isfinite(np.concatenate([first, rest])).any():
            says(axes, "No finite norm.")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
