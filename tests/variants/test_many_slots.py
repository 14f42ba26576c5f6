"""Several slots, and slots that a sliding window leaves behind, against a softmax over [slots; keys] in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from massact.records.errors import UserError
from massact.stats.attention_call import Attended, fused_attention
from massact.variants.calls import Call, Dims
from massact.variants.registry import key_slot, variant
from massact.variants.slots import pooled, with_column

B, H, K, T, E = 2, 4, 2, 7, 3
WAYS = [(1, None), (1, 4), (2, None), (3, 4), (4, 2)]  # slots, window


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call_of(window: int | None, kind: str = "causal") -> Call:
    """Queries of a text, in a window as a mask says it to the kernel; `padded`: the second text begins at 2."""
    back = torch.arange(T)[:, None] - torch.arange(T)
    seen = ((back >= 0) & (back < (window or T))).expand(B, 1, T, T).clone()
    at = torch.arange(T).expand(B, T).clone()
    if kind == "padded":
        seen[1, ..., :2] = False
        at[1] = (at[1] - 2).clamp(min=0)
    q, k, v = (drawn(B, h, T, E, seed=i) for i, h in enumerate((H, K, K)))
    given = at if kind == "padded" else None
    whole = kind == "causal" and window is None
    return Call(2 * q, k, v, None if whole else seen, whole, 0.7, forward=True, window=window, position_BT=given)


def params_of(n: int) -> dict[str, Tensor]:
    shape = (K, E) if n == 1 else (K, n, E)
    return {"k": drawn(*shape, seed=7), "v": drawn(*shape, seed=8)}


def written_out(call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and probabilities (B, H, T, N + T): the slots are keys at positions -N..-1."""
    k, v = (x.reshape(K, -1, E) for x in (k, v))
    n = k.shape[1]
    keys, values = (torch.cat([x.expand(B, K, n, E), y], 2).repeat_interleave(H // K, 1)
                    for x, y in ((k, call.k_BKSE), (v, call.v_BKSF)))  # fmt: skip
    z = call.scale * call.q_BHTE @ keys.transpose(-1, -2)
    seen = torch.ones(T, T, dtype=torch.bool).tril() if call.mask is None else call.mask
    at = torch.arange(T).expand(B, T) if call.position_BT is None else call.position_BT
    near = at[:, :, None] - torch.arange(-n, 0) < (call.window or 10**6)
    p = z.masked_fill(~torch.cat([near[:, None], seen.expand(B, 1, T, T)], -1), -torch.inf).softmax(-1).nan_to_num(0)
    return p @ values, p


def attended(call: Call, params: dict[str, Tensor], n: int) -> Tensor:
    made = variant("kv-bias")
    return made.attend(call, params, **made.resolved({"slots": n, "placed": True}))[0]


@pytest.mark.parametrize("kind", ["causal", "padded"])
@pytest.mark.parametrize(("n", "window"), WAYS)
def test_slots_are_keys_before_the_text(n: int, window: int | None, kind: str) -> None:
    call, params = call_of(window, kind), params_of(n)
    wanted, _ = written_out(call, **params)
    rows = torch.ones(B, T, dtype=torch.bool)
    if kind == "padded":  # what padding gives is nobody's
        rows[1, :2] = False
    out = attended(call, params, n)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out.transpose(1, 2)[rows], wanted.transpose(1, 2)[rows], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("n", "window"), WAYS)
def test_gradients_of_queries_keys_values_and_slots(n: int, window: int | None) -> None:
    call, params = call_of(window), params_of(n)

    def attend(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        return attended(replace(call, q_BHTE=q, k_BKSE=k, v_BKSF=v), dict(zip(params, given, strict=True)), n)

    inputs = [t.clone().requires_grad_() for t in (call.q_BHTE, call.k_BKSE, call.v_BKSF, *params.values())]
    assert gradcheck(attend, inputs)
    loss = drawn(B, H, T, E, seed=9)
    found = torch.autograd.grad((attend(*inputs) * loss).sum(), inputs)
    q, k, v, slot_k, slot_v = inputs
    out, _ = written_out(replace(call, q_BHTE=q, k_BKSE=k, v_BKSF=v), slot_k, slot_v)
    for a, b in zip(found, torch.autograd.grad((out * loss).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("valued", [True, False])
@pytest.mark.parametrize(("n", "window"), WAYS)
def test_as_a_column_of_any_kernel(n: int, window: int | None, valued: bool) -> None:
    """Elsewhere than on a CPU the slot is a column, with the same output and the same gradients."""
    call, params = call_of(window), params_of(n)
    params = {name: p.requires_grad_() for name, p in params.items() if valued or name == "k"}
    slot, value = key_slot(call, params, slots=n, placed=True)
    mask = None if call.mask is None else torch.zeros(B, 1, T, T).double().masked_fill(~call.mask, -torch.inf)
    column = with_column(call.q_BHTE, call.k_BKSE, call.v_BKSF, slot, value, mask, call.causal, call.scale)
    fused = attended(call, params, n)
    torch.testing.assert_close(column, fused, rtol=1e-10, atol=1e-12)
    loss = drawn(B, H, T, E, seed=9)
    grads = [torch.autograd.grad((out * loss).sum(), list(params.values())) for out in (column, fused)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_slot_out_of_sight_is_finite_in_16_bits(dtype: torch.dtype) -> None:
    """Both ways: its logit is the least number, which over the scale is beyond the range of the dtype."""
    call, params = call_of(2), {n: p.to(dtype) for n, p in params_of(2).items()}
    few = replace(call, q_BHTE=call.q_BHTE.to(dtype), k_BKSE=call.k_BKSE.to(dtype), v_BKSF=call.v_BKSF.to(dtype))
    mask = torch.zeros(B, 1, T, T, dtype=dtype).masked_fill(~call.mask, -torch.inf)
    slot, value = key_slot(few, params, slots=2, placed=True)
    column = with_column(few.q_BHTE, few.k_BKSE, few.v_BKSF, slot, value, mask, False, few.scale)
    wanted, _ = written_out(call, **params_of(2))
    for out in (column, attended(few, params, 2)):
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=24 * torch.finfo(dtype).eps)


def test_one_slot_has_the_parameters_it_had() -> None:
    made, dims = variant("kv-bias"), Dims(H, K, E, E, 6, T)
    one, two = (made.parameters(dims, **made.resolved({"slots": n})) for n in (1, 2))
    assert {n: i.shape for n, i in one.items()} == {"k": (K, E), "v": (K, E)}
    assert {n: i.shape for n, i in two.items()} == {"k": (K, 2, E), "v": (K, 2, E)}
    with pytest.raises(UserError, match="slots"):
        made.resolved({"slots": 0})


def test_without_a_place_a_slot_is_seen_from_everywhere() -> None:
    call, params = call_of(2), params_of(2)
    far = replace(call, window=None)
    made = variant("kv-bias")
    out = made.attend(call, params, **made.resolved({"slots": 2}))[0]
    torch.testing.assert_close(out, made.attend(far, params, **made.resolved({"slots": 2, "placed": True}))[0])


@pytest.mark.parametrize(("n", "window"), WAYS)
def test_what_taps_are_told_is_what_the_softmax_is(n: int, window: int | None) -> None:
    """Probability of the slots together, their update, and the output without some keys, for each query its own."""
    call, params = call_of(window), params_of(n)
    _, p = written_out(call, **params)
    slot, value = key_slot(call, params, slots=n, placed=True)
    mask = None if call.mask is None else torch.zeros(B, 1, T, T).double().masked_fill(~call.mask, -torch.inf)
    fused = fused_attention(call.q_BHTE, call.k_BKSE, call.v_BKSF, mask, call.causal, call.scale)
    assert fused is not None and value is not None
    out = attended(call, params, n)
    a = Attended(
        call.q_BHTE[1], call.k_BKSE[1], call.v_BKSF[1], out[1], fused[1][1], call.scale,
        None if mask is None else mask[1], causal=call.causal, forward=True, slot_logit_HT=slot[1],
        slot_value_HTF=value[:, None] if value.ndim == 2 else value[1],
    )  # fmt: skip
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    assert a.slot_HT is not None
    torch.testing.assert_close(a.slot_HT, p[1, ..., :n].sum(-1), **close)
    v = params["v"].reshape(K, n, E).repeat_interleave(H // K, 0)
    torch.testing.assert_close(a.slot_update(), p[1, ..., :n] @ v, **close)
    few = torch.tensor([4, 6])
    torch.testing.assert_close(a.slot_update(few), a.slot_update()[:, few])
    torch.testing.assert_close(a.trimmed(few).slot_update(), a.slot_update()[:, few])
    left = p[1].clone()
    left[..., n] = 0  # nobody sees the first token of the text
    sees = left.sum(-1, keepdim=True)
    values = torch.cat([v, call.v_BKSF[1].repeat_interleave(H // K, 0)], 1)
    torch.testing.assert_close(a.without(torch.tensor([0])), (left / sees.clamp(min=1e-30)) @ values, **close)


def test_pooled_slots_of_one_are_that_one() -> None:
    b, v = drawn(B, H, T, 1, seed=0), drawn(H, 1, E, seed=1)
    slot, value = pooled(b, v)
    assert value is not None
    torch.testing.assert_close(slot, b[..., 0])
    torch.testing.assert_close(value, v[:, 0][None, :, None].expand(B, H, T, E))
