"""Panels of a trajectory: the peak layer over the steps of a training, and all layers as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from massact.records.kinds.trajectory import Trajectory
from massact.reports import panels
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.panels import Axis, Color, Heat, Limit, Line, Panel, Sheet
from massact.reports.spelling import number, shortened, visible

DECADES = 100.0  # steps whose ends are this far apart are drawn on a log axis
Shade = tuple[float, float]


def draw_trajectory(t: Trajectory) -> Sheet:
    """|h| and ratio of the peak layer over the steps, and the ratio of every layer at every checkpoint."""
    pairs, rule, made = t.revisions[["stack", "site"]].drop_duplicates(), rule_of(t), []
    for stack, site in pairs.itertuples(index=False, name=None):
        head = f"{visible(stack)} {visible(site)}".strip() if len(pairs) > 1 else ""
        rows = t.revisions[(t.revisions["stack"] == stack) & (t.revisions["site"] == site)]
        names = [c.name for c in t.info.having("ok") if c.name in set(rows["revision"])]
        found = next((e for e in t.info.emergence if (e.stack, e.site) == (stack, site)), None)
        steps = panels.column(rows.drop_duplicates("revision").set_index("revision").reindex(names), "step")
        at, axis = step_axis(steps if t.info.has_steps() else None, names)
        shades = []
        if found is not None and found.before is not None and {found.before, found.first} <= set(names):
            shades = [(at[names.index(found.before)], at[names.index(found.first)])]
        sizes, ratios = _curves(head, rows, names, (at, axis), rule, shades)
        title = panels.headed(head, "Ratio of each layer")
        made += [sizes, heat_over_steps(rows, "revision", "ratio", title, rule.noun), ratios]
    return Sheet(made, shortened(visible(t.info.model.get("id")), 44)) or panels.unmeasured()


def step_axis(steps: np.ndarray | None, names: Sequence[str]) -> tuple[list[float], Axis]:
    """Where each checkpoint stands: at its step, far ones by their logarithm, or at its number where there is none."""
    if steps is None:
        labels = [shortened(visible(name), 16) for name in names]
        return list(map(float, range(len(names)))), Axis("Checkpoint", ticks=panels.thinned(range(len(names)), labels))
    positive = steps[steps > 0]
    if not len(positive) or positive.max() < DECADES * positive.min():
        ends = np.unique([steps.min(), steps.max()]) if len(steps) else np.zeros(1)
        ticks = np.unique(np.linspace(ends[0], ends[-1], 6).round())
        return list(map(float, steps)), Axis("Training step", ticks=[(float(x), short(x)) for x in ticks])
    least = math.log10(positive.min()) - 0.6  # where step 0 stands
    at = [math.log10(x) if x > 0 else least for x in steps]
    first, last = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    powers = [(float(p), short(10.0**p)) for p in range(first, last + 1, -(-(last - first + 1) // 7))]
    return at, Axis("Training step", ticks=[(least, "0")] * bool((steps == 0).any()) + powers)


def short(step: float) -> str:
    """1,000 as 1k: ticks of steps stand close."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(step) >= size:
            return f"{number(step / size, 4)}{letter}"
    return number(step, 4)


def _curves(
    head: str, rows: pd.DataFrame, names: list[str], x: tuple[list[float], Axis], rule: Rule, shades: list[Shade]
) -> list[Panel]:
    """The peak layer at every checkpoint: its magnitudes, and its ratio beside the greatest of all layers."""
    titles = [panels.headed(head, of) for of in ("Peak layer over the training", "Top 1 / median over the training")]
    ratios = rows["ratio"].where(np.isfinite(panels.shown(rows["ratio"])))
    if not ratios.notna().any():
        return [Panel(title, empty="No finite ratio.") for title in titles]
    peak, (at, axis) = int(rows.loc[ratios.idxmax(), "layer"]), x
    mine = rows[rows["layer"] == peak].drop_duplicates("revision").set_index("revision").reindex(names)
    mine["most"] = ratios.groupby(rows["revision"], sort=False).max().reindex(names)
    said = "Shaded: between the last checkpoint without findings and the first with them." if shades else ""

    def line(name: str, label: str, color: str, symbol: str = "circle", dash: str = "solid") -> Line:
        return Line(
            at, panels.column(mine, name), label, color, symbol, dash, said=[visible(str(name)) for name in names]
        )

    sizes = [line("top1", f"Top 1, layer {peak}", Color.BLUE), line("median", "Median", Color.GREY, "triangle-up")]
    shares = [
        line("ratio", f"Top 1 / median, layer {peak}", Color.BLUE),
        line("ratio_max", "Greatest of any sequence", Color.PURPLE, ""),
        line("most", "Greatest of any layer", Color.GREEN, "square", "dot"),
    ]
    made = []
    for title, lines, of, name, limit in (
        (titles[0], sizes, "|h|", "Magnitude", rule.magnitude),
        (titles[1], shares, "ratio", "Ratio to the median", rule.ratio),
    ):
        limits = [Limit(limit, f"{of} = {number(limit)}")] if limit is not None else []
        y = panels.log_axis([*np.concatenate([one.y for one in lines]), *(one.value for one in limits)], name)
        sees = "When in training the massive activations come: the curve leaves the others and passes the line."
        made.append(Panel(title, lines, axis, y, said, limits=limits, shades=shades, sees=sees))
    return [made[0], replace(made[1], width="full", both=True)]


def heat_over_steps(rows: pd.DataFrame, x: str, name: str, title: str, noun: str = "") -> Panel:
    """A column at every layer, over steps or checkpoints, on a log scale.

    Args:
        x: the column along x: step or revision.
        noun: what a dot marks where the column `found` says so; "": none are drawn.
    """
    order = list(dict.fromkeys(rows[x]))
    table = rows.pivot_table(index="layer", columns=x, values=name, aggfunc="first", dropna=False)
    values, layers = table.reindex(columns=order).to_numpy(float), [int(y) for y in table.index]
    names = [f"{int(s):,}" if isinstance(s, int | float) and math.isfinite(s) else visible(str(s)) for s in order]
    said = [
        [f"{x} {n}, layer {y}: {v:.4g}" for n, v in zip(names, row, strict=True)]
        for y, row in zip(layers, values, strict=True)
    ]
    if not np.isfinite(panels.shown(values, log=True)).any():
        return Panel(title, empty="No finite ratio.")
    series: list[Heat | Line] = [Heat(values, range(len(order)), layers, name, log=True, said=said)]
    having = rows[rows["found"].to_numpy(bool)] if noun else rows.iloc[:0]
    if len(having):
        dots, told = [order.index(n) for n in having[x]], [noun] * len(having)
        series.append(Line(dots, having["layer"], "", Color.PAPER, "circle", "", edge=Color.INK, said=told))
    steps = panels.column(rows.drop_duplicates(x), "step")
    whole = x == "revision" and bool(np.isfinite(steps).all())
    labels = [short(s) for s in steps] if whole else [shortened(n, 16) for n in names]
    along = "Training step (one column per checkpoint)" if whole else "Step" if x == "step" else "Checkpoint"
    across = Axis(along, limits=(-0.5, len(order) - 0.5), ticks=panels.thinned(range(len(order)), labels), grid=False)
    said_of = f"What is not finite is left empty.{f' Dots: {noun}.' if len(having) else f' No {noun}.' if noun else ''}"
    sees = "Each column is one moment of training, each row a layer: where it lights up, massive activations have come."
    return Panel(title, series, across, panels.cell_axis("Layer", layers), said_of, sees=sees)
