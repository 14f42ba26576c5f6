"""What every statistic has in common: where a tensor comes from, and update, merge, result.

Shapes: T tokens, D dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Where:
    """Which tokens a call is about.

    Args:
        sequence: index of the sequence in the corpus.
        start: position of the first row, when the rows are consecutive positions.
        positions: (T,) positions, when they are not consecutive.
    """

    sequence: int
    start: int = 0
    positions: Tensor | None = None

    def rows(self, n_tokens: int) -> Tensor:
        """Positions of the rows of one call: (T,) int64.

        They stay on the device that they came on, so that asking for them never synchronises.
        """
        if self.positions is None:
            return torch.arange(self.start, self.start + n_tokens)
        if self.positions.shape != (n_tokens,):
            shape = tuple(self.positions.shape)
            raise ValueError(f"positions have shape {shape}, the tensor has {n_tokens} tokens")
        # A copy: the caller may reuse its buffer, and we read the positions only in result().
        return self.positions.detach().to(torch.int64, copy=True)

    def positions_of(self, rows_K: Tensor) -> Tensor:
        """Positions (K,) of some rows, -1 where the row is -1, on the device of the rows."""
        if self.positions is None:
            found_K = rows_K + self.start
        else:
            pos_T = self.positions.detach().to(rows_K.device, torch.int64, non_blocking=True)
            found_K = pos_T.index_select(0, rows_K.clamp(min=0))
        return torch.where(rows_K >= 0, found_K, -1)


@runtime_checkable
class Statistic(Protocol):
    """A streaming statistic of one site.

    A sequence is given whole, in one update. Any split of the sequences over several statistics and any
    order of merges gives the same result: exactly for counts and order statistics, to rounding for floating
    sums. One that has `update_all(h_BTD, wheres)` is given sequences of one length, all of whose tokens are valid, in
    one call: the same as an update for each.
    """

    def update(self, seen: Any, where: Where, /) -> None:
        """Take the valid tokens (T, D), or the attention call, of one sequence, without synchronising a device."""
        ...

    def merge(self, other: Self, /) -> None:
        """Add what another statistic of the same kind and options has seen."""
        ...

    def result(self) -> Any:
        """Everything measured so far, as NumPy arrays (float64, int64), sequences in order of their index."""
        ...


@runtime_checkable
class Resumable(Statistic, Protocol):
    """A statistic that an interrupted run goes on with."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to go on later, for `np.savez`."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        ...


@runtime_checkable
class Columned(Statistic, Protocol):
    """A statistic with numbers of a layer: columns of a scan's table `layers`, in `COLUMNS` with what each means."""

    COLUMNS: ClassVar[Mapping[str, str]]

    def columns(self) -> Mapping[str, float]:
        """Each of the columns; NaN where it is not known."""
        ...


class PerSequence:
    """A statistic that has one value of every sequence: `update` puts it into `rows`."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}

    def merge(self, other: Self) -> None:
        """Add the sequences of another one."""
        self.rows |= other.rows

    def in_order(self) -> list[Any]:
        """The values, in order of the sequences' index."""
        return [self.rows[sequence] for sequence in sorted(self.rows)]

    def result(self) -> Any:
        """Sequence -> value."""
        return {sequence: self.rows[sequence] for sequence in sorted(self.rows)}


def to_numpy(x: Tensor, dtype: type = np.float64) -> np.ndarray:
    """A tensor of any device as a NumPy array of `dtype`."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy().astype(dtype)


def concatenated(parts: Sequence[Tensor], dtype: type = np.float64) -> np.ndarray:
    """Ragged 1-d tensors as one array; `offsets_of` their lengths says where each begins."""
    return np.concatenate([to_numpy(p, dtype) for p in parts]) if parts else np.zeros(0, dtype)


def stacked(parts: Sequence[Tensor], width: int, dtype: type = np.float64) -> np.ndarray:
    """N tensors of shape (width,) as one array (N, width)."""
    return np.stack([to_numpy(p, dtype) for p in parts]) if parts else np.zeros((0, width), dtype)


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Start of each ragged part, and the end of the last: (N + 1,) int64."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def check_same(kind: str, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """Refuse to merge two statistics with different options."""
    if ours != theirs:
        raise ValueError(f"cannot merge two {kind} with different options: {ours} and {theirs}")


def check_2d(h_TD: Tensor) -> None:
    """Refuse anything but the (T, D) values of one sequence."""
    if h_TD.ndim != 2 or not h_TD.is_floating_point():
        raise ValueError(f"expected a floating (tokens, dims) tensor, got {h_TD.dtype} {tuple(h_TD.shape)}")
