"""Paired effects of ways to have a prefix: slots, the prefix in front, super weights at zero, on the same targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.interventions.effects import LENIENT, Paired
from massact.interventions.predictions import Predicted, arrays, ask, logits_of, predicted, task_of
from massact.models import Model
from massact.prefixes.search import Progress
from massact.trace import Fired, WeightEdit, observing
from massact.trace.edits import check_fired


@dataclass(frozen=True)
class Way:
    """One way to run a text.

    Args:
        name: of the row.
        model: that runs it.
        ids: in front of every text; its predictions there do not count.
        edits: of weights.
    """

    name: str
    model: Model
    ids: tuple[int, ...] = ()
    edits: tuple[WeightEdit, ...] = ()


def fronted(batch: Batch, ids: Sequence[int]) -> Batch:
    """A batch with tokens in front of every text."""
    inputs: dict[str, Tensor] = dict(batch.inputs)
    for name, value in (("input_ids", ids), ("attention_mask", [1] * len(ids))):
        if name in inputs:
            more = torch.tensor([list(value)], dtype=inputs[name].dtype).expand(len(inputs[name]), -1)
            inputs[name] = torch.cat([more.to(inputs[name].device), inputs[name]], 1)
    return replace(batch, inputs=inputs)


def compare(base: Way, ways: Sequence[Way], text: Corpus, batch_size: int, progress: Progress) -> Paired:
    """Every text once as it is and once each way: losses, divergences and agreement over the same targets.

    Args:
        base: what effects are the difference to.
        text: the texts without anything in front.
        progress: called with (stage, sequences done, sequences in all).

    Raises:
        WorkError: an edit of weights changed nothing.
    """
    task = task_of(base.model)
    before: list[dict[str, np.ndarray]] = []
    after: dict[str, list[dict[str, np.ndarray]]] = {way.name: [] for way in ways}
    fired = {way.name: [Fired(e.name) for e in way.edits] for way in ways}
    done = 0
    for batch in text.batches(batch_size):
        asked = ask(batch, task)
        old = predicted(_run(base, batch, []), asked, None, task)
        before.append(arrays([p.numbers() for p in old]))
        for way in ways:
            new = predicted(_run(way, batch, fired[way.name]), asked, None, task, among=old)
            after[way.name].append(arrays(_compared(old, new)))
        done += len(batch.sequences)
        progress("effects", done, text.n_sequences)
    for every in fired.values():
        check_fired(every)
    first = _joined(before)
    n_targets = first.pop("n_targets")
    edited = {name: {k: x for k, x in _joined(rows).items() if k != "n_targets"} for name, rows in after.items()}
    return Paired(np.arange(len(n_targets)), n_targets, first, edited, {w.name: _fired(w, fired[w.name]) for w in ways})


def _run(way: Way, batch: Batch, fired: list[Fired]) -> Tensor:
    """Logits of the text alone, (B, T, V)."""
    given: Any = fronted(batch, way.ids)
    with torch.inference_mode(), observing(way.model, edits=way.edits, batch=given, lenient=LENIENT) as seen:
        logits = logits_of(way.model, given)
    for total, now in zip(fired, seen.edits, strict=False):
        total.add(now)
    return logits[:, len(way.ids) :]


def _compared(old: list[Predicted], new: list[Predicted]) -> list[dict[str, float]]:
    return [a.numbers() | b.compared(a) for b, a in zip(old, new, strict=True)]


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _fired(way: Way, edits: Sequence[Fired]) -> Fired:
    """What the edits of a way did together; a way without edits is another model, whose change has no size."""
    if not edits:
        return Fired(way.name, known=False)
    total = Fired(way.name)
    for one in edits:
        total.add(one)
    return total
