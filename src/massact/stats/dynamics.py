"""The Hidden-Dynamics curve of a training: A exp(-lambda x) log(x) + K, x = gamma t + t0 (2508.03616).

A and K are linear once lambda, gamma and t0 are known, so the search is over these three (variable projection): a grid
of starts, the best of them refined by least squares on their logarithms.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEAST_POINTS = 8  # five parameters, and something left to judge them by
_STARTS = 8


@dataclass(frozen=True)
class Dynamics:
    """A fitted curve; NaN throughout where there is none, with the reason.

    Args:
        A, lam, gamma, t0, K: parameters; t in steps.
        r2: 1 - sum of squared residuals / sum of squares about the mean.
        peak_step: where it is greatest, (exp(W(1 / lambda)) - t0) / gamma; it may lie beyond the data.
        n: points that were fitted.
        reason: why there is no fit; "" where there is one.
    """

    A: float = math.nan
    lam: float = math.nan
    gamma: float = math.nan
    t0: float = math.nan
    K: float = math.nan
    r2: float = math.nan
    peak_step: float = math.nan
    n: int = 0
    reason: str = ""

    def at(self, t: Any) -> np.ndarray:
        """The curve at steps t."""
        x = self.gamma * np.asarray(t, float) + self.t0
        return self.A * np.exp(-self.lam * x) * np.log(x) + self.K

    def as_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def fit_dynamics(steps: Any, values: Any) -> Dynamics:
    """Fit f(t) = A exp(-lambda x) log(x) + K, x = gamma t + t0, by least squares (Gallego-Feliciano et al. 2026).

    Args:
        steps: (N,) steps t >= 0.
        values: (N,) for instance top1 / median of a layer at these steps; values that are not finite are left out.
    """
    t_N, y_N = np.asarray(steps, float).ravel(), np.asarray(values, float).ravel()
    if t_N.shape != y_N.shape:
        raise ValueError(f"{len(t_N)} steps, but {len(y_N)} values")
    kept = np.isfinite(t_N) & np.isfinite(y_N) & (t_N >= 0)
    t_N, y_N = t_N[kept], y_N[kept]
    n = len(t_N)
    if n < LEAST_POINTS:
        return Dynamics(n=n, reason=f"{n} points; a curve of five parameters needs {LEAST_POINTS} or more")
    if len(np.unique(t_N)) < LEAST_POINTS:
        return Dynamics(n=n, reason=f"fewer than {LEAST_POINTS} different steps")
    spread = y_N.std()
    if spread <= 1e-12 * max(1e-300, np.abs(y_N).max()):
        return Dynamics(n=n, reason="the values are all equal")
    span = t_N.max()
    tau_N, z_N = t_N / span, (y_N - y_N.mean()) / spread
    best = min((_refined(start, tau_N, z_N) for start in _starts(tau_N, z_N)), key=lambda found: found[0])
    loss, logs_3 = best
    lam, gamma, t0 = np.exp(logs_3)
    A, K = _linear(_basis(logs_3[None], tau_N)[0], z_N)
    from scipy.special import lambertw

    peak = (math.exp(min(lambertw(1 / lam).real, 700.0)) - t0) / gamma * span
    return Dynamics(
        A=float(A * spread), lam=float(lam), gamma=float(gamma / span), t0=float(t0),
        K=float(K * spread + y_N.mean()), r2=float(1 - loss / (z_N @ z_N)), peak_step=float(peak), n=n,
    )  # fmt: skip


def _basis(logs_P3: np.ndarray, tau_N: np.ndarray) -> np.ndarray:
    """exp(-lambda x) log(x) for P sets of (log lambda, log gamma, log t0): (P, N)."""
    lam, gamma, t0 = np.exp(logs_P3.T)[:, :, None]
    x_PN = gamma * tau_N + t0
    return np.exp(-lam * x_PN) * np.log(x_PN)


def _linear(g_N: np.ndarray, z_N: np.ndarray) -> tuple[float, float]:
    """Best A and K of z = A g + K."""
    off_N = g_N - g_N.mean()
    square = off_N @ off_N
    A = float(off_N @ z_N / square) if square > 0 else 0.0
    return A, float(z_N.mean() - A * g_N.mean())


def _starts(tau_N: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    """The best points of a grid over the three logarithms: (P, 3)."""
    axes = np.linspace(-9, 3, 13), np.linspace(-2, 8, 11), np.linspace(-6, 4, 11)
    grid_P3 = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    # A grid needs no more than some 200 points of a long history.
    every = max(1, len(tau_N) // 200)
    tau, z = tau_N[::every], z_N[::every] - z_N[::every].mean()
    g_PN = _basis(grid_P3, tau)
    g_PN -= g_PN.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_P = np.nan_to_num((g_PN @ z) ** 2 / (g_PN**2).sum(1), nan=-1.0, posinf=-1.0)
    return grid_P3[np.argsort(-gain_P, kind="stable")[:_STARTS]]


def _residual(logs_3: np.ndarray, tau_N: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    g_N = _basis(logs_3[None], tau_N)[0]
    if not np.isfinite(g_N).all():
        return np.full(len(z_N), 1e6)
    A, K = _linear(g_N, z_N)
    return A * g_N + K - z_N


def _refined(logs_3: np.ndarray, tau_N: np.ndarray, z_N: np.ndarray) -> tuple[float, np.ndarray]:
    """(sum of squares, logarithms) of the least squares that one start leads to."""
    from scipy.optimize import least_squares  # 0.4 s, which only who fits need wait

    found = least_squares(_residual, logs_3, bounds=(-20, 20), args=(tau_N, z_N), jac="3-point",
                          xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=300)  # fmt: skip
    return 2 * float(found.cost), found.x
