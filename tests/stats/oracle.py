"""What the statistics must equal (float64 NumPy on everything at once), and streams that are hard on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Seen:
    """One sequence as it is given to a statistic."""

    sequence: int
    h_TD: Tensor
    positions_T: np.ndarray


def hard_stream(seed: int, lengths: list[int], D: int, dtype: torch.dtype) -> list[Seen]:
    """Drifting, heavy-tailed sequences with massive values and dims that hardly vary about a huge mean.

    The mean of each sequence moves by about ten standard deviations, so that anything that squares before it
    centres loses its digits.
    """
    rng = np.random.default_rng(seed)
    stream = []
    for sequence, T in enumerate(lengths):
        h_TD = rng.standard_t(3, (T, D)) * rng.uniform(0.2, 1, D) + rng.normal(0, 10)
        h_TD += np.linspace(0, rng.normal(0, 5), T)[:, None]  # and inside of a sequence
        h_TD[:, 0] = 900 + rng.standard_normal(T) * 0.5
        if D > 2:
            h_TD[:, 1] = -777.0  # constant
        for _ in range(2):
            h_TD[rng.integers(T), rng.integers(D)] = rng.choice([-1, 1]) * rng.uniform(1e3, 3e4)
        stream.append(Seen(sequence, torch.from_numpy(h_TD).to(dtype), np.arange(T)))
    return stream


def wide_stream(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Seen:
    """One sequence in which tiny values lie beside ordinary ones: what float32 squares and fourth powers lose."""
    rng, (T, D) = np.random.default_rng(seed), (64, 48)
    h_TD = rng.standard_normal((T, D))
    match kind:
        case "one of 1e4":
            h_TD *= 1e-11
            h_TD[3, 5] = 1e4
        case "tokens of 1e-11" | "tokens of 1e-25":
            h_TD[10:20] *= float(kind.split()[-1])
        case "dims of 1e-11" | "dims of 1e-25":
            h_TD[:, 10:20] *= float(kind.split()[-1])
        case "a dim of 1e4":
            h_TD *= 1e-11
            h_TD[:, 0] = 1e4
        case "a token of 1e4":
            h_TD *= 1e-7
            h_TD[0] = 3e4 * rng.standard_normal(D)
        case "subnormal":
            h_TD[5] *= 1e-42
            h_TD[:, 7] *= 1e-41
        case "heavy tails":
            h_TD = rng.standard_cauchy((T, D)) * np.exp(rng.uniform(-60, 15, (T, D)))
    return Seen(0, torch.from_numpy(h_TD).to(dtype), np.arange(T))


WIDE = ("one of 1e4", "tokens of 1e-11", "tokens of 1e-25", "dims of 1e-11", "dims of 1e-25", "a dim of 1e4",
        "a token of 1e4", "subnormal", "heavy tails")  # fmt: skip


def _lower_median(v: np.ndarray) -> float:
    return np.sort(v)[(len(v) - 1) // 2] if len(v) else np.nan


def _ratio(a: Any, b: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(a, np.float64) / b


def order_of(h_TD: np.ndarray) -> np.ndarray:
    """Flat indices of the finite values, descending in magnitude, ties by index."""
    flat = h_TD.reshape(-1)
    mag = np.where(np.isfinite(flat), np.abs(flat), -1)
    return np.argsort(-mag, kind="stable")[: np.isfinite(flat).sum()]


def sequence_oracle(seen: Seen, top_k: int) -> dict[str, Any]:
    """Every per-sequence number of `HiddenResult`."""
    h_TD = seen.h_TD.double().numpy()
    D = h_TD.shape[1]
    v = h_TD[np.isfinite(h_TD)]
    order = order_of(h_TD)[:top_k]
    pad = (0, top_k - len(order))
    median = _lower_median(np.abs(v))
    d = v - v.mean() if len(v) else v
    m2 = (d**2).mean() if len(v) else np.nan
    x_TD = np.where(np.isfinite(h_TD), h_TD, 0)
    n_T = np.isfinite(h_TD).sum(1)
    mean_T = _ratio(x_TD.sum(1), n_T)
    var_T = _ratio((np.where(np.isfinite(h_TD), x_TD - mean_T[:, None], 0) ** 2).sum(1), n_T)
    second_T, fourth_T = _ratio((x_TD**2).sum(1), n_T), _ratio((x_TD**4).sum(1), n_T)
    kept_T = var_T > 1e-13 * second_T
    osp = np.maximum(_ratio(fourth_T, var_T**2) - 3, 0)[kept_T]
    rms = np.sqrt((v**2).mean()) if len(v) else np.nan
    return {
        "sequence": seen.sequence,
        "n_tokens": len(h_TD),
        "top_value": np.pad(h_TD.reshape(-1)[order], pad, constant_values=np.nan),
        "top_pos": np.pad(seen.positions_T[order // D], pad, constant_values=-1),
        "top_dim": np.pad(order % D, pad, constant_values=-1),
        "median": median,
        "mad": _lower_median(np.abs(np.abs(v) - median)),
        "mean": v.mean() if len(v) else np.nan,
        "std": np.sqrt(m2),
        "rms": rms,
        "mean_abs": np.abs(v).mean() if len(v) else np.nan,
        "max": np.abs(v).max() if len(v) else np.nan,
        "kurtosis": (d**4).mean() / m2**2 if len(v) and m2 > 1e-13 * rms**2 else np.nan,
        "osp_kurtosis": osp.mean() if len(osp) else np.nan,
        "n_nan": np.isnan(h_TD).sum(),
        "n_inf": np.isinf(h_TD).sum(),
        "token_pos": seen.positions_T,
        "token_norm": np.where(n_T > 0, np.sqrt((x_TD**2).sum(1)), np.nan),
        "token_max": np.where(n_T > 0, np.abs(x_TD).max(1), np.nan),
    }


def dims_oracle(stream: list[Seen], hit: float) -> dict[str, Any]:
    """Every per-dim number."""
    h_TD = np.concatenate([seen.h_TD.double().numpy() for seen in stream])
    finite_TD = np.isfinite(h_TD)
    x_TD, n_D = np.where(finite_TD, h_TD, 0), finite_TD.sum(0)
    mean_D = _ratio(x_TD.sum(0), n_D)
    var_D = _ratio((np.where(finite_TD, x_TD - mean_D, 0) ** 2).sum(0), n_D)
    return {
        "max": np.where(n_D > 0, np.abs(x_TD).max(0), np.nan),
        "mean_abs": _ratio(np.abs(x_TD).sum(0), n_D),
        "mean": mean_D,
        "std": np.sqrt(var_D),
        "hits": (np.abs(x_TD) >= hit).sum(0),
        "n": n_D,
        "n_tokens": len(h_TD),
    }


def hidden_oracle(stream: list[Seen], top_k: int, hit: float, mad: bool) -> dict[str, Any]:
    """Every field of `HiddenResult`."""
    stream = sorted(stream, key=lambda seen: seen.sequence)
    rows = [sequence_oracle(seen, top_k) for seen in stream]
    ragged = ("token_pos", "token_norm", "token_max")
    fields = {k: np.array([row[k] for row in rows]) for k in rows[0] if k not in ragged}
    fields |= {k: np.concatenate([row[k] for row in rows]) for k in ragged}
    fields["token_offsets"] = np.cumsum([0, *fields["n_tokens"]])
    if not mad:
        fields["mad"] = np.full(len(rows), np.nan)
    dims = dims_oracle(stream, hit)
    n_tokens = dims.pop("n_tokens")
    return fields | {f"dim_{k}": v for k, v in dims.items()} | {"n_tokens_total": n_tokens}


# Selected or counted: must be equal. Sums: float32 within a block, so to about 1e-6 of the size of values.
TOLERANCE = {
    "mean": 2e-6,
    "std": 2e-6,
    "rms": 2e-6,
    "mean_abs": 2e-6,
    "kurtosis": 2e-5,
    "osp_kurtosis": 2e-5,
    "token_norm": 2e-6,
    "mad": 1e-7,  # | |h| - median | is rounded to float32
    "dim_mean_abs": 2e-6,
    "dim_mean": 2e-6,
    "dim_std": 2e-6,
}


def check_hidden(result: Any, expected: dict[str, Any]) -> None:
    """Every field of a HiddenResult against the oracle; means and stds relative to the rms."""
    scale = {"mean": expected["rms"], "std": expected["rms"]}
    scale["dim_mean"] = scale["dim_std"] = np.sqrt(expected["dim_mean"] ** 2 + expected["dim_std"] ** 2)
    for name, want in expected.items():
        got = getattr(result, name)
        if name not in TOLERANCE:
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        size = np.abs(scale.get(name, want))
        close = np.abs(got - want) <= TOLERANCE[name] * size + 1e-300
        assert np.all(close | (np.isnan(got) & np.isnan(want))), f"{name}: got {got}, want {want}"
