"""Intervals of paired differences: the one place where a confidence interval is made.

All are of 95 % and take their last axis as the sequences, so that a simulation makes thousands of them at once. What
they cover, by number of sequences and by distribution, is in docs/statistics.md and checked by tests/stats.

Shapes: N sequences; ... any axes before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
TAIL = 0.5 + LEVEL / 2
Z = 1.959963984540054  # the normal quantile at TAIL
MOST = 10**7  # sequences: beyond it, no number of them is named
_BISECTIONS = 60


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; every field (...), NaN where it is unavailable.

    Args:
        estimate: of the mean difference, or of the ratio.
        low, high: its 95 % interval.
        se: standard error; df: degrees of freedom of the t distribution (inf: normal).
    """

    estimate: Any
    low: Any
    high: Any
    se: Any = math.nan
    df: Any = math.nan


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def mean_interval(d: Any, weights: Any = None) -> Interval:
    """The weighted mean of paired differences, by t with a jackknife variance.

    With h = w / sum w and e = d - sum h d: variance (N - 1) / N sum (h e / (1 - h))^2, on n - 1 degrees of freedom
    with n = 1 / sum h^2 sequences of one weight that would do as much. Of equal weights this is the paired t interval.

    Args:
        d: (..., N) differences, NaN or infinite where there is none: then there is no interval.
        weights: (..., N), the targets of each sequence; None: all alike.
    """
    d, h = _with_shares(d, weights)
    with np.errstate(all="ignore"):
        mean = (h * d).sum(-1)
        e = d - mean[..., None]
        return _around(mean, _covariance(h, e, e), _degrees(h))


def summary_interval(mean: Any, deviation: Any, n: Any) -> Interval:
    """The same of equal weights, from a mean and a standard deviation (with n - 1) over n sequences."""
    mean, deviation, n = (np.asarray(x, float) for x in (mean, deviation, n))
    with np.errstate(all="ignore"):
        return _around(mean, deviation**2 / n, n - 1)


def pseudo_interval(estimate: float, apart: Any) -> Interval:
    """Of any statistic, by t over the pseudo-values K estimate - (K - 1) apart of a jackknife (Tukey 1958).

    Args:
        estimate: of all sequences.
        apart: (K,) the same without each of K folds of them, of about one size.
    """
    apart = np.asarray(apart, float)
    K = len(apart)
    if K < 2:
        return Interval(estimate, math.nan, math.nan)
    found = mean_interval(K * estimate - (K - 1) * apart)
    half = (found.high - found.low) / 2
    return Interval(estimate, estimate - half, estimate + half, found.se, found.df)


def spread_interval(values: Any) -> Interval:
    """std / |mean| of one value a sequence, by a jackknife of its logarithm; [0, 0] of equal ones.

    Args:
        values: (N,) finite ones; below three there is no interval.
    """
    v = np.asarray(values, float)
    if len(v) > 1 and np.ptp(v) == 0:
        return Interval(0.0, 0.0, 0.0)
    without = np.array([np.delete(v, i) for i in range(len(v))]) if len(v) > 2 else np.zeros((0, 2))
    with np.errstate(all="ignore"):
        each = np.log(without.std(axis=1, ddof=1) / np.abs(without.mean(axis=1)))
        of_all = float(np.log(v.std(ddof=1) / abs(v.mean()))) if len(v) > 1 else math.nan
        found = pseudo_interval(of_all, each)
        return Interval(*(float(np.exp(x)) for x in (found.estimate, found.low, found.high)))


def ratio_interval(over: Any, under: Any, weights: Any = None) -> Interval:
    """The ratio of two weighted means over the same sequences, by Fieller.

    Those r for which the interval of mean(over - r under) holds zero: the roots of
    (b^2 - t^2 v_bb) r^2 - 2 (a b - t^2 v_ab) r + a^2 - t^2 v_aa. Unavailable where the interval of b holds zero.

    Args:
        over, under: (..., N) differences, with the means a and b.
        weights: as of `mean_interval`.
    """
    over, h = _with_shares(over, weights)
    under = np.asarray(under, float)
    with np.errstate(all="ignore"):
        a, b = (h * over).sum(-1), (h * under).sum(-1)
        e, f, df = over - a[..., None], under - b[..., None], _degrees(h)
        t2 = _quantile(df) ** 2
        square, middle, rest = (x - t2 * _covariance(h, *y) for x, y in ((b * b, (f, f)), (a * b, (e, f)),
                                                                         (a * a, (e, e))))  # fmt: skip
        square = np.where(square > 0, square, np.nan)
        root = np.sqrt(np.maximum(middle * middle - square * rest, 0))
        known = np.where(np.isnan(square), np.nan, a / b)
    return Interval(known, (middle - root) / square, (middle + root) / square, df=df)


def proportion_interval(lost: Any, gained: Any, n: Any) -> Interval:
    """The difference of two paired proportions, (gained - lost) / n, by the score test (Tango 1998).

    Those differences that the score test does not reject; where no answer changed z^2 / (n + z^2) to both sides, so
    that a few answers that stayed say little.

    Args:
        lost: (...) how many answers were right and are wrong now; gained: the other way round; n: answers in all.
    Source: Tango, Statistics in Medicine 17 (1998) 891.
    """
    lost, gained, n = np.broadcast_arrays(*(np.asarray(x, float) for x in (lost, gained, n)))
    d = (gained - lost) / n

    def score(x: np.ndarray) -> np.ndarray:
        b = (2 * n - gained + lost) * x - lost - gained
        q = (np.sqrt(np.maximum(b * b + 8 * n * lost * x * (1 - x), 0)) - b) / (4 * n)
        return (gained - lost - n * x) / np.sqrt(np.maximum(n * (2 * q + x * (1 - x)), 1e-300))

    def limit(outer: float) -> np.ndarray:
        rejected, kept = np.full_like(d, outer), d.copy()
        for _ in range(_BISECTIONS):
            middle = (rejected + kept) / 2
            out = np.abs(score(middle)) > Z
            rejected, kept = np.where(out, middle, rejected), np.where(out, kept, middle)
        return kept

    variance = (lost + gained - n * d * d) / n**2
    return Interval(d, limit(-1.0), limit(1.0), np.sqrt(np.maximum(variance, 0)), np.full_like(d, np.inf))


def share_interval(k: Any, n: Any) -> Interval:
    """A share of independent sequences, k / n, by the score test (Wilson 1927).

    Args:
        k: (...) how many have it; n: of how many.
    """
    k, n = (np.asarray(x, float) for x in (k, n))
    middle, z2 = k / n, Z * Z
    half = Z / (n + z2) * np.sqrt(k * (n - k) / n + z2 / 4)
    centre = (k + z2 / 2) / (n + z2)
    return Interval(
        middle, centre - half, centre + half, np.sqrt(middle * (1 - middle) / n), np.full_like(middle, np.inf)
    )


def difference_interval(one: Interval, other: Interval) -> Interval:
    """The difference of two independent estimates, `one - other`, by Welch.

    se^2 = s1^2 + s2^2, on (s1^2 + s2^2)^2 / (s1^4 / df1 + s2^4 / df2) degrees of freedom. Of proportions, whose
    standard error is 0 where no answer changed, the half widths of both intervals are squared and added (MOVER).
    """
    if np.all(np.isinf(one.df) & np.isinf(other.df)):
        d = np.asarray(one.estimate, float) - other.estimate
        down = np.hypot(one.estimate - one.low, other.high - other.estimate)
        up = np.hypot(one.high - one.estimate, other.estimate - other.low)
        return Interval(d, d - down, d + up, df=np.inf)
    v, w = np.asarray(one.se, float) ** 2, np.asarray(other.se, float) ** 2
    with np.errstate(all="ignore"):
        df = (v + w) ** 2 / (v * v / one.df + w * w / other.df)
    df = np.where(v + w == 0, np.minimum(one.df, other.df), df)
    return _around(np.asarray(one.estimate, float) - other.estimate, v + w, df)


def needed(estimate: float, deviation: float, margin: float, least: int) -> float:
    """How many sequences would settle a verdict if they were like those seen.

    The smallest n >= least with t(n - 1) deviation / sqrt(n) < | |estimate| - margin |: then the interval lies within
    the margin to both sides, or beyond it to one. It takes what was seen for the truth, so it is a guide, no promise.

    Args:
        estimate: mean difference.
        deviation: standard deviation of one sequence's, se x sqrt(n).
        margin: within which nothing has happened.
        least: below it there is no verdict.

    Returns:
        A whole number; inf where more than `MOST` would be needed; NaN where the spread is unknown.
    """
    room = abs(abs(estimate) - margin)
    if math.isnan(room) or math.isnan(deviation):
        return math.nan
    if room == 0 or (Z * deviation / room) ** 2 > MOST:
        return math.inf
    n = max(least, math.ceil((Z * deviation / room) ** 2))
    while float(_quantile(np.array(n - 1.0))) * deviation / math.sqrt(n) >= room > 0:
        n += 1
    return float(n)


def needed_answers(lost: float, gained: float, n: int, margin: float, least: int) -> float:
    """The same of paired proportions: the smallest n with as many answers lost and gained, relative to n.

    Returns:
        A whole number; inf where more than `MOST` would be needed; NaN without answers.
    """
    if n <= 0 or math.isnan(lost + gained):
        return math.nan

    def open_at(many: int) -> bool:
        found = proportion_interval(lost * many / n, gained * many / n, many)
        low, high = float(found.low), float(found.high)
        return not (low > margin or high < -margin or (low > -margin and high < margin))

    above = least
    while open_at(above):
        above *= 2
        if above > MOST:
            return math.inf
    below = max(least - 1, above // 2)
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if open_at(middle) else (below, middle)
    return float(above)


def _with_shares(d: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """The differences, and the share of each in the mean."""
    d = np.asarray(d, float)
    w = np.ones_like(d) if weights is None else np.broadcast_to(np.asarray(weights, float), d.shape)
    return d, w / w.sum(-1, keepdims=True)


def _covariance(h: np.ndarray, e: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The jackknife covariance of two weighted means: (N - 1) / N sum h^2 e f / (1 - h)^2; NaN of one sequence."""
    n = h.shape[-1]
    with np.errstate(all="ignore"):
        return (n - 1) / n * (h * h * e * f / (1 - h) ** 2).sum(-1) if n > 1 else np.full(h.shape[:-1], np.nan)


def _degrees(h: np.ndarray) -> np.ndarray:
    """n - 1, n the sequences of one weight that would do as much."""
    return 1 / (h * h).sum(-1) - 1


def _quantile(df: Any) -> np.ndarray:
    """Of the t distribution at `TAIL`; NaN without degrees of freedom."""
    df = np.asarray(df, float)
    return np.where(df > 0, np.where(np.isinf(df), Z, stdtrit(np.where(df > 0, df, 1.0), TAIL)), np.nan)


def _around(estimate: np.ndarray, variance: np.ndarray, df: np.ndarray) -> Interval:
    with np.errstate(all="ignore"):
        se = np.sqrt(variance)
        half = _quantile(df) * se
        return Interval(estimate, estimate - half, estimate + half, se, df)
