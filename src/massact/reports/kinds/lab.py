"""The toy lab in words, as tables and as a figure: what was found, with intervals, and what it does not show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from massact.records.kinds.lab import Lab
from massact.records.rules import MAGNITUDE, RATIO, SINK, WORDS, is_sink
from massact.reports import charts
from massact.reports.lettering import PLAIN, STACKS, lettered
from massact.reports.parts import Chart, Part, Section, Table, Words, grid, narrow, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.render.markup import figure_text
from massact.reports.spelling import cell, number, percent, real, visible

UNDONE = 0.25  # the mean undoes what zero breaks if its whole interval is below this share of zero's
CONSTANT = 0.9999  # cosine from which on a state is the same in every sequence
BIAS, CONTENT, FREE, UNSEEN = "bias", "content", "free", "unseen"
HEADS = {
    "variant": "variant",
    "nats": "loss",
    "backcopy_nats": "backcopy",
    "bigram_excess_nats": "bigram\nexcess",
    "first_attention": "on\nfirst",
    "first_attention_max": "greatest\nhead",
    "slot_mass": "slot\nmass",
    "norm_ratio": "norm\nratio",
}
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))


def lab_verdict(lab: Lab, variant: str) -> str:
    """What the first position's state after block 1 is for.

    Returns:
        "bias": setting it to zero costs more than the same at an ordinary position (the interval of the difference is
        above zero), and setting it to its mean costs a quarter of that at most. "content": zero costs more, but the
        mean does not undo that. "free": zero is not seen to cost more than at an ordinary position. "unseen": not
        measured.
    """
    zero, other, mean = (lab.effect(variant, *what) for what in (("zero", 0), ("zero", _ordinary(lab)), ("mean", 0)))
    if zero is None or other is None or mean is None:
        return UNSEEN
    if not (zero["ci_low"] > 0 and _above(zero, other)):
        return FREE
    return BIAS if mean["ci_high"] < UNDONE * zero["ci_low"] else CONTENT


def _above(one: pd.Series, other: pd.Series) -> bool:
    """Whether one effect is the greater one: the interval of the difference, as if of independent sequences."""
    halves = [(e["ci_high"] - e["ci_low"]) / 2 for e in (one, other)]
    return bool(one["delta_nats"] - other["delta_nats"] > math.hypot(*halves))


def lab_in_words(lab: Lab) -> list[str]:
    """What a toy lab shows, in sentences, as far as its intervals say so.

    Args:
        lab: fresh, or of a directory.
    """
    c = lab.info.config
    starts = {"bos": "every sequence begins with BOS", "none": "no sequence begins with BOS"}.get(
        str(c.get("starts")), f"BOS begins {percent(c.get('share'))} of the sequences")  # fmt: skip
    words = [
        f"Toy lab, bigram-backcopy: {real(c.get('steps')):,.0f} steps of {visible(c.get('optimiser'))}, seed "
        f"{c.get('seed')}; {starts}. Looked at are held-out sequences that begin with "
        f"{visible(lab.info.corpus.get('looked_at'))}."
    ]
    for variant in lab.variants:
        words.append(f"{visible(variant)}: {_attention(lab, variant)} {_state(lab, variant)}")
    return [*words, _not_shown(lab)]


def _attention(lab: Lab, variant: str) -> str:
    row = lab.last(variant)
    first, most, slot = (real(row[c]) for c in ("first_attention", "first_attention_max", "slot_mass"))
    even = real(lab.info.variants[variant].get("uniform_attention"))
    sink = "a sink" if is_sink(most) else f"no sink (above {number(SINK)})"
    said = (
        f"attention on the first position is {number(first)}, mean over heads ({number(first / even)} x that of a head "
        f"that looks everywhere alike), and {number(most)} in the head with most: {sink}."
    )
    if math.isnan(slot):
        return said
    return f"{said} The slot takes {number(slot)}{', more than the first position' if slot > first else ''}."


def _state(lab: Lab, variant: str) -> str:
    verdict = lab_verdict(lab, variant)
    if verdict == UNSEEN:
        return "What its state is for was not measured: there is no second block to read it."
    zero, other, mean = (lab.effect(variant, *what) for what in (("zero", 0), ("zero", _ordinary(lab)), ("mean", 0)))
    assert zero is not None and other is not None and mean is not None
    said = (
        f"Its state after block 1 set to zero changes the loss of far targets by {_change(zero)} nats (position "
        f"{_ordinary(lab)}: "
        f"{_change(other)}), set to its mean by {_change(mean)}: "
    )
    constant = real(zero["cosine"]) >= CONSTANT
    if verdict == BIAS and constant:
        said += "it is needed; that its mean does not hurt says nothing, for it is the same in every sequence."
    elif verdict == BIAS:
        said += "zero hurts, the mean does not: it serves as a bias."
    elif verdict == CONTENT:
        said += "zero hurts, and the mean does not undo that."
    else:
        said += "zero is not seen to hurt more than at an ordinary position."
    soft = lab.effect("softmax", "zero", 0) if variant != "softmax" and "softmax" in lab.variants else None
    if soft is not None and _above(soft, zero):
        share = max(0.0, real(zero["delta_nats"])) / real(soft["delta_nats"])
        said += f" Zero costs {percent(share, 2)} of what it costs with softmax."
    return said


def _not_shown(lab: Lab) -> str:
    """What a reader must not take this for."""
    top, ratio = real(lab.lab["top1"].max()), real(lab.lab["ratio"].max())
    intervals = "Intervals are over the sequences of one training: other seeds differ by more."
    if top > MAGNITUDE and ratio >= RATIO:
        return intervals
    return (
        f"What this does not show: massive activations ({WORDS}). The greatest |h| is "
        f"{number(top)}, the greatest ratio {number(ratio)}: the mechanism shows in direction, not in size. {intervals}"
    )


def _ordinary(lab: Lab) -> int:
    return int(lab.info.corpus.get("ordinary", 9))


def _change(effect: Any) -> str:
    return f"{_nats(effect['delta_nats'])} ({_nats(effect['ci_low'])} to {_nats(effect['ci_high'])})"


def _nats(value: Any) -> str:
    """To a ten-thousandth: less is not of interest."""
    return f"{real(value):+.4f}"


def _interval(effect: pd.Series | None) -> str:
    if effect is None:
        return "-"
    return f"{effect['delta_nats']:+.4f} [{effect['ci_low']:+.4f},{effect['ci_high']:+.4f}]"


# -------------------------------------------------------------------------------------------- figure
def lab_figure(lab: Lab) -> Figure:
    """Attention on the first position and on the slot, both losses over the steps; and what the edits change."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    panels = figure.subplots(2, 3)
    curves = (
        ("first_attention", "Attention on the first position,\nmean over heads"),
        ("first_attention_max", "Attention on the first position,\nhead with most"),
        ("slot_mass", "Attention on the slot,\nmean over heads"),
        ("backcopy_nats", "Loss on backcopies (nats)"),
        ("bigram_excess_nats", "Loss on bigrams, beyond\nthe chain's uncertainty (nats)"),
    )
    looks = _looks(lab.variants)
    for axes, (column, title) in zip(panels.ravel(), curves, strict=False):
        for variant in lab.variants:
            rows = lab.lab[lab.lab["variant"] == variant]
            y = rows[column].to_numpy(float)
            if np.isfinite(y).any():
                axes.plot(rows["step"], y, **looks[variant])
        axes.set_title(title)
        axes.set_xlabel("Step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if "nats" in column:
            axes.set_ylim(bottom=0)
            continue
        axes.set_ylim(-0.03, 1.03)
        if column != "slot_mass":
            even = real(lab.info.variants[lab.variants[0]].get("uniform_attention"))
            axes.axhline(even, color=PLAIN, linewidth=0.8, linestyle=":", label="looking everywhere alike")
        elif not axes.lines:
            axes.text(0.5, 0.5, "No variant has a slot.", ha="center", va="center", transform=axes.transAxes)
    _bars(panels[1, 2], lab, looks)
    handles = panels[0, 0].lines
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _looks(variants: list[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"color": STACKS[i % len(STACKS)], "linestyle": DASHES[i // len(STACKS) % len(DASHES)],
               "label": f" {lettered(name, 34)}"} for i, name in enumerate(variants)
    }  # fmt: skip


def _bars(axes: Axes, lab: Lab, looks: dict[str, dict[str, Any]]) -> None:
    """The change of the loss by each edit, with its interval."""
    axes.set_title("Change of the loss of far targets\n(nats): state after block 1 set to")
    if not len(lab.lab_effects):
        axes.text(0.5, 0.5, "One block: nothing reads it.", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        return
    places = [("zero", 0), ("mean", 0), ("zero", _ordinary(lab)), ("mean", _ordinary(lab))]
    width = 0.8 / len(lab.variants)
    for i, variant in enumerate(lab.variants):
        found = [lab.effect(variant, *place) for place in places]
        at = np.arange(len(places)) + (i - (len(lab.variants) - 1) / 2) * width
        delta, low, high = (np.array([math.nan if e is None else real(e[c]) for e in found])
                            for c in ("delta_nats", "ci_low", "ci_high"))  # fmt: skip
        axes.bar(at, delta, width * 0.9, color=looks[variant]["color"])
        axes.errorbar(at, delta, yerr=[delta - low, high - delta], fmt="none", ecolor="#333333", capsize=2,
                      linewidth=0.8)  # fmt: skip
    axes.axhline(0, color=PLAIN, linewidth=0.6)
    axes.set_xticks(range(len(places)), [f"{edit}\n{'first' if p == 0 else f'pos. {p}'}" for edit, p in places])


def section(lab: Lab) -> Section:
    """The toy lab: losses, attention on the first position and effects of every variant."""
    parts: list[Part | None] = [Words(lab_in_words(lab))]
    parts += [_over_the_steps(lab, *panel) for panel in (
        ("backcopy_nats", "Loss of targets that repeat"), ("first_attention", "Attention on the first position"),
        ("top1", "Greatest |h|"))]  # fmt: skip
    parts += [_ends(lab),
              table_of("lab_effects", lab.lab_effects, "Effects of edits"),
              table_of("lab", lab.lab, "Every measurement")]  # fmt: skip
    return Section("lab", "Toy lab", parts_of(*parts))


def _over_the_steps(lab: Lab, column: str, title: str) -> Chart | None:
    """A curve of a column for every variant that has it."""
    data = []
    for i, name in enumerate(lab.variants):
        rows = lab.lab[lab.lab["variant"] == name]
        if rows[column].notna().any():
            said = [f"{figure_text(name)}, step {int(s):,}" for s in rows["step"]]
            color = charts.SERIES[i % len(charts.SERIES)]
            data.append(charts.line(rows["step"], rows[column], name, color, text=said))
    return Chart(title, data, {"xaxis": {"title": {"text": "Step"}}}, "", 300, width="third") if data else None


def _ends(lab: Lab) -> Table | None:
    rows = lab.lab.groupby("variant", sort=False).tail(1)
    return table_of("lab", rows, "Every variant at the end", shown_first=True)


def brief(lab: Lab) -> list[Section]:
    """Every variant at the end, and what edits change."""
    title = "At the end (losses in nats, held out; attention on the first position, mean of heads and greatest)"
    made = [narrow(_ends(lab), title, HEADS)]
    c, there = lab.info.corpus, set(lab.lab_effects["targets"])
    for targets, which in (
        ("far", f"predicted from position {c.get('far')} on"),
        ("next", f"the {c.get('next')} right behind the edited position"),
    ):
        if targets in there:
            title = f"Change of the loss of {targets} targets ({which}) when a state after block 1 is set"
            made.append(_changes(lab, targets, f"{title}; cosine: with its mean"))
    return [Section("lab", "", parts_of(*made))]


def _changes(lab: Lab, targets: str, title: str) -> Table | None:
    """Three rows for each variant: its name, set to zero, and to the mean. A column of names would be too narrow."""
    ordinary, rows = _ordinary(lab), []
    for variant in lab.variants:
        zeroed = lab.effect(variant, "zero", 0, targets)
        rows.append([visible(variant), "", "", "-" if zeroed is None else cell(zeroed["cosine"])])
        for edit in ("zero", "mean"):
            rows.append([f"  {edit}", *(_interval(lab.effect(variant, edit, p, targets)) for p in (0, ordinary)), ""])
    return grid(title, ("<set to", "first position", f"position {ordinary}", "cosine"), rows)


READING = Reading(lab_in_words, (section,), brief, noun="toy lab", figures={"lab": lab_figure}, table="lab")
