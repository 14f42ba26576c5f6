"""The Hidden-Dynamics curve: planted parameters come back, and what cannot be fitted says why."""

from __future__ import annotations

import math

import numpy as np
import pytest

from massact.stats import fit_dynamics

STEPS = np.arange(0, 20_001, 100)


@pytest.mark.parametrize(
    ("A", "lam", "gamma", "t0", "K"),
    [(500, 0.05, 1e-3, 1.2, 30), (1200, 0.5, 5e-4, 1.0, 10), (300, 1e-3, 1e-2, 2, 50), (-80, 0.3, 1e-3, 1.5, 90)],
)
def test_planted_parameters_come_back(A: float, lam: float, gamma: float, t0: float, K: float) -> None:
    x = gamma * STEPS + t0
    y = A * np.exp(-lam * x) * np.log(x) + K
    found = fit_dynamics(STEPS, y)
    assert found.reason == "" and found.r2 == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose([found.A, found.lam, found.gamma, found.t0, found.K], [A, lam, gamma, t0, K], rtol=1e-4)
    np.testing.assert_allclose(found.at(STEPS), y, rtol=1e-6, atol=1e-6)
    # The peak: the derivative of the planted curve is zero there.
    at = gamma * found.peak_step + t0
    assert 1 / at - lam * math.log(at) == pytest.approx(0, abs=1e-6)


def test_noise_costs_what_it_must() -> None:
    x = 1e-3 * STEPS + 1.2
    y = 500 * np.exp(-0.05 * x) * np.log(x) + 30
    noisy = y + np.random.default_rng(0).normal(size=len(y)) * 0.1 * y.std()
    found = fit_dynamics(STEPS, noisy)
    planted_r2 = 1 - ((noisy - y) ** 2).sum() / ((noisy - noisy.mean()) ** 2).sum()
    assert found.r2 >= planted_r2 - 1e-9  # least squares is at least as good as the truth
    assert found.peak_step == pytest.approx(7870, rel=0.1)


@pytest.mark.parametrize(
    ("steps", "values", "why"),
    [
        (range(5), range(5), "5 points"),
        (range(20), [3.0] * 20, "all equal"),
        ([1] * 20, range(20), "different steps"),
        (range(20), [math.nan] * 15 + [1, 2, 3, 4, 5], "5 points"),
        ([], [], "0 points"),
    ],
)
def test_what_cannot_be_fitted_says_why(steps: list, values: list, why: str) -> None:
    found = fit_dynamics(steps, values)
    assert why in found.reason and math.isnan(found.r2) and math.isnan(found.A)


def test_values_that_are_not_finite_are_left_out() -> None:
    y = np.log(1e-3 * STEPS + 1.5) * 10
    y[::7] = np.inf
    found = fit_dynamics(STEPS, y)
    assert found.n == np.isfinite(y).sum() and found.r2 > 0.99


def test_a_straight_line_and_huge_values_do_not_break_it() -> None:
    for y in (STEPS * 1.0, STEPS * 1e30, -(STEPS**2.0), np.where(STEPS > 9000, 1.0, 0.0)):
        found = fit_dynamics(STEPS, y)
        assert found.reason == "" and 0 < found.r2 <= 1
