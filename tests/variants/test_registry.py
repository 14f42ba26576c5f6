"""Every attention variant against a loop over rows in float64: output, gradients, row sums, what its paper claims."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from massact.records.errors import UserError
from massact.variants.calls import Call, Dims
from massact.variants.registry import VARIANTS, variant
from massact.variants.slots import slotted, with_column

B, H, K, T, E, D = 2, 4, 2, 5, 3, 6
DIMS = Dims(H, K, E, E, D, T)
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"size": 2, "kept": 1}, "clipped-softmax": {"gamma": -0.1, "zeta": 1.1}, "gated-headwise": {"bias": 0.5},
}  # fmt: skip
MASKS = ("none", "causal", "padded", "random")
NAMES = [n for n in VARIANTS if n != "sink-token"]  # its function is softmax: the token is in the model


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def params_of(name: str, seed: int = 9) -> dict[str, Tensor]:
    made = VARIANTS[name]
    shapes = made.parameters(DIMS, **made.resolved(OPTIONS.get(name, {})))
    return {k: drawn(*init.shape, seed=seed + i) for i, (k, init) in enumerate(shapes.items())}


def mask_of(kind: str) -> Tensor | None:
    """Where a key is seen, (B, 1, T, T); None for all."""
    if kind in ("none", "causal"):
        return None
    if kind == "padded":  # two tokens of padding on the left of one sequence: its first rows see nothing
        seen = torch.ones(T, T, dtype=torch.bool).tril().repeat(B, 1, 1, 1)
        seen[1, :, :, :2] = False
        return seen
    seen = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(4)) < 0.6
    seen[..., 0] = True
    return seen


def call_of(kind: str, seed: int = 0) -> Call:
    q, k, v, x = (drawn(B, h, T, E, seed=seed + i) for i, h in enumerate((H, K, K, 1)))
    return Call(1.5 * q, k, v, mask_of(kind), kind == "causal", 0.7, x_BTD=drawn(B, T, D, seed=seed + 5),
                forward=kind in ("causal", "padded"))  # fmt: skip


def run(name: str, call: Call, params: dict[str, Tensor]) -> Tensor:
    made = VARIANTS[name]
    return made.attend(call, params, **made.resolved(OPTIONS.get(name, {})))[0]


# -------------------------------------------------------------------------------------------- the oracle
def sigma(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def weights(name: str, z: np.ndarray, slot: float | None, options: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Weights of the keys that a row sees, and of the slot."""
    if name == "sigmoid":
        return sigma(z), 0.0
    if name == "sigmoid-normalised":
        return sigma(z) / sigma(z).sum(), 0.0
    if name == "relu":
        return np.maximum(z, 0) / len(z), 0.0
    if name == "softpick":
        e = np.exp(z) - 1
        return np.maximum(e, 0) / np.abs(e).sum(), 0.0
    total = np.exp(z).sum() + (0.0 if slot is None else np.exp(slot))
    p = np.exp(z) / total
    if name == "clipped-softmax":
        p = np.clip((options["zeta"] - options["gamma"]) * p + options["gamma"], 0, 1)
    return p, 0.0 if slot is None else float(np.exp(slot) / total)


def naive(name: str, call: Call, params: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Output (B, H, T, E) and row sums over the keys (B, H, T)."""
    options = VARIANTS[name].resolved(OPTIONS.get(name, {}))
    q, k, v, x = (t.numpy() for t in (call.q_BHTE, call.k_BKSE, call.v_BKSF, call.x_BTD))
    p = {n: t.detach().numpy() for n, t in params.items()}
    out, sums = np.zeros((B, H, T, E)), np.zeros((B, H, T))
    for b, h, t in np.ndindex(B, H, T):
        g = h // (H // K)  # the key-value head of this head
        seen = [
            s for s in range(T) if (call.mask is None or bool(call.mask[b, 0, t, s])) and not (call.causal and s > t)
        ]
        if name == "window":
            one_way = call.causal or call.forward
            seen = [s for s in seen if ((t - s if one_way else abs(t - s)) < 2) or s < 1]
        values = v[b, g].copy()
        if name == "value-gate":
            values = values * sigma(values @ p["w"][g] + p["b"][g])[:, None]
        z = np.array([call.scale * q[b, h, t] @ k[b, g, s] for s in seen])
        if name == "qk-bias":
            z = z + call.scale * p["q"][h, t] * np.array([p["k"][g, s] for s in seen])
        slots = {"kv-bias": lambda h=h, g=g, b=b, t=t: call.scale * q[b, h, t] @ p["k"][g],
                 "softmax-off-by-one": lambda: 0.0, "sink-logit": lambda h=h: p["sink"][h]}  # fmt: skip
        slots["k-bias"] = slots["kv-bias"]
        slot = slots[name]() if name in slots else None
        if not seen and slot is None:
            w, w_slot = np.zeros(0), 0.0
        else:
            w, w_slot = weights(name, z, slot, options)
        row = sum((w[i] * values[s] for i, s in enumerate(seen)), np.zeros(E))
        if name == "kv-bias":
            row = row + w_slot * p["v"][g]
        if name == "v-bias":
            row = row + p["v"][g]
        if name == "head-norm":
            row = row / np.sqrt((row**2).mean() + options["eps"]) * p["weight"][h]
        if name.startswith("gated"):
            per_head = p["gate"].reshape(H, -1, D)[h] @ x[b, t] + p.get("gate_bias", np.zeros(H))[h]
            row = row * sigma(per_head)
        out[b, h, t], sums[b, h, t] = row, w.sum()
    return out, sums


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_output_is_that_of_a_loop_over_rows(name: str, kind: str) -> None:
    call, params = call_of(kind), params_of(name)
    wanted, _ = naive(name, call, params)
    np.testing.assert_allclose(run(name, call, params).numpy(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_rows_sum_to_what_the_registry_says(name: str) -> None:
    """The sums of the oracle, and of the function itself where it only weighs values: v = 1 everywhere."""
    call, params = call_of("causal"), params_of(name)
    _, sums = naive(name, call, params)
    said = VARIANTS[name].row_sum
    if said == "1":
        assert np.allclose(sums, 1)
    elif said == "<= 1":
        assert (sums < 1).any() and (sums <= 1 + 1e-12).all()
    else:
        assert said == "any" and not np.allclose(sums, 1)
    if not name.startswith(("gated", "value-gate", "head-norm", "v-bias", "kv-bias")):
        ones = Call(call.q_BHTE, call.k_BKSE, torch.ones_like(call.v_BKSF), None, True, call.scale, forward=True)
        np.testing.assert_allclose(run(name, ones, params)[..., 0].numpy(), sums, rtol=1e-10)


@pytest.mark.parametrize("kind", ["causal", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, kind: str) -> None:
    """Of queries, keys, values and every parameter, against finite differences."""
    call, params = call_of(kind), params_of(name)

    def attend(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        made = Call(q, k, v, call.mask, call.causal, call.scale, 0.0, call.x_BTD, call.forward)
        return run(name, made, dict(zip(params, given, strict=True)))

    inputs = [t.clone().requires_grad_() for t in (call.q_BHTE, call.k_BKSE, call.v_BKSF, *params.values())]
    assert gradcheck(attend, inputs)


# -------------------------------------------------------------------------------------------- the two ways of a slot
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("valued", [True, False])
def test_the_fused_slot_is_the_slot_as_a_column(kind: str, valued: bool) -> None:
    call, slot = call_of(kind), drawn(B, H, T, seed=20)
    value = drawn(H, E, seed=21) if valued else None
    given = (call.q_BHTE, call.k_BKSE, call.v_BKSF, slot, value)
    one = [x.clone().requires_grad_() for x in given if x is not None]
    two = [x.clone().requires_grad_() for x in given if x is not None]
    pad = [] if valued else [None]
    fused, lse = slotted(*one, *pad, call.mask, call.causal, call.scale)
    mask = None if call.mask is None else torch.zeros(B, 1, T, T).double().masked_fill(~call.mask, -torch.inf)
    column = with_column(*two, *pad, mask, call.causal, call.scale)
    assert lse is not None
    torch.testing.assert_close(fused, column, rtol=1e-10, atol=1e-12)
    weight = drawn(B, H, T, E, seed=22)
    (fused * weight).sum().backward()
    (column * weight).sum().backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduce", ["sum", "some"])
def test_gradients_of_any_layout_at_a_real_width(reduce: str) -> None:
    """Heads of 64 in the layout of the models, and output gradients that are expanded or full of zeros."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 4, 64, generator=g).transpose(1, 2).requires_grad_() for _ in range(3))
    slot, value = torch.randn(2, 4, 70, generator=g).requires_grad_(), torch.randn(4, 64, generator=g).requires_grad_()
    inputs = (q, k, v, slot, value)
    found = []
    for out in (slotted(*inputs, None, True, 0.125)[0], with_column(*inputs, None, True, 0.125)):
        whole = out.sum() if reduce == "sum" else out[:, :, ::2].square().sum()
        found.append(torch.autograd.grad(whole, inputs))
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slot_in_less_precision(dtype: torch.dtype) -> None:
    call, slot, value = call_of("causal"), drawn(B, H, T, seed=20), drawn(H, E, seed=21)
    given = (call.q_BHTE, call.k_BKSE, call.v_BKSF, slot, value)
    wanted, _ = slotted(*given, None, True, call.scale)
    inputs = [x.to(dtype).requires_grad_() for x in given]
    out, _ = slotted(*inputs, None, True, call.scale)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and bool(x.grad.isfinite().all()) for x in inputs)


def test_wide_values_learned_masks_and_dropout_take_the_column() -> None:
    """Where the fused kernel does not apply the result is the same, and there is no log-sum-exp."""
    call, slot = call_of("causal"), drawn(B, H, T, seed=20)
    v = drawn(B, K, T, 11, seed=3)
    out, lse = slotted(call.q_BHTE, call.k_BKSE, v, slot, None, None, True, call.scale)
    assert lse is None and out.shape == (B, H, T, 11)
    parts = [
        slotted(call.q_BHTE, call.k_BKSE, v[..., i : i + E], slot, None, None, True, call.scale)[0] for i in (0, 8)
    ]
    torch.testing.assert_close(out[..., [0, 1, 2, 8, 9, 10]], torch.cat(parts, -1))
    bias = drawn(1, H, T, T, seed=8).requires_grad_()
    out, lse = slotted(call.q_BHTE, call.k_BKSE, call.v_BKSF, slot, None, bias, False, call.scale)
    out.sum().backward()
    assert lse is None and bias.grad is not None
    torch.manual_seed(0)
    mean = torch.stack([slotted(call.q_BHTE, call.k_BKSE, call.v_BKSF, slot, None, None, True, call.scale, 0.3)[0]
                        for _ in range(4000)]).mean(0)  # fmt: skip
    plain, _ = slotted(call.q_BHTE, call.k_BKSE, call.v_BKSF, slot, None, None, True, call.scale)
    assert float((mean - plain).abs().max()) < 0.1


def test_great_and_small_slots_stay_finite() -> None:
    call = call_of("causal")
    for size in (1e4, -1e4):
        slot = torch.full((B, H, T), size, dtype=torch.float64, requires_grad=True)
        q = call.q_BHTE.clone().requires_grad_()
        out, _ = slotted(q, call.k_BKSE, call.v_BKSF, slot, drawn(H, E, seed=1), None, True, call.scale)
        out.sum().backward()
        assert bool(out.isfinite().all() and q.grad.isfinite().all() and slot.grad.isfinite().all())


# -------------------------------------------------------------------------------------------- what the papers claim
@pytest.mark.parametrize("kind", MASKS)
def test_a_zero_kv_bias_is_softmax_off_by_one(kind: str) -> None:
    call = call_of(kind)
    zeros = {"k": torch.zeros(K, E).double(), "v": torch.zeros(K, E).double()}
    one = run("softmax-off-by-one", call, {})
    torch.testing.assert_close(run("kv-bias", call, zeros), one, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(run("k-bias", call, {"k": zeros["k"]}), one, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(run("sink-logit", call, {"sink": torch.zeros(H).double()}), one, rtol=1e-12, atol=1e-14)


def test_a_slot_that_nobody_wants_is_plain_attention() -> None:
    """The logit of k' to minus infinity; also what v' is then does not matter."""
    call = call_of("causal")
    plain = run("softmax", call, {})
    for sink in (-60.0, -1e6, -torch.inf):
        out = run("sink-logit", call, {"sink": torch.full((H,), sink).double()})
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-14)
    out, _ = slotted(call.q_BHTE, call.k_BKSE, call.v_BKSF, torch.full((B, H, T), -1e6).double(),
                     drawn(H, E, seed=2), None, True, call.scale)  # fmt: skip
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-14)


def test_eq_3_is_attention_with_one_more_key_and_value() -> None:
    """softmax(Q [K^T k']) [V; v'] as Sun et al. write it, no mask."""
    call, p = call_of("none"), params_of("kv-bias")
    k, v = (torch.cat([x, p[n][None, :, None].expand(B, K, 1, E)], 2).repeat_interleave(H // K, 1)
            for x, n in ((call.k_BKSE, "k"), (call.v_BKSF, "v")))  # fmt: skip
    wanted = torch.softmax(call.scale * call.q_BHTE @ k.transpose(-1, -2), -1) @ v
    torch.testing.assert_close(run("kv-bias", call, p), wanted, rtol=1e-12, atol=1e-13)


def test_identities_of_the_others() -> None:
    call = call_of("causal")
    plain = run("softmax", call, {})

    def like(name: str, params: dict[str, Tensor], **options: Any) -> Tensor:
        return VARIANTS[name].attend(call, params, **variant(name).resolved(options))[0]

    torch.testing.assert_close(like("window", {}, size=T), plain)
    torch.testing.assert_close(like("window", {}, size=1, kept=T), plain)
    torch.testing.assert_close(like("clipped-softmax", {}, gamma=0.0, zeta=1.0), plain)
    torch.testing.assert_close(like("v-bias", {"v": torch.zeros(K, E).double()}), plain)
    # A bias of queries or keys alone is not seen by the softmax (Namazifar et al. 2023): q' the same at all positions.
    even = {"q": drawn(H, T, seed=1), "k": torch.ones(K, T).double()}
    torch.testing.assert_close(like("qk-bias", even), plain)
    open_gate = {"gate": torch.zeros(H * E, D).double(), "gate_bias": torch.full((H * E,), 60.0).double()}
    torch.testing.assert_close(like("gated-elementwise", open_gate, bias=60.0), plain)
    open_gate = {"w": torch.zeros(K, E).double(), "b": torch.full((K,), 60.0).double()}
    torch.testing.assert_close(like("value-gate", open_gate), plain)
    normed = like("head-norm", {"weight": torch.ones(H, E).double()}, eps=0.0)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(B, H, T).double())
    # Sigmoids far below 0 are exponentials: normalised they are the softmax.
    torch.testing.assert_close(like("sigmoid-normalised", {}, bias=-40.0), plain)


def test_softpick_neither_overflows_nor_divides_by_zero() -> None:
    for size in (0.0, 500.0):
        q = torch.full((1, 1, 3, 2), size, dtype=torch.float32, requires_grad=True)
        k, v = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0]]]]), torch.eye(3)[None, None, :, :2]
        out, _ = VARIANTS["softpick"].attend(Call(q, k, v, None, True), {})
        out.sum().backward()
        assert bool(out.isfinite().all() and q.grad.isfinite().all())


# -------------------------------------------------------------------------------------------- the registry
def test_every_variant_says_where_it_is_from() -> None:
    for name, made in VARIANTS.items():
        assert made.name == name and made.source and made.formula and made.row_sum in ("1", "<= 1", "any")
        assert (made.slot is not None) == (name in ("kv-bias", "k-bias", "softmax-off-by-one", "sink-logit"))


def test_wrong_names_and_options_are_refused() -> None:
    with pytest.raises(UserError, match="kv-bias"):
        variant("kv-bais")
    with pytest.raises(UserError, match="no option 'stdd'"):
        variant("kv-bias").resolved({"stdd": 1.0})
    with pytest.raises(UserError, match="gamma"):
        variant("clipped-softmax").resolved({"gamma": 0.1})
    with pytest.raises(UserError, match="size"):
        variant("window").resolved({"size": 0})


def test_more_keys_than_qk_bias_has_positions_are_refused() -> None:
    call = call_of("causal")
    short = {"q": torch.zeros(H, T - 1).double(), "k": torch.zeros(K, T - 1).double()}
    with pytest.raises(UserError, match="positions"):
        run("qk-bias", call, short)
