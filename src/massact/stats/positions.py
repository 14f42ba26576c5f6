"""Moments of fixed positions over sequences (registers), and mean magnitudes at chosen positions (register neurons).

Shapes: T tokens, D dims, R positions, K kept sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.groups import Chosen, rows_at
from massact.stats.protocol import Where, check_2d, check_same, to_numpy


def _wide(h: Tensor) -> Tensor:
    return h.detach().to("cpu" if h.device.type == "mps" else h.device).double()  # MPS has no float64


@dataclass(frozen=True)
class MomentsAt:
    """Mean and spread over sequences of what is at some positions.

    Args:
        n: sequences.
        mean, std: (R, D); std with n in the denominator; NaN without sequences.
        kept: (K,) the sequences whose values are kept, in order of their index.
        values: (K, R, D) float32, their values.
    """

    n: int
    mean: np.ndarray
    std: np.ndarray
    kept: np.ndarray
    values: np.ndarray


class PositionMoments:
    """Mean and standard deviation over sequences at fixed positions, in float64, streamed (Chan 1983).

    Args:
        positions: R positions that every sequence has.
        keep: values of the sequences with an index below this are kept as they are.
    """

    def __init__(self, positions: Sequence[int], keep: int = 0) -> None:
        self.positions, self.keep = tuple(positions), keep
        self.n, self._mean, self._square = 0, torch.zeros(0), torch.zeros(0)
        self._kept: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence.

        Raises:
            ValueError: it lacks one of the positions.
        """
        check_2d(h_TD)
        rows = rows_at(where, len(h_TD), self.positions)
        if len(rows) != len(self.positions):
            raise ValueError(f"sequence {where.sequence} has {len(h_TD)} tokens and lacks some of {self.positions}")
        x_RD = h_TD[rows]
        self._add(1, _wide(x_RD), torch.zeros_like(x_RD, dtype=torch.float64, device=_wide(x_RD).device))
        if where.sequence < self.keep:
            self._kept.append((where.sequence, x_RD.detach().float().clone()))

    def _add(self, n: int, mean: Tensor, square: Tensor) -> None:
        if not self.n:
            self.n, self._mean, self._square = n, mean.clone(), square.clone()
            return
        total, mean, square = self.n + n, mean.to(self._mean.device), square.to(self._mean.device)
        off = mean - self._mean
        self._square += square + off.square() * (self.n * n / total)
        self._mean += off * (n / total)
        self.n = total

    def merge(self, other: PositionMoments) -> None:
        """Add what another one has seen."""
        check_same("PositionMoments", (self.positions, self.keep), (other.positions, other.keep))
        if other.n:
            self._add(other.n, other._mean, other._square)
        self._kept.extend(other._kept)

    def result(self) -> MomentsAt:
        """Everything measured so far."""
        kept = sorted(self._kept, key=lambda row: row[0])
        mean, square = to_numpy(self._mean), to_numpy(self._square)
        none = np.zeros((0, *mean.shape), np.float32)
        values = np.stack([to_numpy(x, np.float32) for _, x in kept]) if kept else none
        std = np.sqrt(square / self.n) if self.n else square
        return MomentsAt(self.n, mean, std, np.array([s for s, _ in kept], np.int64), values)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        r = self.result()
        return {
            "positions": np.array(self.positions, np.int64), "keep": np.array(self.keep), "n": np.array(self.n),
            "mean": to_numpy(self._mean), "square": to_numpy(self._square), "kept": r.kept, "values": r.values,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls(state["positions"].tolist(), int(state["keep"]))
        self.n = int(state["n"])
        self._mean, self._square = (torch.from_numpy(np.array(state[k])) for k in ("mean", "square"))
        self._kept = [(int(s), torch.from_numpy(np.array(v))) for s, v in zip(state["kept"], state["values"],
                                                                             strict=True)]  # fmt: skip
        return self


@dataclass(frozen=True)
class SplitMagnitudes:
    """Mean |x| of every dim at chosen positions and at all others: (D,) each; NaN where there were none."""

    n_chosen: int
    n_rest: int
    chosen: np.ndarray
    rest: np.ndarray


class MagnitudesAt:
    """Mean |x| of every dim over chosen positions of all sequences, and over all other positions, in float64.

    Args:
        chosen: sequence -> positions; all other sequences have none.
        among: positions that count as others; None for all.
    """

    def __init__(self, chosen: Chosen, among: Sequence[int] | None = None) -> None:
        self.chosen, self.among = chosen, None if among is None else tuple(among)
        self.n = [0, 0]
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence."""
        check_2d(h_TD)
        rows = rows_at(where, len(h_TD), sorted(set(self.chosen.get(where.sequence, ()))))
        others = range(len(h_TD)) if self.among is None else rows_at(where, len(h_TD), self.among)
        rest = [r for r in others if r not in set(rows)]
        self._add([len(rows), len(rest)], [_wide(h_TD[part]).abs().sum(0) for part in (rows, rest)])

    def _add(self, n: list[int], sums: list[Tensor]) -> None:
        self.n = [a + b for a, b in zip(self.n, n, strict=True)]
        held = self._sums
        self._sums = [a.to(b.device) + b for a, b in zip(held, sums, strict=True)] if held else sums

    def merge(self, other: MagnitudesAt) -> None:
        """Add what another one has seen."""
        check_same("MagnitudesAt", (self.among,), (other.among,))
        if other._sums:
            self._add(other.n, other._sums)

    def result(self) -> SplitMagnitudes:
        """Everything measured so far."""
        sums = [to_numpy(x) for x in self._sums] or [np.zeros(0), np.zeros(0)]
        means = [x / n if n else np.full_like(x, np.nan) for x, n in zip(sums, self.n, strict=True)]
        return SplitMagnitudes(self.n[0], self.n[1], *means)

    def state(self) -> dict[str, np.ndarray]:
        """The sums, for `np.savez`."""
        sums = {f"sum{i}": to_numpy(x) for i, x in enumerate(self._sums)}
        return {"n": np.array(self.n), "among": np.array(self.among or (), np.int64),
                "all": np.array(self.among is None)} | sums  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The sums that `state()` came from; it can be merged into one that knows its positions."""
        self = cls({}, None if state["all"] else state["among"].tolist())
        self.n = [int(x) for x in state["n"]]
        self._sums = [torch.from_numpy(np.array(state[k])) for k in ("sum0", "sum1") if k in state]
        return self
