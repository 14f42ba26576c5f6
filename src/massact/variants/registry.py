"""The attention variants: for each one small function, its parameters, its formula, its paper, what its rows sum to.

Every function takes a `Call` (queries, keys, values, the attention module's input), parameters and options and gives
(out, lse): the output of the heads (B, H, T, F) and the log-sum-exp over the keys (B, H, T), or None where the kernel
does not say. z = scale * q.k are the logits, P the weights of the keys.

Sources are given as they are known to us; where a paper leaves something open, `note` says what was chosen. To add one:
a function, its parameters, and a `Variant` in the table at the end, or in another package (entry point
`massact.variants`).

Shapes as in `massact.variants.calls`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from massact.records.errors import UserError, near
from massact.records.extensions import extensions
from massact.variants.calls import Call, Dims, Given, Init, Params, Slot, Variant
from massact.variants.slots import additive, pooled, slotted


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
def key_slot(
    call: Call, params: Params, slots: int = 1, placed: bool = False, **_: Any
) -> tuple[Tensor, Tensor | None]:
    """b = scale * q.k', and v' where there is one; several slots are pooled."""
    k, v = call.per_head(params["k"] * call.scale, 0), params.get("v")
    v = None if v is None else call.per_head(v, 0)
    if slots == 1:
        # Not matmul: with one column its backward pass costs half of attention at 128 tokens.
        slot_BHT = (call.q_BHTE * k[:, None].to(call.q_BHTE.dtype)).sum(-1)
        hidden = _out_of_window(call, 1) if placed else None
        return slot_BHT if hidden is None else _hide(slot_BHT, hidden[..., 0]), v
    logit_BHTN = torch.matmul(call.q_BHTE, k.to(call.q_BHTE.dtype).transpose(-1, -2))
    logit_BHTN = logit_BHTN.to(torch.promote_types(logit_BHTN.dtype, torch.float32))
    hidden = _out_of_window(call, slots) if placed else None
    return pooled(logit_BHTN if hidden is None else _hide(logit_BHTN, hidden), v)


def _out_of_window(call: Call, n: int) -> Tensor | None:
    """Which queries no longer see which of n slots at positions -n..-1: (B or 1, 1, T, N); None: all see all.

    Slot i sees the query at position t iff t - (i - n) < window.
    """
    if call.window is None or (call.position_BT is None and call.k_BKSE.shape[2] + n <= call.window):
        return None
    # A cache that keeps a window of keys alone hides how many came before; no slot is in sight by then.
    at = call.positions()[0][None] if call.position_BT is None else call.position_BT
    back = at[:, None, :, None] - torch.arange(-n, 0, device=at.device)
    return back >= call.window


def _hide(logit: Tensor, hidden: Tensor) -> Tensor:
    """The logits with the least number, not -inf, where hidden: a row that sees nothing then has finite gradients."""
    return logit.masked_fill(hidden, torch.finfo(logit.dtype).min)


def zero_slot(call: Call, params: Params, **_: Any) -> tuple[Tensor, None]:
    """b = 0, v' = 0."""
    return call.q_BHTE.new_zeros(()).expand(call.q_BHTE.shape[:3]), None


def learned_slot(call: Call, params: Params, **_: Any) -> tuple[Tensor, None]:
    """b learned for each head, v' = 0."""
    return params["sink"][None, :, None].expand(call.q_BHTE.shape[:3]), None


def with_slot(slot: Slot) -> Callable[..., Given]:
    """Attention with the slot that `slot` gives, on the fused kernel."""

    def attend(call: Call, params: Params, **options: Any) -> Given:
        slot_BHT, value = slot(call, params, **options)
        return slotted(call.q_BHTE, call.k_BKSE, call.v_BKSF, slot_BHT, value, call.mask, call.causal, call.scale,
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


# -------------------------------------------------------------------------------------------- parameters and options
def _key(dims: Dims, std: float, slots: int, **_: Any) -> dict[str, Init]:
    return {"k": Init(_of_slots(dims.K, slots, dims.E), std)}


def _key_and_value(dims: Dims, std: float, value_std: float, slots: int, **_: Any) -> dict[str, Init]:
    return _key(dims, std, slots) | {"v": Init(_of_slots(dims.K, slots, dims.F), value_std)}


def _of_slots(K: int, slots: int, width: int) -> tuple[int, ...]:
    """The shape of a parameter of some slots: of one as it was before there were several."""
    return (K, width) if slots == 1 else (K, slots, width)


def _value(dims: Dims, std: float, **_: Any) -> dict[str, Init]:
    return {"v": Init((dims.K, dims.F), std)}


def _columns(dims: Dims, std: float, **_: Any) -> dict[str, Init]:
    return {"q": Init((dims.H, dims.N), std), "k": Init((dims.K, dims.N), std)}


def _sink(dims: Dims, std: float, **_: Any) -> dict[str, Init]:
    return {"sink": Init((dims.H,), std)}


def _gate(n: int, dims: Dims, std: float, bias: float | None) -> dict[str, Init]:
    weight = {"gate": Init((n, dims.D), std)}
    return weight if bias is None else weight | {"gate_bias": Init((n,), constant=bias)}


def _head_gate(dims: Dims, std: float, bias: float | None, **_: Any) -> dict[str, Init]:
    return _gate(dims.H, dims, std, bias)


def _element_gate(dims: Dims, std: float, bias: float | None, **_: Any) -> dict[str, Init]:
    return _gate(dims.H * dims.F, dims, std, bias)


def _own_gate(dims: Dims, std: float, bias: float, **_: Any) -> dict[str, Init]:
    return {"w": Init((dims.K, dims.F), std), "b": Init((dims.K,), constant=bias)}


def _head_weight(dims: Dims, **_: Any) -> dict[str, Init]:
    return {"weight": Init((dims.H, dims.F), constant=1.0)}


def _clip(gamma: float, zeta: float, **_: Any) -> str:
    return "" if gamma <= 0 and zeta >= 1 else "gamma must not be above 0 nor zeta below 1: else nothing is clipped."


def _slots(slots: int, **_: Any) -> str:
    return "" if isinstance(slots, int) and slots >= 1 else "slots must be a whole number from 1 on."


def _window(size: int, kept: int, **_: Any) -> str:
    return "" if size >= 1 and kept >= 0 else "size must be at least 1 and kept at least 0."


_QIU = "Qiu et al. 2025 (arXiv 2505.06708): a gate on the output of attention, from the module's input"
_GU = "Gu et al. 2025 (arXiv 2410.10781)"
_SUN = "Sun et al. 2024 (arXiv 2402.17762)"
# How many slots; and whether they stand at the positions before the text, so that a sliding window leaves them behind.
_PLACES = {"slots": 1, "placed": False}
_SCALE = "std of k' is that of the paper's code; real keys are often larger, and then only a larger std draws attention"

_ALL = (
    Variant("softmax", "Vaswani et al. 2017", "softmax(z) v", "1", softmax),
    Variant(
        "kv-bias", f"{_SUN}, Eq. 3", "softmax([z, scale q.k']) [v; v']", "<= 1", with_slot(key_slot),
        _key_and_value, {"std": 0.02, "value_std": 0.02, **_PLACES}, slot=key_slot, check=_slots, note=_SCALE,
    ),
    Variant(
        "k-bias", f"{_GU}; {_SUN}, App. B.4", "softmax([z, scale q.k']) [v; 0]", "<= 1", with_slot(key_slot),
        _key, {"std": 0.02, **_PLACES}, slot=key_slot, check=_slots, note=_SCALE,
    ),
    Variant("v-bias", f"{_SUN}, App. B.4", "softmax(z) v + v'", "1", v_bias, _value, {"std": 0.02}),
    Variant(
        "qk-bias", f"{_SUN}, App. B.4", "softmax(scale [q q'] [k k']^T) v", "1", qk_bias, _columns,
        {"std": 0.02, "length": None},
        note="q' and k' have one number for each position: numbers that are the same at all positions change nothing",
    ),
    Variant(
        "softmax-off-by-one", "Miller 2023, Attention is off by one", "exp(z) / (1 + sum exp(z)) v", "<= 1",
        with_slot(zero_slot), slot=zero_slot,
    ),
    Variant(
        "sink-logit", "OpenAI 2025, gpt-oss (arXiv 2508.10925)", "exp(z) / (exp(b) + sum exp(z)) v", "<= 1",
        with_slot(learned_slot), _sink, {"std": 0.0}, slot=learned_slot,
        note="b starts at 0, which is softmax-off-by-one; the report does not say how it was drawn",
    ),
    Variant(
        "sink-token", "Xiao et al. 2023 (arXiv 2309.17453); Sun et al. 2024, 4.3", "softmax(z) v over one more token",
        "1", softmax, options={"std": 0.02},
        note="a learned token of its own in the residual stream, without a position embedding of its own",
    ),
    Variant(
        "clipped-softmax", "Bondarenko et al. 2023 (arXiv 2306.12929)",
        "clip((zeta - gamma) softmax(z) + gamma, 0, 1) v", "any", clipped_softmax,
        options={"gamma": -0.03, "zeta": 1.0}, check=_clip,
        note="-0.03 is the paper's for BERT; for a decoder it takes -alpha / (training length), alpha 2 to 4",
    ),
    Variant(
        "gated-headwise", f"{_QIU}, one for each head", "softmax(z) v * sigmoid(x W)", "1", gated, _head_gate,
        {"std": 0.02, "bias": None}, takes_input=True,
        note="bias=b adds a constant to start from, as Bondarenko et al. 2023 do with a gate for each head",
    ),
    Variant(
        "gated-elementwise", f"{_QIU}, one for each entry", "softmax(z) v * sigmoid(x W)", "1", gated, _element_gate,
        {"std": 0.02, "bias": None}, takes_input=True,
    ),
    Variant(
        "value-gate", "Value-State Gated Attention 2025 (arXiv 2510.09017)", "softmax(z) (v * sigmoid(w.v + b))", "1",
        value_gate, _own_gate, {"std": 0.02, "bias": 0.0},
        note="read from the abstract: a gate that is a function of the value itself; one for each key and head is ours",
    ),
    Variant("sigmoid", f"{_GU}, without normalisation", "sigmoid(z + bias) v", "any", sigmoid, options={"bias": 0.0}),
    Variant(
        "sigmoid-normalised", f"{_GU}, with normalisation", "sigmoid(z + bias) / sum sigmoid(z + bias) v", "1",
        sigmoid_normalised, options={"bias": 0.0},
    ),
    Variant(
        "relu", "Guo et al. 2024 (arXiv 2410.13835), ReLU attention", "relu(z) / n v, n keys seen", "any", relu,
        note="the division by the number of keys is ours: without it the output grows with the length",
    ),
    Variant(
        "softpick", "Zuhri et al. 2025 (arXiv 2504.20966)", "relu(exp(z) - 1) / sum |exp(z) - 1| v", "<= 1", softpick
    ),
    Variant(
        "head-norm", "Li et al. 2026 (arXiv 2605.06611)", "RMSNorm(softmax(z) v), head by head", "1", head_norm,
        _head_weight, {"eps": 1e-6}, note="one weight for each entry of each head is ours",
    ),
    Variant(
        "window", "Beltagy et al. 2020; kept tokens as in Xiao et al. 2023",
        "softmax(z) v over the last `size` keys and the first `kept`", "1", window,
        options={"size": 128, "kept": 0}, check=_window,
    ),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}


def variants() -> dict[str, Variant]:
    """Name -> variant: ours, and those that other packages name (entry point `massact.variants`).

    Raises:
        UserError: what another package names is no variant, or is called like another.
    """
    return extensions("massact.variants", Variant, VARIANTS)


@cache  # asked at every call of attention
def variant(name: str) -> Variant:
    """The attention variant of this name.

    Raises:
        UserError: there is none; says which are near.
    """
    known = variants()
    if name not in known:
        raise UserError(f"There is no attention variant {name!r}.", do=near(name, known))
    return known[name]
