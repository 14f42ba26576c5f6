"""What a model predicts, and how far two predictions are apart: loss, KL, agreement, top-1 probability, accuracy.

Shapes: B batch, T tokens, V vocabulary or classes, N targets, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.corpora.batch import Positions
from massact.interventions.labels import n_classes
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.trace import unchanged
from massact.trace.text_rows import TextRows

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
        own = corpus is not None and "decoder_input_ids" in corpus.inputs  # a text of its own: its next tokens
        return Task(int(own), since, placeholders=frozenset(model.placeholders))
    generates = getattr(model.module, "can_generate", None)
    if generates is None or generates():
        return Task(1, since, placeholders=frozenset(model.placeholders))
    mask_id = getattr(model.tokenizer, "mask_token_id", None)
    special = getattr(model.tokenizer, "all_special_ids", None) or ()
    return Task(None, since, mask_id, frozenset(special), seed)


def ask(batch: Batch, task: Task) -> Asked:
    """Hide what is to be predicted; the same positions whenever a sequence comes."""
    ids_BT = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
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
            do="Load it with its language-model or classification head; for images give --head or --zero-shot; a "
            "module of your own must give an output with `logits` of tokens, (B, T, V), or of classes, (B, C).",
        )
    return logits


@dataclass(frozen=True)
class Targets:
    """What is predicted of one sequence: each target is a position of the text, which no edit renames.

    Args:
        at_N: their positions, ascending.
        rows_N: rows of the logits that predict them.
        loss_N: which of them have a loss; None where no loss is asked for.
    """

    at_N: Tensor
    rows_N: Tensor
    loss_N: Tensor | None

    def of(self, chosen_N: Tensor) -> Targets:
        """Some of them, by mask or by index."""
        loss_N = None if self.loss_N is None else self.loss_N[chosen_N]
        return Targets(self.at_N[chosen_N], self.rows_N[chosen_N], loss_N)


def targets_of(asked: Asked, b: int, logits: Tensor, task: Task, moved: TextRows | None = None) -> Targets:
    """What the rows of the logits (B, T, V) predict of sequence b.

    A row predicts the next one that counts, so behind a hole the first token behind it. A target that an edit has taken
    away, masked or added is none; one that it has moved is still the same one.

    Args:
        moved: where an edit has put the tokens; None where they are.

    Raises:
        WorkError: there are as many rows neither as tokens nor as the edit says.
    """
    T = logits.shape[1] if asked.ids_BT is None else asked.ids_BT.shape[1]
    if moved is None:
        counted = _counted(asked, T)[b]
        positions_R, rows = torch.arange(T), torch.arange(T)[counted if counted is not None else slice(None)]
    else:
        positions_R = moved.positions_BR[b]
        rows = torch.arange(len(positions_R)) if moved.counted_BR is None else moved.counted_BR[b].nonzero().flatten()
    if len(positions_R) != logits.shape[1]:
        raise WorkError(
            f"The model gives {logits.shape[1]} predictions for {len(positions_R)} tokens.",
            "Which token each of them is about is not known, so no two can be compared.",
        )
    ahead = task.ahead or 0
    at_N, rows_N = positions_R[rows[ahead:]], rows[: len(rows) - ahead]
    loss_N = torch.ones_like(at_N, dtype=torch.bool) if task.ahead is not None else None
    if asked.hidden:
        loss_N = torch.isin(at_N, asked.hidden[b])
    kept_N = (at_N >= task.since) & (at_N >= 0)
    if task.placeholders and asked.ids_BT is not None:
        ids_N = asked.ids_BT[b].cpu()[at_N.clamp(min=0)]
        kept_N &= ~torch.isin(ids_N, torch.tensor(sorted(task.placeholders)))
    found = Targets(at_N, rows_N, loss_N).of(kept_N)
    return found.of(found.at_N.argsort())


class Predicted:
    """What a model says of chosen targets of one sequence: N numbers each.

    With l the logits, p = softmax(l): KL = sum p l - sum p l_after + lse_after - lse, p of the run without an edit.

    Args:
        logits_RV: all rows.
        targets: of them.
        ids_N: the true token (or class) of each; None where no loss is asked for.
        kept: also keep p, where it fits, to be compared with.
        label: the one target is a class.
    """

    def __init__(
        self, logits_RV: Tensor, targets: Targets, ids_N: Tensor | None, *, kept: bool = False, label: bool = False
    ) -> None:
        self.label = label
        self.targets, self.logits_NV = targets, _picked(logits_RV, targets.rows_N)
        none = self.logits_NV.new_zeros(0, dtype=torch.float32)
        parts = [x.float().logsumexp(-1) for x in self.logits_NV.split(ROWS)]
        self.lse_N = torch.cat(parts) if len(self.logits_NV) else none
        self.top_N = self.logits_NV.argmax(-1)
        self.top1_N = (self._at(self.top_N) - self.lse_N).exp()
        V = self.logits_NV.shape[-1]
        # A head of few classes predicts no tokens.
        self.ids_N = None if ids_N is None or int(ids_N.max() if len(ids_N) else 0) >= V else ids_N.to(logits_RV.device)
        self.nll_N = None if self.ids_N is None else self.lse_N - self._at(self.ids_N)
        self.p_NV: Tensor | None = None
        if kept and self.logits_NV.numel() * 4 <= MOST_KEPT_BYTES:
            self.p_NV = (self.logits_NV.float() - self.lse_N[:, None]).exp_()
        self.own_N = self._against(self.logits_NV, torch.arange(len(self.logits_NV))) if kept else none

    def _at(self, ids_N: Tensor) -> Tensor:
        return self.logits_NV.gather(1, ids_N[:, None])[:, 0].float()

    def _against(self, other_MV: Tensor, rows_M: Tensor) -> Tensor:
        """sum over the vocabulary of p l, p of chosen rows of this one."""
        parts = []
        for at, x_RV in zip(rows_M.split(ROWS), other_MV.split(ROWS), strict=True):
            p_RV = _picked(self.p_NV, at) if self.p_NV is not None else (
                _picked(self.logits_NV, at).float() - _picked(self.lse_N, at)[:, None]).exp_()  # fmt: skip
            parts.append(torch.einsum("rv,rv->r", p_RV, x_RV.float()))
        return torch.cat(parts) if len(rows_M) else self.lse_N[:0]

    def numbers(self, at_M: Tensor | None = None) -> dict[str, float]:
        """Means over the targets (over those at some positions), and how many count; NaN where there are none."""
        at_N, loss_N = self.targets.at_N, self.targets.loss_N
        kept_N = torch.ones_like(at_N, dtype=torch.bool) if at_M is None else torch.isin(at_N, at_M)
        known = {"n_targets": float(kept_N.sum()), "top1_probability": _mean(self.top1_N, kept_N)}
        if loss_N is None:
            return known
        nll = float("nan") if self.nll_N is None else _mean(self.nll_N, kept_N & loss_N)
        known |= {"n_targets": float((kept_N & loss_N).sum()), "nll": nll}
        if self.label:
            known["accuracy"] = float("nan") if self.ids_N is None else float(self.top_N[0] == self.ids_N[0])
        return known

    def compared(self, after: Predicted) -> dict[str, float]:
        """KL(this || after) and agreement over the targets of `after`, which are all among these.

        Raises:
            WorkError: one of them is not.
        """
        rows_M = torch.searchsorted(self.targets.at_N, after.targets.at_N)
        found = self.targets.at_N[rows_M.clamp(max=max(0, len(self.targets.at_N) - 1))]
        if not torch.equal(found, after.targets.at_N):
            raise WorkError("Predictions of different tokens were about to be compared.",
                            f"Positions {found.tolist()[:8]} and {after.targets.at_N.tolist()[:8]}.")  # fmt: skip
        kl_M = _picked(self.own_N, rows_M) - self._against(after.logits_NV, rows_M)
        kl_M = (kl_M + (after.lse_N - _picked(self.lse_N, rows_M))).clamp(min=0)  # rounding alone takes it below
        return {"kl": _mean(kl_M), "top1_agreement": _mean(_picked(self.top_N, rows_M) == after.top_N)}


def _picked(x_N: Tensor, rows_M: Tensor) -> Tensor:
    """Some rows, without a copy where they lie side by side."""
    n = len(rows_M)
    if n and int(rows_M[-1]) - int(rows_M[0]) == n - 1 and bool((rows_M.diff() == 1).all()):
        return x_N[int(rows_M[0]) : int(rows_M[0]) + n]
    return x_N[rows_M.to(x_N.device)]


def _mean(x_N: Tensor, kept_N: Tensor | None = None) -> float:
    x_N = x_N if kept_N is None else x_N[kept_N.to(x_N.device)]
    return float(x_N.double().mean()) if len(x_N) else float("nan")


def predicted(
    logits: Tensor,
    asked: Asked,
    labels: Tensor | None,
    task: Task,
    *,
    moved: TextRows | None = None,
    among: list[Predicted] | None = None,
) -> list[Predicted]:
    """What a model says of each sequence of a batch.

    Args:
        logits: with an edit, or without one.
        labels: (B,) classes.
        moved: where the edit has put the tokens; None where they are.
        among: what it says without an edit: of these targets only; None: of all, and ready to be compared with.
    """
    if logits.ndim == 2:
        one = torch.zeros(1, dtype=torch.long)
        loss = None if labels is None else torch.ones(1, dtype=torch.bool)
        return [
            Predicted(logits[b : b + 1], Targets(one, one, loss), None if labels is None else labels[b : b + 1],
                      kept=among is None, label=labels is not None)
            for b in range(len(logits))
        ]  # fmt: skip
    if asked.ids_BT is None and not set(asked.batch.inputs) & {"input_values", "input_features"}:
        raise UserError(
            f"The model gives outputs of shape {tuple(logits.shape)} for inputs that are no tokens.",
            "They are no classes, and there is no text that they predict.",
            "Load it with a classification head, whose logits are (B, C); for a measure of your own run the "
            "model under massact.edited(...).",
        )
    if asked.ids_BT is None:
        task = Task(None)  # frames of sound: nothing is their target
    said = []
    for b in range(len(logits)):
        targets = targets_of(asked, b, logits, task, moved)
        if among is not None:
            targets = targets.of(torch.isin(targets.at_N, among[b].targets.at_N))
        ids_N = None if targets.loss_N is None or asked.ids_BT is None else asked.ids_BT[b].cpu()[targets.at_N]
        said.append(Predicted(logits[b], targets, ids_N, kept=among is None))
    return said


def arrays(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Numbers of each sequence of a batch: name -> (B,)."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _counted(asked: Asked, width: int) -> tuple[Positions, ...]:
    """Which positions of each sequence's predictions count: those of the text, of the decoder or of frames."""
    batch = asked.batch
    if "decoder_input_ids" in batch.inputs:
        return batch.counts.get(width, (None,) * len(batch.rows))
    return batch.rows if "input_ids" in batch.inputs else batch.rows_of(width)
