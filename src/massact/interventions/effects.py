"""Paired evaluation: every sequence once without an edit and once with each, and what differs.

Shapes: B batch, T tokens, V vocabulary or classes, N sequences, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.records.anatomy import Stack
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.trace import Edit, Fired
from massact.trace.edits import AnyEdit, check_fired, edited
from massact.trace.replay import Prefix

ROWS = 256  # of logits turned into probabilities at once
# Per sequence: sum over its targets, or its own number. All are means over sequences but `perplexity`.
METRICS = ("nll", "kl", "top1_agreement", "accuracy")


@dataclass(frozen=True)
class Paired:
    """What was measured of every sequence, with and without edits.

    Args:
        sequences: (N,) index in the corpus.
        n_targets: (N,) tokens predicted of each; 1 for an image.
        baseline: metric -> (N,).
        edited: name of the edit -> metric -> (N,).
        fired: what each edit did.
    """

    sequences: np.ndarray
    n_targets: np.ndarray
    baseline: dict[str, np.ndarray]
    edited: dict[str, dict[str, np.ndarray]]
    fired: dict[str, Fired] = field(default_factory=dict)


def evaluate(
    model: Model,
    corpus: Corpus,
    edits: Sequence[AnyEdit],
    *,
    batch_size: int = 1,
    labels: Tensor | None = None,
    share_prefix: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Paired:
    """Run a corpus without edits and with each of them.

    The blocks before the layer of an edit are run once for all edits at that layer.

    Args:
        model: with a language-model head (next-token loss) or a classifier (with labels).
        corpus: what to evaluate on.
        edits: each evaluated on its own; their names must differ.
        batch_size: sequences per forward pass.
        labels: (N,) classes, for accuracy.
        share_prefix: False runs every edit through the whole model (to check that it is the same).
        progress: called with sequences done and sequences in all.

    Raises:
        UserError: two edits of one name, or a model without logits.
        WorkError: an edit changed nothing.
    """
    names = [e.name for e in edits]
    if len(set(names)) < len(names):
        raise UserError(f"Two edits are called alike: {', '.join(names)}.", do="Name them apart.")
    base: list[dict[str, np.ndarray]] = []
    after: dict[str, list[dict[str, np.ndarray]]] = {n: [] for n in names}
    fired = {n: Fired(n) for n in names}
    done = 0
    for batch in corpus.batches(batch_size):
        truth = None if labels is None else labels[list(batch.sequences)]
        prefixes = _prefixes(model, edits) if share_prefix else {}
        with torch.inference_mode(), ExitStack() as stack:
            for prefix in prefixes.values():
                stack.enter_context(prefix.recording())
            logits = _logits(model, batch)
        base.append(_measured(logits, None, batch, truth))
        for edit in edits:
            with torch.inference_mode(), _silently(model, edit, fired[edit.name]):
                with ExitStack() as stack:
                    where = _layer_of(model, edit)
                    if where in prefixes:
                        stack.enter_context(prefixes[where].skipping())  # type: ignore[index]
                    changed = _logits(model, batch)
            after[edit.name].append(_measured(changed, logits, batch, truth))
        done += len(batch.sequences)
        if progress is not None:
            progress(done, corpus.n_sequences)
    check_fired(list(fired.values()))
    joined = _joined(base)
    return Paired(
        np.arange(corpus.n_sequences), joined.pop("n_targets"), joined,
        {n: {k: v for k, v in _joined(rows).items() if k != "n_targets"} for n, rows in after.items()}, fired,
    )  # fmt: skip


@contextmanager
def _silently(model: Model, edit: AnyEdit, total: Fired) -> Iterator[None]:
    """One batch under an edit: it may leave a batch alone, but not all of them."""
    counts: list[Fired] = []
    try:
        with edited(model, edit) as counts:
            yield
    except WorkError:
        if not counts or int(counts[0].n_elements):
            raise
    total.n_calls += counts[0].n_calls
    total.n_elements += int(counts[0].n_elements)


def _layer_of(model: Model, edit: AnyEdit) -> tuple[str, int] | None:
    """(stack, layer) of an edit of the hidden state after one block; None for all others."""
    if not isinstance(edit, Edit):
        return None
    sites: list[Site] = list(model.anatomy.select(edit.site))
    if len(sites) != 1 or sites[0].point != "resid_post" or sites[0].layer < 1:
        return None
    return sites[0].stack, sites[0].layer


def _prefixes(model: Model, edits: Sequence[AnyEdit]) -> dict[tuple[str, int], Prefix]:
    wanted = {where for e in edits if (where := _layer_of(model, e)) is not None}
    stacks: dict[str, Stack] = {s.name: s for s in model.anatomy.stacks}
    return {(name, layer): Prefix(model.module, stacks[name], layer) for name, layer in wanted}


def _logits(model: Model, batch: Batch) -> Tensor:
    """Logits (B, T, V) of a language model, (B, V) of a classifier."""
    inputs = {k: v for k, v in batch.inputs.items() if k != "labels"}
    place = [model.anatomy.logits] if model.anatomy.logits is not None else []
    out = model.run(inputs, places=place) if place else model.module(
        **{k: v.to(model.device) for k, v in inputs.items()}, **model.arguments)  # fmt: skip
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{model.name or 'The model'} gives no logits, so an edit has no effect to measure on it.",
            do="Load it with its language-model or classification head.",
        )
    return logits


def _measured(logits: Tensor, before: Tensor | None, batch: Batch, labels: Tensor | None) -> dict[str, np.ndarray]:
    """Metrics of each sequence of a batch; `before`: logits without the edit."""
    if logits.ndim == 2:
        rows = [_classified(logits[b], None if before is None else before[b],
                            None if labels is None else int(labels[b])) for b in range(len(logits))]  # fmt: skip
    else:
        ids = batch.inputs["input_ids"].to(logits.device)
        rows = [_predicted(logits[b], None if before is None else before[b], ids[b], batch.rows[b])
                for b in range(len(logits))]  # fmt: skip
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _classified(logits_V: Tensor, before_V: Tensor | None, label: int | None) -> dict[str, float]:
    log_V = logits_V.float().log_softmax(-1)
    known = {"n_targets": 1.0}
    if label is not None:
        known |= {"nll": float(-log_V[label]), "accuracy": float(log_V.argmax() == label)}
    if before_V is not None:
        was_V = before_V.float().log_softmax(-1)
        known["kl"] = float((was_V.exp() * (was_V - log_V)).sum())
        known["top1_agreement"] = float(was_V.argmax() == log_V.argmax())
    return known


def _predicted(logits_TV: Tensor, before_TV: Tensor | None, ids_T: Tensor, rows: Any) -> dict[str, float]:
    """Mean loss over the T - 1 targets of one window (paper.md 2.1), mean KL and agreement over the same positions."""
    if rows is not None:
        logits_TV, ids_T = logits_TV[rows], ids_T[rows]
        before_TV = None if before_TV is None else before_TV[rows]
    n = len(ids_T) - 1
    if logits_TV.shape[0] < len(ids_T):  # the edit has taken tokens away at the start
        gone = len(ids_T) - logits_TV.shape[0]
        ids_T, n = ids_T[gone:], n - gone
        before_TV = None if before_TV is None else before_TV[gone:]
    totals = dict.fromkeys(("nll", "kl", "top1_agreement"), 0.0)
    for start in range(0, n, ROWS):
        part = slice(start, min(n, start + ROWS))
        log_RV = logits_TV[part].float().log_softmax(-1)
        targets_R = ids_T[1:][part]
        totals["nll"] -= float(log_RV.gather(1, targets_R[:, None]).double().sum())
        if before_TV is not None:
            was_RV = before_TV[part].float().log_softmax(-1)
            totals["kl"] += float((was_RV.exp() * (was_RV - log_RV)).double().sum())
            totals["top1_agreement"] += float((was_RV.argmax(-1) == log_RV.argmax(-1)).sum())
    if before_TV is None:
        totals = {"nll": totals["nll"]}
    return {k: v / max(n, 1) for k, v in totals.items()} | {"n_targets": float(n)}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Effect:
    """One metric of one edit over some sequences: without, with, the difference and its interval."""

    metric: str
    baseline: float
    edited: float
    ci_low: float
    ci_high: float
    n_sequences: int

    @property
    def delta(self) -> float:
        return self.edited - self.baseline


def effects_of(paired: Paired, name: str, chosen: np.ndarray, seed: int = 0, resamples: int = 1000) -> list[Effect]:
    """Effects of one edit over chosen sequences, with 95 % intervals by bootstrap over sequences (paired).

    perplexity = exp(sum of nll over all targets / targets); perplexity_windowed = exp(mean over windows of their
    mean nll), as Sun 2024 and Owen 2025 compute it; all other metrics are means over sequences.

    Args:
        paired: what was measured.
        name: of the edit.
        chosen: (N,) bool.
    """
    n, base, after = paired.n_targets[chosen], paired.baseline, paired.edited[name]
    draw = np.random.default_rng(seed).integers(0, len(n), (resamples, len(n)))
    found: list[Effect] = []

    def add(metric: str, old: np.ndarray, new: np.ndarray, reduce: Callable[[np.ndarray, np.ndarray], Any]) -> None:
        a, b = reduce(old[None], n[None])[0], reduce(new[None], n[None])[0]
        deltas = reduce(new[draw], n[draw]) - reduce(old[draw], n[draw])
        low, high = np.percentile(deltas[np.isfinite(deltas)], [2.5, 97.5]) if np.isfinite(deltas).any() else (
            np.nan, np.nan)  # fmt: skip
        found.append(Effect(metric, float(a), float(b), float(low), float(high), len(n)))

    zeros, ones = np.zeros(len(n)), np.ones(len(n))
    if "nll" in base and (n > 1).any():
        old, new = base["nll"][chosen], after["nll"][chosen]
        with np.errstate(over="ignore", invalid="ignore"):
            add("perplexity", old, new, lambda x, w: np.exp((x * w).sum(1) / w.sum(1)))
            add("perplexity_windowed", old, new, lambda x, w: np.exp(x.mean(1)))
    for metric in (*METRICS, *(m for m in after if m not in METRICS)):
        if metric in after:
            start = base[metric][chosen] if metric in base else ones if metric == "top1_agreement" else zeros
            add(metric, start, after[metric][chosen], lambda x, w: x.mean(1))
    return found


def renamed(edits: Mapping[str, AnyEdit]) -> list[AnyEdit]:
    """Edits under the names that a user gave them."""
    return [replace(edit, name=name) for name, edit in edits.items()]
