"""From measured statistics to the tables that criteria look at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from massact.records.formats import MAXIMA
from massact.records.sites import Site
from massact.records.tables import frame
from massact.scans.criteria import Evidence
from massact.stats import HiddenResult, TokenMaxResult

Results = Mapping[Site, HiddenResult]


def _joined(parts: Mapping[Site, Mapping[str, np.ndarray]]) -> pd.DataFrame:
    """One table from the columns of several sites; a frame for each site would cost more than a small scan."""
    if not parts:
        return pd.DataFrame()
    lengths = [len(next(iter(columns.values()))) for columns in parts.values()]
    table = {
        "stack": np.repeat(np.array([s.stack for s in parts], object), lengths),
        "site": np.repeat(np.array([s.point for s in parts], object), lengths),
        "layer": np.repeat([s.layer for s in parts], lengths),
    }
    names = next(iter(parts.values()))
    return pd.DataFrame(table | {name: np.concatenate([c[name] for c in parts.values()]) for name in names})


def candidates_table(results: Results) -> pd.DataFrame:
    """One row per (site, sequence, rank): the greatest |h| with their place and what they are compared with."""
    table = _joined({site: _candidates(r) for site, r in results.items()})
    return table[table.pos >= 0].reset_index(drop=True) if len(table) else table


def _candidates(r: HiddenResult) -> dict[str, np.ndarray]:
    n, k = r.top_value.shape
    magnitude = np.abs(r.top_value)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = magnitude / r.median[:, None]
    return {
        "sequence": np.repeat(r.sequence, k), "pos": r.top_pos.reshape(-1), "dim": r.top_dim.reshape(-1),
        "value": r.top_value.reshape(-1), "magnitude": magnitude.reshape(-1), "ratio": ratio.reshape(-1),
        "rank": np.tile(np.arange(1, k + 1), n), "median": np.repeat(r.median, k),
        "mean_abs": np.repeat(r.mean_abs, k), "mad": np.repeat(r.mad, k),
        "token_rms": _token_rms(r).reshape(-1),
    }  # fmt: skip


def _token_rms(r: HiddenResult) -> np.ndarray:
    """RMS of the hidden vector that each top entry sits in: (N, K)."""
    rms = np.full(r.top_value.shape, np.nan)
    for i in range(len(r.sequence)):
        positions, norms, _ = r.tokens(i)
        where = np.searchsorted(positions, r.top_pos[i])
        known = (r.top_pos[i] >= 0) & (where < len(positions))
        rms[i, known] = norms[where[known]] / np.sqrt(len(r.dim_max))
    return rms


def layers_table(results: Results, modules: Mapping[Site, str]) -> pd.DataFrame:
    """One row per site: the table `layers`, without the count of findings."""
    return frame("layers", [_layer_row(site, r, modules[site]) for site, r in results.items()])


def _layer_row(site: Site, r: HiddenResult, module: str) -> dict[str, object]:
    magnitude = np.abs(r.top_value)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = r.max / r.median
    first, rest, norm_max = _norms(r)
    greatest = _max(r.max)
    row = {
        "stack": site.stack, "site": site.point, "layer": site.layer, "module": module,
        "mixer": "",
        **{f"top{k + 1}": _mean(magnitude[:, k]) if magnitude.shape[1] > k else np.nan for k in range(3)},
        "median": _mean(r.median), "ratio": _mean(ratio), "ratio_max": _max(ratio), "max": greatest,
        "mean": _mean(r.mean), "mean_abs": _mean(r.mean_abs), "std": _mean(r.std), "rms": _mean(r.rms),
        "kurtosis": _mean(r.kurtosis), "rms_kurtosis": _rms_kurtosis(r),
        "token_max_median": _token_max_median(r), "token_kurtosis": _mean(r.osp_kurtosis),
        "norm_first": first, "norm_rest": rest, "norm_max": norm_max,
        "nonfinite": int(r.n_nan.sum() + r.n_inf.sum()), "n_findings": 0, "n_sequences": len(r.sequence),
    }  # fmt: skip
    overflow = bool(r.n_inf.sum())
    for name, largest in MAXIMA.items():
        row[f"headroom_{name}"] = 0.0 if overflow else (largest / greatest if greatest else np.inf)
    return row


def _mean(x: np.ndarray) -> float:
    """Mean of what is available; NaN when nothing is."""
    known = x[~np.isnan(x)]
    return float(known.mean()) if len(known) else float("nan")


def _max(x: np.ndarray) -> float:
    known = x[~np.isnan(x)]
    return float(known.max()) if len(known) else float("nan")


def _rms_kurtosis(r: HiddenResult) -> float:
    """Kurtosis of the per-dim RMS s_j: mean(s^4) / mean(s^2)^2, 1 when all dims are alike, D when one holds all."""
    squares = r.dim_mean**2 + r.dim_std**2
    squares = squares[~np.isnan(squares)]  # of the dims that have a finite value
    total = float(np.mean(squares)) if len(squares) else 0.0
    return float(np.mean(squares**2) / total**2) if total > 0 else float("nan")


def _token_max_median(r: HiddenResult) -> float:
    medians = np.repeat(r.median, np.diff(r.token_offsets))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _mean(r.token_max / medians)


def _norms(r: HiddenResult) -> tuple[float, float, float]:
    """Mean L2 norm of the first token that counts, of all others, and the greatest."""
    starts = r.token_offsets[:-1][np.diff(r.token_offsets) > 0]
    first = np.zeros(len(r.token_norm), bool)
    first[starts] = True
    return _mean(r.token_norm[first]), _mean(r.token_norm[~first]), _max(r.token_norm)


def dims_table(results: Results) -> pd.DataFrame:
    """One row per (site, dim): the table `dims`."""
    columns = {
        site: {
            "dim": np.arange(len(r.dim_max)), "max": r.dim_max, "mean_abs": r.dim_mean_abs, "mean": r.dim_mean,
            "std": r.dim_std,
            "hit_rate": np.where(r.dim_n > 0, r.dim_hits / max(r.n_tokens_total, 1), np.nan),
        }
        for site, r in results.items()
    }  # fmt: skip
    return frame("dims", _joined(columns))


def norms_table(results: Results, every_layer: bool = False) -> pd.DataFrame:
    """One row per token of the last layer of each stack, or of every layer: its L2 norm, RMS and max|h|."""
    chosen = {(site.stack, site.point): site for site in sorted(results)}.values()
    norms = {site: results[site] for site in (results if every_layer else chosen)}
    return _per_token(
        {
            site: (r, {"norm": r.token_norm, "rms": r.token_norm / np.sqrt(len(r.dim_max)), "max": r.token_max})
            for site, r in norms.items()
        }
    )


def spikes_table(results: Mapping[Site, TokenMaxResult]) -> pd.DataFrame:
    """One row per token of the input of down_proj: max|x|."""
    return _per_token({site: (r, {"max": r.token_max}) for site, r in results.items()})


def _per_token(values: Mapping[Site, tuple[HiddenResult | TokenMaxResult, dict[str, np.ndarray]]]) -> pd.DataFrame:
    return _joined(
        {
            site: {"sequence": np.repeat(r.sequence, np.diff(r.token_offsets)), "pos": r.token_pos, **columns}
            for site, (r, columns) in values.items()
        }
    )


def evidence(
    results: Results, modules: Mapping[Site, str], spikes: Mapping[Site, TokenMaxResult], every_token: bool = False
) -> Evidence:
    """Everything that criteria look at; `every_token`: the norms of the tokens of every layer, not of the last."""
    return Evidence(
        candidates_table(results),
        layers_table(results, modules),
        dims_table(results),
        norms_table(results, every_token),
        spikes_table(spikes),
    )
