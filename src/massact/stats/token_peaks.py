"""The greatest magnitude of every token with its place, for a few sequences that are looked at token by token.

Shapes: N sequences, T tokens, D dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from massact.stats.protocol import Where, check_2d, to_numpy
from massact.stats.selection import lower_median


@dataclass(frozen=True)
class TokenPeaksResult:
    """The greatest |x| of every token; sequences in order of their index.

    Args:
        sequence: (N,) int64.
        positions: N arrays (T,) int64.
        value: N arrays (T,) signed; NaN where a token has no finite value.
        dim: N arrays (T,) int64; -1 there. The first of equal magnitudes.
        median: (N,) lower median of |x| over the finite values of a sequence; NaN where there is none.
    """

    sequence: np.ndarray
    positions: tuple[np.ndarray, ...]
    value: tuple[np.ndarray, ...]
    dim: tuple[np.ndarray, ...]
    median: np.ndarray


class TokenPeaks:
    """The greatest |x| of every token, its sign and dim, and the median |x| of the sequence."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, Tensor, Tensor, Tensor, float]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take one sequence (T, D)."""
        check_2d(h_TD)
        h_TD = h_TD.detach().double().cpu()
        finite_TD = torch.isfinite(h_TD)
        if h_TD.numel():
            dim_T = torch.where(finite_TD, h_TD.abs(), -1.0).argmax(1)
            value_T = h_TD.gather(1, dim_T[:, None])[:, 0]
            known_T = finite_TD.any(1)
            value_T, dim_T = torch.where(known_T, value_T, math.nan), torch.where(known_T, dim_T, -1)
        else:
            value_T, dim_T = torch.full((len(h_TD),), math.nan), torch.full((len(h_TD),), -1)
        median = lower_median(h_TD[finite_TD].abs().numpy())
        self._rows.append((where.sequence, where.rows(len(h_TD)), value_T, dim_T, median))

    def merge(self, other: TokenPeaks) -> None:
        """Add what another one has seen."""
        self._rows.extend(other._rows)

    def result(self) -> TokenPeaksResult:
        """Everything measured so far."""
        rows = sorted(self._rows, key=lambda row: row[0])
        return TokenPeaksResult(
            sequence=np.array([row[0] for row in rows], np.int64),
            positions=tuple(to_numpy(row[1], np.int64) for row in rows),
            value=tuple(to_numpy(row[2]) for row in rows),
            dim=tuple(to_numpy(row[3], np.int64) for row in rows),
            median=np.array([row[4] for row in rows]),
        )
