"""How much the loss would change with the attention to each class of tokens: |dL/dP| (Clark et al. 2019, Section 3.2).

dL/dP[t, j] is the partial derivative by one probability, the others held: rows are not normalised again.

Shapes: H heads, T queries, S keys, F width of v, C classes, V vocabulary or classes of a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from massact.classics.attention_by_class import one_hot, row_blocks, visible_by_class
from massact.classics.token_labels import TokenLabels, ids_of_batch, labels_of
from massact.corpora import Corpus
from massact.interventions.predictions import Asked, Task, ask, logits_of, task_of
from massact.models import Model
from massact.records.anatomy import AttentionPlace
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats.attention_call import Attended
from massact.stats.dims import sum_dtype
from massact.stats.protocol import to_numpy
from massact.trace.gradients import attention_gradients, sequences_with_gradients


@dataclass
class ClassGradients:
    """|dL/dP| of one attention layer, summed over visible pairs of query and key.

    Args:
        sums_HC: sum over the pairs whose key is of a class, in units of the loss.
        pairs_HC: how many there are.
    """

    sums_HC: np.ndarray
    pairs_HC: np.ndarray

    @property
    def mean_HC(self) -> np.ndarray:
        """Mean over the pairs of a class; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.sums_HC / self.pairs_HC

    @property
    def mean_H(self) -> np.ndarray:
        """Mean over all pairs."""
        return self.sums_HC.sum(1) / self.pairs_HC.sum(1)

    @property
    def relative_HC(self) -> np.ndarray:
        """Mean of a class over the mean of all pairs, of every head."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.mean_HC / self.mean_H[:, None]

    @property
    def summed_C(self) -> np.ndarray:
        """Means of a class summed over the heads, as in Clark's figure."""
        return self.mean_HC.sum(0)

    @property
    def relative_C(self) -> np.ndarray:
        """The same, over the sum of the means of all pairs."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.summed_C / self.mean_H.sum()


def gradient_by_class(a: Attended, g_HTF: Tensor, labels_S: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of |g_t . v_j| over visible pairs (t, j) by class of j, and how many pairs: (H, C) both.

    Without the first query of a causal model, whose attention has no choice.

    Args:
        a: the call of one sequence, with its values.
        g_HTF: gradient of the loss by the output of the heads.
        labels_S: numbers of classes of the keys.

    Raises:
        UserError: the values were not seen.
    """
    if a.v_KSF is None or a.v_KSF.shape[-1] != g_HTF.shape[-1]:
        raise UserError("The values of an attention call were not seen, so its probabilities have no gradient.")
    H, T, S = a.shape
    since, hot_SC = int(a.forward), one_hot(labels_S, a.device)
    v_HSF = a.values(torch.arange(S, device=a.device))
    sums_HS = torch.zeros(H, S, dtype=torch.float32, device=a.device)
    for rows in row_blocks(H, S, since, T):
        size_HRS = torch.matmul(g_HTF[:, rows].float(), v_HSF.transpose(1, 2)).abs_()
        sums_HS += size_HRS.mul_(a.sees(rows)).sum(1)
    wide = sum_dtype(a.device)
    pairs_HC = visible_by_class(a, hot_SC, since).to(wide).sum(1).expand(H, -1)
    return (sums_HS @ hot_SC).to(wide), pairs_HC


def loss_of(logits: Tensor, asked: Asked, task: Task) -> Tensor | None:
    """Sum over the sequences of a batch of their mean loss in nats, in the graph; None where none has a target.

    Next-token or hidden-token cross-entropy, as effects are measured with; the class loss of a classifier.

    Args:
        logits: (B, T, V), or (B, V) of a classifier.
        asked: the batch, and what is to be predicted.
        task: which loss.

    Raises:
        UserError: there is nothing to predict.
    """
    if logits.ndim == 2:
        if "labels" not in asked.batch.inputs:
            raise UserError("The model is a classifier and the corpus has no labels, so there is no loss.")
        return F.cross_entropy(logits.float(), asked.batch.inputs["labels"].to(logits.device), reduction="sum")
    if asked.ids_BT is None or (task.ahead is None and task.mask_id is None):
        raise UserError("The model predicts no token of the text, so there is no loss.")
    losses = []
    for b, ids_T in enumerate(asked.ids_BT.to(logits.device)):
        if task.ahead is None:
            logits_NV, targets_N = logits[b][asked.hidden[b]], ids_T[asked.hidden[b]]
        else:
            rows = slice(None) if asked.batch.rows[b] is None else asked.batch.rows[b]
            targets_N = ids_T[rows][task.ahead :]
            logits_NV = logits[b][rows][: len(targets_N)]
        if len(targets_N):
            losses.append(F.cross_entropy(logits_NV.float(), targets_N))
    return torch.stack(losses).sum() if losses else None


def class_gradients(
    model: Model,
    corpus: Corpus,
    places: Mapping[Site, AttentionPlace],
    tokens: TokenLabels,
    *,
    batch_size: int,
    seed: int,
) -> dict[Site, ClassGradients]:
    """|dL/dP| by class of the key, of attention calls, over a corpus.

    Hidden tokens of a masked language model are of the class "mask" here.

    Args:
        model: with a head that gives a loss.
        corpus: what it reads.
        places: attention calls by site.
        tokens: says which class a token is in.
        batch_size: sequences per pass; the result does not depend on it.
        seed: of which tokens are hidden.

    Raises:
        UserError: there is no loss.
    """
    task, nothing = task_of(model, seed=seed), np.zeros((), np.float32)
    found: dict[Site, ClassGradients] = {}
    if corpus.kind != "tokens" and "labels" not in corpus.inputs:
        raise UserError("The corpus is no text and has no labels, so there is no loss.")
    if corpus.kind == "tokens" and "labels" not in corpus.inputs and task.ahead is None and task.mask_id is None:
        raise UserError("The model predicts no token of the text, so there is no loss.")
    with attention_gradients(model.module, places.values()) as graph:
        for batch in corpus.batches(batch_size):
            asked = ask(batch, task)
            graph.begin()
            loss = loss_of(logits_of(model, asked.batch.to(model.device)), asked, task)
            if loss is None:
                continue
            gradients, seen = graph.gradients(loss), asked.batch.to(model.device)
            for site, place in places.items():
                label = labels_of(model, site.stack, ids_of_batch(asked.batch), tokens)
                for a, g_HTF, where in sequences_with_gradients(graph.calls[place], gradients[place], place, seen):
                    sums_HC, pairs_HC = gradient_by_class(a, g_HTF, label(where, a.shape[2]))
                    held = found.setdefault(site, ClassGradients(nothing, nothing))
                    held.sums_HC = held.sums_HC + to_numpy(sums_HC)
                    held.pairs_HC = held.pairs_HC + to_numpy(pairs_HC)
    if not found:
        raise UserError("No sequence has a target, so there is no loss.")
    return found
