"""Attention variants: for each one small function, its parameters, its formula, its paper and what its rows sum to.

Every function takes a `Call` (queries, keys, values, the attention module's input), parameters and options and gives
(out, lse): the output of the heads (B, H, T, F) and the log-sum-exp over the keys (B, H, T), or None where the kernel
does not say. z = scale * q.k are the logits, P the weights of the keys.

Shapes: B batch, H heads, K key-value heads, T queries, S keys, E width of q and k, F width of v, D width of the input,
N greatest number of positions. Where queries share keys (K < H), whatever belongs to a key or a value has K heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from massact.records.errors import UserError, check_options
from massact.stats.attended import HIDES
from massact.variants.slots import additive, slotted

Given = tuple[Tensor, Tensor | None]
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One attention call of a batch.

    Args:
        q_BHTE, k_BKSE, v_BKSF: queries, keys (after rotary) and values.
        mask: True where a key is seen, or added to the logits; broadcastable to (B, H, T, S), or None.
        causal: query t sees the keys up to t; only for T = S.
        scale: logits are scale * q.k.
        dropout: probability that a weight is set to 0.
        x_BTD: the input of the attention module, for variants that need it.
        forward: no query sees a key behind it (by flag or mask): its position is counted from the last key.
    """

    q_BHTE: Tensor
    k_BKSE: Tensor
    v_BKSF: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    x_BTD: Tensor | None = None
    forward: bool = False

    def per_head(self, x: Tensor, axis: int) -> Tensor:
        """A tensor of K key-value heads as one of H heads."""
        H, K = self.q_BHTE.shape[1], self.k_BKSE.shape[1]
        return x if x.shape[axis] == H else x.repeat_interleave(H // K, axis)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the queries (T,) and of the keys (S,): with a cache, queries are the last of the keys."""
        T, S = self.q_BHTE.shape[2], self.k_BKSE.shape[2]
        key_S = torch.arange(S, device=self.q_BHTE.device)
        return key_S[:T] if self.causal or not self.forward else key_S[S - T :], key_S

    def written(self) -> tuple[Tensor, Tensor]:
        """Logits (B, H, T, S), at least float32, and where a key is seen, broadcastable to them."""
        k_BHSE = self.per_head(self.k_BKSE, 1)
        z = torch.matmul(self.q_BHTE, k_BHSE.transpose(-1, -2))
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * self.scale
        T, S = z.shape[-2:]
        seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=z.device)
        if self.causal:
            seen = seen.tril()
        if self.mask is not None:
            mask = self.mask.reshape((1,) * (4 - self.mask.ndim) + self.mask.shape)
            if mask.dtype == torch.bool:
                seen = seen & mask
            else:
                seen, z = seen & (mask > HIDES), z + mask.clamp(min=HIDES)
        return z, seen

    def weighted(self, p_BHTS: Tensor) -> Tensor:
        """P v, with dropout on P."""
        v_BHSF = self.per_head(self.v_BKSF, 1)
        return torch.matmul(F.dropout(p_BHTS, self.dropout).to(v_BHSF.dtype), v_BHSF)


@dataclass(frozen=True)
class Dims:
    """Sizes of one attention module: heads, key-value heads, widths of keys, values and input, positions."""

    H: int
    K: int
    E: int
    F: int
    D: int
    N: int


@dataclass(frozen=True)
class Init:
    """A parameter before training: its shape, and how it is drawn.

    Args:
        shape: of the parameter.
        std: of a normal distribution with mean 0; 0 for a constant.
        constant: every entry, where std is 0.
    """

    shape: tuple[int, ...]
    std: float = 0.0
    constant: float = 0.0


Options = dict[str, Any]
Slot = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Variant:
    """An attention variant.

    Args:
        name: what a user calls it.
        source: paper, section.
        formula: of one head's output.
        row_sum: what the weights of the keys sum to in a row: "1", "<= 1" or "any".
        attend: `attend(call, params, **options) -> (out, lse or None)`.
        parameters: `parameters(dims, **options) -> {name: Init}`.
        options: with their defaults.
        takes_input: whether it reads `Call.x_BTD`.
        slot: of the extra-slot family: `slot(call, params, **options) -> (logit (B, H, T), value (H, F) or None)`.
        check: refuses options that make no sense.
        note: what is not certain about it.
    """

    name: str
    source: str
    formula: str
    row_sum: str
    attend: Callable[..., Given]
    parameters: Callable[..., dict[str, Init]] = lambda dims, **_: {}
    options: Options = field(default_factory=dict)
    takes_input: bool = False
    slot: Slot | None = None
    check: Callable[..., str] = lambda **_: ""
    note: str = ""

    def resolved(self, given: Options) -> Options:
        """All options, the given ones over the defaults.

        Raises:
            UserError: an option is unknown or makes no sense.
        """
        check_options(f"The attention variant {self.name!r}", given, self.options)
        options = self.options | given
        wrong = self.check(**options)
        if wrong:
            raise UserError(f"The attention variant {self.name!r} cannot be had with {given}.", wrong)
        return options


# -------------------------------------------------------------------------------------------- plain softmax
def softmax(call: Call, params: Params = {}, **_: Any) -> Given:  # noqa: B006
    """softmax(z) v, by `F.scaled_dot_product_attention`."""
    q, k, v = call.q_BHTE, call.k_BKSE, call.v_BKSF
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = additive(mask, q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.device.type != "cpu":  # no fused kernel there takes both
        k, v, grouped = call.per_head(k, 1), call.per_head(v, 1), False
    out = F.scaled_dot_product_attention(q, k, v, mask, call.dropout, call.causal, scale=call.scale, enable_gqa=grouped)
    return out, None


# -------------------------------------------------------------------------------------------- the extra-slot family
def key_slot(call: Call, params: Params, **_: Any) -> tuple[Tensor, Tensor | None]:
    """b = scale * q.k', and v' where there is one."""
    k_HE, v_KF = call.per_head(params["k"] * call.scale, 0), params.get("v")
    # Not matmul: with one column its backward pass costs half of attention at 128 tokens.
    slot_BHT = (call.q_BHTE * k_HE[:, None].to(call.q_BHTE.dtype)).sum(-1)
    return slot_BHT, None if v_KF is None else call.per_head(v_KF, 0)


def zero_slot(call: Call, params: Params, **_: Any) -> tuple[Tensor, None]:
    """b = 0, v' = 0."""
    return call.q_BHTE.new_zeros(()).expand(call.q_BHTE.shape[:3]), None


def learned_slot(call: Call, params: Params, **_: Any) -> tuple[Tensor, None]:
    """b learned for each head, v' = 0."""
    return params["sink"][None, :, None].expand(call.q_BHTE.shape[:3]), None


def with_slot(slot: Slot) -> Callable[..., Given]:
    """Attention with the slot that `slot` gives, on the fused kernel."""

    def attend(call: Call, params: Params, **options: Any) -> Given:
        slot_BHT, value_HF = slot(call, params, **options)
        return slotted(call.q_BHTE, call.k_BKSE, call.v_BKSF, slot_BHT, value_HF, call.mask, call.causal, call.scale,
                       call.dropout)  # fmt: skip

    return attend


# -------------------------------------------------------------------------------------------- around softmax
def v_bias(call: Call, params: Params, **_: Any) -> Given:
    """softmax(z) v + v'."""
    out, lse = softmax(call)
    return out + call.per_head(params["v"], 0)[:, None].to(out.dtype), lse


def qk_bias(call: Call, params: Params, **_: Any) -> Given:
    """softmax(z + scale q' k'^T) v: one more feature dim, learned for every position."""
    q_HN, k_KN, E = params["q"], params["k"], call.q_BHTE.shape[-1]
    row_T, key_S = call.positions()
    if len(key_S) > q_HN.shape[1]:
        raise UserError(
            f"The attention variant 'qk-bias' has {q_HN.shape[1]} positions, and there are {len(key_S)} keys.",
            do="Apply it with a greater length=...",
        )
    n_values = call.v_BKSF.shape[-1]
    width = -(-(E + 1) // 8) * 8  # rows stay aligned; values as wide as keys keep the fused kernel
    extra_q = q_HN[:, row_T, None].to(call.q_BHTE.dtype).expand(len(call.q_BHTE), -1, -1, -1)
    extra_k = k_KN[:, key_S, None].to(call.k_BKSE.dtype).expand(len(call.q_BHTE), -1, -1, -1)
    wide = replace(
        call, v_BKSF=F.pad(call.v_BKSF, (0, max(0, width - n_values))),
        q_BHTE=F.pad(torch.cat([call.q_BHTE, extra_q], -1), (0, width - E - 1)),
        k_BKSE=F.pad(torch.cat([call.k_BKSE, extra_k], -1), (0, width - E - 1)),
    )  # fmt: skip
    out, lse = softmax(wide)
    return out[..., :n_values], lse


def gated(call: Call, params: Params, **_: Any) -> Given:
    """softmax(z) v * sigmoid(x W + b), one gate for each head or for each entry of the output."""
    assert call.x_BTD is not None
    out, lse = softmax(call)
    x_BTD, bias = call.x_BTD, params.get("gate_bias")
    gate = F.linear(x_BTD, params["gate"].to(x_BTD.dtype), None if bias is None else bias.to(x_BTD.dtype))
    B, H, T, _ = out.shape
    return out * torch.sigmoid(gate).reshape(B, T, H, -1).transpose(1, 2).to(out.dtype), lse


def value_gate(call: Call, params: Params, **_: Any) -> Given:
    """softmax(z) (v * sigmoid(w.v + b)), one gate for each key and head, from the value itself."""
    w_KF, b_K, v = params["w"], params["b"], call.v_BKSF
    gate = torch.matmul(v, w_KF[..., None].to(v.dtype)) + b_K[:, None, None].to(v.dtype)
    return softmax(replace(call, v_BKSF=v * torch.sigmoid(gate)))


def head_norm(call: Call, params: Params, eps: float, **_: Any) -> Given:
    """RMSNorm of every head's softmax(z) v."""
    out, lse = softmax(call)
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * params["weight"][:, None]).to(out.dtype), lse


def window(call: Call, params: Params, size: int, kept: int, **_: Any) -> Given:
    """softmax over the last `size` keys and the first `kept` ones; in both directions where attention has none."""
    row_T, key_S = call.positions()
    back = row_T[:, None] - key_S
    near_TS = (back < size) if call.causal or call.forward else (back.abs() < size)
    near_TS = near_TS | (key_S < kept)
    if call.causal:
        near_TS = near_TS & (back >= 0)
    mask = near_TS if call.mask is None else call.mask & near_TS if call.mask.dtype == torch.bool else (
        additive(call.mask, call.q_BHTE.dtype) + additive(near_TS, call.q_BHTE.dtype))  # fmt: skip
    return softmax(replace(call, mask=mask, causal=False))


# -------------------------------------------------------------------------------------------- other weights
def _softmax_rows(z: Tensor, seen: Tensor) -> Tensor:
    """softmax over the keys that are seen; a row that sees none is 0."""
    # The least number, not -inf: a row that sees nothing then has finite gradients.
    p = z.masked_fill(~seen, torch.finfo(z.dtype).min).softmax(-1)
    return p.masked_fill(~seen, 0.0)


def clipped_softmax(call: Call, params: Params, gamma: float, zeta: float, **_: Any) -> Given:
    """clip((zeta - gamma) softmax(z) + gamma, 0, 1) v."""
    p = _softmax_rows(*call.written())
    return call.weighted(((zeta - gamma) * p + gamma).clamp(0.0, 1.0)), None


def sigmoid(call: Call, params: Params, bias: float, **_: Any) -> Given:
    """sigmoid(z + bias) v, not normalised."""
    z, seen = call.written()
    return call.weighted(torch.sigmoid(z + bias).masked_fill(~seen, 0.0)), None


def sigmoid_normalised(call: Call, params: Params, bias: float, **_: Any) -> Given:
    """sigmoid(z + bias) over its sum in the row, times v."""
    z, seen = call.written()
    return call.weighted(_softmax_rows(F.logsigmoid(z + bias), seen)), None


def relu(call: Call, params: Params, **_: Any) -> Given:
    """relu(z) / (number of keys seen) v."""
    z, seen = call.written()
    return call.weighted(z.relu().masked_fill(~seen, 0.0) / seen.sum(-1, keepdim=True).clamp(min=1)), None


def softpick(call: Call, params: Params, **_: Any) -> Given:
    """relu(exp(z) - 1) / sum |exp(z) - 1| v."""
    z, seen = call.written()
    z = z.masked_fill(~seen, 0.0)
    shift = z.detach().amax(-1, keepdim=True).clamp(min=0)  # exp(z - m) - exp(-m): the same ratio, no overflow
    above = ((z - shift).exp() - (-shift).exp()).masked_fill(~seen, 0.0)
    return call.weighted(above.relu() / above.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)), None
