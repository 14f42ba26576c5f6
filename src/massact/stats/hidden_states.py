"""Everything a scan wants to know about a hidden state, in one fused and exact pass.

Shapes: N sequences, T tokens, D dims, K top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.records.rules import HIT
from massact.stats.dims import DimTotals
from massact.stats.passes import SCALARS, Ask, Measured, measured
from massact.stats.protocol import Where, check_2d, check_same, concatenated, offsets_of, stacked


@dataclass(frozen=True)
class HiddenResult:
    """What `HiddenStats` measured at one site; sequences in order of their index.

    All magnitudes and moments are over the finite values; `n_nan` and `n_inf` say how many were left out.
    NaN (and -1 for places) where there was no finite value, or fewer than k.

    Args:
        sequence, n_tokens: (N,) int64.
        top_value: (N, K) signed, descending in magnitude. Equal magnitudes in order of position, then dim.
        top_pos, top_dim: (N, K) int64.
        median: (N,) lower median of |h| over all T * D values, as torch.median.
        mad: (N,) lower median of | |h| - median |; NaN unless asked for.
        mean, std, rms, mean_abs, max: (N,) over all values; std is the population's, max is max|h|.
        kurtosis: (N,) Pearson, m4 / m2^2, 3 for a Gaussian; NaN for a constant.
        osp_kurtosis: (N,) mean over tokens of relu(mean(x^4) / std(x)^4 - 3), as OSP (Park et al. 2025),
            whose fourth moment is not centred; population std; tokens with no variance are left out.
        n_nan, n_inf: (N,) int64.
        token_offsets: (N + 1,) where each sequence begins in the next three.
        token_pos, token_norm, token_max: (sum T,) position, L2 norm and max|h| of each token.
        dim_max, dim_mean_abs, dim_mean, dim_std: (D,) over all tokens of all sequences.
        dim_hits: (D,) int64, tokens with |h| >= hit (Dettmers et al. 2022: an outlier feature, hit 6).
        dim_n: (D,) int64, finite values of each dim.
        n_tokens_total: tokens seen.
    """

    sequence: np.ndarray
    n_tokens: np.ndarray
    top_value: np.ndarray
    top_pos: np.ndarray
    top_dim: np.ndarray
    median: np.ndarray
    mad: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    rms: np.ndarray
    mean_abs: np.ndarray
    max: np.ndarray
    kurtosis: np.ndarray
    osp_kurtosis: np.ndarray
    n_nan: np.ndarray
    n_inf: np.ndarray
    token_offsets: np.ndarray
    token_pos: np.ndarray
    token_norm: np.ndarray
    token_max: np.ndarray
    dim_max: np.ndarray
    dim_mean_abs: np.ndarray
    dim_mean: np.ndarray
    dim_std: np.ndarray
    dim_hits: np.ndarray
    dim_n: np.ndarray
    n_tokens_total: int

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, norms, maxima) of the tokens of row i, (T,) each."""
        span = slice(*self.token_offsets[i : i + 2])
        return self.token_pos[span], self.token_norm[span], self.token_max[span]


@dataclass(frozen=True)
class _Row:
    """One sequence; tensors stay where they were measured until result()."""

    sequence: int
    scalars: Tensor
    top_value_K: Tensor
    top_pos_K: Tensor
    top_dim_K: Tensor
    pos_T: Tensor
    norm_T: Tensor
    max_T: Tensor


class HiddenStats:
    """Top magnitudes with their place, median, moments, per-token and per-dim statistics, in one exact pass.

    On a CPU the pass runs in row blocks that stay in L2; NaN and Inf there send a sequence down a slow
    float64 path. On an accelerator nothing synchronises or branches on a value.

    Exact: everything selected or counted. To about 1e-6: float sums (float32 in a block, float64 beyond).

    Args:
        top_k: how many of the greatest magnitudes to keep per sequence.
        hit: magnitude from which a value is a hit of its dim.
        mad: also measure the median absolute deviation: a second pass over the tensor.
        blocked: False forces the path of accelerators on a CPU (for tests); None chooses by device.
    """

    def __init__(self, top_k: int = 16, hit: float = HIT, mad: bool = False, *, blocked: bool | None = None) -> None:
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; keep at least one entry")
        self.ask = Ask(int(top_k), float(hit), bool(mad))
        self.blocked = blocked
        self.totals = DimTotals()
        self._rows: list[_Row] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the valid tokens (T, D) of one sequence."""
        check_2d(h_TD)
        pos_T = where.rows(len(h_TD))
        if not h_TD.numel():
            self._rows.append(_empty_row(where.sequence, pos_T, self.ask.top_k))
            return
        self.update_all(h_TD[None], (where,))

    @torch.no_grad()
    def update_all(self, h_BTD: Tensor, wheres: Sequence[Where]) -> None:
        """Take sequences (B, T, D) of one length whose tokens are all valid: on a CPU at once, in far fewer calls."""
        passed = measured(h_BTD, self.ask, self.blocked) if h_BTD.numel() else None
        if passed is None:
            for h_TD, where in zip(h_BTD, wheres, strict=True):
                self.update(h_TD, where)
            return
        columns, each = passed
        self.totals.add(columns, h_BTD.shape[0] * h_BTD.shape[1])
        self._rows += [_row_of(m, where, self.ask.top_k) for m, where in zip(each, wheres, strict=True)]

    def merge(self, other: HiddenStats) -> None:
        """Add what another one with the same options has seen."""
        check_same("HiddenStats", (self.ask,), (other.ask,))
        self.totals.merge(other.totals)
        self._rows.extend(other._rows)

    def result(self) -> HiddenResult:
        """Everything measured so far."""
        arrays = self._arrays()
        dims = self.totals.result()
        scalars_NS = arrays.pop("scalars")
        scalars = dict(zip(SCALARS, scalars_NS.T, strict=True))
        counts = {name: scalars.pop(name).astype(np.int64) for name in ("n_nan", "n_inf")}
        return HiddenResult(
            **arrays,
            **scalars,
            **counts,
            n_tokens=np.diff(arrays["token_offsets"]),
            dim_max=dims.max,
            dim_mean_abs=dims.mean_abs,
            dim_mean=dims.mean,
            dim_std=dims.std,
            dim_hits=self.totals.arrays()["hits"].astype(np.int64),
            dim_n=dims.n,
            n_tokens_total=dims.n_tokens,
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        """The rows as arrays, sorted by sequence."""
        rows, K = sorted(self._rows, key=lambda row: row.sequence), self.ask.top_k
        return {
            "sequence": np.array([row.sequence for row in rows], np.int64),
            "scalars": stacked([row.scalars for row in rows], len(SCALARS)),
            "top_value": stacked([row.top_value_K for row in rows], K),
            "top_pos": stacked([row.top_pos_K for row in rows], K, np.int64),
            "top_dim": stacked([row.top_dim_K for row in rows], K, np.int64),
            "token_offsets": offsets_of([len(row.pos_T) for row in rows]),
            "token_pos": concatenated([row.pos_T for row in rows], np.int64),
            "token_norm": concatenated([row.norm_T for row in rows]),
            "token_max": concatenated([row.max_T for row in rows]),
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        options = {"top_k": self.ask.top_k, "hit": self.ask.hit, "mad": self.ask.mad}
        options["blocked"] = self.blocked is not False
        return {k: np.asarray(v) for k, v in options.items()} | self._arrays() | self.totals.state()

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        blocked = None if state["blocked"] else False
        self = cls(int(state["top_k"]), float(state["hit"]), bool(state["mad"]), blocked=blocked)
        self.totals = DimTotals.from_state(state)
        ends = state["token_offsets"]
        for i, sequence in enumerate(state["sequence"]):
            tensors = [torch.from_numpy(np.array(state[k][i])) for k in ("scalars", "top_value", "top_pos", "top_dim")]
            ragged = [torch.from_numpy(np.array(state[k][ends[i] : ends[i + 1]])) for k in
                      ("token_pos", "token_norm", "token_max")]  # fmt: skip
            self._rows.append(_Row(int(sequence), *tensors, *ragged))
        return self


def _row_of(m: Measured, where: Where, k: int) -> _Row:
    """One measured sequence, its rows turned into positions and padded to k."""
    return _Row(
        where.sequence,
        m.scalars,
        _padded(m.top_value_K, k, float("nan")),
        _padded(where.positions_of(m.top_row_K), k, -1),
        _padded(m.top_dim_K, k, -1),
        where.rows(len(m.token_max_T)),
        m.token_norm_T,
        m.token_max_T,
    )


def _empty_row(sequence: int, pos_T: Tensor, k: int) -> _Row:
    """A sequence without values."""
    scalars = torch.full((len(SCALARS),), float("nan"), dtype=torch.float64)
    scalars[-2:] = 0
    none_K, nan_T = torch.full((k,), -1), torch.full((len(pos_T),), float("nan"))
    return _Row(sequence, scalars, torch.full((k,), float("nan")), none_K, none_K, pos_T, nan_T, nan_T)


def _padded(x_K: Tensor, k: int, fill: float) -> Tensor:
    """The first entries of a (k,) tensor, the rest filled."""
    return x_K if len(x_K) == k else torch.nn.functional.pad(x_K, (0, k - len(x_K)), value=fill)
