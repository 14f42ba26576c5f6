"""Small statistics: the greatest magnitude of each token, the tensor itself, values at given ranks.

Shapes: N sequences, T tokens, D dims, R ranks, V all values of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.records.errors import UserError
from massact.stats.protocol import Where, check_2d, check_same, concatenated, offsets_of, stacked, to_numpy
from massact.stats.row_blocks import blocks_of
from massact.stats.selection import rank_stable, top_k_stable

_NEAR_TOP = 1000  # ranks below this come from one partition


# --------------------------------------------------------------------------------------------------- TokenMax
@dataclass(frozen=True)
class TokenMaxResult:
    """max|x| of every token; sequences in order of their index.

    Args:
        sequence, n_tokens: (N,) int64.
        token_offsets: (N + 1,) where each sequence begins in the next two.
        token_pos, token_max: (sum T,); the maximum is over the finite values, NaN where there is none.
        n_nan, n_inf: (N,) int64.
    """

    sequence: np.ndarray
    n_tokens: np.ndarray
    token_offsets: np.ndarray
    token_pos: np.ndarray
    token_max: np.ndarray
    n_nan: np.ndarray
    n_inf: np.ndarray

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, maxima) of the tokens of row i, (T,) each."""
        span = slice(*self.token_offsets[i : i + 2])
        return self.token_pos[span], self.token_max[span]


@dataclass(frozen=True)
class _TokenRow:
    sequence: int
    pos_T: Tensor
    max_T: Tensor
    bad_2: Tensor  # NaN and Inf counts


class TokenMax:
    """max|x| of every token along the last axis, for instance of the input of down_proj (PrefixQuant's rule).

    Exact. Wide tensors (T, d_mlp) are welcome: nothing but (T,) is kept.
    """

    def __init__(self) -> None:
        self._rows: list[_TokenRow] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take one sequence (T, D)."""
        check_2d(h_TD)
        max_T, bad_2 = _token_max(h_TD.detach())
        self._rows.append(_TokenRow(where.sequence, where.rows(len(h_TD)), max_T, bad_2))

    @torch.no_grad()
    def update_all(self, h_BTD: Tensor, wheres: Sequence[Where]) -> None:
        """Take sequences (B, T, D) of one length whose tokens are all valid, at once."""
        max_N, bad_2 = _token_max(h_BTD.detach().flatten(0, 1))
        if bool(bad_2.any()):  # which of them has NaN or Inf
            for h_TD, where in zip(h_BTD, wheres, strict=True):
                self.update(h_TD, where)
            return
        each = zip(max_N.view(h_BTD.shape[:2]), wheres, strict=True)
        self._rows += [_TokenRow(where.sequence, where.rows(len(max_T)), max_T, bad_2) for max_T, where in each]

    def merge(self, other: TokenMax) -> None:
        """Add what another one has seen."""
        self._rows.extend(other._rows)

    def result(self) -> TokenMaxResult:
        """Everything measured so far."""
        arrays = self.state()
        bad_N2 = arrays.pop("bad")
        return TokenMaxResult(
            **arrays, n_tokens=np.diff(arrays["token_offsets"]), n_nan=bad_N2[:, 0], n_inf=bad_N2[:, 1]
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        rows = sorted(self._rows, key=lambda row: row.sequence)
        return {
            "sequence": np.array([row.sequence for row in rows], np.int64),
            "token_offsets": offsets_of([len(row.pos_T) for row in rows]),
            "token_pos": concatenated([row.pos_T for row in rows], np.int64),
            "token_max": concatenated([row.max_T for row in rows]),
            "bad": stacked([row.bad_2 for row in rows], 2, np.int64),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls()
        for i, sequence in enumerate(state["sequence"]):
            span = slice(*state["token_offsets"][i : i + 2])
            tensors = (torch.from_numpy(np.array(x)) for x in
                       (state["token_pos"][span], state["token_max"][span], state["bad"][i]))  # fmt: skip
            self._rows.append(_TokenRow(int(sequence), *tensors))
        return self


def _token_max(h_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(max|x| of the finite values (T,), counts of NaN and Inf (2,))."""
    if not h_TD.numel():
        return torch.full((len(h_TD),), float("nan")), torch.zeros(2, dtype=torch.int64)
    if h_TD.device.type == "cpu" and h_TD.dtype != torch.float64:
        max_T = torch.cat([block.mag_RD.amax(1) for block in blocks_of(h_TD.contiguous())])
        if bool(torch.isfinite(max_T).all()):
            return max_T, torch.zeros(2, dtype=torch.int64)
    max_T = torch.where(torch.isfinite(h_TD), h_TD.abs(), -1).amax(1)
    bad_2 = torch.stack([torch.isnan(h_TD).sum(), torch.isinf(h_TD).sum()])
    return torch.where(max_T < 0, float("nan"), max_T), bad_2


# ------------------------------------------------------------------------------------------------------- Keep
@dataclass(frozen=True)
class KeepResult:
    """The tensors themselves, in order of their sequence.

    Args:
        sequence: (N,) int64.
        positions: N arrays (T,) int64.
        values: N arrays (T, D) float32.
    """

    sequence: np.ndarray
    positions: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]


class Keep:
    """The whole (T, D) tensor of every sequence in float32, for short prompts and figures.

    Args:
        limit_bytes: refuse to hold more than this.
    """

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = int(limit_bytes)
        self.n_bytes = 0
        self._rows: list[tuple[int, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take one sequence (T, D); UserError above the limit, before anything is copied."""
        check_2d(h_TD)
        self._reserve(4 * h_TD.numel())
        kept_TD = h_TD.detach().to(torch.float32, copy=True)
        self._rows.append((where.sequence, where.rows(len(h_TD)), kept_TD))

    def _reserve(self, n_bytes: int) -> None:
        needed = self.n_bytes + n_bytes
        if needed > self.limit_bytes:
            raise UserError(
                f"Keeping {len(self._rows) + 1} tensors of one site takes {needed / 1e6:.1f} MB, "
                f"the limit is {self.limit_bytes / 1e6:.1f} MB.",
                "Keep stores every value, which is meant for short prompts and figures.",
                "Use fewer or shorter sequences, a streaming statistic (HiddenStats), or raise limit_bytes.",
            )
        self.n_bytes += n_bytes

    def merge(self, other: Keep) -> None:
        """Add what another one has kept; the limit of this one holds for both."""
        self._reserve(other.n_bytes)
        self._rows.extend(other._rows)

    def result(self) -> KeepResult:
        """All tensors."""
        rows = sorted(self._rows, key=lambda row: row[0])
        return KeepResult(
            sequence=np.array([row[0] for row in rows], np.int64),
            positions=tuple(to_numpy(row[1], np.int64) for row in rows),
            values=tuple(to_numpy(row[2], np.float32) for row in rows),
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        kept = self.result()
        arrays = {"limit_bytes": np.asarray(self.limit_bytes), "sequence": kept.sequence}
        for i, (positions_T, values_TD) in enumerate(zip(kept.positions, kept.values, strict=True)):
            arrays |= {f"positions_{i}": positions_T, f"values_{i}": values_TD}
        return arrays

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls(int(state["limit_bytes"]))
        for i, sequence in enumerate(state["sequence"]):
            positions_T = torch.from_numpy(np.array(state[f"positions_{i}"]))
            values_TD = torch.from_numpy(np.array(state[f"values_{i}"]))
            self.n_bytes += 4 * values_TD.numel()
            self._rows.append((int(sequence), positions_T, values_TD))
        return self


# ------------------------------------------------------------------------------------------------------ Ranks
@dataclass(frozen=True)
class RanksResult:
    """The element at each magnitude rank; sequences in order of their index.

    Args:
        ranks: R names: an int r for the r-th greatest, a float p for a fraction of all values.
        sequence: (N,) int64.
        value: (N, R) signed; NaN where the sequence has fewer values.
        pos, dim: (N, R) int64; -1 where the sequence has fewer values.
        n_nan, n_inf: (N,) int64, left out of the ranking.
    """

    ranks: tuple[int | float, ...]
    sequence: np.ndarray
    value: np.ndarray
    pos: np.ndarray
    dim: np.ndarray
    n_nan: np.ndarray
    n_inf: np.ndarray


class Ranks:
    """Signed value and place of the element at each magnitude rank (tables 1 and 2 of Sun et al. 2024).

    With a = |h| of all V = T * D values, descending: top r is a[r - 1], fraction p is a[ceil(p V) - 1], and
    0.5 is the median a[V // 2] (the lower one). Equal magnitudes rank by position, then dim. Exact.

    Args:
        fractions: each in (0, 1].
        tops: each >= 1.
    """

    def __init__(
        self,
        fractions: tuple[float, ...] = (0.01, 0.1, 0.5),
        tops: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 100),
    ) -> None:
        if not all(0 < p <= 1 for p in fractions) or not all(r >= 1 for r in tops):
            raise ValueError(f"fractions must lie in (0, 1] and tops start at 1: {fractions}, {tops}")
        self.fractions, self.tops = tuple(map(float, fractions)), tuple(map(int, tops))
        self._rows: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take one sequence (T, D)."""
        check_2d(h_TD)
        h_TD = h_TD.detach()
        D, h_V = max(1, h_TD.shape[1]), h_TD.reshape(-1)
        finite_V = torch.isfinite(h_V)
        mag_V = torch.where(finite_V, h_V.abs(), -1)  # what is not finite ranks last
        n_finite = finite_V.sum()
        rank_R = self._ranks_of(n_finite)
        real_R = (rank_R >= 0) & (rank_R < n_finite)
        flat_R = places(mag_V, torch.where(real_R, rank_R, 0))
        value_R = torch.full(flat_R.shape, float("nan"), dtype=h_V.dtype, device=h_V.device)
        if h_V.numel():
            value_R = torch.where(real_R, h_V.index_select(0, flat_R), value_R)
        pos_R = where.positions_of(torch.where(real_R, flat_R // D, -1))
        dim_R = torch.where(real_R, flat_R % D, -1)
        bad_2 = torch.stack([torch.isnan(h_V).sum(), torch.isinf(h_V).sum()])
        self._rows.append((where.sequence, value_R, pos_R, dim_R, bad_2))

    def _ranks_of(self, n: Tensor) -> Tensor:
        """0-based ranks (R,) for n (0-d) values, tops first; in integers, so that ceil is exact."""
        ranks = [torch.full_like(n, r - 1) for r in self.tops]
        for p in self.fractions:
            exact = Fraction(p).limit_denominator(10**6)
            ceil = -((-exact.numerator * n) // exact.denominator)
            ranks.append(n // 2 if p == 0.5 else ceil - 1)
        return torch.stack(ranks)

    def merge(self, other: Ranks) -> None:
        """Add what another one with the same ranks has seen."""
        check_same("Ranks", (self.fractions, self.tops), (other.fractions, other.tops))
        self._rows.extend(other._rows)

    def result(self) -> RanksResult:
        """Everything measured so far."""
        arrays = self.state()
        bad_N2 = arrays["bad"]
        named = {k: arrays[k] for k in ("sequence", "value", "pos", "dim")}
        return RanksResult(ranks=self.tops + self.fractions, **named, n_nan=bad_N2[:, 0], n_inf=bad_N2[:, 1])

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        rows, R = sorted(self._rows, key=lambda row: row[0]), len(self.tops) + len(self.fractions)
        return {
            "fractions": np.array(self.fractions, np.float64),
            "tops": np.array(self.tops, np.int64),
            "sequence": np.array([row[0] for row in rows], np.int64),
            "value": stacked([row[1] for row in rows], R),
            "pos": stacked([row[2] for row in rows], R, np.int64),
            "dim": stacked([row[3] for row in rows], R, np.int64),
            "bad": stacked([row[4] for row in rows], 2, np.int64),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls(tuple(state["fractions"].tolist()), tuple(state["tops"].tolist()))
        for i, sequence in enumerate(state["sequence"]):
            tensors = (torch.from_numpy(np.array(state[k][i])) for k in ("value", "pos", "dim", "bad"))
            self._rows.append((int(sequence), *tensors))
        return self


def places(mag_V: Tensor, rank_R: Tensor) -> Tensor:
    """Indices (R,) of the elements at 0-based ranks of the descending order, ties by index; 0 if empty."""
    if not mag_V.numel():
        return torch.zeros_like(rank_R)
    if mag_V.device.type == "cpu":
        return _places_cpu(mag_V, rank_R)
    return _places_sorted(mag_V, rank_R)


def _places_cpu(mag_V: Tensor, rank_R: Tensor) -> Tensor:
    """By partition: tens of times faster than a full sort with its indices."""
    v_V = mag_V.numpy() if mag_V.dtype == torch.float64 else mag_V.float().numpy()
    ranks = rank_R.tolist()
    top_K = top_k_stable(v_V, 1 + max((r for r in ranks if r < _NEAR_TOP), default=0))
    return torch.tensor([top_K[r] if r < _NEAR_TOP else rank_stable(v_V, r) for r in ranks], dtype=torch.int64)


def _places_sorted(mag_V: Tensor, rank_R: Tensor) -> Tensor:
    """By a full stable sort, with no synchronisation."""
    return torch.sort(mag_V, descending=True, stable=True).indices.index_select(0, rank_R)
