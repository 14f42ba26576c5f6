"""Order statistics: top k with ties, the bracketed median, the histogram median."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massact.stats import passes, selection
from tests.stats.oracle import DTYPES


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), k=st.integers(1, 45))
def test_top_k_is_the_head_of_a_stable_descending_sort(values, k):
    v = np.array(values, np.float32)
    np.testing.assert_array_equal(selection.top_k_stable(v, k), np.argsort(-v, kind="stable")[:k])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 12), D=st.integers(1, 12), k=st.integers(1, 20))
def test_searching_only_k_rows_finds_the_k_greatest_even_among_ties(seed, T, D, k):
    h_TD = torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, (T, D)).astype(np.float32))
    mag_TD = h_TD.abs()
    expected = np.argsort(-mag_TD.numpy().reshape(-1), kind="stable")[:k]
    rows, dims = selection.top_of_rows(h_TD, mag_TD.amax(1).numpy(), k)
    np.testing.assert_array_equal(rows * D + dims, expected)
    rows, dims = selection.top_of_rows_device(mag_TD, mag_TD.amax(1), k)
    np.testing.assert_array_equal((rows * D + dims).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 300), n_bad=st.integers(0, 5), log_scale=st.integers(-4, 4))
def test_the_histogram_median_is_torch_median(dtype, seed, n, n_bad, log_scale):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, generator=generator) * 10.0**log_scale).to(dtype)
    bad = torch.tensor([np.nan, np.inf, -np.inf, np.nan, np.inf][:n_bad], dtype=dtype)
    mixed = torch.cat([bad, x])[torch.randperm(n + n_bad, generator=generator)]
    n_valid = torch.isfinite(mixed).sum()  # fp16 may overflow
    got = selection.lower_median_device(mixed, n_valid)
    assert got.dtype == dtype and got.ndim == 0
    if n_valid > 0:
        assert got == mixed[torch.isfinite(mixed)].abs().median()
    else:
        assert torch.isnan(got)


def test_the_histogram_median_over_several_chunks(monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 37)
    x = torch.randn(1001)
    assert selection.lower_median_device(x, torch.tensor(1001)) == x.abs().median()


def bracket_of(x: np.ndarray, sample: np.ndarray | None, n_blocks: int = 7) -> selection.MedianBracket:
    bracket = selection.MedianBracket(None if sample is None else sample.copy(), len(x))
    for part in np.array_split(x, n_blocks):
        bracket.add(part, np.empty(len(part), bool), np.empty(len(part), bool))
    return bracket


def test_the_bracket_keeps_few_values_and_is_exact():
    x = np.abs(np.random.default_rng(0).standard_normal(400_000)).astype(np.float32)
    h_TD = torch.from_numpy(x.reshape(-1, 400))
    bracket = bracket_of(x, selection.strided_sample(h_TD))
    assert bracket.median() == np.sort(x)[(len(x) - 1) // 2]
    assert 0 < bracket.n_between < 0.04 * len(x)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 200), m=st.integers(1, 30), levels=st.integers(1, 50))
def test_the_bracket_is_exact_or_says_that_it_missed(seed, n, m, levels):
    """Any sample, representative or not, and any ties: a wrong answer is never given."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, n).astype(np.float32)
    sample = rng.integers(0, levels, m).astype(np.float32)
    bracket = bracket_of(x, sample, n_blocks=3)
    median = np.sort(x)[(n - 1) // 2]
    assert bracket.median() == (median if bracket.lo <= median <= bracket.hi else None)


@pytest.mark.parametrize("zeros", [0.0, 0.09, 0.3, 0.5, 0.7, 1.0])
def test_few_values_are_all_kept_whatever_their_ties(zeros):
    rng = np.random.default_rng(1)
    x = np.abs(rng.standard_normal(9_001)).astype(np.float32) * (rng.random(9_001) >= zeros)
    assert selection.strided_sample(torch.from_numpy(x)[:, None]) is None
    bracket = bracket_of(x.astype(np.float32), None)
    assert bracket.n_between == len(x) and bracket.median() == np.sort(x)[4_500]


def test_a_missed_bracket_falls_back_to_the_exact_median(monkeypatch):
    monkeypatch.setattr(selection, "strided_sample", lambda h_TD: np.full(50, 1e6, np.float32))
    torch.manual_seed(0)
    h_TD = torch.randn(80, 60)
    _, (m,) = passes.blocked_pass(h_TD[None], passes.Ask(top_k=3, hit=6.0, mad=True))
    median = h_TD.abs().median()
    assert m.scalars[0] == median
    assert m.scalars[1] == (h_TD.abs() - median).abs().median()


@pytest.mark.parametrize("D", [1, 12, 768, 769])
def test_the_sample_visits_every_dim(D, monkeypatch):
    monkeypatch.setattr(selection, "SMALL", 64)
    h_TD = (torch.arange(D, dtype=torch.float32) + 1).repeat(40_000 // D + 2, 1)
    sample = selection.strided_sample(h_TD)
    counts = (
        np.unique_counts(sample).counts if hasattr(np, "unique_counts") else np.unique(sample, return_counts=True)[1]
    )
    assert len(counts) == D and counts.max() <= counts.min() + 1


def test_the_histogram_median_works_in_deterministic_mode():
    x = torch.randn(300, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        assert selection.lower_median_device(x, torch.tensor(300)) == x.abs().median()
    finally:
        torch.use_deterministic_algorithms(False)
