"""The answer of a scan in English.

Says what was measured: how large, where, how constant, how close to overflow. It never names a cause, because
a scan has none.
"""

from __future__ import annotations

import math
from typing import Any

from massact.records.answer import Peak
from massact.records.clusters import MASSIVE, OUTLIER, passing
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.by_input import by_input_in_words
from massact.reports.kinds.scan.cluster_words import CLASSES, clusters_in_words
from massact.reports.kinds.scan.criteria import disagreement
from massact.reports.kinds.scan.opening import opening
from massact.reports.kinds.scan.origins import origins_in_words
from massact.reports.kinds.scan.rises import mixers_in_words
from massact.reports.kinds.scan.streams import line, sets_of
from massact.reports.kinds.scan.views import FORMATS, Rule, StackView, answer_of, model_name, rule_of, views
from massact.reports.spelling import (
    counted,
    listed,
    noted,
    number,
    numbered,
    percent,
    quoted,
    ranges,
    real,
    signed,
    spanned,
    visible,
)
from massact.reports.stack_words import called, said_once, stream_sets

WIDE = 1e6  # formats that hold more: no |h| of a model comes near, what they lack is precision


def answer_in_words(result: ScanResult) -> list[str]:
    """Put the answer of a scan into sentences, the most important first.

    Args:
        result: of a scan, or of a run directory.
    Source: the questions are those of Sun 2024, sections 2 to 3.
    """
    answer, rule, stacks = answer_of(result), rule_of(result), views(result)
    if answer is None:
        return [f"This run holds no answer (status: {visible(result.info.status)}).", *noted(result.info.notes)]
    told: list[tuple[str, list[str]]] = []
    lead_of = {v.label: streams.lead for streams in sets_of(result, stacks) for v in streams.others}
    for view in sorted(stacks, key=lambda v: v.label in lead_of):  # first what is told in full
        rules = disagreement(result.criteria[result.criteria["stack"].fillna("") == view.stack])
        rules = rules if view.site == "resid_post" else []
        lead = lead_of.get(view.label)
        if lead is None:
            told.append((view.label, [*_in_full(view, rule, result), *rules]))
            continue
        told.append((view.label, [line(view, lead, rule, result.criteria)]))
        told.append((view.label, [s for s in rules if any(s in sentences for _, sentences in told)]))
    first = opening(result)
    said = [*first, _headline(result, rule, stacks, bool(first)), *said_once(told), *by_input_in_words(result)]
    said += origins_in_words(result)
    if any(v.n_sequences for v in stacks) and not any(_nonfinite(v) for v in stacks):
        said.append("All measured values are finite.")
    return said + _null(answer.null, result) + _bos(answer.bos) + noted(result.info.notes)


def _in_full(view: StackView, rule: Rule, result: ScanResult) -> list[str]:
    """All that is said of one stack, but for the published rules."""
    sentences = _found(view, rule) if view.n_findings else _below(view, rule)
    if rule.kind == "layer":
        sentences += _near_misses(view)
    elif not view.n_findings:
        sentences += clusters_in_words(view, rule)
    sentences += mixers_in_words(view, result.rises)
    return sentences + [s for s in (_range(view), _nonfinite(view)) if s]


def _headline(result: ScanResult, rule: Rule, stacks: list[StackView], opened: bool) -> str:
    name = model_name(result) or "The model"
    sequences = max((v.n_sequences for v in stacks), default=0)
    if not sequences:
        return f"Nothing was measured on {name}: no sequences."
    over = f"in {counted(sequences, 'sequence')}"
    each = ", counted at every layer," if rule.kind != "layer" else ""
    having = [v for v in stacks if v.n_findings]
    total = counted(sum(v.n_findings for v in stacks), "finding")
    if not having:
        return f"No: {name} has no {rule.noun} {over} under {rule.in_words()}."
    where = ""
    if len(stacks) > 1:
        without = [v.label for v in stacks if not v.n_findings]
        where = f" in {called([v.label for v in having])}" + (f", not in {called(without)}" if without else "")
        read = [name for name in stream_sets(result.info.model) if name in {v.stack for v in stacks}]
        where += f" ({listed([visible(name) for name in read])}: what blocks read of the streams together)" * bool(read)
    if rule.kind != "element":
        return f"Yes: {name} has {rule.noun}{where}: {total} {over}{each} under {rule.in_words()}."
    labels = {str(label) for v in having for label in passing(v.clusters)["label"]}
    told = f"{total} {over}{each} under {rule.in_words()}"
    if opened:
        return f"There are {told}{where}."
    if MASSIVE in labels:
        return f"Yes: {name} has massive activations{where}: {told}."
    what = (
        "are outlier features, on many tokens each" if OUTLIER in labels else "just pass, in humps near the threshold"
    )
    return f"No massive activations in {name}, but {told}{where}: they {what}."


def _found(view: StackView, rule: Rule) -> list[str]:
    """What each cluster is, and the largest finding."""
    said = clusters_in_words(view, rule) if rule.kind != "layer" else [_layers(view)]
    if view.answer:
        if jump := _jump(view):
            said.insert(1, jump)
        said += _modal(view)
    said += _padding(view)
    if view.answer and view.answer.peak:
        said.append(f"The largest finding is {_place(view.answer.peak)}.")
    return said


def _jump(view: StackView) -> str:
    """How abruptly the largest cluster comes (Sun 2024, Section 2.2)."""
    answer = view.answer
    if answer is None or answer.onset is None or not math.isfinite(real(answer.onset_jump)):
        return ""
    return f"The largest |h| at layer {answer.onset} is {number(answer.onset_jump)} times that at the layer before."


def _layers(view: StackView) -> str:
    """Where a rule about whole layers passes."""
    return f"They are {spanned('layer', {int(x) for x in view.findings['layer']})} of {view.n_layers}."


def _modal(view: StackView) -> list[str]:
    """On tokens of which modality the findings of the layer of the largest are."""
    if view.answer is None or view.answer.peak is None or not view.answer.modalities:
        return []
    return [f"At layer {view.answer.peak.layer} the findings are on {_modalities(view.answer.modalities)}."]


def _modalities(counts: list[tuple[str, int]]) -> str:
    """'image tokens (5) and text tokens (2)' of a stack that reads both."""
    one = len(counts) == 1
    named = [f"{visible(kind)} tokens" + ("" if one else f" ({n:,})") for kind, n in counts]
    return listed(named) + " only" * one


def _padding(view: StackView) -> list[str]:
    """How many findings are in frames behind the end of a recording."""
    count = int((view.findings["position_class"] == "padding").sum())
    if not count:
        return []
    share = percent(count / len(view.findings))
    return [
        f"{counted(count, 'finding')} ({share}) {'is' if count == 1 else 'are'} in padding: frames behind the end of a "
        "recording, which the model attends to as to any other."
    ]


def _below(view: StackView, rule: Rule) -> list[str]:
    """How far from the criterion the nearest activation is, and which threshold it misses."""
    largest = view.largest
    if largest is None:
        return ["No largest ratio is recorded."] if view.n_sequences else []
    if rule.kind != "element":
        return [f"The largest ratio of |h| to the median is {_ratio_place(largest)}; {rule.name} does not look at it."]
    said = [f"The largest ratio is {_ratio_place(largest)}; {_failure(largest, rule)}."]
    strongest = view.answer.largest_magnitude if view.answer else None
    if strongest and (strongest.layer, strongest.pos, strongest.dim, strongest.sequence) != (
        largest.layer,
        largest.pos,
        largest.dim,
        largest.sequence,
    ):
        said.append(f"The largest |h| is {_place(strongest)}; {_failure(strongest, rule)}.")
    return said + _steady(view)


def _near_misses(view: StackView) -> list[str]:
    """How many activations the criterion narrowly misses: a line drawn elsewhere would count them."""
    table = view.near_misses
    if not len(table):
        return []
    layers, dims = {int(x) for x in table["layer"]}, {int(x) for x in table["dim"]} - {-1}
    where = f"at {spanned('layer', layers)}" + (f", {numbered('dim', sorted(dims))}" if dims else "")
    said = "they reach" if len(table) > 1 else "it reaches"
    return [f"{counted(len(table), 'near miss', 'near misses')} {where}: {said} at least half of every threshold."]


def _steady(view: StackView) -> list[str]:
    """How constant the greatest |h| is over sequences, where nothing passes (Sun 2024, Table 2)."""
    rows = view.ranks[(view.ranks["source"] == "corpus") & (view.ranks["rank"] == "top 1")]
    if not len(rows) or int(rows.iloc[0]["n_sequences"]) < 2:
        return []
    row = rows.iloc[0]
    return [
        f"At layer {int(row['layer'])} the greatest value of a sequence is {signed(row['value_mean'])} ± "
        f"{number(row['value_std'])} over {counted(int(row['n_sequences']), 'sequence')}, at one and the same dim in "
        f"{percent(row['same_dim'])} of them."
    ]


def _failure(peak: Peak, rule: Rule) -> str:
    magnitude, ratio = real(peak.magnitude), real(peak.ratio)
    missed = rule.failed(magnitude, ratio)
    said = []
    if "magnitude" in missed:
        said.append(f"magnitude ({number(magnitude)}, needs more than {number(rule.magnitude)})")
    if "ratio" in missed:
        said.append(f"ratio ({number(ratio)}, needs {number(rule.ratio)})")
    return f"it fails on {listed(said)}" if said else f"it does not pass {rule.name}"


def _where(peak: Peak) -> str:
    """'layer 2, position 0, dim 17, on 'x' (start) of sequence 3', without what a rule does not have (-1)."""
    parts = [f"layer {int(peak.layer)}"]
    if peak.pos >= 0:
        parts.append(f"position {int(peak.pos)}")
    if peak.dim >= 0:
        parts.append(f"dim {int(peak.dim)}")
    if peak.sequence >= 0:
        where, sequence = visible(peak.position_class), f"sequence {int(peak.sequence)}"
        parts.append(f"on {quoted(peak.token)} ({where}) of {sequence}" if peak.token else f"{sequence} ({where})")
    return ", ".join(parts)


def _place(peak: Peak) -> str:
    place = f"{signed(peak.value)} at {_where(peak)}"
    if math.isnan(real(peak.ratio)):
        return place
    return f"{place}: {number(peak.ratio)} times the median |h| of {number(peak.median)}"


def _ratio_place(peak: Peak) -> str:
    return f"{number(peak.ratio)} (|h| {number(peak.magnitude)}, median {number(peak.median)}) at {_where(peak)}"


def _range(view: StackView) -> str:
    """How close each number format is to overflow, at which layers it would, and how fine it is at the largest |h|."""
    said, none = [], view.layers_without_values()
    for column, name, limit in FORMATS:
        factors = view.column(f"headroom_{column}")
        if all(math.isnan(f) for f in factors):
            continue
        known = [(f, int(x)) for f, x in zip(factors, view.layers["layer"], strict=True) if not math.isnan(f)]
        factor, layer = min(known)
        over = view.layers_below_one(column)
        every = "every layer" if not none else "every layer that has a finite value"
        verdict = f"overflows at {counted(len(over), 'layer')} ({ranges(over)})" if over else f"holds {every}"
        most = "the largest |h| being Inf"
        if factor >= 1:
            most = f"its maximum of {number(limit, 5)} being {number(factor)} times the largest |h|"
        elif factor:
            most = f"the largest |h| being {number(1 / factor)} times its maximum of {number(limit, 5)}"
        step = view.step(column, layer)
        if limit > WIDE:
            said.append(f"{name} {verdict}" + ("" if math.isnan(step) else f", with {_step(view, step, layer)}"))
            continue
        fine = "" if over or math.isnan(step) else f", with steps of {number(step)} there"
        said.append(f"{name} {verdict}, {most} (layer {layer}){fine}")
    return "Without scaling, " + "; ".join(said) + "." if said else ""


def _step(view: StackView, step: float, layer: int) -> str:
    """'steps of 128 at the largest |h|, 23,400 (layer 12, where the median |h| is 1.66)'."""
    row = view.layers[view.layers["layer"] == layer].iloc[0]
    median = real(row["median"])  # NaN where half of the values are not finite
    beside = "" if math.isnan(median) else f", where the median |h| is {number(median)}"
    return f"steps of {number(step)} at the largest |h|, {number(row['max'])} (layer {layer}{beside})"


def _nonfinite(view: StackView) -> str:
    count = int(view.answer.nonfinite) if view.answer else int(view.layers["nonfinite"].sum())
    if not count:
        return ""
    layers = view.nonfinite_layers()
    where = f", at {spanned('layer', layers)}" if layers else ""
    none = view.layers_without_values()
    whole = f" {spanned('Layer', none)}: no value is finite, so nothing is known there."
    return f"{counted(count, 'value')} {'is' if count == 1 else 'are'} NaN or Inf{where}.{whole if none else ''}"


def _null(null: dict[str, Any], result: ScanResult) -> list[str]:
    if not null:
        return []
    if "unavailable" in null:
        return [f"There is no random-init twin to compare with: {_reason(null)}"]
    n = int(real(null.get("n_sequences", 0)))
    count = int(real(null.get("n_findings", 0)))
    ours = _in_first(result, n, null.get("n_tokens"))
    beside = "" if ours is None or not n else f"; the model has {_rate(ours, n)} there"
    return [
        f"A random-init twin of the same architecture has {_rate(count, n)}{_of_first(null)} (largest ratio |h| / "
        f"median {number(null.get('largest_ratio'))}, largest |h| {number(null.get('largest_magnitude'))}){beside}."
    ]


def _in_first(result: ScanResult, n: int, n_tokens: int | None) -> int | None:
    """Findings of the scan in the first tokens of its first n sequences; None where they are of no single sequence."""
    sequence, pos = result.findings["sequence"], result.findings["pos"]
    inside = (sequence < n) & (True if n_tokens is None else pos < n_tokens)
    return None if (sequence < 0).any() else int(inside.sum())


def _of_first(control: dict[str, Any]) -> str:
    """' in the first 42 tokens of the first 4 sequences'; nothing where their number was not recorded."""
    n, n_tokens = int(real(control.get("n_sequences", 0))), control.get("n_tokens")
    if n_tokens is not None and n:
        return f" in the first {counted(int(n_tokens), 'token')} of {f'{n} sequences' if n > 1 else 'one sequence'}"
    return f" in the first {counted(n, 'sequence')}" if n > 1 else " in the first sequence" if n else ""


def _rate(count: int, n: int) -> str:
    """'70 findings (17.5 per sequence)'."""
    if not count:
        return "no findings"
    return counted(count, "finding") + (f" ({number(count / n)} per sequence)" if n > 1 else "")


def _bos(bos: dict[str, Any]) -> list[str]:
    if not bos:
        return []
    if "unavailable" in bos:
        return [f"There is no comparison with and without BOS: {_reason(bos)}"]
    sides = {name: side for name, side in bos.items() if isinstance(side, dict)}
    return [f"{visible(name).replace('_', ' ').capitalize()}{'' if 'bos' in name.lower() else ' BOS'}: {_side(side)}"
            for name, side in sides.items()]  # fmt: skip


def _side(side: dict[str, Any]) -> str:
    """What one side of the comparison has."""
    if "unavailable" in side:
        return f"not available: {_reason(side)}"
    n, count = int(real(side.get("n_sequences", 0))), int(real(side.get("n_findings", 0)))
    found, ratio = (
        f"{_rate(count, n)}{_of_first(side)}",
        f"largest ratio |h| / median {number(side.get('largest_ratio'))}",
    )
    if not count:
        return f"{found}; {ratio}."
    dims = [d for d in side.get("dims") or [] if int(d) >= 0]
    where = f", {numbered('dim', dims)}" if dims else ""
    classes = listed([CLASSES.get(c, visible(c)) for c in side.get("classes") or []])
    at = "" if classes == "none" else f", {classes}"
    return f"{found}, onset at layer {side.get('onset')}{where}{at}; {ratio}."


def _reason(record: dict[str, Any]) -> str:
    return visible(str(record["unavailable"])).rstrip(".") + "."
