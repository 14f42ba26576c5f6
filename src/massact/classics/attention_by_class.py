"""How much of the attention of every head goes to each class of tokens, without a (T, T) matrix.

Shapes: H heads, T queries, S keys, R rows, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.classics.token_labels import CLASSES, CLS, FIRST, SEP, Labels
from massact.stats import Where
from massact.stats.attention_call import Attended
from massact.stats.dims import sum_dtype
from massact.stats.protocol import to_numpy

BLOCK_VALUES = 1 << 20  # of one block of rows


def one_hot(labels_S: Tensor, device: torch.device) -> Tensor:
    """(S, C) float32."""
    return torch.nn.functional.one_hot(labels_S, len(CLASSES)).to(device, torch.float32)


def row_blocks(n_heads: int, n_keys: int, since: int, n_queries: int) -> list[slice]:
    """Blocks of queries, small enough that (H, R, S) is no more than a constant."""
    rows = max(1, BLOCK_VALUES // (n_heads * max(n_keys, 1)))
    return [slice(start, min(start + rows, n_queries)) for start in range(since, n_queries, rows)]


def visible_by_class(a: Attended, hot_SC: Tensor, since: int) -> Tensor:
    """How many keys of each class the queries from `since` on see: (H or 1, T - since, C)."""
    H, T, S = a.shape
    if a.mask_HTS is None and a.scores_HTS is None:
        if a.causal:
            return hot_SC.cumsum(0)[None, since:T]
        return hot_SC.sum(0).expand(1, T - since, -1)
    blocks = row_blocks(H, S, since, T)
    return torch.cat([a.sees(rows).float() @ hot_SC for rows in blocks], 1)


def row_entropy(a: Attended, row: int) -> Tensor:
    """Entropy in nats of one query, of every head (H,); a learned sink is one more outcome."""
    s_HS = a.logits(slice(row, row + 1))[:, 0] - a.norm_HT[:, row, None]
    p_HS = s_HS.exp()
    entropy_H = -torch.where(p_HS > 0, p_HS * s_HS, 0.0).sum(-1)
    if a.slot_HT is not None:
        entropy_H = entropy_H + torch.special.entr(a.slot_HT[:, row])
    return entropy_H


class ClassShares:
    """Attention to classes of tokens and its entropy, of one attention layer, streamed.

    Queries t are all positions, without the first one of a causal model, which sees only itself. Of these, Q_c are
    the ones that see at least one key of class c:
        share_c = mean over t in Q_c of sum over keys k of class c of p_t[k]
        chance_c = mean over t in Q_c of (visible keys of class c) / (visible keys)
        self = mean over queries t of class sep of sum over keys k of class sep of p_t[k]
        entropy = mean over t of -sum over k of p_t[k] log p_t[k]
    Means are over the queries of all sequences together. Q_c differs from class to class, so the shares need not add
    up to one; nor do they with a learned sink, which is no key.

    Args:
        labels: classes of the positions of a sequence.
    """

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence; self-attention only."""
        H, T, S = a.shape
        since = int(a.forward)
        if T <= since:
            return
        labels_S = self.labels(where, S)
        hot_SC = one_hot(labels_S, a.device)
        mass_HS, entropy_H = a.columns()
        entropy_H = entropy_H * T
        if since:  # the first query gives all it has to the first key
            p_HS = (a.logits(slice(0, 1))[:, 0] - a.norm_HT[:, :1]).exp()
            mass_HS, entropy_H = (mass_HS - p_HS).clamp(min=0), entropy_H - row_entropy(a, 0)
        seen = visible_by_class(a, hot_SC, since)
        self._add("share", mass_HS @ hot_SC)
        self._add("queries", (seen > 0).sum(1).expand(H, -1))
        self._add("chance", (seen / seen.sum(-1, keepdim=True)).sum(1).expand(H, -1))
        self._add("entropy", entropy_H)
        self._add("n", torch.tensor(T - since, device=a.device))
        self._add_sep(a, [int(t) for t in (labels_S == SEP).nonzero()[:, 0]], since)
        first = [int(t) for t in torch.isin(labels_S, torch.tensor([CLS, FIRST])).nonzero()[:1, 0]]
        if first == [0] and not a.forward:
            self._add("cls_entropy", row_entropy(a, 0))
            self._add("n_cls", torch.tensor(1, device=a.device))

    def _add_sep(self, a: Attended, keys: list[int], since: int) -> None:
        keys_C = torch.tensor(keys, device=a.device)
        queries_R = keys_C[keys_C >= since] if keys else keys_C
        if len(queries_R) == 0:
            return
        for block in row_blocks(a.shape[0], len(keys), 0, len(queries_R)):
            self._add("self", a.probs(keys_C, queries_R[block]).sum((1, 2)))
        self._add("n_self", torch.tensor(len(queries_R), device=a.device))

    def _add(self, name: str, x: Tensor) -> None:
        x = x.to(sum_dtype(x.device))
        held = self._sums.get(name)
        self._sums[name] = x if held is None else held.to(x.device) + x

    def merge(self, other: ClassShares) -> None:
        """Add what another one has seen."""
        for name, x in other._sums.items():
            self._add(name, x)

    def result(self) -> dict[str, Any]:
        """Means by name; NaN where nothing was seen.

        Returns:
            share, chance, queries: (H, C). entropy, self, cls_entropy: (H,), in nats where it is an entropy.
            n, n_self, n_cls: numbers of queries. Empty where no sequence had a query.
        """
        if not self._sums:
            return {}
        sums = {name: to_numpy(x).astype(float) for name, x in self._sums.items()}
        n_heads = len(sums["entropy"])
        with np.errstate(divide="ignore", invalid="ignore"):
            known: dict[str, Any] = {name: sums[name] / sums["queries"] for name in ("share", "chance")}
        known |= {"queries": sums["queries"], "entropy": sums["entropy"] / sums["n"], "n": int(sums["n"])}
        for name, count in (("self", "n_self"), ("cls_entropy", "n_cls")):
            known[count] = int(sums.get(count, 0))
            known[name] = sums[name] / known[count] if known[count] else np.full(n_heads, np.nan)
        return known
