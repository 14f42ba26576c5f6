"""What the intervals cover, by number of sequences: distributions for the tests, and the tables of docs/statistics.md.

python -m tests.stats.coverage (a minute)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.stats

from massact.records.verdicts import LEAST, MARGIN
from massact.stats.intervals import Interval, mean_interval, proportion_interval

DRAWS = 20_000
NUMBERS = (4, 5, 6, 8, 12, 16, 32, 64)
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DIFFERENCES: dict[str, Draw] = {  # of mean 0
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t, 5 df": lambda rng, shape: rng.standard_t(5, shape),
    "gamma, skew 1": lambda rng, shape: rng.gamma(4, 1, shape) - 4,
}
SKEWED: dict[str, Draw] = {  # for which they fall short
    "exponential, skew 2": lambda rng, shape: rng.exponential(1, shape) - 1,
    "log-normal, skew 6": lambda rng, shape: rng.lognormal(0, 1, shape) - np.exp(0.5),
    "one sequence in ten": lambda rng, shape: (rng.random(shape) < 0.1) - 0.1,
}
WEIGHTS: dict[str, Draw] = {
    "equal": lambda rng, shape: np.ones(shape),
    "50 to 500": lambda rng, shape: rng.uniform(50, 500, shape),
    "log-normal, sd 0.7": lambda rng, shape: np.exp(0.7 * rng.normal(size=shape)),
}
LOST_GAINED = ((0, 0), (0.01, 0), (0.05, 0.01), (0.1, 0.1), (0.1, 0), (0.2, 0.1), (0.3, 0.05), (0.3, 0.3), (0.5, 0))
NEARLY_ALL = (0.9, 0)


def drawn(of: str, weights: str, n: int, seed: int = 0) -> Interval:
    """Intervals (DRAWS,) of a mean of 0."""
    rng = np.random.default_rng((seed, n, len(of), len(weights)))
    shape = (DRAWS, n)
    return mean_interval((DIFFERENCES | SKEWED)[of](rng, shape), WEIGHTS[weights](rng, shape))


def covered(found: Interval, truth: float = 0.0) -> float:
    """Share of the intervals that hold the truth."""
    return float(((found.low <= truth) & (found.high >= truth)).mean())


def outcomes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every number of answers lost and gained, of n."""
    lost, gained = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    return lost[lost + gained <= n], gained[lost + gained <= n]


def chances(lost: float, gained: float, n: int) -> np.ndarray:
    """Probability of each of the outcomes."""
    b, c = outcomes(n)
    p: np.ndarray = scipy.stats.multinomial.pmf(np.stack([b, c, n - b - c], -1), n, [lost, gained, 1 - lost - gained])
    return p


def covered_proportions(lost: float, gained: float, n: int) -> float:
    """Exactly: every outcome weighted with its probability."""
    found, truth = proportion_interval(*outcomes(n), n), gained - lost
    return float(chances(lost, gained, n)[(found.low <= truth + 1e-12) & (found.high >= truth - 1e-12)].sum())


def _bootstrap(of: str, n: int, method: str) -> float:
    d = (DIFFERENCES | SKEWED)[of](np.random.default_rng(n), (1000, n))
    found = scipy.stats.bootstrap(
        (d,), np.mean, axis=1, vectorized=True, n_resamples=999, method=method, random_state=1, batch=50
    ).confidence_interval  # fmt: skip
    return float(((found.low <= 0) & (found.high >= 0)).mean())


def _wrong(of: str, weights: str, n: int) -> float:
    """How often harmless is said where the harm is the margin, at the spread at which that is most frequent."""
    found, worst = drawn(of, weights, n, seed=1), 0.0
    for spread in (0.02, 0.1, 0.5, 1.0):
        low, high = (spread * np.asarray(x) + 1 for x in (found.low, found.high))  # in margins
        worst = max(worst, float(((low > -1) & (high < 1)).mean()))
    return worst


def _table(title: str, rows: dict[str, list[float]], numbers: tuple[int, ...]) -> None:
    print(f"\n| {title} |", " | ".join(map(str, numbers)), "|\n|---|" + "---|" * len(numbers))
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(f"{100 * x:.1f}" for x in row), "|")


if __name__ == "__main__":
    assert (LEAST, MARGIN) == (4, 0.01)
    every = {f"{of}; {w}": (of, w) for of in DIFFERENCES | SKEWED for w in ("equal", *list(WEIGHTS)[1:])}
    _table("differences; weights", {k: [covered(drawn(*v, n)) for n in NUMBERS] for k, v in every.items()}, NUMBERS)
    _table("lost, gained", {f"{100 * b:g} %, {100 * c:g} %": [covered_proportions(b, c, n) for n in NUMBERS]
                            for b, c in (*LOST_GAINED, NEARLY_ALL)}, NUMBERS)  # fmt: skip
    few = (4, 8, 16)
    _table("bootstrap", {f"{of}, {m}": [_bootstrap(of, n, m) for n in few] for of in DIFFERENCES
                         for m in ("percentile", "BCa")}, few)  # fmt: skip
    _table("wrongly harmless", {of: [_wrong(of, "equal", n) for n in NUMBERS] for of in DIFFERENCES | SKEWED}, NUMBERS)
