"""Attention of one sequence against a dense softmax in float64; mass per key by the fused kernel and by blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from massact.stats import attention_call as module
from massact.stats.attention_call import Attended, fused_attention, hides_only


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def naive(a: Attended, value: Tensor | None = None) -> dict[str, np.ndarray]:
    """Everything that `Attended` says, written out densely in float64 from what it was given."""
    H, T, S = a.shape
    if a.scores_HTS is not None:
        s = numbers(a.scores_HTS)
    else:
        k = np.repeat(numbers(a.k_KSE), H // len(a.k_KSE), 0)
        s = np.zeros((H, T, S))
        for h in range(H):
            s[h] = numbers(a.q_HTE)[h] @ k[h].T * a.scale
        if a.cap is not None:
            s = a.cap * np.tanh(s / a.cap)
        if a.mask_HTS is not None:
            s = s + numbers(a.mask_HTS)
        if a.causal:
            s[:, np.arange(T)[:, None] < np.arange(S)] = -np.inf
    top = s.max(-1, keepdims=True)
    lse = np.log(np.exp(s - top).sum(-1)) + top[..., 0]
    e = np.exp(s)
    slot = np.zeros((H, T)) if a.sink_H is None else np.exp(numbers(a.sink_H))[:, None] + np.zeros((H, T))
    total = e.sum(-1) + slot
    p, slot = e / total[..., None], slot / total
    outcomes = p if a.sink_H is None else np.concatenate([p, slot[..., None]], -1)
    safe = np.where(outcomes > 0, outcomes, 1)
    found = {"s": s, "lse": lse, "p": p, "slot": slot, "mass": p.sum(1)}
    found["entropy"] = -(outcomes * np.log(safe)).sum(-1).mean(-1)
    if a.v_KSF is not None:
        found["v"] = np.repeat(numbers(a.v_KSF), H // len(a.v_KSF), 0)
        found["out"] = p @ found["v"]
    return found


HIDDEN = torch.finfo(torch.float32).min


def rows_before(T: int, S: int, window: int | None = None) -> Tensor:
    """What a query may see: the keys up to itself, or the last few of them."""
    back = torch.arange(T)[:, None] - torch.arange(S)
    return (back >= 0) & (back < (window or S))


def call(
    H: int = 4, K: int | None = None, T: int = 21, S: int | None = None, E: int = 8, F: int | None = None,
    seed: int = 0, size: float = 1.0, mask: Tensor | None = None, dtype: torch.dtype = torch.float32,
    lowest: float = -math.inf, **more: Any,
) -> Attended:  # fmt: skip
    """A random call; `mask` is a bool, (H or 1, T or 1, S), what a query may see."""
    rng = torch.Generator().manual_seed(seed)
    K, S, F = K or H, S or T, F or E

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=rng) * size).to(dtype)

    q, k, v = draw(H, T, E), draw(K, S, E), draw(K, S, F)
    if mask is not None:
        more["mask_HTS"] = torch.zeros(mask.shape).masked_fill_(~mask, lowest).clamp(min=lowest).to(dtype)
    return Attended(q, k, v, None, scale=more.pop("scale", E**-0.5), **more)


def slopes(T: int = 21, H: int = 4) -> Tensor:
    """ALiBi: further back is less, and not behind."""
    back = (torch.arange(T)[:, None] - torch.arange(T)).float()
    bias = -back * 2.0 ** -torch.arange(1, H + 1)[:, None, None]
    return bias.masked_fill(back < 0, -math.inf)


BLIND = torch.ones(1, 1, 21, dtype=torch.bool)
BLIND[..., [3, 20]] = False  # keys that no query may see

CASES: dict[str, dict[str, Any]] = {
    "causal flag": dict(causal=True, forward=True),
    "causal flag, grouped": dict(causal=True, forward=True, K=2),
    "causal flag, one key-value head, large": dict(causal=True, forward=True, K=1, size=2.5),
    "causal mask": dict(mask=rows_before(21, 21)[None], forward=True),
    "causal mask, finite": dict(mask=rows_before(21, 21)[None], forward=True, lowest=HIDDEN, K=2),
    "window": dict(mask=rows_before(21, 21, 5)[None], forward=True),
    "window, finite": dict(mask=rows_before(21, 21, 5)[None], forward=True, lowest=HIDDEN),
    "both ways": dict(),
    "both ways, grouped": dict(K=2),
    "padding": dict(mask=BLIND, K=2),
    "padding, finite": dict(mask=BLIND, lowest=HIDDEN),
    "mask per head": dict(mask=torch.stack([rows_before(21, 21, w) for w in (1, 2, 9, 21)])),
    "alibi": dict(mask_HTS=slopes(), binary=False, forward=True),
    "soft cap": dict(causal=True, cap=1.5, size=2.0, K=2),
    "learned sink": dict(causal=True, sink_H=torch.tensor([-2.0, 0.0, 1.0, 4.0]), K=2),
    "learned sink, window": dict(mask=rows_before(21, 21, 4)[None], sink_H=torch.tensor([-9.0, 0.5, 1.0, 2.0])),
    "learned sink, soft cap": dict(causal=True, cap=2.0, sink_H=torch.tensor([-2.0, 0.0, 1.0, 4.0])),
    "other width of values": dict(causal=True, E=12, F=6, K=2),
    "odd width": dict(causal=True, E=5, F=7),
    "cross": dict(T=9, S=25, K=2),
    "cross, more queries": dict(T=25, S=4),
    "cross, flag": dict(T=13, S=9, causal=True),
    "cross, flag, more keys": dict(T=9, S=13, causal=True),
    "one token": dict(T=1, causal=True),
    "scale": dict(scale=0.7, causal=True),
}
BLOCKED = {"alibi", "soft cap", "learned sink, soft cap", "cross, flag", "cross, flag, more keys"}
FUSED = [name for name in CASES if name not in BLOCKED]


def tolerance(dtype: torch.dtype) -> float:
    """Of probabilities that a kernel of this dtype made, for sums of about one."""
    return 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_every_case_has_a_naive_answer_that_is_a_distribution() -> None:
    """The oracle itself: rows and the sink's share sum to one."""
    for case in CASES.values():
        want = naive(call(**case))
        np.testing.assert_allclose(want["p"].sum(-1) + want["slot"], 1, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_logits_lse_and_probabilities(case: str, dtype: torch.dtype) -> None:
    """Logits are made in float32 from whatever q and k are, so that 16 bits cost nothing here."""
    a = call(**CASES[case], dtype=dtype)
    want = naive(a)
    H, T, S = a.shape
    s, p = a.dense()
    assert s.dtype == p.dtype == a.lse_HT.dtype == torch.float32
    np.testing.assert_allclose(np.maximum(numbers(s), -1e30), np.maximum(want["s"], -1e30), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numbers(a.lse_HT), want["lse"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numbers(p), want["p"], atol=3e-6)
    keys = torch.tensor([S - 1, 0, S // 2])
    np.testing.assert_allclose(numbers(a.probs(keys)), want["p"][:, :, keys], atol=3e-6)
    for rows in (slice(T // 3, None), torch.tensor([T - 1, 0])):
        np.testing.assert_allclose(numbers(a.probs(keys, rows)), want["p"][:, rows][:, :, keys], atol=3e-6)
        np.testing.assert_allclose(numbers(a.logits(rows).exp()), np.exp(want["s"][:, rows]), rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_values_give_the_output(case: str, dtype: torch.dtype) -> None:
    """Values of chosen keys for every head, in the order asked for; P times all of them is the output."""
    a = call(**CASES[case], dtype=dtype)
    want, S = naive(a), a.shape[2]
    keys = torch.tensor([S - 1, 0])
    np.testing.assert_array_equal(numbers(a.values(keys)), want["v"][:, keys])
    out = a.dense()[1] @ a.values(torch.arange(S))
    np.testing.assert_allclose(numbers(out), want["out"], atol=2e-5)


def check_columns(mass: Tensor, entropy: Tensor, want: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    T, S = want["p"].shape[1:]
    np.testing.assert_allclose(numbers(mass), want["mass"], rtol=tolerance(dtype), atol=tolerance(dtype))
    np.testing.assert_allclose(numbers(entropy), want["entropy"], atol=tolerance(dtype) * max(1, math.log(S)))
    unseen = (want["p"] == 0).all(1)
    assert (numbers(mass)[unseen] == 0).all()
    # All that is not the sink's goes somewhere.
    rest = T - want["slot"].sum(-1)
    np.testing.assert_allclose(numbers(mass).sum(-1), rest, rtol=tolerance(dtype))


@pytest.mark.parametrize("case", CASES)
def test_columns(case: str, dtype: torch.dtype) -> None:
    """Mass that every key receives, and the mean entropy."""
    a = call(**CASES[case], dtype=dtype)
    check_columns(*a.columns(), naive(a), dtype)


@pytest.mark.parametrize("case", FUSED)
def test_columns_by_kernel_and_by_blocks_agree(case: str, dtype: torch.dtype) -> None:
    """The fused kernel answers wherever it can, and says what the plain formula says."""
    a = call(**CASES[case], dtype=dtype)
    assert a._fusable
    swapped, blocked = a._columns_swapped(), a._columns_blocked()
    assert swapped is not None
    np.testing.assert_allclose(numbers(swapped[0]), numbers(blocked[0]), rtol=tolerance(dtype), atol=tolerance(dtype))
    scale = a.shape[1] * max(1.0, float(np.abs(naive(a)["s"][np.isfinite(naive(a)["s"])]).max()))
    scale = min(scale, 1e3 * a.shape[1])  # hidden logits are no logits
    np.testing.assert_allclose(numbers(swapped[1]), numbers(blocked[1]), atol=tolerance(dtype) * scale)


@pytest.mark.parametrize("level", [-70.0, 70.0])
def test_logits_that_are_all_large(level: float, dtype: torch.dtype) -> None:
    """What is the same for all keys cancels, though sixteen bits round it: the norms ride in several pieces."""
    a = call(causal=True, dtype=dtype)
    q, k = torch.ones(4, 21, 9, dtype=dtype), torch.full((4, 21, 9), level / a.scale, dtype=dtype)
    q[..., :8], k[..., :8] = a.q_HTE, a.k_KSE
    a = replace(a, q_HTE=q, k_KSE=k)
    mass = a._columns_swapped()[0]
    np.testing.assert_allclose(numbers(mass), naive(a)["mass"], rtol=1e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("case", [name for name in CASES if "padding" in name])
def test_keys_that_no_query_may_see_get_nothing(case: str) -> None:
    a = call(**CASES[case])
    for mass, score, *_ in (a._columns_swapped(), a._columns_blocked()):
        assert (mass[:, [3, 20]] == 0).all() and (mass[:, [2, 4, 19]] > 0).all()
        assert score.isfinite().all()


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("not this way")


def test_the_way_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that only hides keys goes to the fused kernel; a bias, a cap or bare logits go by blocks.

    So does a causal flag where queries and keys differ in number: turned round, it would hide other keys.
    """
    monkeypatch.setattr(Attended, "_columns_blocked", refuse)
    for case in FUSED:
        call(**CASES[case]).columns()
    monkeypatch.undo()
    monkeypatch.setattr(module, "fused_attention", refuse)
    for case in BLOCKED:
        call(**CASES[case]).columns()
    bare(call()).columns()


def bare(a: Attended) -> Attended:
    """The same call where only the logits were seen."""
    return Attended(None, None, a.v_KSF, a.out_HTF, scores_HTS=a.dense()[0], forward=a.forward)


@pytest.mark.parametrize("case", ["causal flag", "window, finite", "both ways", "alibi", "cross"])
def test_only_logits_were_seen(case: str) -> None:
    a = call(**CASES[case])
    b, want = bare(a), naive(a)
    assert b.shape == a.shape and b.device == a.device
    np.testing.assert_allclose(numbers(b.lse_HT), want["lse"], atol=1e-5)
    np.testing.assert_allclose(numbers(b.dense()[1]), want["p"], atol=3e-6)
    keys, rows = torch.tensor([2, 0]), torch.tensor([1, 4])
    np.testing.assert_allclose(numbers(b.probs(keys, rows)), want["p"][:, rows][:, :, keys], atol=3e-6)
    check_columns(*b.columns(), want, torch.float32)


@pytest.mark.parametrize("case", ["learned sink", "learned sink, window"])
def test_a_learned_sink_takes_what_rows_lack(case: str) -> None:
    a = call(**CASES[case])
    want = naive(a)
    assert a.slot_HT is not None
    np.testing.assert_allclose(numbers(a.slot_HT), 1 - want["p"].sum(-1), atol=1e-6)
    np.testing.assert_allclose(numbers(a.dense()[1]).sum(-1) + numbers(a.slot_HT), 1, atol=1e-6)
    assert (np.diff(numbers(a.slot_HT).mean(1)) > 0).all()  # the greater its logit, the more
    assert call().slot_HT is None


def test_the_kernels_lse_is_taken() -> None:
    """A given lse replaces the sum over the keys: rows then keep what they had among more keys."""
    a = call(**CASES["both ways"])
    more = replace(a, lse_given_HT=a.lse_HT + math.log(4.0))
    np.testing.assert_allclose(numbers(more.dense()[1]), naive(a)["p"] / 4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("values", [1, 300])
def test_rows_in_blocks(case: str, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, down to a row each, give what one block gives."""
    monkeypatch.setattr(module, "_ROW_VALUES", values)
    a = call(**CASES[case])
    H, T, S = a.shape
    sizes = [s.shape[1] for _, s in a.blocks()]
    assert sum(sizes) == T and max(sizes) == min(T, max(1, values // (H * S)))
    want = naive(a)
    np.testing.assert_allclose(numbers(a.lse_HT), want["lse"], rtol=1e-5, atol=1e-5)
    mass, _ = a._columns_blocked()
    np.testing.assert_allclose(numbers(mass), want["mass"], atol=3e-6)


class Largest(TorchDispatchMode):
    """The greatest number of elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """No operation of the fused path makes anything near T x T; the dense one does, and is seen to."""
    sizes = []
    for T in (512, 1024):
        a = call(H=2, T=T, causal=True, forward=True)
        given = fused_attention(a.q_HTE[None], a.k_KSE[None], a.v_KSF[None], None, True, a.scale)
        assert given is not None
        a = replace(a, lse_given_HT=given[1][0])
        with Largest() as seen:
            a.columns()
            a.probs(torch.tensor([0, 5]))
        sizes.append(seen.numel)
        assert seen.numel < T * T // 8
    assert sizes[1] <= 2 * sizes[0]
    with Largest() as seen:
        a.dense()
    assert seen.numel == 2 * 1024 * 1024


def test_blocked_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROW_VALUES", 1 << 13)
    a = call(H=2, T=512, causal=True, cap=3.0)
    with Largest() as seen:
        a.columns()
    assert seen.numel <= 1 << 13 and seen.numel < 512 * 512


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rows", [slice(4, None), slice(0, 15), torch.tensor([0, 1, 5, 6, 20])], ids=str)
def test_trimmed_to_what_counts(rows: slice | Tensor, given: bool) -> None:
    """A padded call without its padding is the call of the shorter sequence."""
    kept = torch.zeros(21, dtype=torch.bool)
    kept[rows] = True
    see = rows_before(21, 21) & kept | torch.eye(21, dtype=torch.bool)  # padding sees itself, nobody else sees it
    a = call(mask=see[None], K=2, forward=True)
    want = naive(a)
    a = replace(a, out_HTF=torch.from_numpy(want["out"]).float(), lse_given_HT=a.lse_HT if given else None)
    short = a.trimmed(rows)
    n = int(kept.sum())
    assert short.shape == (4, n, n)
    alone = replace(short, mask_HTS=None, causal=True, lse_given_HT=None)
    for x in (want["p"][:, rows][:, :, rows], naive(alone)["p"]):
        np.testing.assert_allclose(numbers(short.dense()[1]), x, atol=3e-6)
    np.testing.assert_allclose(numbers(short.out_HTF), naive(alone)["out"], atol=1e-5)
    check_columns(*short.columns(), naive(alone), torch.float32)
    logits = bare(a).trimmed(rows)
    assert logits.shape == (4, n, n)
    np.testing.assert_allclose(numbers(logits.dense()[1]), naive(alone)["p"], atol=3e-6)


def test_trimming_cross_attention_leaves_the_keys() -> None:
    a = call(T=9, S=25)
    short = a.trimmed(slice(2, 7))
    assert short.shape == (4, 5, 25)
    np.testing.assert_allclose(numbers(short.dense()[1]), naive(a)["p"][:, 2:7], atol=3e-6)


def test_trimming_a_mask_of_keys_alone() -> None:
    """A mask that is the same for all queries is cut along the keys and stays one row."""
    short = call(mask=BLIND).trimmed(torch.tensor([0, 1, 3, 7]))
    assert short.mask_HTS is not None and short.mask_HTS.shape == (1, 1, 4)
    assert (short.dense()[1][:, :, 2] == 0).all() and torch.allclose(short.dense()[1].sum(-1), torch.ones(4, 4))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_kernel(K: int, causal: bool, masked: bool, dtype: torch.dtype) -> None:
    """Output and log-sum-exp of the kernel itself."""
    mask = torch.rand(1, 21, 21, generator=torch.Generator().manual_seed(3)) > 0.4
    mask |= torch.eye(21, dtype=torch.bool)
    a = call(K=K, causal=causal, mask=mask if masked else None, dtype=dtype)
    additive = None if a.mask_HTS is None else a.mask_HTS[None].float()  # of another dtype than the queries
    given = fused_attention(a.q_HTE[None], a.k_KSE[None], a.v_KSF[None], additive, causal, a.scale)
    assert given is not None
    want = naive(a)
    np.testing.assert_allclose(numbers(given[0][0]), want["out"], atol=tolerance(dtype))
    rounded = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 16  # it adds up what it has rounded
    np.testing.assert_allclose(numbers(given[1][0]), want["lse"], atol=rounded)


def test_the_fused_kernel_does_not_apply_to_unequal_widths() -> None:
    a = call(E=8, F=4)
    assert fused_attention(a.q_HTE[None], a.k_KSE[None], a.v_KSF[None], None, True, 1.0) is None


def test_hides_only() -> None:
    for lowest in (-math.inf, HIDDEN, -65504.0):
        assert hides_only(torch.tensor([0.0, lowest, 0.0]))
    for lowest in (torch.finfo(torch.bfloat16).min, -1e4):  # which is -9,984
        assert hides_only(torch.tensor([0.0, lowest], dtype=torch.bfloat16))
    assert not hides_only(torch.tensor([0.0, -0.5, -math.inf]))
    assert not hides_only(torch.tensor([1.0, 0.0])) and not hides_only(slopes())


def shapes() -> Iterator[tuple[str, st.SearchStrategy]]:
    yield "K", st.sampled_from([1, 2, 3])
    yield "groups", st.sampled_from([1, 2])
    yield "T", st.integers(1, 18)
    yield "S", st.one_of(st.none(), st.integers(1, 18))
    yield "E", st.integers(1, 9)
    yield "F", st.one_of(st.none(), st.integers(1, 9))
    yield "seen", st.sampled_from(["all", "flag", "random", "padding", "window"])
    yield "sink", st.booleans()
    yield "size", st.sampled_from([0.1, 1.0, 3.0])
    yield "seed", st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(**dict(shapes()))
def test_any_shape_and_any_mask(K, groups, T, S, E, F, seen, sink, size, seed):
    """Both ways to the columns, and the probabilities, whatever the shapes and whatever is hidden."""
    assume(seen != "flag" or S is None)
    H, S, rng = K * groups, S or T, torch.Generator().manual_seed(seed)
    mask = None
    if seen in ("random", "padding"):
        mask = torch.rand(1, T if seen == "random" else 1, S, generator=rng) > 0.5
        mask[..., seed % S] = True  # every query sees a key
    elif seen == "window":
        mask = rows_before(T, S, 1 + seed % 4)[None] | (torch.arange(S) == 0)
    sink_H = torch.randn(H, generator=rng) if sink else None
    a = call(H, K, T, S, E, F, seed, size, mask, causal=seen == "flag", sink_H=sink_H)
    want = naive(a)
    np.testing.assert_allclose(numbers(a.dense()[1]), want["p"], atol=1e-5)
    swapped, blocked = a._columns_swapped(), a._columns_blocked()
    assert swapped is not None
    for mass, *_ in (swapped, blocked):
        np.testing.assert_allclose(numbers(mass), want["mass"], rtol=2e-5, atol=2e-5)
        assert (numbers(mass)[(want["p"] == 0).all(1)] == 0).all()
    np.testing.assert_allclose(numbers(a.columns()[1]), want["entropy"], atol=1e-4)
