"""Paired evaluation: every sequence once without an edit and once with each, and what differs.

Shapes: B batch, T tokens, V vocabulary or classes, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.interventions.predictions import Asked, Predicted, Task, arrays, ask, logits_of, predicted, task_of
from massact.interventions.reach import prefixes_of, reach_of
from massact.interventions.sinks import SINK_METRICS, Masses, Sinks, sink_probes, unseen_attention
from massact.interventions.watchers import Watcher
from massact.models import Model
from massact.records.errors import UserError
from massact.records.verdicts import (
    CONTROL,
    LEAST,
    MARGIN,
    NOT_JUDGED,
    ONE_SIDED,
    OPEN,
    ZERO,
    shows,
    unit_of,
    verdict_of,
    with_change,
)
from massact.stats.intervals import (
    UNKNOWN,
    Interval,
    difference_interval,
    mean_interval,
    needed,
    needed_answers,
    proportion_interval,
    ratio_interval,
)
from massact.trace import Fired, observing
from massact.trace.edits import AnyEdit, check_fired

# One number of every sequence; all but `perplexity` are means over sequences.
_PERPLEXITIES = ("perplexity", "perplexity_windowed")
LENIENT = ("edits", "sites")  # one batch may have nothing to edit, and an input may leave a part of the model out
METRICS = ("nll", "kl", "top1_agreement", "top1_probability", "accuracy")
_CONTINUOUS = {"nll", "kl", "top1_probability", *_PERPLEXITIES, *SINK_METRICS}


@dataclass(frozen=True)
class Paired:
    """What was measured of every sequence, with and without edits.

    Args:
        sequences: (N,) index in the corpus.
        n_targets: (N,) tokens predicted of each; 1 for an image.
        baseline: metric -> (N,).
        edited: name of the edit -> metric -> (N,).
        fired: what each edit did.
        baseline_of: name of the edit -> metric -> (N,): metrics that are of the layers behind the edit, over queries
            of both runs; all of them where the edit takes targets away, over those that are left.
        n_targets_of: name of the edit -> (N,), where it takes targets away: those of both runs, by their position in
            the text.
    """

    sequences: np.ndarray
    n_targets: np.ndarray
    baseline: dict[str, np.ndarray]
    edited: dict[str, dict[str, np.ndarray]]
    fired: dict[str, Fired] = field(default_factory=dict)
    baseline_of: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    n_targets_of: dict[str, np.ndarray] = field(default_factory=dict)


def told_apart(edits: Sequence[AnyEdit]) -> list[AnyEdit]:
    """The same edits under names that differ: the second of one name gets the number 2.

    Raises:
        UserError: one and the same edit is given twice.
    """
    taken: set[str] = set()
    out: list[AnyEdit] = []
    for i, edit in enumerate(edits):
        if any(edit is other for other in edits[:i]):
            raise UserError(f"The edit {edit.name!r} is given twice.", do="Give it once.")
        name, n = edit.name, 2
        while name in taken:
            name, n = f"{edit.name} ({n})", n + 1
        taken.add(name)
        out.append(edit if name == edit.name else replace(edit, name=name))
    return out


def evaluate(
    model: Model,
    corpus: Corpus,
    edits: Sequence[AnyEdit],
    *,
    batch_size: int = 1,
    labels: Tensor | None = None,
    sinks: Sinks | None = None,
    since: int = 0,
    watcher: Watcher | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Paired:
    """Run a corpus without edits and with each of them.

    Both sides of an effect are of the same targets: those positions of the text that both runs predict. The blocks
    before an edit are run once for all edits there.

    Args:
        model: with a language-model head (loss of the next or of hidden tokens) or a classifier (with labels).
        corpus: what to evaluate on.
        edits: each evaluated on its own; those of one name are numbered, see `told_apart`.
        batch_size: sequences per forward pass.
        labels: (N,) classes, for accuracy.
        sinks: also every sink statistic, of the layers behind the edit. Needs a model of `with_attention`.
        since: targets before this position do not count.
        watcher: of what else is to be seen of these passes, which are then run from the first block.
        progress: called with sequences done and sequences in all.

    Raises:
        UserError: an edit is given twice, or a model without logits.
        WorkError: an edit changed nothing.
    """
    edits = told_apart(edits)
    names = [e.name for e in edits]
    base: list[dict[str, np.ndarray]] = []
    after: dict[str, list[dict[str, np.ndarray]]] = {n: [] for n in names}
    own: dict[str, list[dict[str, np.ndarray]]] = {n: [] for n in names}
    fired = {n: Fired(n) for n in names}
    unseen = {e.name: unseen_attention(model, e) for e in edits}
    done, task = 0, task_of(model, since, corpus=corpus)
    for batch in corpus.batches(batch_size):
        truth = None if labels is None else labels[list(batch.sequences)]
        asked = ask(batch, task)
        prefixes = prefixes_of(model, edits, sinks is not None) if watcher is None else {}
        tokens: dict[int, list[int]] = {}
        with torch.inference_mode(), ExitStack() as stack:
            for prefix in prefixes.values():
                stack.enter_context(prefix.recording())
            probes = sink_probes(model, sinks, tokens, find=batch) + (
                [] if watcher is None else watcher.probes(model, None)
            )
            seen = stack.enter_context(observing(model, probes, batch=batch, lenient=LENIENT))
            logits = logits_of(model, asked.batch)
        first, before = Masses.of(seen), predicted(logits, asked, truth, task)
        if watcher is not None:
            watcher.take(None, seen)
        base.append(arrays([p.numbers() for p in before]))
        for edit in edits:
            where, probes = reach_of(model, edit), sink_probes(model, sinks, tokens, among=first)
            probes += [] if watcher is None else watcher.probes(model, edit.name)
            shared = None if where is None else prefixes.get((where.stack, where.before))
            skipping = nullcontext() if shared is None else shared.skipping()
            with torch.inference_mode(), skipping:
                # It may leave a batch alone, but not all of them.
                with observing(model, probes, [edit], batch=batch, text=True, lenient=LENIENT) as seen:
                    changed = logits_of(model, asked.batch)
            fired[edit.name].add(seen.edits[0])
            if watcher is not None:
                watcher.take(edit.name, seen)
            now, moved = Masses.of(seen), seen.rows[-1] if seen.rows and _reads_text(asked, task) else None
            said = predicted(changed, asked, truth, task, moved=moved, among=before)
            new, old = _alike(before, said)
            after[edit.name].append(new | now.behind(where, unseen[edit.name]))
            same = _over_the_same(model, asked, sinks, tokens, (first, now))
            own[edit.name].append(old | same.behind(where, unseen[edit.name]))
        done += len(batch.sequences)
        if progress is not None:
            progress(done, corpus.n_sequences)
    check_fired(list(fired.values()))
    return _paired(_joined(base), {n: _joined(r) for n, r in after.items()}, {n: _joined(r) for n, r in own.items()},
                   fired)  # fmt: skip


def _over_the_same(
    model: Model, asked: Asked, sinks: Sinks | None, tokens: dict[int, list[int]], runs: tuple[Masses, Masses]
) -> Masses:
    """Sink statistics without an edit over the queries of those with it; one more pass where these are fewer."""
    old, new = runs
    if all(old.queries[site].used == queries.used for site, queries in new.queries.items()):
        return old
    probes = sink_probes(model, sinks, tokens, among=new)
    with torch.inference_mode(), observing(model, probes, batch=asked.batch, lenient=LENIENT) as again:
        logits_of(model, asked.batch)
    return Masses.of(again)


def _alike(before: list[Predicted], after: list[Predicted]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Numbers of each sequence with an edit, and those without it over the same targets."""
    new = [a.numbers() | b.compared(a) for b, a in zip(before, after, strict=True)]
    old = []
    for b, a in zip(before, after, strict=True):
        lost = len(b.targets.at_N) - len(a.targets.at_N)  # these are among those: as many are the same ones
        old.append(b.numbers(a.targets.at_N if lost else None) | {"lost": float(lost)})
    return arrays(new), arrays(old)


_Numbers = dict[str, np.ndarray]


def _paired(base: _Numbers, after: dict[str, _Numbers], own: dict[str, _Numbers], fired: dict[str, Fired]) -> Paired:
    """All batches together; what is without an edit once more, where an edit takes targets away."""
    n_targets = base.pop("n_targets")
    left = {n: rows["n_targets"] for n, rows in own.items() if rows["lost"].any()}
    of = {n: {k: v for k, v in rows.items() if k in SINK_METRICS or (n in left and k in base)}
          for n, rows in own.items()}  # fmt: skip
    return Paired(
        np.arange(len(n_targets)), n_targets, base,
        {n: {k: v for k, v in rows.items() if k != "n_targets"} for n, rows in after.items()}, fired,
        {n: rows for n, rows in of.items() if rows}, left,
    )  # fmt: skip


def _reads_text(asked: Asked, task: Task) -> bool:
    """Whether the predictions are of the tokens that an edit of the inputs moves; a decoder's own ids stay."""
    return task.ahead != 0 and "decoder_input_ids" not in asked.batch.inputs


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All batches in a row; without what is unavailable in all of them."""
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return {n: x for n, x in joined.items() if n not in SINK_METRICS or not np.isnan(x).all()}


@dataclass(frozen=True)
class Effect:
    """One metric of one edit over some sequences: without, with, the difference, its interval and the verdict.

    Args:
        ci_low, ci_high: 95 % interval of the difference.
        n_targets: targets of these sequences, the same ones on both sides; NaN for metrics that have none.
        harm: how much worse, in nats of the log-perplexity or as a share of answers; None of a metric that is not
            judged.
        share: of the harm that the edit `zero` does.
        beyond: the difference to the edit `random`, of quantities that move one way only.
        verdict: see `massact.records.verdicts`.
        n_needed: sequences that would settle it, where it is not.
    """

    metric: str
    baseline: float
    edited: float
    ci_low: float
    ci_high: float
    n_sequences: int
    n_targets: float = math.nan
    harm: Interval | None = None
    share: Interval = UNKNOWN
    beyond: Interval = UNKNOWN
    verdict: str = NOT_JUDGED
    n_needed: float = math.nan

    @property
    def delta(self) -> float:
        return self.edited - self.baseline

    def row(self) -> dict[str, object]:
        """Its columns of the table `effects`."""
        nats = self.harm if self.harm is not None and unit_of(self.metric) == "nats" else UNKNOWN
        return {
            "metric": self.metric, "baseline": self.baseline, "edited": self.edited, "delta": self.delta,
            "ci_low": self.ci_low, "ci_high": self.ci_high, "verdict": self.verdict, "n_needed": self.n_needed,
            "delta_nats": float(nats.estimate), "nats_low": float(nats.low), "nats_high": float(nats.high),
            "share_of_zero": float(self.share.estimate), "share_low": float(self.share.low),
            "share_high": float(self.share.high), "random_low": float(self.beyond.low),
            "random_high": float(self.beyond.high), "n_sequences": self.n_sequences, "n_targets": self.n_targets,
        }  # fmt: skip


def effects_of(paired: Paired, name: str, chosen: np.ndarray, margin: float = MARGIN, task: str = "") -> list[Effect]:
    """Effects of one edit over chosen sequences, with 95 % intervals of the paired differences.

    perplexity = exp(sum of nll over all targets / targets); perplexity_windowed = exp(mean over windows of their
    mean nll), as Sun 2024 and Owen 2025 compute it; all other metrics are means over sequences. A perplexity's
    interval is that of its logarithm, baseline x (exp(nats) - 1). One sequence says nothing about others: its interval
    is NaN.

    Args:
        paired: what was measured.
        name: of the edit.
        chosen: (N,) bool.
        margin: harm within which nothing has happened.
        task: of lm-eval, stands before its metrics.
    """
    after = paired.edited[name]
    metrics = [m for m in (*METRICS, *(m for m in after if m not in METRICS)) if m in after]
    targets = _targets_of(paired, name)
    if "nll" in paired.baseline and "nll" in after and (targets[chosen] > 1).any():
        metrics = [*_PERPLEXITIES, *metrics]
    found = (_effect(_Pairs(paired, name, metric, chosen), task, margin) for metric in metrics)
    return [effect for effect in found if effect is not None]


def effect_rows(
    paired: Paired,
    *,
    stack: str = "",
    layer: int = -1,
    groups: Mapping[str, np.ndarray] | None = None,
    at: Mapping[str, tuple[int, str]] | None = None,
    only: Sequence[str] = (),
    margin: float = MARGIN,
    task: str = "",
) -> list[dict[str, object]]:
    """Rows of the table `effects`: every edit of a paired run over all sequences, and over those of each label.

    Args:
        stack, layer: where the massive activations are.
        groups: column -> (N,) label of each sequence.
        at: edit -> its layer and the clusters that it edits; of others `layer`, and none.
        only: metrics to keep; nothing: all.
        margin, task: see `effects_of`.
    """
    rows: list[dict[str, object]] = []
    for name, fired in paired.fired.items():
        here, cluster = (at or {}).get(name, (layer, ""))
        where = {"edit": name, "stack": stack, "layer": here, "cluster": cluster, "n_calls": fired.n_calls,
                 "n_elements": int(fired.n_elements), "change": fired.change}  # fmt: skip
        everyone = np.ones(len(paired.n_targets), bool)
        told = [("all", e, UNKNOWN) for e in effects_of(paired, name, everyone, margin, task)]
        for column, labels in (groups or {}).items():
            by_label = {label: effects_of(paired, name, labels == label, margin, task)
                        for label in dict.fromkeys(labels)}  # fmt: skip
            apart = worst_of(by_label)
            told += [(f"{column}={label}", e, apart.get((label, e.metric), UNKNOWN))
                     for label, effects in by_label.items() for e in effects]  # fmt: skip
        for group, effect, gap in told:
            if not only or effect.metric in only:
                rows.append(where | {"group": group, "gap": float(gap.estimate), "gap_low": float(gap.low),
                                     "gap_high": float(gap.high)} | replace(
                    effect, verdict=with_change(effect.verdict, fired.change)).row())  # fmt: skip
    return rows


def worst_of(by_label: Mapping[str, Sequence[Effect]]) -> dict[tuple[str, str], Interval]:
    """(label, metric) of the group with most harm -> how much more that is than of the next one (Welch).

    Of groups with at least `LEAST` sequences; nothing where there are not two of them, or where a harm is not finite:
    it may be the greatest, and has no interval.
    """
    found: dict[tuple[str, str], Interval] = {}
    for metric in dict.fromkeys(e.metric for effects in by_label.values() for e in effects):
        mine = [(label, e.harm, e.n_sequences) for label, effects in by_label.items() for e in effects
                if e.metric == metric and e.harm is not None]  # fmt: skip
        known = [(label, harm) for label, harm, n in mine if n >= LEAST]
        known.sort(key=lambda pair: -float(pair[1].estimate))
        if len(known) > 1 and all(np.isfinite(harm.estimate) for _, harm, _ in mine):
            found[known[0][0], metric] = difference_interval(known[0][1], known[1][1])
    return found


def _targets_of(paired: Paired, name: str) -> np.ndarray:
    return paired.n_targets_of.get(name, paired.n_targets)


class _Pairs:
    """A metric of chosen sequences, without an edit and with it, where it is known.

    Args:
        known: (N,) of which sequences; old, new: of these; weights: targets of these.
    """

    def __init__(self, paired: Paired, name: str, metric: str, chosen: np.ndarray) -> None:
        self.paired, self.name, self.metric = paired, name, metric
        self.key = "nll" if metric in _PERPLEXITIES else metric
        old, new = self.of(name)
        targets = _targets_of(paired, name)
        known = chosen & (targets > 0) & ~np.isnan(old)  # a sequence may lack a statistic: it has no findings, say
        if metric in SINK_METRICS and not np.isnan(new[known]).all():
            known &= ~np.isnan(new)  # or the edit has taken that token away
        self.known, self.old, self.new, self.targets = known, old[known], new[known], targets[known]

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) without an edit and with it; NaN where it was not measured."""
        after, base = self.paired.edited.get(name, {}), self.paired.baseline | self.paired.baseline_of.get(name, {})
        n = len(self.paired.n_targets)
        start = np.full(n, np.nan if self.key in SINK_METRICS else float(self.key == "top1_agreement"))
        return base.get(self.key, start), after.get(self.key, np.full(n, np.nan))

    def partner(self, word: str) -> str:
        """The edit to compare with, of the same cluster ("zero 507@start") or layers ("zero, 3 layers")."""
        own = [f"{word}{sign}{self.name.rpartition(sign)[2]}" for sign in (" ", ", ")]
        return next((name for name in own if name in self.paired.edited), word)

    @property
    def weights(self) -> np.ndarray | None:
        return self.targets if self.metric == "perplexity" else None

    @property
    def answers(self) -> bool:
        """Whether each sequence has one answer, right or wrong."""
        both = np.concatenate([self.old, self.new])
        return self.metric not in _CONTINUOUS and bool((self.targets == 1).all() and np.isin(both, (0, 1)).all())

    def interval(self, old: np.ndarray, new: np.ndarray) -> Interval:
        """Of the mean difference."""
        if self.answers and np.isin(old, (0, 1)).all():
            return proportion_interval(float((old > new).sum()), float((old < new).sum()), len(old))
        with np.errstate(invalid="ignore"):
            return mean_interval(new - old, self.weights)


def _effect(pairs: _Pairs, task: str, margin: float) -> Effect | None:
    """None where the metric is known of no sequence."""
    old, new, n = pairs.old, pairs.new, int(pairs.known.sum())
    if not n:
        return None
    metric = f"{task}/{pairs.metric}" if task else pairs.metric
    change, w = pairs.interval(old, new), pairs.targets if pairs.weights is not None else np.ones(n)
    low, high = float(change.low), float(change.high)
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = (float((x * w).sum() / w.sum()) for x in (old, new))
        if pairs.metric in _PERPLEXITIES:
            a, b = float(np.exp(a)), float(np.exp(b))
            low, high = (float(a * np.expm1(x)) for x in (low, high))
    targets = float(pairs.targets.sum()) if pairs.metric in (*METRICS, *_PERPLEXITIES) else math.nan
    effect = Effect(metric, a, b, low, high, n, targets, beyond=_beyond(pairs))
    unit = unit_of(metric)
    if not unit:
        return effect
    harm = change if unit == "nats" else Interval(-change.estimate, -change.high, -change.low, change.se, change.df)
    verdict = verdict_of({"metric": metric, "baseline": a, "edited": b, "ci_low": low, "ci_high": high,
                          "nats_low": harm.low, "nats_high": harm.high, "n_sequences": n}, margin)  # fmt: skip
    share = _share(pairs, margin) if unit == "nats" else UNKNOWN
    effect = replace(effect, harm=harm, share=share, verdict=verdict)
    if verdict != OPEN or not shows(metric, a):
        return effect
    if pairs.answers:
        more = needed_answers(float((old > new).sum()), float((old < new).sum()), n, margin, LEAST)
    else:
        more = needed(float(harm.estimate), float(harm.se) * math.sqrt(n), margin, LEAST)
    return replace(effect, n_needed=more)


def _share(pairs: _Pairs, margin: float) -> Interval:
    """Of the harm that zero does, over the same sequences; unavailable where that is not beyond the margin itself."""
    zero = pairs.partner(ZERO)
    old, new = (x[pairs.known] for x in pairs.of(zero))
    with np.errstate(invalid="ignore"):
        mine, of_zero = pairs.new - pairs.old, new - old
    low = float(mean_interval(of_zero, pairs.weights).low)
    beyond = pairs.name != zero and len(old) >= LEAST and low > margin
    return ratio_interval(mine, of_zero, pairs.weights) if beyond else UNKNOWN


def _beyond(pairs: _Pairs) -> Interval:
    """How much more it moves than with the control, of a quantity that moves one way only."""
    random = pairs.partner(CONTROL)
    if pairs.metric not in ONE_SIDED or pairs.name == random:
        return UNKNOWN
    _, control = pairs.of(random)
    return pairs.interval(control[pairs.known], pairs.new)
