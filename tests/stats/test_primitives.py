"""TokenMax, Keep and Ranks: what the merge tests do not see (NaN, limits, edges)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massact.records.errors import UserError
from massact.stats import Keep, Ranks, TokenMax, Where, primitives
from tests.stats.oracle import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_max_counts_and_leaves_out_nan_and_inf(dtype):
    stats = TokenMax()
    h_TD = torch.tensor([[1.0, -3.0], [math.nan, 2.0], [math.inf, -math.inf]], dtype=dtype)
    stats.update(h_TD, Where(0))
    stats.update(torch.ones(0, 2, dtype=dtype), Where(1))
    result = stats.result()
    np.testing.assert_array_equal(result.token_max, [3, 2, math.nan])
    assert result.n_nan.tolist() == [1, 0] and result.n_inf.tolist() == [2, 0]
    assert result.n_tokens.tolist() == [3, 0]


def test_keep_refuses_above_its_limit_and_stays_usable():
    keep = Keep(limit_bytes=4 * 10 * 8)
    keep.update(torch.ones(9, 8, dtype=torch.float64), Where(0))
    with pytest.raises(UserError) as error:
        keep.update(torch.ones(2, 8), Where(1))
    assert "limit" in error.value.what and error.value.why and "HiddenStats" in error.value.do
    keep.update(torch.ones(1, 8), Where(1))
    assert len(keep.result().values) == 2
    with pytest.raises(UserError):
        keep.merge(keep)


def test_keep_copies():
    h_TD = torch.ones(2, 2)
    keep = Keep()
    keep.update(h_TD, Where(0))
    h_TD.zero_()
    assert keep.result().values[0].sum() == 4


@pytest.mark.parametrize("V", [1, 7, 10, 100, 700, 1000, 1001])
def test_fractions_are_ceilings_in_integers(V):
    """0.07 * 100 is 7.000000000000001 in floating point; its rank is 7, not 8."""
    h_TD = -torch.arange(V, 0, -1.0)[:, None]  # magnitudes V, V - 1, ..., 1
    ranks = Ranks(fractions=(0.01, 0.07, 0.5, 1.0), tops=(1, V))
    ranks.update(h_TD, Where(0))
    expected = [0, V - 1, -(-V // 100) - 1, -(-7 * V // 100) - 1, V // 2 if V > 1 else 0, V - 1]
    result = ranks.result()
    assert result.pos[0].tolist() == expected
    assert result.value[0].tolist() == [float(rank - V) for rank in expected]


def test_the_rank_of_one_half_is_the_lower_median():
    for V in (2, 3, 8, 9):
        h_TD = torch.randn(V, 1)
        ranks = Ranks(fractions=(0.5,), tops=())
        ranks.update(h_TD, Where(0))
        assert abs(ranks.result().value[0, 0]) == h_TD.abs().median()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_leave_out_nan_and_inf(dtype):
    ranks = Ranks(fractions=(0.5,), tops=(1, 2, 3))
    ranks.update(torch.tensor([[math.nan, 1.0], [-2.0, math.inf]], dtype=dtype), Where(0))
    ranks.update(torch.full((2, 2), math.nan, dtype=dtype), Where(1))
    ranks.update(torch.ones(0, 2, dtype=dtype), Where(2))
    result = ranks.result()
    np.testing.assert_array_equal(result.value[0], [-2, 1, math.nan, 1])
    assert result.pos[0].tolist() == [1, 0, -1, 0] and result.dim[0].tolist() == [0, 1, -1, 1]
    assert np.isnan(result.value[1:]).all() and (result.pos[1:] == -1).all()
    assert result.n_nan.tolist() == [1, 4, 0] and result.n_inf.tolist() == [1, 0, 0]


def test_options_are_checked():
    with pytest.raises(ValueError, match="fractions"):
        Ranks(fractions=(0.0,))
    with pytest.raises(ValueError, match="tops"):
        Ranks(tops=(0,))
    with pytest.raises(ValueError, match="options"):
        Ranks().merge(Ranks(tops=(1,)))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), levels=st.integers(1, 40))
def test_places_are_those_of_a_stable_sort_on_every_device(seed, n, levels):
    rng = np.random.default_rng(seed)
    mag_V = torch.from_numpy(rng.integers(0, levels, n).astype(np.float32))
    rank_R = torch.from_numpy(rng.integers(0, n, 5))
    expected = np.argsort(-mag_V.numpy(), kind="stable")[rank_R.numpy()]
    with pytest.MonkeyPatch.context() as patch:
        for near_top in (0, 7, 1000):
            patch.setattr(primitives, "_NEAR_TOP", near_top)
            np.testing.assert_array_equal(primitives._places_cpu(mag_V, rank_R).numpy(), expected)
    np.testing.assert_array_equal(primitives._places_sorted(mag_V, rank_R).numpy(), expected)
