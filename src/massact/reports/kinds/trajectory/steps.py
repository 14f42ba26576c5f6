"""The figure of a trajectory: the peak layer over the steps of a training, and all layers as a heat map."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from massact.records.kinds.trajectory import Emergence, Trajectory
from massact.reports.kinds.scan.curves import _plottable, unmeasured
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.lettering import LIMIT, MEDIAN, TOP_1, TOP_3, lettered, log_axis, says
from massact.reports.spelling import number

MOST_TICKS, DECADES = 7, 100.0  # steps whose ends are this far apart are drawn on a log axis


def draw_trajectory(t: Trajectory) -> Figure:
    """|h| and ratio of the peak layer over the steps, and log10 of the ratio of every layer at every checkpoint."""
    pairs = list(t.revisions[["stack", "site"]].drop_duplicates().itertuples(index=False, name=None))
    if not pairs:
        return unmeasured()
    figure, rule = Figure(figsize=(10.4, 4.3 * len(pairs) + 0.3), layout="constrained"), rule_of(t)
    for part, (stack, site) in zip(np.atleast_1d(figure.subfigures(len(pairs), 1)), pairs, strict=True):
        grid = part.add_gridspec(2, 2, width_ratios=(1.0, 1.1))
        upper = part.add_subplot(grid[0, 0])
        lower = part.add_subplot(grid[1, 0], sharex=upper)
        heat = part.add_subplot(grid[:, 1])
        rows = t.revisions[(t.revisions["stack"] == stack) & (t.revisions["site"] == site)]
        names = [c.name for c in t.info.having("ok") if c.name in set(rows["revision"])]
        found = next((e for e in t.info.emergence if (e.stack, e.site) == (stack, site)), None)
        label = [lettered(t.info.model.get("id"), 44), lettered(f"{stack} {site}".strip()) if len(pairs) > 1 else ""]
        upper.set_title(", ".join(x for x in label if x))
        _curves((upper, lower), rows, _places(t, rows, names), rule, found)
        _heat(heat, rows, names, rule)
    return figure


def _places(t: Trajectory, rows: pd.DataFrame, names: list[str]) -> pd.Series:
    """Where on the x axis each checkpoint stands: at its step, or at its number where names say none."""
    steps = rows.drop_duplicates("revision").set_index("revision")["step"].reindex(names)
    return steps if t.info.has_steps() else pd.Series(np.arange(len(names), dtype=float), names)


def _curves(both: tuple[Axes, Axes], rows: pd.DataFrame, x: pd.Series, rule: Rule, found: Emergence | None) -> None:
    upper, lower = both
    ratios = rows["ratio"].where(np.isfinite(rows["ratio"].to_numpy(float)))
    if not ratios.notna().any():
        says(upper, "No finite ratio.")
        lower.set_axis_off()
        return
    peak = int(rows.loc[ratios.idxmax(), "layer"])
    mine = rows[rows["layer"] == peak].set_index("revision").reindex(x.index)
    at = x.to_numpy()
    _span(both, x, found)
    _lines(upper, at, mine, (("top1", f"Top 1, layer {peak}", TOP_1, "o"), ("median", "Median", MEDIAN, "^")),
           rule.magnitude, "|h|")  # fmt: skip
    _lines(lower, at, mine, (("ratio", f"Top 1 / median, layer {peak}", TOP_1, "o"),
                             ("ratio_max", "Greatest of any sequence", TOP_3, "")), rule.ratio, "ratio")  # fmt: skip
    upper.set_ylabel("Magnitude")
    lower.set_ylabel("Ratio to the median")
    _x_axis(lower, x, bool((rows["step"].notna()).all()))
    upper.tick_params(labelbottom=False)


def _lines(axes: Axes, at: np.ndarray, mine: pd.DataFrame, curves: tuple[tuple[str, str, str, str], ...],
           limit: float | None, of: str) -> None:  # fmt: skip
    values = np.concatenate([mine[name].to_numpy(float) for name, *_ in curves])
    log_axis(axes, values if limit is None else np.append(values, limit))
    for name, label, colour, marker in curves:
        axes.plot(at, _plottable(mine[name].to_numpy(float), True), color=colour, marker=marker, label=label,
                  zorder=3 if marker else 2, linewidth=1.2 if marker else 0.8,
                  markersize=3.5 if len(at) <= 60 else 2)  # fmt: skip
    if limit is not None:
        label = f"{of} = {number(limit)}"
        axes.axhline(limit, color=LIMIT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label=label)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.02), fontsize=7.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend


def _span(both: tuple[Axes, Axes], x: pd.Series, found: Emergence | None) -> None:
    """Shade what lies between the last checkpoint without findings and the first with them."""
    if found is None or found.before is None or not {found.before, found.first} <= set(x.index):
        return
    for axes in both:
        axes.axvspan(x[found.before], x[found.first], color="#000000", alpha=0.07, linewidth=0, zorder=0)


def _x_axis(axes: Axes, x: pd.Series, steps: bool) -> None:
    values = x.to_numpy(float)
    if not steps:
        shown = _thinned(len(values))
        axes.xaxis.set_major_locator(FixedLocator([float(values[i]) for i in shown]))
        axes.set_xticklabels([lettered(str(x.index[i]), 16) for i in shown], rotation=30, ha="right")
        axes.set_xlabel("Checkpoint")
        return
    positive = values[values > 0]
    if len(positive) and positive.max() >= DECADES * positive.min():
        zero = bool((values == 0).any())
        if zero:
            axes.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.6)
        else:
            axes.set_xscale("log")
        axes.set_xlim(-0.3 * positive.min() if zero else positive.min() / 1.5, positive.max() * 1.5)
        first, last = np.floor(np.log10(positive.min())), np.ceil(np.log10(positive.max()))
        every = max(1, int(np.ceil((last - first + 1) / MOST_TICKS)))
        decades = [10.0**p for p in np.arange(first, last + 1, every)]
        axes.xaxis.set_major_locator(FixedLocator([0.0] * zero + decades))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    axes.set_xlabel("Training step")


def _short(step: float) -> str:
    """1,000 as 1k: ticks of steps stand close."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(step) >= size:
            return f"{number(step / size, 4)}{letter}"
    return number(step, 4)


def _thinned(n: int) -> list[int]:
    """Which of n ticks have room for a label."""
    return list(range(0, n, max(1, -(-n // (MOST_TICKS + 1)))))


def _heat(axes: Axes, rows: pd.DataFrame, names: list[str], rule: Rule) -> None:
    layers = np.sort(rows["layer"].unique())
    table = rows.pivot_table(index="layer", columns="revision", values="ratio", aggfunc="first", dropna=False)
    ratio_LN = table.reindex(index=layers, columns=names).to_numpy(float)
    log_LN = np.log10(np.where(np.isfinite(ratio_LN) & (ratio_LN > 0), ratio_LN, np.nan))
    if not np.isfinite(log_LN).any():
        says(axes, "No finite ratio.")
        return
    edges_x, edges_y = np.arange(len(names) + 1) - 0.5, np.append(layers - 0.5, layers[-1] + 0.5)
    axes.set_facecolor("#d0d0d0")  # what is not finite
    mesh = axes.pcolormesh(edges_x, edges_y, np.ma.masked_invalid(log_LN), cmap="viridis", rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("log10 of the ratio, mean over sequences")
    having = rows[rows["found"].to_numpy(bool)]
    place = {name: i for i, name in enumerate(names)}
    axes.plot([place[n] for n in having["revision"]], having["layer"], linestyle="none", marker="o", clip_on=False,
              markersize=3.2 if len(names) <= 40 else 1.6, markerfacecolor="white", markeredgecolor="black",
              markeredgewidth=0.5)  # fmt: skip
    shown = _thinned(len(names))
    steps = rows.drop_duplicates("revision").set_index("revision")["step"].reindex(names)
    labels = [_short(float(steps.iloc[i])) if steps.notna().all() else lettered(names[i], 16) for i in shown]
    axes.xaxis.set_major_locator(FixedLocator([float(i) for i in shown]))
    axes.set_xticklabels(labels, rotation=0 if steps.notna().all() else 30,
                         ha="center" if steps.notna().all() else "right")  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_xlim(edges_x[0], edges_x[-1])
    axes.set_ylim(edges_y[0], edges_y[-1])
    axes.set_xlabel("Training step (one column per checkpoint)" if steps.notna().all() else "Checkpoint")
    axes.set_ylabel("Layer")
    axes.set_title(f"Dots: {rule.noun}" if len(having) else f"No {rule.noun}", fontsize=9)
