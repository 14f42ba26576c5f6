"""The contract of every statistic: any split by sequences and any order of merges gives the same result."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massact.stats import DimMoments, HiddenStats, Keep, Ranks, Statistic, TokenMax, Where
from tests.stats.oracle import DTYPES, Seen, check_hidden, dims_oracle, hard_stream, hidden_oracle, order_of


def check_dims(result: Any, stream: list[Seen]) -> None:
    want = dims_oracle(stream, hit=6.0)
    size_D = np.sqrt(want["mean"] ** 2 + want["std"] ** 2)
    assert result.n_tokens == want["n_tokens"]
    np.testing.assert_array_equal(result.n, want["n"])
    np.testing.assert_array_equal(result.max, want["max"])
    np.testing.assert_allclose(result.mean_abs, want["mean_abs"], rtol=2e-6)
    assert np.all(np.abs(result.mean - want["mean"]) <= 2e-6 * size_D)
    assert np.all(np.abs(result.std - want["std"]) <= 2e-6 * size_D)


def check_token_max(result: Any, stream: list[Seen]) -> None:
    for i, seen in enumerate(stream):
        positions_T, max_T = result.tokens(i)
        np.testing.assert_array_equal(positions_T, seen.positions_T)
        np.testing.assert_array_equal(max_T, seen.h_TD.double().abs().amax(1).numpy())


def check_keep(result: Any, stream: list[Seen]) -> None:
    for seen, positions_T, values_TD in zip(stream, result.positions, result.values, strict=True):
        np.testing.assert_array_equal(positions_T, seen.positions_T)
        np.testing.assert_array_equal(values_TD, seen.h_TD.float().numpy())


def check_ranks(result: Any, stream: list[Seen]) -> None:
    for i, seen in enumerate(stream):
        h_TD = seen.h_TD.double().numpy()
        order_V, V, D = order_of(h_TD), h_TD.size, h_TD.shape[1]
        assert result.ranks == (1, 2, 3, 4, 5, 10, 100, 0.01, 0.1, 0.5)
        ranks = [0, 1, 2, 3, 4, 9, 99, -(-V // 100) - 1, -(-V // 10) - 1, V // 2]
        for j, rank in enumerate(ranks):
            if rank >= V:
                assert np.isnan(result.value[i, j]) and result.pos[i, j] == result.dim[i, j] == -1
                continue
            assert result.value[i, j] == h_TD.reshape(-1)[order_V[rank]]
            assert result.pos[i, j] == seen.positions_T[order_V[rank] // D]
            assert result.dim[i, j] == order_V[rank] % D


def hidden_check(**options: Any) -> Callable[[Any, list[Seen]], None]:
    return lambda result, stream: check_hidden(result, hidden_oracle(stream, **options))


CASES: dict[str, tuple[Callable[[], Statistic], Callable[[Any, list[Seen]], None]]] = {
    "hidden": (lambda: HiddenStats(top_k=5), hidden_check(top_k=5, hit=6.0, mad=False)),
    "hidden, mad": (lambda: HiddenStats(3, 900.0, True), hidden_check(top_k=3, hit=900.0, mad=True)),
    "hidden, accelerator": (
        lambda: HiddenStats(5, mad=True, blocked=False),
        hidden_check(top_k=5, hit=6.0, mad=True),
    ),
    "dims": (DimMoments, check_dims),
    "token max": (TokenMax, check_token_max),
    "keep": (Keep, check_keep),
    "ranks": (Ranks, check_ranks),
}


def saved_and_loaded(statistic: Statistic) -> Statistic:
    """Through the file that a checkpoint writes."""
    file = io.BytesIO()
    np.savez(file, **statistic.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        return type(statistic).from_state(dict(state))


def assert_same(a: Any, b: Any, rtol: float) -> None:
    """Two results, field by field: exact for what is selected or counted, to `rtol` for joined floats."""
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        for one, other in zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]:
            if field.name.removeprefix("dim_") in ("mean", "std", "mean_abs"):
                np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * 100, err_msg=field.name)
            else:
                np.testing.assert_array_equal(one, other, err_msg=field.name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    D=st.integers(1, 20),
    group=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    order=st.permutations(range(4)),
    save=st.booleans(),
)
def test_any_split_and_any_order_of_merges_equals_numpy(case, dtype, seed, lengths, D, group, order, save):
    make, check = CASES[case]
    stream = hard_stream(seed, lengths, D, dtype)
    whole, parts = make(), [make() for _ in range(4)]
    for seen in stream:
        whole.update(seen.h_TD, Where(seen.sequence))
    for seen in reversed(stream):  # sequences arrive in any order
        parts[group[seen.sequence]].update(seen.h_TD, Where(seen.sequence))
    if save:
        parts = [saved_and_loaded(part) for part in parts]
    merged = parts[order[0]]
    for i in order[1:]:
        merged.merge(parts[i])
    check(merged.result(), stream)
    assert_same(merged.result(), whole.result(), rtol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_a_state_is_complete(case):
    """Saved, loaded, and updated further equals never having stopped; also before the first update."""
    make, check = CASES[case]
    stream = hard_stream(7, [13, 1, 30], 9, torch.float32)
    going, resumed = make(), saved_and_loaded(make())
    for seen in stream:
        going.update(seen.h_TD, Where(seen.sequence))
        resumed.update(seen.h_TD, Where(seen.sequence))
        resumed = saved_and_loaded(resumed)
    check(resumed.result(), stream)
    assert_same(resumed.result(), going.result(), rtol=0)
    assert isinstance(going, Statistic)


@pytest.mark.parametrize("case", CASES)
def test_start_and_positions(case):
    make, check = CASES[case]
    stream = [Seen(s.sequence, s.h_TD, s.positions_T + 17) for s in hard_stream(8, [12, 25], 6, torch.float32)]
    by_start, by_positions = make(), make()
    for seen in stream:
        by_start.update(seen.h_TD, Where(seen.sequence, start=17))
        positions = torch.from_numpy(seen.positions_T)
        by_positions.update(seen.h_TD, Where(seen.sequence, start=99, positions=positions))
    check(by_start.result(), stream)
    check(by_positions.result(), stream)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_on_an_accelerator_never_synchronises(case, dtype):
    """A meta tensor has no values: reading one, or a shape that depends on values, is an error."""
    h_TD = torch.empty(20, 9, dtype=dtype, device="meta")
    statistic = CASES[case][0]()
    for where in (Where(0), Where(1, start=5), Where(2, positions=torch.arange(20))):
        statistic.update(h_TD, where)


def test_the_meta_device_does_refuse_to_be_read():
    x = torch.empty(3, device="meta")
    for read in (lambda: x.max().item(), lambda: x[x > 0], lambda: bool((x > 0).all()), lambda: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
