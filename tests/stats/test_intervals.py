"""Intervals against formulas written out, and what they cover in simulation: the table of docs/statistics.md."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats

from massact.records.verdicts import HARMFUL, HARMLESS, LEAST, MARGIN, judged
from massact.stats.intervals import (
    difference_interval,
    mean_interval,
    needed,
    needed_answers,
    proportion_interval,
    pseudo_interval,
    ratio_interval,
    share_interval,
    spread_interval,
    summary_interval,
)
from tests.stats.coverage import (
    DIFFERENCES,
    DRAWS,
    LOST_GAINED,
    NUMBERS,
    WEIGHTS,
    chances,
    covered,
    covered_proportions,
    drawn,
    outcomes,
)


# ------------------------------------------------------------------------------------------------ formulas
def test_equal_weights_give_the_paired_t() -> None:
    d = np.random.default_rng(0).normal(size=9)
    found, wanted = mean_interval(d), scipy.stats.ttest_1samp(d, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    again = mean_interval(d, np.full(9, 70.0))
    assert (again.low, again.high, again.df) == pytest.approx((found.low, found.high, 8))


def test_weighted_mean_is_that_of_the_jackknife() -> None:
    """Written out: leave one sequence out at a time."""
    rng = np.random.default_rng(1)
    d, w = rng.normal(size=7), rng.integers(20, 300, 7).astype(float)
    found, mean = mean_interval(d, w), (d * w).sum() / w.sum()
    left = [np.average(np.delete(d, i), weights=np.delete(w, i)) for i in range(7)]
    se = math.sqrt(6 / 7 * sum((x - mean) ** 2 for x in left))
    df = w.sum() ** 2 / (w**2).sum() - 1
    half = scipy.stats.t.ppf(0.975, df) * se
    assert float(found.estimate) == pytest.approx(mean) and float(found.se) == pytest.approx(se)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))


def test_ratio_holds_those_that_the_t_test_does_not_reject() -> None:
    """Fieller, by search: of each ratio r the interval of mean(over - r under) holds zero or not."""
    rng = np.random.default_rng(2)
    under, w = rng.normal(2, 0.5, 8), rng.integers(20, 300, 8).astype(float)
    over = 0.3 * under + rng.normal(0, 0.2, 8)
    found = ratio_interval(over, under, w)
    for r in (*np.linspace(-1, 2, 301), found.low + 1e-9, found.high - 1e-9, found.low - 1e-9, found.high + 1e-9):
        one = mean_interval(over - r * under, w)
        assert (one.low <= 0 <= one.high) == (found.low <= r <= found.high)
    assert np.isnan(ratio_interval(over, under - 2, w).low), "nothing is known of a share of nothing"


def test_proportions_hold_what_the_score_test_does_not_reject() -> None:
    """Tango, by search: the likelihood of the lost and gained under a given difference, maximised on a grid."""
    for lost, gained, n in ((3, 1, 10), (0, 2, 9), (5, 5, 20), (0, 0, 7)):
        found = proportion_interval(lost, gained, n)
        q = np.linspace(1e-9, 1, 400_001)[:, None]  # share lost; gained is q + x
        x = np.array([float(found.low) * 0.98, float(found.high) * 0.98, float(found.low) * 1.02,
                      float(found.high) * 1.02])  # fmt: skip
        p = q + x
        fits = (p >= 0) & (p + q <= 1)
        with np.errstate(all="ignore"):
            logs = np.where(fits, (lost * np.log(q) if lost else 0) + (gained * np.log(np.maximum(p, 1e-300)) if gained
                            else 0) + (n - lost - gained) * np.log(np.maximum(1 - p - q, 1e-300)), -np.inf)  # fmt: skip
        best = q[logs.argmax(0), 0]
        z = (gained - lost - n * x) / np.sqrt(n * (2 * best + x - x * x))
        assert (np.abs(z[:2]) < 1.96).all() and (np.abs(z[2:]) > 1.96).all(), (lost, gained, n, z)
    none = proportion_interval(0, 0, 4)
    assert none.high == pytest.approx(1.96**2 / (4 + 1.96**2), rel=1e-4) and none.low == -none.high


def test_difference_of_two_groups_is_that_of_welch() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=7), rng.normal(2, 3, 5)
    found = difference_interval(mean_interval(a), mean_interval(b))
    wanted = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    same = difference_interval(mean_interval(np.ones(5)), mean_interval(np.ones(5)))
    assert same.low == same.high == 0
    answers = difference_interval(proportion_interval(0, 0, 8), proportion_interval(0, 0, 8))
    assert answers.low < -0.3 and answers.high > 0.3, "answers that all stayed say little"


def test_what_is_not_finite_has_no_interval() -> None:
    for bad in (np.inf, np.nan):
        found = mean_interval([1.0, bad, 2.0, 3.0])
        assert np.isnan([found.low, found.high, found.se]).all()
    assert np.isnan(mean_interval([1.0]).low)


# ------------------------------------------------------------------------------------------------ how many would do
@pytest.mark.parametrize("estimate", [0.0, 0.004, -0.02, 0.3])
@pytest.mark.parametrize("deviation", [0.0, 0.003, 0.05])
def test_as_many_as_are_needed_settle_it(estimate: float, deviation: float) -> None:
    n = int(needed(estimate, deviation, MARGIN, LEAST))

    def settled(many: int) -> bool:
        half = scipy.stats.t.ppf(0.975, many - 1) * deviation / math.sqrt(many)
        return judged(estimate - half, estimate + half, many) != "not settled"

    assert settled(n) and (n == LEAST or not settled(n - 1))
    assert needed(MARGIN, 0.1, MARGIN, LEAST) == math.inf and math.isnan(needed(0.0, math.nan, MARGIN, LEAST))


def test_as_many_answers_as_are_needed() -> None:
    assert needed_answers(0, 0, 4, MARGIN, LEAST) == 381  # z^2 / (n + z^2) < 0.01
    n = int(needed_answers(1, 0, 8, MARGIN, LEAST))
    found = proportion_interval(n / 8, 0, n)
    assert float(found.high) < -MARGIN and needed_answers(2, 2, 8, 0.0, LEAST) == math.inf


# ------------------------------------------------------------------------------------------------ what they cover
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("of", DIFFERENCES)
def test_means_are_covered(of: str, weights: str) -> None:
    """At least 93 % of the intervals of 95 % hold the truth, from 4 sequences on; less what 20,000 draws leave open."""
    for n in NUMBERS:
        share = covered(drawn(of, weights, n))
        assert share >= 0.93 - 2 * math.sqrt(0.93 * 0.07 / DRAWS), (n, share)


@pytest.mark.parametrize(("lost", "gained"), LOST_GAINED)
def test_proportions_are_covered(lost: float, gained: float) -> None:
    """Exactly: every outcome weighted with its probability."""
    for n in (*NUMBERS, 100):
        assert covered_proportions(lost, gained, n) >= 0.93, n


def test_shares_are_covered() -> None:
    """Of zero's damage, which is beyond the margin: the true share is 0.2."""
    for n in NUMBERS:
        rng = np.random.default_rng(n)
        zero = rng.gamma(4, 0.5, (DRAWS, n))
        weights = rng.uniform(50, 500, (DRAWS, n))
        found = ratio_interval(0.2 * zero + rng.normal(0, 0.3, zero.shape), zero, weights)
        known = np.isfinite(found.low)
        assert ((found.low <= 0.2) & (found.high >= 0.2))[known].mean() >= 0.93 and known.mean() > 0.5


def test_intervals_of_summaries_shares_and_pseudo_values_are_those_by_definition() -> None:
    x = np.random.default_rng(0).gamma(2, 1, 7)
    want = mean_interval(x)
    for found in (summary_interval(x.mean(), x.std(ddof=1), 7),
                  pseudo_interval(x.mean(), [np.delete(x, i).mean() for i in range(7)])):  # fmt: skip
        assert float(found.low) == pytest.approx(float(want.low)) and float(found.high) == pytest.approx(want.high)
    for k, n in ((0, 4), (4, 4), (3, 10), (70, 100)):
        wilson = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        found = share_interval(k, n)
        assert (float(found.low), float(found.high)) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    assert np.isnan(pseudo_interval(1.0, [1.0]).low) and np.isnan(spread_interval([1.0, 2.0]).low)
    assert spread_interval([3.0, 3.0, 3.0, 3.0]).high == 0.0


@pytest.mark.parametrize(("of", "least"), [("normal", 0.93), ("uniform", 0.93), ("laplace", 0.88)])
def test_a_spread_is_covered(of: str, least: float) -> None:
    """std / |mean| = 0.05 at n = 4, 8, 16; of tails like an exponential's to one side less: docs/statistics.md."""
    size = {"normal": 1.0, "uniform": math.sqrt(1 / 3), "laplace": math.sqrt(2)}[of]
    for n in (4, 8, 16):
        rng = np.random.default_rng(n)
        draw = {"normal": rng.normal, "laplace": rng.laplace, "uniform": partial(rng.uniform, -1, 1)}[of]
        found = [spread_interval(1 + 0.05 * x / size) for x in draw(size=(1500, n))]
        assert np.mean([i.low <= 0.05 <= i.high for i in found]) >= least - 0.01, n


def test_t_covers_more_than_bca() -> None:
    """Why the intervals are those of t: with few sequences the bootstrap's are too narrow, BCa as well."""
    for n, most in ((4, 0.85), (8, 0.92)):
        d = np.random.default_rng(n).normal(size=(400, n))
        low, high = scipy.stats.bootstrap(
            (d,), np.mean, axis=1, vectorized=True, n_resamples=500, method="BCa", random_state=1, batch=50
        ).confidence_interval  # fmt: skip
        t = mean_interval(d)
        assert ((low <= 0) & (high >= 0)).mean() < most < ((t.low <= 0) & (t.high >= 0)).mean()


# ------------------------------------------------------------------------------------------------ what verdicts risk
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("of", ["normal", "t, 5 df"])
def test_less_data_never_gives_the_stronger_claim(of: str, weights: str) -> None:
    """Wrong verdicts in at most 5 %: harmless where the harm is the margin, harmful where it is nothing or the margin.

    At every number of sequences and whatever the spread; below 4 there is none at all.
    """
    for n in (*range(2, 17), 24, 32, 48, 64):
        found = drawn(of, weights, n, seed=1)
        for spread in (0.1, 0.5, 1.0, 3.0, 10.0):  # in margins
            low, high = (spread * MARGIN * np.asarray(x) for x in (found.low, found.high))
            wrong = {
                "harmless": (low + MARGIN > -MARGIN) & (high + MARGIN < MARGIN),
                "helpful": high + MARGIN < -MARGIN,
                "harmful at the margin": low + MARGIN > MARGIN,
                "harmful": low > MARGIN,
            }
            said = [name for name, x in wrong.items() if n >= LEAST and x.mean() > 0.05 + 3 * math.sqrt(0.05 / DRAWS)]
            assert not said, (n, spread, said)
    assert judged(0.5, 0.6, 3) == judged(-0.001, 0.001, 3) == "not settled"
    assert judged(0.5, 0.6, 4) == HARMFUL and judged(-0.001, 0.001, 4) == HARMLESS


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_a_few_answers_that_stayed_are_not_harmless(n: int) -> None:
    """With a true loss of the margin; and harmful is said in at most 5 % where nothing is lost in the mean."""
    found = proportion_interval(*outcomes(n), n)
    said = [judged(-float(h), -float(x), n) for x, h in zip(found.low, found.high, strict=True)]
    for lost, gained, wrong in ((0.01, 0, HARMLESS), (0.06, 0.05, HARMLESS), (0.1, 0.1, HARMFUL), (0.3, 0.3, HARMFUL),
                                (0.01, 0, HARMFUL)):  # fmt: skip
        assert chances(lost, gained, n)[[x == wrong for x in said]].sum() <= 0.05, (lost, gained, wrong)
