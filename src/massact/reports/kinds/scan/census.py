"""Where the findings are: dims, tokens, positions (Sun 2024, section 2.2); without any, how far the nearest is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from massact.records.answer import Peak
from massact.records.kinds.scan import ScanResult
from massact.reports import panels
from massact.reports.kinds.scan.curves import named, titled
from massact.reports.kinds.scan.nouns import Nouns
from massact.reports.kinds.scan.portrait import nouns
from massact.reports.kinds.scan.views import Rule, StackView, census, rule_of, views
from massact.reports.panels import CLASSES, Axis, Bars, Color, Heat, Limit, Panel, Sheet
from massact.reports.spelling import counted, number, shortened

MOST_BARS, MOST_NEAR_MISSES = 12, 8


def draw_census(result: ScanResult) -> Sheet:
    """Findings by layer and dim, and at the peak layer by token and position, a map and two panels for each stack."""
    stacks, rule = [v for v in views(result) if v.n_sequences or len(v.findings)], rule_of(result)
    words = nouns(result)
    made = [one for view in stacks for one in (counts(view, words) if len(view.findings) else [nearest(view, rule)])]
    return Sheet(made, named(result)) or panels.unmeasured()


def by_layer_and_dim(view: StackView) -> Panel:
    """How many findings each dim has at each layer, the dims with most first."""
    found = view.findings.groupby(["dim", "layer"])["magnitude"].agg(["size", "mean"]).reset_index()
    totals = found.groupby("dim")["size"].sum().sort_values(ascending=False, kind="stable")
    dims, layers = totals.index[:MOST_BARS], range(view.n_layers + 1)
    n, mean = (found.pivot(index="dim", columns="layer", values=name).reindex(index=dims, columns=layers)
               for name in ("size", "mean"))  # fmt: skip
    labels = [str(d) if d >= 0 else "whole token" for d in dims]
    said = [
        [f"layer {x}, dim {label}: {counted(int(n.at[d, x]), 'finding')}, mean |h| {number(mean.at[d, x])}"
         if n.at[d, x] > 0 else f"layer {x}, dim {label}: no finding" for x in layers]
        for d, label in zip(dims, labels, strict=True)
    ]  # fmt: skip
    heat = Heat(n.to_numpy(float), layers, range(len(dims)), "findings", low=0.0, said=said)
    x = replace(panels.layer_axis(view.n_layers), limits=(-0.5, view.n_layers + 0.5), grid=False)
    left = len(totals) - len(dims)
    more = f"{counted(left, 'more dim')} with fewer findings are not shown." if left > 0 else ""
    sees = "Each row is one dim (coordinate) of the hidden state, each column a layer. A row that stays dark is a "
    sees += "massive activation that one layer writes and the next ones carry along; where it is empty there is none."
    slots, limit = max(3, len(dims)), Limit(view.peak_layer or 0, upright=True, color=Color.MUTED)
    y = panels.named_axis(labels, "Dim", slots=min(2, len(dims)))
    title, said_of = (
        titled(view, "Findings by layer and dim"),
        f"Upright line: the peak, layer {view.peak_layer}.",
    )
    given = (title, [heat], x, y, said_of, more, [limit])
    return Panel(*given, sees=sees, height=130 + 22 * slots, width="full")


def counts(view: StackView, words: Nouns) -> list[Panel]:
    """Findings by layer and dim, then of the peak layer the tokens and positions that have them."""
    rows, made = view.findings[view.findings["layer"] == view.peak_layer], [by_layer_and_dim(view)]
    by_token, by_pos = census(rows), rows.drop_duplicates(["sequence", "pos"])["pos"].value_counts()
    by_pos = by_pos.sort_index().sort_values(ascending=False, kind="stable")
    places = [str(p) if p >= 0 else "no position" for p in by_pos.index]
    tokens, classes = [panels.quoted_label(t) for t, _ in by_token.index], [str(c) for _, c in by_token.index]
    slots, one = max(4, *(min(len(labels), MOST_BARS) for labels in (tokens, places))), words.position
    for what, noun, unit, labels, counts_of, sees in (
        (f"{words.plural().capitalize()} with findings", words.title(), "Positions with findings", tokens, by_token,
         f"Which {words.plural()} carry them: a long bar is a {one} that has them again and again."),
        ("Positions with findings", "Position", "Sequences", places, by_pos,
         "Where in a sequence they sit: one long bar means always at the same place."),
    ):  # fmt: skip
        few, left, values = labels[:MOST_BARS], len(labels) - MOST_BARS, counts_of.to_numpy()[:MOST_BARS]
        more = f"{left:,} more are not shown." if left > 0 else ""
        bars = Bars(range(len(few)), values, flat=True, said=few, told=[f"{n:,}" for n in values], what=unit.lower())
        caption = ""
        if counts_of is by_token:
            colors = [CLASSES.get(c, Color.GREY) for c in classes[:MOST_BARS]]
            bars = replace(bars, colors=colors, groups=classes[:MOST_BARS])
            padding = "purple: padding; " if "padding" in classes else ""
            caption = f"Each counts once. Blue: start; orange: delimiter; {padding}grey: other."
        x = Axis(unit, limits=(0.0, float(values.max(initial=1)) * 1.16), whole=True)
        y, title = panels.named_axis(few, noun, slots), titled(view, f"{what}, layer {view.peak_layer}")
        made.append(Panel(title, [bars], x, y, caption, more, sees=sees, height=90 + 19 * slots))
    return made


def nearest(view: StackView, rule: Rule) -> Panel:
    """No findings: the largest ratio in words, and the near misses as bars."""
    said = f"No findings under {shortened(rule.name, 30)}"
    best, near = view.largest, view.near_misses
    if best is not None and not math.isnan(float(best.ratio)):
        said += f"; largest ratio {number(best.ratio)} at {_address(best)}"
    title, n = titled(view, "Near misses, the highest ratio first"), len(near)
    near = near[np.isfinite(near["ratio"].to_numpy(float))].iloc[:MOST_NEAR_MISSES]
    near = near[near["ratio"] > 0]
    if not len(near):
        known = counted(n, "near miss", "near misses") if n else "No near misses"
        return Panel(title, empty=f"{said}.\n{known}.", height=200, width="full")
    labels = [f"layer {r.layer}, pos {r.pos}, dim {r.dim}, {panels.quoted_label(r.token)}" for r in near.itertuples()]
    ratios = near["ratio"].to_numpy(float)
    told = [f"{number(r.ratio)}  (|h| {number(r.magnitude)})" for r in near.itertuples()]
    limits = [Limit(rule.ratio, f"needs {number(rule.ratio, 6)}", upright=True)] if rule.ratio is not None else []
    ends = [10.0 ** (np.floor(np.log10(ratios.min()) - 0.3)), *ratios, *(2 * limit.value for limit in limits)]
    bars = Bars(range(len(near)), ratios, colors=Color.GREY, flat=True, said=labels, told=told, what="ratio")
    x, y = panels.log_axis(ends, "|h| / median of near misses"), panels.named_axis(labels)
    height = 90 + 22 * max(len(near), 4)
    sees = "None is massive here: how near the nearest come to the ratio that the rule needs."
    return Panel(title, [bars], x, y, note=f"{said}.", limits=limits, sees=sees, height=height, width="full")


def _address(peak: Peak) -> str:
    parts = [("layer", peak.layer), ("pos", peak.pos), ("dim", peak.dim)]
    return ", ".join(f"{name} {int(value)}" for name, value in parts if value >= 0)
