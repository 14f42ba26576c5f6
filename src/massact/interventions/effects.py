"""Paired evaluation: every sequence once without an edit and once with each, and what differs.

Shapes: B batch, T tokens, V vocabulary or classes, N sequences, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.records.anatomy import AttentionPlace, Stack
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.trace import Edit, Fired
from massact.trace.attention import AttentionCall, attending
from massact.trace.edits import AnyEdit, check_fired, edited
from massact.trace.measurements import attended_sequences
from massact.trace.replay import Prefix

ROWS = 256  # of logits turned into probabilities at once
MOST_KEPT_BYTES = 1 << 28  # of probabilities without an edit, of one sequence; beyond it they are made again
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
        baseline_of: name of the edit -> metric -> (N,), for metrics that are of the layers behind the edit.
    """

    sequences: np.ndarray
    n_targets: np.ndarray
    baseline: dict[str, np.ndarray]
    edited: dict[str, dict[str, np.ndarray]]
    fired: dict[str, Fired] = field(default_factory=dict)
    baseline_of: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def evaluate(
    model: Model,
    corpus: Corpus,
    edits: Sequence[AnyEdit],
    *,
    batch_size: int = 1,
    labels: Tensor | None = None,
    share_prefix: bool = True,
    sinks: bool = False,
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
        sinks: also the attention on the first position, in the layers behind the edit: mean over queries and heads.
            Needs a model of `with_attention`.
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
    own: dict[str, list[dict[str, np.ndarray]]] = {n: [] for n in names}
    fired = {n: Fired(n) for n in names}
    done, ahead = 0, _ahead(model)
    for batch in corpus.batches(batch_size):
        truth = None if labels is None else labels[list(batch.sequences)]
        prefixes = _prefixes(model, edits) if share_prefix else {}
        with torch.inference_mode(), ExitStack() as stack:
            for prefix in prefixes.values():
                stack.enter_context(prefix.recording())
            first = stack.enter_context(_first_mass(model, batch, sinks))
            logits = _logits(model, batch)
        base.append(_measured(logits, None, batch, truth, ahead))
        before = _befores(logits, batch) if edits else []
        for edit in edits:
            with torch.inference_mode(), _silently(model, edit, fired[edit.name], batch):
                with ExitStack() as stack:
                    where = _layer_of(model, edit)
                    if where in prefixes:
                        stack.enter_context(prefixes[where].skipping())  # type: ignore[index]
                    now = stack.enter_context(_first_mass(model, batch, sinks))
                    changed = _logits(model, batch)
            after[edit.name].append(_measured(changed, before, batch, truth, ahead))
            if sinks:
                behind = [s for s in now if where is None or (s.stack == where[0] and s.layer > where[1])]
                if behind:
                    after[edit.name][-1]["attention_first"] = np.mean([now[s] for s in behind], axis=0)
                    own[edit.name].append({"attention_first": np.mean([first[s] for s in behind], axis=0)})
        done += len(batch.sequences)
        if progress is not None:
            progress(done, corpus.n_sequences)
    check_fired(list(fired.values()))
    joined = _joined(base)
    return Paired(
        np.arange(corpus.n_sequences), joined.pop("n_targets"), joined,
        {n: {k: v for k, v in _joined(rows).items() if k != "n_targets"} for n, rows in after.items()}, fired,
        {n: _joined(rows) for n, rows in own.items() if rows},
    )  # fmt: skip


@contextmanager
def _silently(model: Model, edit: AnyEdit, total: Fired, batch: Batch) -> Iterator[None]:
    """One batch under an edit: it may leave a batch alone, but not all of them."""
    counts: list[Fired] = []
    try:
        with edited(model, edit, sequences=batch.sequences) as counts:
            yield
    except WorkError:
        if not counts or any(c.n_calls == 0 for c in counts):
            raise
    total.n_calls += sum(c.n_calls for c in counts)
    total.n_elements += sum(int(c.n_elements) for c in counts)


@contextmanager
def _first_mass(model: Model, batch: Batch, wanted: bool) -> Iterator[dict[Site, np.ndarray]]:
    """Attention on the first position that counts, mean over later queries and heads: (B,) of every layer."""
    masses: dict[Site, np.ndarray] = {}

    def see(site: Site, place: AttentionPlace) -> Callable[[AttentionCall], None]:
        def look(call: AttentionCall) -> None:
            masses[site] = np.array(
                [
                    float(a.probs(torch.zeros(1, dtype=torch.long, device=a.device))[:, 1:].mean())
                    for a, _ in attended_sequences(call, place, batch)
                ]
            )

        return look

    places = {s: p for s, p in model.anatomy.attentions.items() if s.point == "attention"} if wanted else {}
    with attending(model.module, {p: see(s, p) for s, p in places.items()}) as heads:
        heads.begin()
        yield masses


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


def _ahead(model: Model) -> int | None:
    """How far ahead a language model predicts: 1 the next token, 0 the one that its decoder is about to read.

    None for masked models: they predict no token that they have not seen, so there is no loss to speak of.
    """
    if getattr(getattr(model.module, "config", None), "is_encoder_decoder", False):
        return 0
    generates = getattr(model.module, "can_generate", None)
    return 1 if generates is None or generates() else None


def _measured(
    logits: Tensor, before: list[_Before] | None, batch: Batch, labels: Tensor | None, ahead: int | None
) -> dict[str, np.ndarray]:
    """Metrics of each sequence of a batch; `before`: what was without the edit; `ahead`: see `_ahead`."""
    rows = []
    for b in range(len(logits)):
        old = None if before is None else before[b]
        if logits.ndim == 2:
            rows.append(_classified(logits[b], old, None if labels is None else int(labels[b])))
        else:
            ids_T, width = _targets(batch, b).to(logits.device), batch.inputs["input_ids"].shape[1]
            rows.append(_predicted(_counted(logits[b], batch.rows[b], width), old, ids_T, ahead))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _befores(logits: Tensor, batch: Batch) -> list[_Before]:
    if logits.ndim == 2:
        return [_Before(logits[b : b + 1], None) for b in range(len(logits))]
    return [_Before(logits[b], batch.rows[b]) for b in range(len(logits))]


def _targets(batch: Batch, b: int) -> Tensor:
    """The tokens of one sequence that count."""
    ids_T = batch.inputs["input_ids"][b]
    return ids_T if batch.rows[b] is None else ids_T[batch.rows[b]]


class _Before:
    """What the model gave for one sequence without an edit, ready to be compared with: log p, and p where it fits.

    With l the logits, p = softmax(l_before): KL = sum p l_before - lse_before - sum p l_after + lse_after.
    """

    def __init__(self, logits_TV: Tensor, rows: Any) -> None:
        self.logits_TV = logits_TV if rows is None else logits_TV[rows]
        self.lse_T = torch.cat([x.float().logsumexp(-1) for x in self.logits_TV.split(ROWS)])
        self.top_T = self.logits_TV.argmax(-1)
        fits = self.logits_TV.numel() * 4 <= MOST_KEPT_BYTES
        self.p_TV = (self.logits_TV.float() - self.lse_T[:, None]).exp_() if fits else None
        self.own_T = self._against(self.logits_TV, slice(0, len(self.logits_TV)))

    def _against(self, logits_TV: Tensor, rows: slice) -> Tensor:
        """sum over the vocabulary of p l, for rows of it."""
        parts = []
        for start in range(rows.start, rows.stop, ROWS):
            part = slice(start, min(start + ROWS, rows.stop))
            p_RV = self.p_TV[part] if self.p_TV is not None else (
                self.logits_TV[part].float() - self.lse_T[part, None]).exp_()  # fmt: skip
            shifted = slice(part.start - rows.start, part.stop - rows.start)
            parts.append(torch.einsum("rv,rv->r", p_RV, logits_TV[shifted].float()))
        return torch.cat(parts) if parts else self.lse_T[:0]

    def kl(self, logits_RV: Tensor, lse_R: Tensor, first: int) -> Tensor:
        """KL(before || after) of each row; `first` is the row here that is row 0 there."""
        rows = slice(first, first + len(logits_RV))
        kl_R = self.own_T[rows] - self.lse_T[rows] - self._against(logits_RV, rows) + lse_R
        return kl_R.clamp(min=0)  # rounding alone takes it below


def _classified(logits_V: Tensor, before: _Before | None, label: int | None) -> dict[str, float]:
    logits_1V = logits_V[None]
    lse_1 = logits_1V.float().logsumexp(-1)
    known = {"n_targets": 1.0}
    if label is not None:
        known |= {"nll": float(lse_1 - logits_V[label].float()), "accuracy": float(logits_V.argmax() == label)}
    if before is not None:
        known["kl"] = float(before.kl(logits_1V, lse_1, 0))
        known["top1_agreement"] = float(before.top_T[0] == logits_V.argmax())
    return known


def _counted(logits_TV: Tensor, rows: Any, width: int) -> tuple[Tensor, int]:
    """The logits at positions that count, and how many of these the edit has taken away at the start.

    `rows`: which of the `width` positions of the batch count; None for all.
    """
    gone = width - len(logits_TV)
    if rows is None:
        return logits_TV, gone
    if not gone:
        return logits_TV[rows], 0
    at = torch.arange(width, device=logits_TV.device)[rows]
    return logits_TV[at[at >= gone] - gone], int((at < gone).sum())


def _predicted(
    counted: tuple[Tensor, int], before: _Before | None, ids_T: Tensor, ahead: int | None
) -> dict[str, float]:
    """Mean loss over the targets of one window (paper.md 2.1), mean KL and agreement over the same positions.

    A window without a target (one token) has no numbers: NaN.
    """
    logits_TV, gone = counted
    targets_N = ids_T[gone + (ahead or 0) :]
    n = min(len(targets_N), len(logits_TV))
    logits_NV = logits_TV[:n]
    lse_N = torch.cat([x.float().logsumexp(-1) for x in logits_NV.split(ROWS)]) if n else logits_NV.new_zeros(0)

    def mean(x_N: Tensor) -> float:
        return float(x_N.double().mean()) if n else float("nan")

    known = {"n_targets": float(n)}
    if ahead is not None:
        known["nll"] = mean(lse_N - logits_NV.gather(1, targets_N[:n, None])[:, 0].float())
    if before is not None:
        known["kl"] = mean(before.kl(logits_NV, lse_N, gone))
        known["top1_agreement"] = mean(before.top_T[gone : gone + n] == logits_NV.argmax(-1))
    return known


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
    chosen = chosen & (paired.n_targets > 0)
    n, after = paired.n_targets[chosen], paired.edited[name]
    base = paired.baseline | paired.baseline_of.get(name, {})
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
