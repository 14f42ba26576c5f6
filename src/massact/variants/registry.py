"""The registry of attention variants: name, source, formula, what a row sums to, parameters, function.

Sources are given as they are known to us; where a paper leaves something open, `note` says what was chosen.
"""

from __future__ import annotations

from typing import Any

from massact.records.errors import UserError, near
from massact.variants import formulas as a
from massact.variants.formulas import Dims, Init, Variant


def _key(dims: Dims, std: float, **_: Any) -> dict[str, Init]:
    return {"k": Init((dims.K, dims.E), std)}


def _key_and_value(dims: Dims, std: float, value_std: float, **_: Any) -> dict[str, Init]:
    return {"k": Init((dims.K, dims.E), std), "v": Init((dims.K, dims.F), value_std)}


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


def _window(size: int, kept: int, **_: Any) -> str:
    return "" if size >= 1 and kept >= 0 else "size must be at least 1 and kept at least 0."


_QIU = "Qiu et al. 2025 (arXiv 2505.06708): a gate on the output of attention, from the module's input"
_GU = "Gu et al. 2025 (arXiv 2410.10781)"
_SUN = "Sun et al. 2024 (arXiv 2402.17762)"
_SCALE = "std of k' is that of the paper's code; real keys are often larger, and then only a larger std draws attention"

_ALL = (
    Variant("softmax", "Vaswani et al. 2017", "softmax(z) v", "1", a.softmax),
    Variant(
        "kv-bias", f"{_SUN}, Eq. 3", "softmax([z, scale q.k']) [v; v']", "<= 1", a.with_slot(a.key_slot),
        _key_and_value, {"std": 0.02, "value_std": 0.02}, slot=a.key_slot, note=_SCALE,
    ),
    Variant(
        "k-bias", f"{_GU}; {_SUN}, App. B.4", "softmax([z, scale q.k']) [v; 0]", "<= 1", a.with_slot(a.key_slot),
        _key, {"std": 0.02}, slot=a.key_slot, note=_SCALE,
    ),
    Variant("v-bias", f"{_SUN}, App. B.4", "softmax(z) v + v'", "1", a.v_bias, _value, {"std": 0.02}),
    Variant(
        "qk-bias", f"{_SUN}, App. B.4", "softmax(scale [q q'] [k k']^T) v", "1", a.qk_bias, _columns,
        {"std": 0.02, "length": None},
        note="q' and k' have one number for each position: numbers that are the same at all positions change nothing",
    ),
    Variant(
        "softmax-off-by-one", "Miller 2023, Attention is off by one", "exp(z) / (1 + sum exp(z)) v", "<= 1",
        a.with_slot(a.zero_slot), slot=a.zero_slot,
    ),
    Variant(
        "sink-logit", "OpenAI 2025, gpt-oss (arXiv 2508.10925)", "exp(z) / (exp(b) + sum exp(z)) v", "<= 1",
        a.with_slot(a.learned_slot), _sink, {"std": 0.0}, slot=a.learned_slot,
        note="b starts at 0, which is softmax-off-by-one; the report does not say how it was drawn",
    ),
    Variant(
        "sink-token", "Xiao et al. 2023 (arXiv 2309.17453); Sun et al. 2024, 4.3", "softmax(z) v over one more token",
        "1", a.softmax, options={"std": 0.02},
        note="a learned token of its own in the residual stream, without a position embedding of its own",
    ),
    Variant(
        "clipped-softmax", "Bondarenko et al. 2023 (arXiv 2306.12929)",
        "clip((zeta - gamma) softmax(z) + gamma, 0, 1) v", "any", a.clipped_softmax,
        options={"gamma": -0.03, "zeta": 1.0}, check=_clip,
        note="-0.03 is the paper's for BERT; for a decoder it takes -alpha / (training length), alpha 2 to 4",
    ),
    Variant(
        "gated-headwise", f"{_QIU}, one for each head", "softmax(z) v * sigmoid(x W)", "1", a.gated, _head_gate,
        {"std": 0.02, "bias": None}, takes_input=True,
        note="bias=b adds a constant to start from, as Bondarenko et al. 2023 do with a gate for each head",
    ),
    Variant(
        "gated-elementwise", f"{_QIU}, one for each entry", "softmax(z) v * sigmoid(x W)", "1", a.gated, _element_gate,
        {"std": 0.02, "bias": None}, takes_input=True,
    ),
    Variant(
        "value-gate", "Value-State Gated Attention 2025 (arXiv 2510.09017)", "softmax(z) (v * sigmoid(w.v + b))", "1",
        a.value_gate, _own_gate, {"std": 0.02, "bias": 0.0},
        note="read from the abstract: a gate that is a function of the value itself; one for each key and head is ours",
    ),
    Variant("sigmoid", f"{_GU}, without normalisation", "sigmoid(z + bias) v", "any", a.sigmoid, options={"bias": 0.0}),
    Variant(
        "sigmoid-normalised", f"{_GU}, with normalisation", "sigmoid(z + bias) / sum sigmoid(z + bias) v", "1",
        a.sigmoid_normalised, options={"bias": 0.0},
    ),
    Variant(
        "relu", "Guo et al. 2024 (arXiv 2410.13835), ReLU attention", "relu(z) / n v, n keys seen", "any", a.relu,
        note="the division by the number of keys is ours: without it the output grows with the length",
    ),
    Variant(
        "softpick", "Zuhri et al. 2025 (arXiv 2504.20966)", "relu(exp(z) - 1) / sum |exp(z) - 1| v", "<= 1", a.softpick
    ),
    Variant(
        "head-norm", "Li et al. 2026 (arXiv 2605.06611)", "RMSNorm(softmax(z) v), head by head", "1", a.head_norm,
        _head_weight, {"eps": 1e-6}, note="one weight for each entry of each head is ours",
    ),
    Variant(
        "window", "Beltagy et al. 2020; kept tokens as in Xiao et al. 2023",
        "softmax(z) v over the last `size` keys and the first `kept`", "1", a.window,
        options={"size": 128, "kept": 0}, check=_window,
    ),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}


def variant(name: str) -> Variant:
    """The attention variant of this name.

    Raises:
        UserError: there is none; says which are near.
    """
    if name not in VARIANTS:
        raise UserError(f"There is no attention variant {name!r}.", do=near(name, VARIANTS))
    return VARIANTS[name]
