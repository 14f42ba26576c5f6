"""Paired evaluation: every sequence once without an edit and once with each, and what differs.

Shapes: B batch, T tokens, V vocabulary or classes, N sequences, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.interventions.predictions import Asked, Predicted, Task, arrays, ask, logits_of, predicted, task_of
from massact.interventions.sinks import SINK_METRICS, Masses, Sinks, sink_probes, unseen_attention
from massact.models import Model
from massact.records.anatomy import Stack
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.trace import Edit, Fired, Together, observing
from massact.trace.edits import AnyEdit, check_fired
from massact.trace.replay import Prefix

# One number of every sequence; all but `perplexity` are means over sequences.
_PERPLEXITIES = ("perplexity", "perplexity_windowed")
LENIENT = ("edits", "sites")  # one batch may have nothing to edit, and an input may leave a part of the model out
METRICS = ("nll", "kl", "top1_agreement", "top1_probability", "accuracy")


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
    share_prefix: bool = True,
    sinks: Sinks | None = None,
    since: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Paired:
    """Run a corpus without edits and with each of them.

    Both sides of an effect are of the same targets: those positions of the text that both runs predict. The blocks
    before the layer of an edit are run once for all edits at that layer.

    Args:
        model: with a language-model head (loss of the next or of hidden tokens) or a classifier (with labels).
        corpus: what to evaluate on.
        edits: each evaluated on its own; those of one name are numbered, see `told_apart`.
        batch_size: sequences per forward pass.
        labels: (N,) classes, for accuracy.
        share_prefix: False runs every edit through the whole model (to check that it is the same).
        sinks: also every sink statistic, of the layers behind the edit. Needs a model of `with_attention`.
        since: targets before this position do not count.
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
        prefixes, tokens = _prefixes(model, edits) if share_prefix else {}, dict[int, list[int]]()
        with torch.inference_mode(), ExitStack() as stack:
            for prefix in prefixes.values():
                stack.enter_context(prefix.recording())
            probes = sink_probes(model, sinks, tokens, find=True)
            seen = stack.enter_context(observing(model, probes, batch=batch, lenient=LENIENT))
            logits = logits_of(model, asked.batch)
        first, before = Masses.of(seen), predicted(logits, asked, truth, task)
        base.append(arrays([p.numbers() for p in before]))
        for edit in edits:
            where, probes = _layer_of(model, edit), sink_probes(model, sinks, tokens, among=first)
            skipping = prefixes[where].skipping() if where in prefixes else nullcontext()
            with torch.inference_mode(), skipping:
                # It may leave a batch alone, but not all of them.
                with observing(model, probes, [edit], batch=batch, text=True, lenient=LENIENT) as seen:
                    changed = logits_of(model, asked.batch)
            fired[edit.name].add(seen.edits[0])
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


def _layer_of(model: Model, edit: AnyEdit) -> tuple[str, int] | None:
    """(stack, layer) of an edit of the hidden state after one block, the first of several; None for all others."""
    if isinstance(edit, Together):
        places = [_layer_of(model, one) for one in edit.edits]
        known = [place for place in places if place is not None]
        same = len(known) == len(places) > 0 and len({stack for stack, _ in known}) == 1
        return min(known) if same else None
    if not isinstance(edit, Edit):
        return None
    sites: list[Site] = list(model.anatomy.select(edit.site))
    if len(sites) != 1 or sites[0].point != "resid_post" or sites[0].layer < 1:
        return None
    if model.placeholders and sites[0].stack != model.anatomy.stacks[-1].name:
        return None  # a mixed model may take the features of an image from any block of its tower: all must run
    if model.anatomy.stack(sites[0].stack).skips:
        return None  # what earlier blocks gave is read again later (U-Net): all must run
    return sites[0].stack, sites[0].layer


def _prefixes(model: Model, edits: Sequence[AnyEdit]) -> dict[tuple[str, int], Prefix]:
    wanted = {where for e in edits if (where := _layer_of(model, e)) is not None}
    stacks: dict[str, Stack] = {s.name: s for s in model.anatomy.stacks}
    return {(name, layer): Prefix(model.module, stacks[name], layer) for name, layer in wanted}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All batches in a row; without what is unavailable in all of them."""
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return {n: x for n, x in joined.items() if n not in SINK_METRICS or not np.isnan(x).all()}


@dataclass(frozen=True)
class Effect:
    """One metric of one edit over some sequences: without, with, the difference and its interval.

    `n_targets`: targets of these sequences, the same ones on both sides; NaN for metrics that have none.
    """

    metric: str
    baseline: float
    edited: float
    ci_low: float
    ci_high: float
    n_sequences: int
    n_targets: float = float("nan")

    @property
    def delta(self) -> float:
        return self.edited - self.baseline


def effects_of(paired: Paired, name: str, chosen: np.ndarray, seed: int = 0, resamples: int = 1000) -> list[Effect]:
    """Effects of one edit over chosen sequences, with 95 % intervals by bootstrap over sequences (paired).

    perplexity = exp(sum of nll over all targets / targets); perplexity_windowed = exp(mean over windows of their
    mean nll), as Sun 2024 and Owen 2025 compute it; all other metrics are means over sequences. One sequence says
    nothing about others: its interval is NaN.

    Args:
        paired: what was measured.
        name: of the edit.
        chosen: (N,) bool.
    """
    n_targets = paired.n_targets_of.get(name, paired.n_targets)
    chosen = chosen & (n_targets > 0)
    n, after = n_targets[chosen], paired.edited[name]
    base = paired.baseline | paired.baseline_of.get(name, {})
    found: list[Effect] = []

    def add(metric: str, old: np.ndarray, new: np.ndarray, reduce: Callable[[np.ndarray, np.ndarray], Any]) -> None:
        known = ~np.isnan(old)  # a sequence may lack a statistic: it has no token with findings, say
        if metric in SINK_METRICS and not np.isnan(new[known]).all():
            known &= ~np.isnan(new)  # or the edit has taken that token away
        if not known.any():
            return
        old, new, w = old[known], new[known], n[known]
        draw = np.random.default_rng(seed).integers(0, len(w), (resamples, len(w)))
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = reduce(old[None], w[None])[0], reduce(new[None], w[None])[0]
            deltas = reduce(new[draw], w[draw]) - reduce(old[draw], w[draw])
        # An order statistic, not a weighted mean of two: some may be infinite. NaN: nothing is known (one sequence).
        unknown = len(w) < 2 or np.isnan(deltas).any()
        low, high = (np.nan, np.nan) if unknown else np.quantile(deltas, [0.025, 0.975], method="inverted_cdf")
        targets = float(w.sum()) if metric in (*METRICS, *_PERPLEXITIES) else float("nan")
        found.append(Effect(metric, float(a), float(b), float(low), float(high), len(w), targets))

    zeros, ones = np.zeros(len(n)), np.ones(len(n))
    if "nll" in base and (n > 1).any():
        old, new = base["nll"][chosen], after["nll"][chosen]
        pooled, windowed = _PERPLEXITIES
        add(pooled, old, new, lambda x, w: np.exp((x * w).sum(1) / w.sum(1)))
        add(windowed, old, new, lambda x, w: np.exp(x.mean(1)))
    for metric in (*METRICS, *(m for m in after if m not in METRICS)):
        if metric in after and (metric in base or metric not in SINK_METRICS):
            start = base[metric][chosen] if metric in base else ones if metric == "top1_agreement" else zeros
            add(metric, start, after[metric][chosen], lambda x, w: x.mean(1))
    return found
