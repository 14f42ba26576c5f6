"""What a model predicts, and how far two predictions are apart: loss, KL, agreement, top-1 probability, accuracy.

Shapes: B batch, T tokens, V vocabulary or classes, N targets, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.interventions.labels import n_classes
from massact.models import Model
from massact.records.errors import UserError
from massact.trace import unchanged

ROWS = 256  # of logits turned into probabilities at once
MOST_KEPT_BYTES = 1 << 28  # of probabilities without an edit, of one sequence; beyond it they are made again
MASKED_SHARE = 0.15  # of the tokens of a masked language model: Devlin 2019


@dataclass(frozen=True)
class Task:
    """What a model is asked to predict.

    Args:
        ahead: how far: 1 the next token, 0 the one that a decoder is about to read; None: no token of the text.
        since: targets before this position do not count.
        mask_id: token that hides others, of a masked language model; None: nothing is hidden.
        kept: token ids that are never hidden (special ones).
        seed: of which tokens are hidden.
        placeholders: token ids in whose place images or sounds stand: no text, so no targets.
    """

    ahead: int | None
    since: int = 0
    mask_id: int | None = None
    kept: frozenset[int] = frozenset()
    seed: int = 0
    placeholders: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Asked:
    """A batch as the model gets it, and what it is to predict.

    Args:
        batch: with tokens hidden, where the model is a masked one.
        ids_BT: the tokens of the text; None where there are none.
        hidden: of every row, the positions that are hidden; empty where none are.
    """

    batch: Batch
    ids_BT: Tensor | None
    hidden: list[Tensor] = field(default_factory=list)


def task_of(model: Model, since: int = 0, seed: int = 0, corpus: Corpus | None = None) -> Task:
    """What a model predicts, read from what it is.

    A masked language model predicts hidden tokens, 15 % of the text, where its tokenizer has a mask token; without
    one there is no loss to speak of: every token is seen by its own prediction. Of recordings, the decoder predicts the
    transcript behind its start tokens; without a transcript there is no loss.
    """
    recordings = None if corpus is None else corpus.recordings
    if recordings is not None:
        spoken = recordings.texts is not None and bool(recordings.prompt)
        return Task(1, max(since, len(recordings.prompt))) if spoken else Task(None, since)
    if getattr(getattr(model.module, "config", None), "is_encoder_decoder", False):
        return Task(0, since, placeholders=frozenset(model.placeholders))
    generates = getattr(model.module, "can_generate", None)
    if generates is None or generates():
        return Task(1, since, placeholders=frozenset(model.placeholders))
    mask_id = getattr(model.tokenizer, "mask_token_id", None)
    special = getattr(model.tokenizer, "all_special_ids", None) or ()
    return Task(None, since, mask_id, frozenset(special), seed)


def ask(batch: Batch, task: Task) -> Asked:
    """Hide what is to be predicted; the same positions whenever a sequence comes."""
    ids_BT = batch.inputs.get("input_ids", batch.inputs.get("decoder_input_ids"))
    if ids_BT is None or task.mask_id is None:
        return Asked(batch, ids_BT)
    new_BT, hidden = ids_BT.clone(), []
    for b, sequence in enumerate(batch.sequences):
        rows = batch.rows[b]
        at_T = torch.arange(ids_BT.shape[1])[rows if rows is not None else slice(None)]
        free = [int(t) for t in at_T if int(ids_BT[b, t]) not in task.kept and int(t) >= task.since]
        draw = np.random.default_rng((task.seed, sequence))
        n = max(1, round(MASKED_SHARE * len(free))) if free else 0
        hidden.append(torch.tensor(sorted(draw.choice(free, n, replace=False).tolist()) if n else [], dtype=torch.long))
        new_BT[b, hidden[-1]] = task.mask_id
    return Asked(replace(batch, inputs=batch.inputs | {"input_ids": new_BT}), ids_BT, hidden)


class NoHead(UserError):
    """A model that gives no logits, on which no edit has an effect to measure."""


def logits_of(model: Model, batch: Batch) -> Tensor:
    """Logits (B, T, V) of a language model, (B, V) of a classifier.

    Raises:
        NoHead: the model has no head.
    """
    inputs = {k: v for k, v in batch.inputs.items() if k != "labels"}
    if model.head is not None:
        return model.head(model, inputs)
    if model.main_input == "input_ids" and hasattr(model.module, "get_image_features") and "input_ids" not in inputs:
        raise NoHead(
            f"{model.name or 'The model'} gives no logits of images alone, so an edit has no effect to measure on it.",
            do="Classify by the names of classes: --zero-shot (in Python head=ZeroShot(...)).",
        )
    place = [model.anatomy.logits] if model.anatomy.logits is not None else []
    if place:
        out = model.run(inputs, places=place)
    else:
        with unchanged(model.module):
            out = model.module(**{k: v.to(model.device) for k, v in inputs.items()}, **model.arguments)
    logits = getattr(out, "logits", None)
    if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == n_classes(model):  # a classifier of timm
        return out
    if not isinstance(logits, Tensor):
        raise NoHead(
            f"{model.name or 'The model'} gives no logits, so an edit has no effect to measure on it.",
            do="Load it with its language-model or classification head; for images give --head or --zero-shot.",
        )
    return logits


class Before:
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


def befores(logits: Tensor, batch: Batch) -> list[Before]:
    """What every sequence of a batch is compared with."""
    if logits.ndim == 2:
        return [Before(logits[b : b + 1], None) for b in range(len(logits))]
    return [Before(logits[b], rows) for b, rows in enumerate(_rows_of(batch, logits))]


def measured(
    logits: Tensor, before: list[Before] | None, asked: Asked, labels: Tensor | None, task: Task
) -> dict[str, np.ndarray]:
    """Metrics of each sequence of a batch: name -> (B,).

    Args:
        logits: with the edit, or without one.
        before: what was without the edit; None for the baseline itself.
        labels: (B,) classes.
    """
    rows, counted = [], _rows_of(asked.batch, logits)
    for b in range(len(logits)):
        old = None if before is None else before[b]
        if logits.ndim == 2:
            rows.append(_classified(logits[b], old, None if labels is None else int(labels[b])))
            continue
        if asked.ids_BT is None and set(asked.batch.inputs) & {"input_values", "input_features"}:
            kept_TV, _ = _counted(logits[b], counted[b], logits.shape[1])  # frames of sound: nothing is their target
            rows.append(_predicted(kept_TV, 0, old, kept_TV, (Task(None), torch.arange(len(kept_TV)))))
            continue
        if asked.ids_BT is None:
            raise UserError(
                f"The model gives outputs of shape {tuple(logits.shape)} for inputs that are no tokens.",
                "They are no classes of an image, and there is no text that they predict.",
                "Load it with a classification head.",
            )
        valid = slice(None) if counted[b] is None else counted[b]
        at_T = torch.arange(asked.ids_BT.shape[1])[valid]
        kept_TV, gone = _counted(logits[b], counted[b], asked.ids_BT.shape[1])
        known = _predicted(kept_TV, gone, old, asked.ids_BT[b][valid].to(logits.device), (task, at_T))
        if asked.hidden:
            known |= _filled_in(logits[b], asked.ids_BT[b], asked.hidden[b])
        rows.append(known)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _rows_of(batch: Batch, logits: Tensor) -> tuple[Any, ...]:
    """Which positions of each sequence's predictions count: those of the text, or of the decoder or frames."""
    return batch.rows if "input_ids" in batch.inputs else batch.rows_of(logits.shape[1])


def _classified(logits_V: Tensor, before: Before | None, label: int | None) -> dict[str, float]:
    logits_1V = logits_V[None]
    lse_1 = logits_1V.float().logsumexp(-1)
    known = {"n_targets": 1.0, "top1_probability": float((logits_V.max().float() - lse_1).exp())}
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
    return logits_TV[at[gone:] - gone], min(gone, len(at))


def _predicted(
    logits_TV: Tensor, gone: int, before: Before | None, ids_T: Tensor, asked: tuple[Task, Tensor]
) -> dict[str, float]:
    """Mean loss over the targets of one window (paper.md 2.1); mean KL, agreement, probability over its positions.

    Targets that are placeholders count in none of them. A window without a target (one token) has no numbers: NaN.
    """
    task, at_T = asked
    ahead = task.ahead or 0
    left = int((at_T[gone:] + ahead < task.since).sum())  # predictions of targets before `since`
    logits_NV, gone = logits_TV[left:], gone + left
    targets_N = ids_T[gone + ahead :]
    n = min(len(targets_N), len(logits_NV))
    logits_NV = logits_NV[:n]
    lse_N = torch.cat([x.float().logsumexp(-1) for x in logits_NV.split(ROWS)]) if n else logits_NV.new_zeros(0)

    text_N = torch.ones(n, dtype=torch.bool, device=logits_TV.device)
    if task.placeholders:
        text_N = ~torch.isin(targets_N[:n], torch.tensor(sorted(task.placeholders), device=targets_N.device))
    n_text = int(text_N.sum())

    def mean(x_N: Tensor) -> float:
        return float(x_N[text_N].double().mean()) if n_text else float("nan")

    top_N = logits_NV.argmax(-1)
    known = {"n_targets": float(n_text)}
    known["top1_probability"] = mean((logits_NV.gather(1, top_N[:, None])[:, 0].float() - lse_N).exp())
    if task.ahead is not None:
        known["nll"] = mean(lse_N - logits_NV.gather(1, targets_N[:n, None])[:, 0].float())
    if before is not None:
        known["kl"] = mean(before.kl(logits_NV, lse_N, gone))
        known["top1_agreement"] = mean(before.top_T[gone : gone + n] == top_N)
    return known


def _filled_in(logits_TV: Tensor, ids_T: Tensor, hidden_N: Tensor) -> dict[str, float]:
    """Mean loss of the hidden tokens that are still there; NaN where nothing is hidden."""
    gone = len(ids_T) - len(logits_TV)  # positions that an edit has taken away at the start
    hidden_N = hidden_N[hidden_N >= gone]
    n = len(hidden_N)
    if not n or int(ids_T.max()) >= logits_TV.shape[-1]:  # a head of few classes predicts no tokens
        return {"n_targets": float(n), "nll": float("nan")}
    rows_NV = logits_TV[(hidden_N - gone).to(logits_TV.device)].float()
    targets_N = ids_T[hidden_N].to(logits_TV.device)
    nll_N = rows_NV.logsumexp(-1) - rows_NV.gather(1, targets_N[:, None])[:, 0]
    return {"n_targets": float(n), "nll": float(nll_N.double().mean())}
