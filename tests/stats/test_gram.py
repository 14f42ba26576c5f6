"""The spectrum of hidden states against an SVD of the matrix itself, and the bound on p_1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massact.stats.gram import LEAST, METRICS, SETS, GramResult, GramStats
from massact.stats.protocol import Where

CHOSEN = {0: [0, 2], 3: [1]}


def svd_numbers(x: np.ndarray, least: int) -> list[float]:
    """p_1, entropy, effective rank, participation and mean cosine of the rows of a matrix, spelled out."""
    if len(x) < least or not np.isfinite(x).all():
        return [np.nan] * len(METRICS)
    s = np.linalg.svd(x, compute_uv=False) ** 2
    if not s.sum() > 0:
        return [np.nan] * len(METRICS)
    p = s / s.sum()
    h = -sum(v * np.log2(v) for v in p if v > 0)
    unit = [row / np.linalg.norm(row) for row in x if np.linalg.norm(row) > 0]
    pairs = [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    return [p[0], h, 2**h, 1 / (p**2).sum(), np.mean(pairs) if pairs else np.nan]


def sets_of(x: np.ndarray, chosen: list[int]) -> list[np.ndarray]:
    rest = np.delete(x, [p for p in chosen if p < len(x)], 0)
    return [x, rest, rest - rest.mean(0) if len(rest) else rest]


def check(result: GramResult, stream: list[np.ndarray], corpus: bool = True) -> None:
    """Every number of every sequence, and of the stacked matrix."""
    for i, x in enumerate(stream):
        chosen = CHOSEN.get(int(result.sequence[i]), [])
        want = np.array([svd_numbers(y, n) for y, n in zip(sets_of(x, chosen), LEAST, strict=True)])
        np.testing.assert_allclose(result.values[i, :, :4], want[:, :4], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(result.values[i, :, 4], want[:, 4], rtol=1e-6, atol=1e-5)
        assert result.left_out[i] == len([p for p in chosen if p < len(x)])
    if corpus:
        rests = [sets_of(x, CHOSEN.get(int(s), []))[1] for x, s in zip(stream, result.sequence, strict=True)]
        stacked, rest = np.concatenate(stream), np.concatenate(rests)
        want = [svd_numbers(y, n) for y, n in zip((stacked, rest, rest - rest.mean(0)), LEAST, strict=True)]
        np.testing.assert_allclose(result.corpus, np.array(want)[:, :4], rtol=1e-6, atol=1e-6)


def measured(stream: list[np.ndarray], dtype: torch.dtype = torch.float64, **options: object) -> GramResult:
    statistic = GramStats(CHOSEN, **options)  # type: ignore[arg-type]
    for sequence, x in enumerate(stream):
        statistic.update(torch.from_numpy(x).to(dtype), Where(sequence))
    return statistic.result()


@pytest.mark.parametrize(("T", "D"), [(6, 20), (20, 6), (9, 9), (1, 5), (2, 5), (3, 2)])
def test_against_the_singular_values(T: int, D: int) -> None:
    """More tokens than dims, and fewer; a massive token among them; too few tokens to say anything."""
    draw = np.random.default_rng(T * 100 + D)
    stream = [draw.normal(size=(T, D)) + 0.5 for _ in range(4)]
    stream[0][0] *= 1e4
    check(measured(stream, corpus=True), stream)
    assert measured(stream).corpus is None


def test_rank_one_and_noise_has_the_planted_share() -> None:
    """A long token along e_0 and others across it: p_1 = M / (M + R), entropy of (p_1, equal rest)."""
    T, D, M = 9, 16, 640.0
    x = np.zeros((T, D))
    x[0, 0] = M**0.5
    x[1:, 1:9] = np.eye(8) * 10**0.5  # R = 80, alpha = 0
    (values,), (bound,) = measured([x]).values, measured([x], n_null=0).bound
    p1 = M / (M + 80)
    entropy = -p1 * np.log2(p1) - (1 - p1) * np.log2((1 - p1) / 8)
    assert values[0, :2] == pytest.approx([p1, entropy], rel=1e-12) and values[0, 2] == pytest.approx(2**entropy)
    assert bound == pytest.approx([p1, M / 80, 0], abs=1e-12)
    rest = GramStats({0: [0]}, n_null=0)
    rest.update(torch.from_numpy(x), Where(0))
    assert rest.result().values[0, 1, :4] == pytest.approx([1 / 8, 3, 8, 8])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), T=st.integers(2, 30), D=st.integers(1, 30), size=st.floats(0.1, 1e5),
    along=st.floats(-3, 3), chosen=st.booleans(),
)  # fmt: skip
def test_p1_is_never_below_its_bound(seed: int, T: int, D: int, size: float, along: float, chosen: bool) -> None:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(T, D))
    x[0] *= size
    x[1:] += along * x[0] / max(np.linalg.norm(x[0]), 1e-9)
    statistic = GramStats({0: [0]} if chosen else {}, n_null=1, seed=seed)
    statistic.update(torch.from_numpy(x), Where(0))
    r = statistic.result()
    assert r.values[0, 0, 0] >= r.bound[0, 0] - 1e-9
    first = 0 if chosen else int(np.linalg.norm(x, axis=1).argmax())
    v = x[first] / np.linalg.norm(x[first])
    assert r.bound[0, 0] == pytest.approx(((x @ v) ** 2).sum() / (x**2).sum(), rel=1e-9)
    c = (x[first] ** 2).sum() / (np.delete(x, first, 0) ** 2).sum()
    assert r.bound[0, 1] == pytest.approx(c, rel=1e-9)


def test_the_null_has_the_norms_and_nothing_else() -> None:
    """One direction for all: of the null only the norms are left; the same at every site; of some sequences only."""
    norms = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    x = norms[:, None] * np.eye(64)[0]
    r = measured([x, x], n_null=1)
    assert r.values[0, 0, 0] == pytest.approx(1) and r.values[0, 0, 4] == pytest.approx(1)
    assert r.null[0, 0, 0] == pytest.approx(1e4 / (1e4 + 7), abs=1e-4), "of the norms alone"
    assert 4 < r.null[0, 1, 2] <= 6 and abs(r.null[0, 1, 4]) < 0.2, "without the two chosen ones"
    assert np.isnan(r.null[1]).all()
    np.testing.assert_array_equal(r.null, measured([x, x], n_null=1).null)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_left_out_where_it_is_the_massive_token(bad: float) -> None:
    """An overflow of the massive token spoils what is about it, and nothing else; no eigenvalue fails."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(7, 5))
    x[2, 3] = bad
    r = measured([x], corpus=True)
    assert np.isnan(r.values[0, 0]).all() and np.isnan(r.bound).all() and np.isnan(r.corpus).all()
    want = svd_numbers(np.delete(x, [0, 2], 0), 2)
    np.testing.assert_allclose(r.values[0, 1], want, rtol=1e-9)
    x[4, 4] = bad
    assert np.isnan(measured([x]).values).all()


def test_states_of_zero_have_no_spectrum() -> None:
    r = measured([np.zeros((4, 3))], corpus=True)
    assert np.isnan(r.values).all() and np.isnan(r.bound).all() and np.isnan(r.corpus).all()
    assert SETS == ("all", "without", "centred")


def test_half_precision_is_summed_in_float64() -> None:
    draw = np.random.default_rng(3)
    x = draw.normal(size=(6, 12)).astype(np.float16).astype(np.float64)
    x[0] *= 1000
    x = x.astype(np.float16).astype(np.float64)
    check(measured([x], torch.float16, corpus=True), [x])
