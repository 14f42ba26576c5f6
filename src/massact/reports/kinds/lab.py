"""The toy lab in words, as tables and as a figure: what was found, with intervals, and what it does not show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.lab import Lab
from massact.records.rules import MAGNITUDE, RATIO, SINK, WORDS, is_sink
from massact.records.verdicts import LEAST, MARGIN, judged
from massact.reports.panels import (
    Axis,
    Color,
    Limit,
    Line,
    Panel,
    Points,
    Sheet,
    column,
    linear_axis,
    looks,
    named_axis,
    share_axis,
    symlog_axis,
)
from massact.reports.parts import Part, Section, Table, Words, grid, narrow, parts_of, table_of
from massact.reports.readings import Reading
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
    if not (zero["ci_low"] > 0 and _above(zero, other) and zero["n_sequences"] >= LEAST):
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
        f"Its state after block 1 set to zero changes the loss of far targets by {_change(zero)} nats, {_judged(zero)} "
        f"(position {_ordinary(lab)}: {_change(other)}, {_judged(other)}), set to its mean by {_change(mean)}, "
        f"{_judged(mean)}: "
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
    intervals = "Intervals are over the sequences of one training: other seeds differ by more. "
    intervals += f"Harmful and harmless are beyond and within {number(MARGIN)} nats with the whole interval."
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


def _judged(effect: Any) -> str:
    """The verdict by the rule of all effects."""
    return judged(real(effect["ci_low"]), real(effect["ci_high"]), real(effect["n_sequences"]))


def _nats(value: Any) -> str:
    """To a ten-thousandth: less is not of interest."""
    return f"{real(value):+.4f}"


def _interval(effect: pd.Series | None) -> str:
    if effect is None:
        return "-"
    return f"{effect['delta_nats']:+.4f} [{effect['ci_low']:+.4f},{effect['ci_high']:+.4f}]"


# -------------------------------------------------------------------------------------------- figure
CURVES = (
    ("first_attention", "Attention on the first position, mean over heads"),
    ("first_attention_max", "Attention on the first position, head with most"),
    ("slot_mass", "Attention on the slot, mean over heads"),
    ("backcopy_nats", "Loss on backcopies (nats)"),
    ("bigram_excess_nats", "Loss on bigrams, beyond the chain's uncertainty (nats)"),
    ("top1", "Greatest |h|"),
)


def draw_lab(lab: Lab) -> Sheet:
    """Attention on the first position and on the slot, both losses over the steps; and what the edits change."""
    return Sheet([*(_over_steps(lab, *curve) for curve in CURVES), _edits(lab)])


SEEN = {
    "first_attention": "How much attention goes to the first position: a variant that needs no sink keeps it low.",
    "first_attention_max": "The same of the head that looks there most.",
    "slot_mass": "How much attention goes to the slot that a variant has in place of a first token.",
    "top1": "How large the largest number gets: it grows where massive activations form.",
}


def _over_steps(lab: Lab, name: str, title: str) -> Panel:
    """A curve of a column for every variant that has it."""
    lines = []
    for variant, look in zip(lab.variants, looks(len(lab.variants)), strict=True):
        rows = lab.lab[lab.lab["variant"] == variant]
        if np.isfinite(y := column(rows, name)).any():
            said = [f"{visible(variant)}, step {int(s):,}" for s in rows["step"]]
            lines.append(Line(column(rows, "step"), y, visible(variant), **(look | {"symbol": ""}), said=said))
    values = np.concatenate([line.y for line in lines]) if lines else np.zeros(0)
    axis, limits = linear_axis(values), []
    if name in ("first_attention", "first_attention_max", "slot_mass"):
        axis = share_axis()
    if name.startswith("first_attention"):
        even = real(lab.info.variants[lab.variants[0]].get("uniform_attention"))
        limits = [Limit(even, "looking everywhere alike", color=Color.MUTED)] * math.isfinite(even)
    empty = "No variant has a slot." if name == "slot_mass" else "Not measured."
    sees = SEEN.get(name, "How the variants differ in it while they train.")
    given = (title, lines, Axis("Step", whole=True), axis)
    return Panel(*given, limits=limits, sees=sees, width="third", empty=empty)


def _edits(lab: Lab) -> Panel:
    """The change of the loss by each edit, with its interval."""
    title = "Change of the loss of far targets: state after block 1 set to its mean or zero"
    places = [("zero", 0), ("mean", 0), ("zero", _ordinary(lab)), ("mean", _ordinary(lab))]
    rows: list[tuple[dict[str, str], str, Any]] = []
    for edit, p in places if len(lab.lab_effects) else ():
        where = f"{edit}, {'first' if p == 0 else f'pos. {p}'}"
        for variant, look in zip(lab.variants, looks(len(lab.variants)), strict=True):
            rows.append((look, f"{where}: {visible(variant)}", lab.effect(variant, edit, p)))
    names = [name for _, name, _ in rows]
    delta, low, high = (np.array([math.nan if e is None else real(e[c]) for *_, e in rows])
                        for c in ("delta_nats", "ci_low", "ci_high"))  # fmt: skip
    colors, symbols = ([look[of] for look, *_ in rows] for of in ("color", "symbol"))
    dots = [Points(delta, range(len(rows)), colors, symbols, low, high, names)] * bool(rows)
    x, y = symlog_axis([delta, low, high], 0.01, "Change in nats"), named_axis(names, slots=3)
    nothing, empty = [Limit(0.0, upright=True, color=Color.MUTED)], "One block: nothing reads it."
    sees = "Each dot is one edit of one variant; far to the right: the model depends on what was taken away."
    given = (title, dots, x, y, "Lines: 95% intervals.")
    return Panel(*given, limits=nothing, sees=sees, height=110 + 26 * max(len(rows), 3), width="full", empty=empty)


def section(lab: Lab) -> Section:
    """The toy lab: losses, attention on the first position and effects of every variant."""
    parts: list[Part | None] = [Words(lab_in_words(lab))]
    parts += draw_lab(lab).parts
    parts += [_ends(lab),
              table_of("lab_effects", lab.lab_effects, "Effects of edits"),
              table_of("lab", lab.lab, "Every measurement")]  # fmt: skip
    return Section("lab", "Toy lab", parts_of(*parts))


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


READING = Reading(lab_in_words, (section,), brief, noun="toy lab", figures={"lab": draw_lab}, table="lab")
