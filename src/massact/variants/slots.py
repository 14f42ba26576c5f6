"""Softmax attention with one more slot in every row's denominator, on the fused kernel, with exact gradients.

With s_j the logits of a row, lse their log-sum-exp, b the logit of the slot and v' its value:
    norm = log(exp(lse) + exp(b)),  out = (sum_j exp(s_j) v_j + exp(b) v') / exp(norm)
         = softmax(s) v * sigmoid(lse - b) + v' * sigmoid(b - lse)

The backward pass needs no new kernel. That of flash attention makes its probabilities anew from the log-sum-exp that
it is handed, P_j = exp(s_j - norm), and takes dP_j - sum(dout * out) for the derivative of a logit, which is right for
any row of which these P are a part. So it is handed norm and the output with the slot in it.

n slots with logits b_i and values v'_i are one slot whose value is another for every query:
    b = log sum_i exp(b_i),  v' = sum_i exp(b_i - b) v'_i
which is what `pooled` makes of them; its derivatives are those of the two lines, and autograd takes them.

Shapes: B batch, H heads, K key-value heads, T queries, S keys, E width of q and k, F width of v, N slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from massact.stats.attention_call import HIDES, fused_attention


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (True is seen, or already a number) as what is added to the logits, with four axes."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype)


def pooled(logit_BHTN: Tensor, value_HNF: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """n slots as one: its logit (B, H, T), and its value for every query (B, H, T, F).

    Args:
        logit_BHTN: of every slot; the least number of its dtype, not -inf, where a query does not see it.
        value_HNF: values of the slots, or None for 0.
    """
    b_BHT = logit_BHTN.logsumexp(-1)
    if value_HNF is None:
        return b_BHT, None
    return b_BHT, torch.matmul(logit_BHTN.softmax(-1), value_HNF.to(logit_BHTN.dtype))


def _per_query(value: Tensor) -> Tensor:
    """A slot's value, (H, F) or (B, H, T, F), with an axis of queries."""
    return value[:, None] if value.ndim == 2 else value


class _Slotted(torch.autograd.Function):
    """Output with the slot, and the log-sum-exp over the keys alone."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        q_BHTE, k_BKSE, v_BKSF, slot_BHT, value, mask, causal, scale = given
        fused = fused_attention(q_BHTE, k_BKSE, v_BKSF, mask, causal, scale)
        assert fused is not None  # `slotted` asks before it calls
        out, lse_BHT = fused
        if mask is not None:  # the kernel says 0 of a row that sees no key: the slot has it all
            lse_BHT = lse_BHT.masked_fill((mask < HIDES).all(-1), -torch.inf)
        norm_BHT = torch.logaddexp(lse_BHT, slot_BHT.to(lse_BHT.dtype))
        out = out * (lse_BHT - norm_BHT).exp_().to(out.dtype)[..., None]
        if value is not None:
            p_BHT = (slot_BHT - norm_BHT).exp_().to(out.dtype)
            out = torch.addcmul(out, p_BHT[..., None], _per_query(value).to(out.dtype))
        ctx.save_for_backward(q_BHTE, k_BKSE, v_BKSF, slot_BHT, value, mask, out, norm_BHT)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse_BHT)
        return out, lse_BHT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slot_BHT, value, mask, out, norm_BHT = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, norm_BHT, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        dslot = dvalue = None
        p_BHT = (slot_BHT - norm_BHT).exp_()
        if ctx.needs_input_grad[3]:
            gain = -out if value is None else _per_query(value).to(out.dtype) - out
            dslot = (p_BHT * (dout * gain).sum(-1)).to(slot_BHT.dtype)
        if value is not None and ctx.needs_input_grad[4]:
            p_BHT = p_BHT.to(dout.dtype)
            one = value.ndim == 2  # for all queries
            dvalue = torch.matmul(p_BHT[..., None, :], dout)[..., 0, :].sum(0) if one else p_BHT[..., None] * dout
            dvalue = dvalue.to(value.dtype)
        return dq, dk, dv, dslot, dvalue, None, None, None


def slotted(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSF: Tensor, slot_BHT: Tensor, value: Tensor | None,
    mask: Tensor | None, causal: bool, scale: float, dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention with an extra slot: out = softmax(s) v * sigmoid(lse - b) + v' * sigmoid(b - lse).

    Args:
        q_BHTE, k_BKSE, v_BKSF: queries, keys and values; H is a multiple of K.
        slot_BHT: the slot's logit b of every query (nats), broadcastable to (B, H, T).
        value: the slot's value v', (H, F), or (B, H, T, F) where every query has its own; None for 0.
        mask: True where a key is seen, or added to the logits; broadcastable to (B, H, T, S), or None. It says nothing
            of the slot.
        causal: query t sees the keys up to t; only for T = S.
        scale: logits are scale * q.k.
        dropout: probability that a weight is set to 0.

    Returns:
        The output (B, H, T, F), and the log-sum-exp over the keys (B, H, T), not differentiable; None where the
        fused kernel does not give it (dropout, E != F, another device than a CPU).
    """
    slot_BHT = slot_BHT.expand(q_BHTE.shape[:3])
    q_BHTE, k_BKSE, v_BKSF = _alike(q_BHTE, k_BKSE, v_BKSF)
    added = None if mask is None else additive(mask, q_BHTE.dtype)
    learned_mask = added is not None and added.requires_grad
    if dropout or learned_mask or q_BHTE.device.type != "cpu" or q_BHTE.shape[-1] != v_BKSF.shape[-1]:
        return with_column(q_BHTE, k_BKSE, v_BKSF, slot_BHT, value, added, causal, scale, dropout), None
    return _Slotted.apply(q_BHTE, k_BKSE, v_BKSF, slot_BHT, value, added, causal, scale)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In one dtype: under autocast its own, as `F.scaled_dot_product_attention` does (rotary makes float32 queries)."""
    device = tensors[0].device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return tuple(x.to(kind) for x in tensors)


def with_column(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSF: Tensor, slot_BHT: Tensor, value: Tensor | None,
    mask: Tensor | None, causal: bool, scale: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same by one more key and value before the others: `F.scaled_dot_product_attention` alone, for any device.

    The slot's logit rides on one more feature dim, q = [q, b / scale], k = [k, 0], k' = [0, 1], so that its gradient
    needs no mask. Where every query has a value of its own, the column's value is 1 on one more feature dim, which
    gives the slot's probability. Arguments as `slotted`, the mask as numbers; costs a T x (S + 1) mask.
    """
    B, H, T, E = q_BHTE.shape
    K, S, n_values = k_BKSE.shape[1], k_BKSE.shape[2], v_BKSF.shape[-1]
    k_BHSE, v_BHSF = (x if K == H else x.repeat_interleave(H // K, 1) for x in (k_BKSE, v_BKSF))
    width = -(-(E + 1) // 8) * 8  # rows stay aligned
    lowest = torch.finfo(q_BHTE.dtype).min / 8  # of a slot that is not seen: an infinite one makes NaN of a key's 0
    slot_BHT = (slot_BHT / scale).clamp(min=lowest).to(q_BHTE.dtype)
    q = torch.cat([q_BHTE, slot_BHT[..., None]], -1)
    first = F.one_hot(torch.tensor(E), width).to(k_BHSE).expand(B, H, 1, width)
    k = torch.cat([first, F.pad(k_BHSE, (0, width - E))], 2)
    one = value is None or value.ndim == 2
    if value is None:
        column = v_BHSF.new_zeros(H, n_values)
    elif one:
        column = value.to(v_BHSF.dtype)
    else:
        v_BHSF = F.pad(v_BHSF, (0, 1))
        column = F.one_hot(torch.tensor(n_values), n_values + 1).to(v_BHSF).expand(H, -1)
    v = torch.cat([column[None, :, None].expand(B, H, 1, -1), v_BHSF], 2)
    if causal:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
        hidden = additive(seen, q.dtype)
        mask = hidden if mask is None else mask + hidden
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:2], T, S), (1, 0))
    q, v = F.pad(q, (0, width - E - 1)), F.pad(v, (0, max(0, width - v.shape[-1])))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    if one:
        return out[..., :n_values]
    assert value is not None
    return torch.addcmul(out[..., :n_values], out[..., n_values, None], value.to(out.dtype))
