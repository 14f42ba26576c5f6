"""Counts per sequence and dim: NumPy on everything at once, any split and order of merges, NaN, no synchronising."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from massact.stats import HiddenStats, Statistic, Where
from massact.stats.hits import HitShares, TailCounts
from tests.stats.oracle import DTYPES, hard_stream

KINDS = {"hits": HitShares, "tail": TailCounts}


def saved_and_loaded(statistic: Statistic) -> Statistic:
    file = io.BytesIO()
    np.savez(file, **statistic.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        return type(statistic).from_state(dict(state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hits_are_those_of_hidden_stats(dtype: torch.dtype) -> None:
    """Summed over sequences they are its `dim_hits`, not-finite values included."""
    hits, hidden = HitShares(), HiddenStats(top_k=1)
    for seen in hard_stream(5, [30, 1, 17], 9, dtype):
        seen.h_TD[0, 3], seen.h_TD[0, 4] = float("nan"), float("inf")
        for statistic in (hits, hidden):
            statistic.update(seen.h_TD, Where(seen.sequence))
    np.testing.assert_array_equal(hits.result().count.sum(0), hidden.result().dim_hits)


def test_the_limit_itself_is_a_hit_and_nan_never_is() -> None:
    below = torch.tensor(6.0).nextafter(torch.tensor(0.0)).item()
    column = torch.tensor([6.0, -6.0, below, -below, float("nan"), float("inf"), 7.0])
    hits = HitShares()
    hits.update(torch.stack([column, torch.full((7,), float("nan"))], 1), Where(0))
    assert hits.result().count.tolist() == [[3, 0]] and hits.result().n_tokens.tolist() == [7]


def test_more_rows_than_one_block() -> None:
    """Long sequences come in blocks; a block without a hit is skipped, the others are not."""
    h_TD = torch.zeros(40_000, 3)
    h_TD[::2, 1], h_TD[39_999, 2] = -9.0, 6.0
    hits = HitShares()
    hits.update(h_TD, Where(0))
    assert hits.result().count.tolist() == [[0, 20_000, 1]]


def test_shares_at_the_edge_are_exact() -> None:
    """59 of 1,000 are fewer than 6 %; 7 of 100 are 7 %, though 0.07 * 100 is a little more than 7 in floats."""
    assert 0.07 * 100 > 7
    hits = HitShares()
    for sequence, (n, T) in enumerate([(21, 350), (20, 350), (60, 1000), (59, 1000), (0, 0), (7, 100)]):
        h_TD = torch.zeros(T, 1)
        h_TD[:n] = 6.0
        hits.update(h_TD, Where(sequence))
    r = hits.result()
    assert r.reaches(0.06)[:, 0].tolist() == [True, False, True, False, False, True]
    assert r.reaches(0.07)[5, 0]
    assert r.reaches(0.0)[:, 0].tolist() == [True, True, True, True, False, True]
    np.testing.assert_array_equal(r.share()[:, 0], [21 / 350, 20 / 350, 0.06, 0.059, np.nan, 0.07])


def test_a_constant_sequence_has_no_tail() -> None:
    tail = TailCounts()
    tail.update(torch.full((50, 3), 0.1), Where(0))
    assert tail.result().count.sum() == 0


def test_one_value_far_out_is_the_tail() -> None:
    """One of n equal values moved away is sqrt(n - 1) sigma out: beyond 6 from n = 38 on."""
    tail = TailCounts()
    for sequence, n in enumerate((36, 38)):
        h_TD = torch.ones(n // 2, 2)
        h_TD[3, 1] = -500.0
        tail.update(h_TD, Where(sequence))
    assert tail.result().count.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_and_other_options(kind: str) -> None:
    make = KINDS[kind]
    assert saved_and_loaded(make()).result().count.shape == (0, 0)
    with pytest.raises(ValueError, match="different options"):
        make(6.0).merge(make(5.0))
    with pytest.raises(ValueError, match="different options"):
        make(6.0).merge(KINDS["tail" if kind == "hits" else "hits"](6.0))
    with pytest.raises(ValueError, match="above 0"):
        make(float("nan"))
    with pytest.raises(ValueError, match="floating"):
        make().update(torch.zeros(3), Where(0))
