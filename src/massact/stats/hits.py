"""How often each dim of each sequence is large: at or above a magnitude, or far from the mean of the sequence.

Shapes: N sequences, T tokens, D dims.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.records.rules import HIT
from massact.stats.dims import compute_dtype, round_up, scaled, sum_dtype
from massact.stats.protocol import Where, check_2d, check_same, stacked
from massact.stats.row_blocks import blocks_of

SLACK = 1e-9  # a share is not exact: 0.07 x 100 is a little more than 7


@dataclass(frozen=True)
class CountResult:
    """Counts of every dim of every sequence, in order of the sequences' index.

    Args:
        sequence, n_tokens: (N,) int64.
        count: (N, D) int64, tokens at which the value of the dim counts.
    """

    sequence: np.ndarray
    n_tokens: np.ndarray
    count: np.ndarray

    def share(self) -> np.ndarray:
        """count / tokens, (N, D); NaN for a sequence without tokens."""
        return self.count / np.where(self.n_tokens > 0, self.n_tokens, np.nan)[:, None]

    def reaches(self, share: float) -> np.ndarray:
        """Where count >= share x tokens, (N, D) bool; nowhere in a sequence without tokens."""
        return (self.count + SLACK >= share * self.n_tokens[:, None]) & (self.n_tokens > 0)[:, None]


class _DimCounts(ABC):
    """Counts per sequence and dim; what counts is said by the kind.

    Args:
        limit: of what counts.
    """

    def __init__(self, limit: float) -> None:
        if not limit > 0:
            raise ValueError(f"the limit is {limit}; it must be above 0")
        self.limit = float(limit)
        self._rows: list[tuple[int, int, Tensor]] = []

    @abstractmethod
    def _counted(self, h_TD: Tensor) -> Tensor:
        """Of a sequence with values: (D,) integers."""

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the valid tokens (T, D) of one sequence."""
        check_2d(h_TD)
        T, D = h_TD.shape
        count_D = self._counted(h_TD.detach()) if h_TD.numel() else torch.zeros(D)
        self._rows.append((where.sequence, T, count_D.to(torch.int32)))

    def merge(self, other: Self) -> None:
        """Add what another one of the same kind and limit has seen."""
        name = type(self).__name__
        check_same(name, (name, self.limit), (type(other).__name__, other.limit))
        self._rows.extend(other._rows)

    def result(self) -> CountResult:
        """Everything counted so far."""
        rows = sorted(self._rows, key=lambda row: row[0])
        width = len(rows[0][2]) if rows else 0
        return CountResult(
            np.array([row[0] for row in rows], np.int64),
            np.array([row[1] for row in rows], np.int64),
            stacked([row[2] for row in rows], width, np.int64),
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        r = self.result()
        return {"limit": np.asarray(self.limit), "sequence": r.sequence, "n_tokens": r.n_tokens, "count": r.count}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls(float(state["limit"]))
        for sequence, n_tokens, count_D in zip(state["sequence"], state["n_tokens"], state["count"], strict=True):
            self._rows.append((int(sequence), int(n_tokens), torch.from_numpy(np.array(count_D, np.int32))))
        return self


class HitShares(_DimCounts):
    """Tokens with |x| >= limit, per sequence and dim: the outlier features of Dettmers 2022.

    Exact. NaN and Inf never count, but their tokens are tokens. Over all sequences it is the `dim_hits` of
    `HiddenStats`, which cannot tell the sequences apart.

    Args:
        limit: in units of the values; Dettmers: 6.
    """

    def __init__(self, limit: float = HIT) -> None:
        super().__init__(limit)

    def _counted(self, h_TD: Tensor) -> Tensor:
        if h_TD.device.type == "cpu" and h_TD.dtype != torch.float64:
            return _hits_in_blocks(h_TD.contiguous(), np.float32(round_up(self.limit)))
        limit = self.limit if h_TD.dtype == torch.float64 else round_up(self.limit)
        mag_TD = h_TD.to(compute_dtype(h_TD)).abs()
        return ((mag_TD >= limit) & (mag_TD < math.inf)).sum(0)


def _hits_in_blocks(h_TD: Tensor, limit: np.float32) -> Tensor:
    """The hits of each dim, from row blocks in cache; most blocks have none and cost one maximum."""
    hits_D = np.zeros(h_TD.shape[1], np.int64)
    for block in blocks_of(h_TD):
        if not block.mag_RD.max().item() < limit:  # NaN goes on, too
            hit_RD = np.greater_equal(block.mag, limit, out=block.low)
            hit_RD &= np.less(block.mag, np.float32(np.inf), out=block.high)
            hits_D += np.add.reduce(hit_RD.view(np.uint8), axis=0, dtype=np.int16)
    return torch.from_numpy(hits_D)


class TailCounts(_DimCounts):
    """Tokens with |x - mean| > limit x std, per sequence and dim: the outliers of Bondarenko 2023.

    Mean and population std are those of all finite values of the sequence, in float64 on a CPU. NaN and Inf never
    count.

    Args:
        limit: in standard deviations; Bondarenko: 6.
    """

    def __init__(self, limit: float = 6.0) -> None:
        super().__init__(limit)

    def _counted(self, h_TD: Tensor) -> Tensor:
        C = torch.float64 if h_TD.device.type == "cpu" else compute_dtype(h_TD)
        A = sum_dtype(h_TD.device)
        v_TD, finite_TD, _ = scaled(h_TD, C)  # by a power of two: no square overflows, no ratio changes
        n = finite_TD.sum().clamp(min=1)
        off_TD = (v_TD - (v_TD.sum(dtype=A) / n).to(C)).mul_(finite_TD)
        std = ((off_TD * off_TD).sum(dtype=A) / n).sqrt()
        return (off_TD.abs_() > (self.limit * std).to(C)).sum(0)
