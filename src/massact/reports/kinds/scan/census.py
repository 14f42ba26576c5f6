"""Where the findings are: dims, tokens, positions (Sun 2024, section 2.2); without any, how far the nearest is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from massact.records.answer import Peak
from massact.records.kinds.scan import ScanResult
from massact.reports import panels
from massact.reports.kinds.scan.curves import named, titled
from massact.reports.kinds.scan.views import Rule, StackView, census, rule_of, views
from massact.reports.panels import CLASSES, Axis, Bars, Color, Limit, Panel, Sheet
from massact.reports.spelling import counted, number, shortened

MOST_BARS, MOST_NEAR_MISSES = 12, 8


def draw_census(result: ScanResult) -> Sheet:
    """Findings of the peak layer by dim, token and position, one row of panels for each stack."""
    stacks, rule = [v for v in views(result) if v.n_sequences or len(v.findings)], rule_of(result)
    made = [panel for view in stacks for panel in (counts(view) if len(view.findings) else [nearest(view, rule)])]
    return Sheet(made, named(result)) or panels.unmeasured()


def counts(view: StackView) -> list[Panel]:
    """Findings of the peak layer by dim, tokens and positions that have them."""
    rows = view.findings[view.findings["layer"] == view.peak_layer]
    by_dim, by_token = rows["dim"].value_counts(), census(rows)
    by_pos = rows.drop_duplicates(["sequence", "pos"])["pos"].value_counts()
    by_dim, by_pos = (t.sort_index().sort_values(ascending=False, kind="stable") for t in (by_dim, by_pos))
    dims = [str(d) if d >= 0 else "whole token" for d in by_dim.index]
    places = [str(p) if p >= 0 else "no position" for p in by_pos.index]
    tokens, classes = [panels.quoted_label(t) for t, _ in by_token.index], [str(c) for _, c in by_token.index]
    slots, made = max(4, *(min(len(labels), MOST_BARS) for labels in (dims, tokens, places))), []
    for what, noun, unit, labels, counts_of in (
        ("Findings by dim", "Dim", "Findings", dims, by_dim),
        ("Tokens with findings", "Token", "Positions with findings", tokens, by_token),
        ("Positions with findings", "Position", "Sequences", places, by_pos),
    ):
        few, left, values = labels[:MOST_BARS], len(labels) - MOST_BARS, counts_of.to_numpy()[:MOST_BARS]
        more = f"{left:,} more {noun.lower()}s are not shown." if left > 0 else ""
        bars = Bars(range(len(few)), values, flat=True, said=few, told=[f"{n:,}" for n in values], what=unit.lower())
        caption = ""
        if noun == "Token":
            colors = [CLASSES.get(c, Color.GREY) for c in classes[:MOST_BARS]]
            bars = replace(bars, colors=colors, groups=classes[:MOST_BARS])
            padding = "purple: padding; " if "padding" in classes else ""
            caption = f"Each counts once. Blue: start; orange: delimiter; {padding}grey: other."
        x = Axis(unit, limits=(0.0, float(values.max(initial=1)) * 1.16), whole=True)
        y, title = panels.named_axis(few, noun, slots), titled(view, f"{what}, layer {view.peak_layer}")
        made.append(Panel(title, [bars], x, y, caption, more, height=90 + 19 * slots, width="third"))
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
    return Panel(title, [bars], x, y, note=f"{said}.", limits=limits, height=height, width="full")


def _address(peak: Peak) -> str:
    parts = [("layer", peak.layer), ("pos", peak.pos), ("dim", peak.dim)]
    return ", ".join(f"{name} {int(value)}" for name, value in parts if value >= 0)
