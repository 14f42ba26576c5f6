"""One attention call of one sequence, and the log-sum-exp algebra: everything without a T x T matrix.

With s the logits, lse the log-sum-exp of a row over its keys and b the logit of a slot that is no key (if there is
one: a learned sink, a KV bias, softmax-off-by-one), one number for a head or one for each query:
    norm = log(exp(lse) + exp(b)),  p = exp(s - norm),  mass of the slot = sigmoid(b - lse)
    update from a set C of keys = sum over C of p v,  the rest = output - that
    mass that a key receives = sum over queries of exp(s - norm): a log-sum-exp with the keys as queries, so a second
    call of the fused kernel, in which -norm rides on extra feature dims and time runs backwards.

Shapes: H heads, K key-value heads, T queries, S keys, E width of q and k, F width of v, C chosen keys, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from massact.stats.dims import sum_dtype

_ROW_VALUES = 1 << 20  # logits of one block of rows
HIDES = -9e3  # an additive mask of this or less hides a key: -10,000 is 9,984 in bfloat16, or has a bias added to it
_FAR = 5e3  # a logit so far below the greatest of its row is masked, where masks are finite and small: -10,000
_SURELY = -1e8  # a logit of this or less is masked
_UNSURE_NATS = 0.01  # an entropy from 16-bit tensors that may be off by more is computed from logits in float32
_ROUNDINGS = 16  # of eps; twice as many of the unit roundoff


@dataclass(frozen=True)
class Sight:
    """A set of keys, as every query has them.

    Args:
        p_HT: probability that goes to them; 0 where it sees none of them.
        n_HT: how many of them it can see; seen_HT: how many keys in all. int64 (H or 1, T).
    """

    p_HT: Tensor
    n_HT: Tensor
    seen_HT: Tensor

    def mean(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean over those of the queries that see one of the keys: of p, and of a uniform head's; NaN where none does.

        A uniform head looks at all keys that a query sees alike: it gives n / seen to the set.
        """
        rows_R = torch.tensor(rows, device=self.p_HT.device)
        n_HR = self.n_HT[:, rows_R]
        alike_HR = torch.where(n_HR > 0, n_HR / self.seen_HT[:, rows_R], 0.0)
        n_H = (n_HR > 0).sum(1)
        return self.p_HT[:, rows_R].sum(1) / n_H, (alike_HR.sum(1) / n_H).expand(len(self.p_HT))


@dataclass(frozen=True)
class Attended:
    """What one attention call of one sequence was given and gave.

    Args:
        q_HTE, k_KSE: queries and keys, after rotary; None where only the logits were seen.
        v_KSF: values; None where they were not seen.
        out_HTF: output of the heads, before the output projection; None where it was not seen.
        lse_given_HT: log-sum-exp over the keys from the kernel, or None.
        scale: logits are scale * q.k.
        mask_HTS: added to the logits, (H or 1, T or 1, S), or None.
        binary: the mask only hides keys (no ALiBi, no position bias).
        causal: query t sees the keys up to t, by the kernel's own flag.
        forward: query t sees no key behind t, by flag or by mask.
        cap: logits are cap * tanh(logits / cap).
        sink_H: logit of a learned sink, in the denominator only.
        scores_HTS: the logits, where q and k were not seen, or where the softmax was given them rounded to 16 bits.
        start: positions before it are padding; 0 where that is not known, or they were taken away.
        slot_logit_HT: logit of a slot that depends on the query, in place of sink_H.
        slot_value_HTF: what the slot adds to the output for each unit of its probability, (H, 1, F), or (H, T, F)
            where it is another for every query; None for 0.
    """

    q_HTE: Tensor | None
    k_KSE: Tensor | None
    v_KSF: Tensor | None
    out_HTF: Tensor | None
    lse_given_HT: Tensor | None = None
    scale: float = 1.0
    mask_HTS: Tensor | None = None
    binary: bool = True
    causal: bool = False
    forward: bool = False
    cap: float | None = None
    sink_H: Tensor | None = None
    scores_HTS: Tensor | None = None
    slot_logit_HT: Tensor | None = None
    slot_value_HTF: Tensor | None = None
    start: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, T, S)."""
        if self.scores_HTS is not None:
            return tuple(self.scores_HTS.shape)
        assert self.q_HTE is not None and self.k_KSE is not None
        return self.q_HTE.shape[0], self.q_HTE.shape[1], self.k_KSE.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        known = self.q_HTE if self.q_HTE is not None else self.scores_HTS
        assert known is not None
        return known.device

    def logits(self, rows: slice | Tensor, keys_C: Tensor | None = None) -> Tensor:
        """Masked logits of some queries, of all keys or of chosen ones: float32 (H, R, C)."""
        H, T, S = self.shape
        if self.scores_HTS is not None:
            s_HRC = self.scores_HTS[:, rows].float()
            return s_HRC if keys_C is None else s_HRC.index_select(2, keys_C)
        assert self.q_HTE is not None and self.k_KSE is not None
        k_KCE = self.k_KSE if keys_C is None else self.k_KSE.index_select(1, keys_C)
        q_HRE = self.q_HTE[:, rows]
        K = len(k_KCE)
        # Heads of one key-value head lie side by side: (K, H / K, R, E).
        q_KGRE = q_HRE.reshape(K, H // K, *q_HRE.shape[1:]).float()
        s_HRC = torch.matmul(q_KGRE, k_KCE.float()[:, None].transpose(-1, -2)).reshape(H, q_HRE.shape[1], -1)
        s_HRC.mul_(self.scale)
        if self.cap is not None:
            s_HRC = s_HRC.div_(self.cap).tanh_().mul_(self.cap)
        if self.mask_HTS is not None:
            mask = self.mask_HTS if self.mask_HTS.shape[1] == 1 else self.mask_HTS[:, rows]
            s_HRC += mask if keys_C is None else mask.index_select(2, keys_C)
        if self.causal:
            row_R = torch.arange(T, device=self.device)[rows]
            key_C = torch.arange(S, device=self.device) if keys_C is None else keys_C
            s_HRC.masked_fill_(row_R[:, None] < key_C, -math.inf)
        return s_HRC

    def sees(self, rows: slice | Tensor = slice(None), keys_C: Tensor | None = None) -> Tensor:
        """Whether queries can see keys, by mask and flag: bool (H or 1, R, C). A key that is hidden has p = 0 exactly.

        Args:
            rows: the queries; keys_C: the keys, None for all.
        """
        _, T, S = self.shape
        if self._masked_below_HT1 is not None:
            assert self.scores_HTS is not None
            s_HRS = self.scores_HTS[:, rows]
            s_HRC = s_HRS if keys_C is None else s_HRS.index_select(2, keys_C)
            return s_HRC > self._masked_below_HT1[:, rows]
        row_R = torch.arange(T, device=self.device)[rows]
        key_C = torch.arange(S, device=self.device) if keys_C is None else keys_C
        seen = (row_R[:, None] >= key_C) if self.causal else row_R[:, None] >= key_C.new_zeros(len(key_C))
        seen = seen[None]
        if self.mask_HTS is not None:
            mask = self.mask_HTS if self.mask_HTS.shape[1] == 1 else self.mask_HTS[:, rows]
            seen = seen & ((mask if keys_C is None else mask.index_select(2, keys_C)) > HIDES)
        return seen

    @cached_property
    def _masked_below_HT1(self) -> Tensor | None:
        """The greatest logit of a row that is still a masked one; None where queries, keys and mask were seen.

        The logits of a written-out attention hold what the mask added to them. Where it is -inf or of its size, that
        tells masked keys whatever the scores are. Else (-10,000, as BERT had it) a masked logit is a score plus that:
        it is known by its distance from the greatest of its row.
        """
        if self.scores_HTS is None:
            return None
        s_HTS = self.scores_HTS
        far_HT1 = s_HTS.amax(-1, keepdim=True).float() - _FAR
        return torch.where(s_HTS.amin() <= _SURELY, torch.full_like(far_HT1, _SURELY), far_HT1)

    @cached_property
    def viewers_HS(self) -> Tensor:
        """How many queries can see each key: int64 (H or 1, S); 0 where none can."""
        H, T, S = self.shape
        if self._masked_below_HT1 is None and (self.mask_HTS is None or self.mask_HTS.shape[1] == 1):
            key_S = torch.arange(S, device=self.device)
            n_S = (T - key_S).clamp(min=0) if self.causal else torch.full_like(key_S, T)
            return n_S[None] if self.mask_HTS is None else n_S * (self.mask_HTS[:, 0] > HIDES)
        return self.viewers_among(None)

    def viewers_among(self, rows_R: Tensor | None) -> Tensor:
        """How many queries, all or some, can see each key: int64 (H or 1, S)."""
        parts = _parts(rows_R, self.shape[1], max(1, _ROW_VALUES // self.shape[2]))
        return sum(self.sees(part).sum(1) for part in parts)

    @cached_property
    def seen_HT(self) -> Tensor:
        """How many keys each query can see: int64 (H or 1, T); 0 where it sees none."""
        _, T, S = self.shape
        if self._masked_below_HT1 is None and (self.mask_HTS is None or self.mask_HTS.shape[1] == 1):
            there_HS = torch.ones(1, S, device=self.device) if self.mask_HTS is None else self.mask_HTS[:, 0] > HIDES
            upto_HS = there_HS.long().cumsum(1)
            last_T = torch.arange(T, device=self.device) if self.causal else torch.full((T,), S, device=self.device)
            return upto_HS[:, last_T.clamp(max=S - 1)]
        parts = _parts(None, T, max(1, _ROW_VALUES // S))
        return torch.cat([self.sees(part).sum(2) for part in parts], dim=1)

    def shares(self, sets: Mapping[str, Sequence[int]]) -> dict[str, Sight]:
        """What each query gives to sets of keys, and how many of them it can see; in blocks, O(T) memory.

        Args:
            sets: name -> keys; those without any are left out.
        """
        H, T, _ = self.shape
        keys = list(dict.fromkeys(key for mine in sets.values() for key in mine))
        if not keys:
            return {}
        place, keys_C = {key: i for i, key in enumerate(keys)}, torch.tensor(keys, device=self.device)
        at = {n: torch.tensor([place[k] for k in x], device=self.device) for n, x in sets.items() if len(x)}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in at}
        for part in _parts(None, T, max(1, _ROW_VALUES // (H * len(keys)))):
            p_HRC, sees_HRC = self.probs(keys_C, part), self.sees(part, keys_C)
            for name, at_C in at.items():
                found[name].append((p_HRC.index_select(2, at_C).sum(2), sees_HRC.index_select(2, at_C).sum(2)))
        sights = {name: [torch.cat(x, 1) for x in zip(*parts, strict=True)] for name, parts in found.items()}
        # What sees nothing has no probabilities: nothing over nothing.
        return {name: Sight(torch.where(n_HT > 0, p_HT, 0.0), n_HT, self.seen_HT) for name, (p_HT, n_HT) in
                sights.items()}  # fmt: skip

    def blocks(self, rows_R: Tensor | None = None) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Blocks of rows, all or some, with their logits (H, R, S), small enough to keep memory O(T)."""
        H, T, S = self.shape
        for part in _parts(rows_R, T, max(1, _ROW_VALUES // (H * S))):
            yield part, self.logits(part)

    @cached_property
    def lse_HT(self) -> Tensor:
        """Log-sum-exp of every row over the real keys, float32."""
        if self.lse_given_HT is not None:
            return self.lse_given_HT.float()
        return torch.cat([s_HRS.logsumexp(-1) for _, s_HRS in self.blocks()], dim=1)

    @property
    def _slot_logit(self) -> Tensor | None:
        """Logit of the slot, float32 (H, T) or (H, 1)."""
        if self.slot_logit_HT is not None:
            return self.slot_logit_HT.float()
        return None if self.sink_H is None else self.sink_H.float()[:, None]

    @cached_property
    def norm_HT(self) -> Tensor:
        """Log of the softmax's denominator: the keys, and the slot where there is one."""
        slot = self._slot_logit
        return self.lse_HT if slot is None else torch.logaddexp(self.lse_HT, slot)

    @cached_property
    def slot_HT(self) -> Tensor | None:
        """Probability that goes to the slot; None where there is none."""
        slot = self._slot_logit
        return None if slot is None else torch.sigmoid(slot - self.lse_HT)

    def slot_update(self, rows: slice | Tensor = slice(None)) -> Tensor | float:
        """What the slot adds to the output of some queries, float32 (H, R, F); 0 where it adds nothing."""
        if self.slot_HT is None or self.slot_value_HTF is None:
            return 0.0
        return self.slot_HT[:, rows, None] * self._slot_values(rows)

    def _slot_values(self, rows: slice | Tensor) -> Tensor:
        """The slot's value for some queries, float32 (H, R or 1, F)."""
        assert self.slot_value_HTF is not None
        one = self.slot_value_HTF.shape[1] == 1
        return (self.slot_value_HTF if one else self.slot_value_HTF[:, rows]).float()

    def probs(self, keys_C: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """Exact probabilities of chosen keys, float32 (H, R, C)."""
        return self.logits(rows, keys_C).sub_(self.norm_HT[:, rows, None]).exp_()

    def values(self, keys_C: Tensor) -> Tensor:
        """Values of chosen keys for every head, float32 (H, C, F)."""
        assert self.v_KSF is not None
        return self.v_KSF.index_select(1, keys_C).float().repeat_interleave(self.shape[0] // len(self.v_KSF), 0)

    def without(self, keys_C: Tensor) -> Tensor:
        """The output if no query could see some keys, float32 (H, T, F); zero where a query sees nothing else."""
        assert self.out_HTF is not None and self.v_KSF is not None
        out_HTF, slot = self.out_HTF.float().clone(), self._slot_logit
        v_HSF = self.values(torch.arange(self.shape[2], device=self.device))
        for rows, s_HRS in self.blocks():
            sees_HRS = self.sees(rows).expand_as(s_HRS)
            loses_HR1 = sees_HRS[..., keys_C].any(-1, keepdim=True)
            s_HRS = s_HRS.masked_fill(~sees_HRS, -math.inf)
            s_HRS[..., keys_C] = -math.inf
            norm_HR1 = s_HRS.logsumexp(-1, keepdim=True)
            if slot is not None:
                slot_HR1 = slot.expand(self.shape[:2])[:, rows, None]
                norm_HR1 = torch.logaddexp(norm_HR1, slot_HR1)
            new_HRF = torch.matmul((s_HRS - norm_HR1.nan_to_num(neginf=0.0)).exp_(), v_HSF)
            if slot is not None and self.slot_value_HTF is not None:
                new_HRF += (slot_HR1 - norm_HR1).exp() * self._slot_values(rows)
            out_HTF[:, rows] = torch.where(loses_HR1, new_HRF, out_HTF[:, rows])
        return out_HTF

    def columns(self, rows_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mass on every key, summed over the queries (H, S), and the entropy in nats, mean over the queries (H,).

        Of all queries, or of some (in blocks).

        One more call of the fused kernel where it can (2x attention alone, O(T) memory), else rows in blocks.
        With a slot the entropy counts it as one more outcome. It is the difference of two numbers of the size of the
        logits, so it may be off by their rounding; never below 0.
        """
        swapped = self._columns_swapped() if self._fusable and rows_R is None else None
        if swapped is None:
            mass_HS, score_H = self._columns_blocked(rows_R)
        else:
            mass_HS, score_H, off_H = swapped
            if off_H is not None and bool((off_H > _UNSURE_NATS).any()):
                score_H = self._columns_blocked()[1]
        rows = slice(None) if rows_R is None else rows_R
        T = self.shape[1] if rows_R is None else len(rows_R)
        norm_HT = self.norm_HT.to(score_H.dtype)
        if self.slot_HT is None:
            return mass_HS, (norm_HT[:, rows].mean(-1) - score_H / T).clamp(min=0).float()
        slot = self._slot_logit
        assert slot is not None
        kept_HT = 1 - self.slot_HT
        slot_HT = self.slot_HT * (slot - self.norm_HT)
        return mass_HS, ((kept_HT * norm_HT - slot_HT)[:, rows].mean(-1) - score_H / T).clamp(min=0).float()

    @property
    def _fusable(self) -> bool:
        _, T, S = self.shape
        square = not self.causal or T == S  # the kernel's flag counts from the first key: only a square can be turned
        known = self.q_HTE is not None and self.scores_HTS is None
        return known and self.cap is None and self.binary and square

    def score_size(self, p_HRS: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """Greatest sum over keys of p scale sum_i |q_i k_i|, of some queries: what the rounding of scores scales with.

        Where the logits themselves were seen, |s| takes the place of the sum of terms. See `rounding_allowed`.

        Args:
            p_HRS: probabilities of these queries.
        """
        size_HRS = torch.where(p_HRS > 0, self.logits(rows), 0.0).abs_()
        if self.scores_HTS is None and self.q_HTE is not None and self.k_KSE is not None:
            terms = replace(self, q_HTE=self.q_HTE.abs(), k_KSE=self.k_KSE.abs(), mask_HTS=None, cap=None, causal=False)
            size_HRS = torch.maximum(size_HRS, terms.logits(rows).abs_())
        return (p_HRS * size_HRS).sum(-1).amax()

    def _columns_blocked(self, rows_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        H, _, S = self.shape
        mass_HS = torch.zeros(H, S, device=self.device)
        score_H = torch.zeros(H, device=self.device, dtype=sum_dtype(self.device))
        for rows, s_HRS in self.blocks(rows_R):
            p_HRS = (s_HRS - self.norm_HT[:, rows, None]).exp_()
            mass_HS += p_HRS.sum(1)
            score_H += torch.where(p_HRS > 0, p_HRS * s_HRS, 0.0).sum((1, 2), dtype=score_H.dtype)
        return mass_HS, score_H

    def _columns_swapped(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Mass (H, S), sum of p s (H,), and in 16 bits the error of its mean over the queries (H,), else None.

        log sum_q exp(s[q, k] - norm[q]) by the fused kernel, with keys as queries and queries as keys.

        -norm rides on extra feature dims (in 16 bits split into three pieces that add up to its float32 value). The
        queries are the values too, so that the output is the mean query of each key, which gives the mean logit
        sum_q p s = scale k.(mass * output). One more dim of ones says which keys no query can see.
        """
        q_HTE, k_KSE = self.q_HTE, self.k_KSE
        assert q_HTE is not None and k_KSE is not None
        H, T, S = self.shape
        E = q_HTE.shape[-1]
        n = 1 if q_HTE.dtype in (torch.float32, torch.float64) else 3
        width = -(-(E + n + 1) // 8) * 8  # rows stay aligned
        keys, queries = q_HTE.new_zeros(1, H, T, width), q_HTE.new_zeros(1, H, S, width)
        flipped = (lambda x: x.flip(1)) if self.causal else (lambda x: x)
        keys[0, ..., :E] = flipped(q_HTE)
        grouped = queries.view(len(k_KSE), H // len(k_KSE), S, width)  # heads of one key-value head lie side by side
        grouped[..., :E] = flipped(k_KSE)[:, None]
        rest_HT = flipped(self.norm_HT).neg() / self.scale
        for i in range(n):
            piece_HT = rest_HT.to(q_HTE.dtype)
            keys[0, ..., E + i] = piece_HT
            queries[0, ..., E + i] = 1
            rest_HT = rest_HT - piece_HT.float()
        keys[0, ..., E + n] = 1
        mask = None if self.mask_HTS is None else self.mask_HTS.expand(-1, T, -1).transpose(1, 2)[None]
        given = fused_attention(queries, keys, keys, mask, self.causal, self.scale)
        if given is None:
            return None
        mean_HSE, log_HS = given[0][0].float(), given[1][0].float()
        mass_HS = torch.where(mean_HSE[..., E + n] > 0.5, log_HS.exp(), 0.0)
        terms_HSE = queries[0, ..., :E].float() * mean_HSE[..., :E]
        score_HS = terms_HSE.sum(-1)
        score_H = (score_HS * mass_HS).sum(-1, dtype=sum_dtype(self.device)) * self.scale
        if n == 1:
            return flipped(mass_HS), score_H, None
        # The mean query is rounded, and so is each p in it: of one key, of 1 / sqrt(mass) where it has many queries.
        off_HS = terms_HSE.square().sum(-1) + score_HS.square() / mass_HS.clamp(min=1)
        off_H = (off_HS.sqrt() * mass_HS).square().sum(-1).sqrt() * (torch.finfo(q_HTE.dtype).eps * self.scale / T)
        return flipped(mass_HS), score_H, off_H

    def dense(self) -> tuple[Tensor, Tensor]:
        """Logits and probabilities (H, T, S), float32: for a prompt, never for a corpus."""
        s_HTS = self.logits(slice(None))
        return s_HTS, (s_HTS - self.norm_HT[..., None]).exp()

    def trimmed(self, rows: slice | Tensor) -> Attended:
        """The same call without the positions that do not count; self-attention only."""
        square = self.shape[1] == self.shape[2]

        def cut(x: Tensor | None, dim: int) -> Tensor | None:
            if x is None or x.shape[dim] == 1:
                return x
            return x[(slice(None),) * dim + (rows,)]

        mask = self.mask_HTS if not square else cut(self.mask_HTS, 2)
        scores = self.scores_HTS if not square else cut(self.scores_HTS, 2)
        keys: dict[str, Any] = {"k_KSE": cut(self.k_KSE, 1), "v_KSF": cut(self.v_KSF, 1)} if square else {}
        return replace(
            self, q_HTE=cut(self.q_HTE, 1), out_HTF=cut(self.out_HTF, 1), lse_given_HT=cut(self.lse_given_HT, 1),
            mask_HTS=cut(mask, 1), scores_HTS=cut(scores, 1), slot_logit_HT=cut(self.slot_logit_HT, 1),
            slot_value_HTF=cut(self.slot_value_HTF, 1), **keys,
        )  # fmt: skip


def _parts(rows_R: Tensor | None, T: int, size: int) -> Iterable[slice | Tensor]:
    """Some rows in parts of a size, or all T of them as slices, which copy nothing."""
    return [slice(i, min(T, i + size)) for i in range(0, T, size)] if rows_R is None else rows_R.split(size)


def fused_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSF: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Output (B, H, T, F) and log-sum-exp (B, H, T) of the kernel that SDPA uses, or None where it does not apply.

    Args:
        mask: added to the logits, broadcastable to (B, H, T, S), or None.
        causal: only for T = S.
    """
    if not q_BHTE.shape[-1] == k_BKSE.shape[-1] == v_BKSF.shape[-1]:
        return None
    if mask is not None and mask.dtype != q_BHTE.dtype:
        mask = mask.to(q_BHTE.dtype)
    try:
        if q_BHTE.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHTE, k_BKSE, v_BKSF, 0.0, causal, attn_mask=mask, scale=scale
            )
            return out, lse
        if q_BHTE.device.type != "cuda":
            return None
        H, K = q_BHTE.shape[1], k_BKSE.shape[1]
        k_BHSE, v_BHSF = (x if H == K else x.repeat_interleave(H // K, 1) for x in (k_BKSE, v_BKSF))
        if mask is None and q_BHTE.dtype in (torch.float16, torch.bfloat16):
            given = torch.ops.aten._scaled_dot_product_flash_attention(
                q_BHTE, k_BHSE, v_BHSF, 0.0, causal, False, scale=scale
            )
            return given[0], given[1]
        if mask is not None:
            mask = mask.expand(q_BHTE.shape[0], H, q_BHTE.shape[2], k_BHSE.shape[2])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHTE, k_BHSE, v_BHSF, mask, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q_BHTE.shape[2]]
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            raise
        return None  # a width or a dtype that the kernel does not have


def rounding_allowed(dtypes: Iterable[torch.dtype], score_size: float) -> float:
    """How far P V, written out, may be from a kernel's output by rounding alone, over the greatest output.

    Let u be the unit roundoff (eps = 2 u) of the dtype in which scores are computed and held.
        s = scale sum_i q_i k_i:   |ds| <= c u a,  a = scale sum_i |q_i k_i| >= |s|,  c <= E, in blocks about sqrt(E)
        p = exp(s - lse):          |dp| / p = |ds - dlse| to first order: an ABSOLUTE error of a score, however large
                                   the score, is a RELATIVE error of its probability
        lse = log sum exp(s):      |dlse| <= sum p |ds| + u |lse|,  |lse| <= log S + sum p |s|
        out = sum p v:             |dout| <= (2 c + 1) u (sum p a) max|v|, and besides a few roundings u' of P, v and
                                   out themselves, u' being that of the dtype of the tensors
    So with A = `score_size`, the greatest sum over keys of p a, the allowed error is 16 max(eps', eps max(1, A)):
    32 unit roundoffs hold two sums of 256 terms in blocks. With scores below 1 it is 16 eps' as for any other product.

    eps is float32's for every dtype of the tensors: fused kernels (flash, memory-efficient, flex, that of the CPU) take
    16-bit products into float32 and leave the scores there, and so do we. Eager attention rounds its scores to 16
    bits, twice: of a score of 1,000 in bfloat16 that is up to 4, or a factor of 50 in p. No tolerance would tell that
    from a wrong scale, so there the scores are taken as the softmax was given them (`massact.trace.attention`).

    What it cannot see: a mistake that moves no output by more than that. 16 eps' are 2e-6 in float32, 1.6 % in float16
    and 12.5 % in bfloat16. There a missing scale, a wrong mask, a bias that is not there, a missing sink are seen, but
    not a scale that is off by a tenth, which moves outputs by 2 to 6 %. Rounding itself is below 0.5 %: `error` of an
    `AttentionPlace` says how near the proof came, `allowed` what it would have taken. A model in float32 has the
    same formulas and shows them to 1e-5; where the softmax's own input is seen, scale and mask are not ours to mistake.

    Args:
        dtypes: of the tensors of the call.
        score_size: A.
    """
    wide = torch.finfo(torch.float32).eps
    return _ROUNDINGS * max(*(torch.finfo(dtype).eps for dtype in dtypes), wide, wide * score_size)


def hides_only(mask: Tensor) -> bool:
    """Whether an additive mask does nothing but hide keys."""
    return bool(((mask == 0) | (mask <= HIDES)).all())
