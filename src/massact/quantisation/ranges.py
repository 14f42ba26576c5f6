"""What static scales, constant vectors and predictions of a site rest on: one pass, whatever the number of schemes.

Shapes: T tokens, F features, C clusters of massive tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from massact.quantisation.number_formats import blocks_of
from massact.stats.protocol import Where

BINS, SHIFT = (
    1 << 11,
    20,
)  # of |x| as a float32: its exponent and the first three bits behind it, an eighth of an octave


class Look(NamedTuple):
    """A way to share scales that predictions are wanted for.

    Args:
        rotated: whether x is rotated before. spares: whether massive tokens count in no scale.
        sharing, group: see `Format`; "static": of all sequences.
    """

    rotated: bool
    spares: bool
    sharing: str
    group: int

    @property
    def whole(self) -> bool:
        """Whether one scale serves all entries of a sequence, or of all sequences."""
        return self.sharing in ("tensor", "static")


@dataclass
class Ranges:
    """Greatest |x| of a site, of each channel, the mean of massive tokens, and how |x| of the others is distributed.

    Args:
        clusters: sequence -> position -> cluster of a massive token.
        n_clusters: C.
        looks: for which histograms are kept, of the sequences `counted`; nothing: of all.
        turn: rotates (T, F); None: nothing is rotated.

    What it holds:
        amax: (rotated, spares) -> greatest |x|; of_sequence: the same with the sequence behind.
        channels: spares -> (F,) greatest |x| of each.
        magnitudes: (rotated, sequence) -> (BINS,) int64: entries that are not 0 of tokens that are not massive, by |x|.
        shares: of looks that are not whole, the same by |x| over the greatest of its block.
        sums: (C, F) float64 over massive tokens; tokens (C,): how many.
    """

    clusters: Mapping[int, Mapping[int, int]]
    n_clusters: int
    looks: tuple[Look, ...] = ()
    turn: Callable[[Tensor], Tensor] | None = None
    counted: frozenset[int] = frozenset()
    amax: dict[tuple[bool, bool], Tensor] = field(default_factory=dict)
    of_sequence: dict[tuple[bool, bool, int], Tensor] = field(default_factory=dict)
    channels: dict[bool, Tensor] = field(default_factory=dict)
    magnitudes: dict[tuple[bool, int], Tensor] = field(default_factory=dict)
    shares: dict[Look, Tensor] = field(default_factory=dict)
    sums: Tensor | None = None
    tokens: Tensor | None = None

    @torch.no_grad()
    def update(self, x_TF: Tensor, where: Where) -> None:
        """Take the tokens of one sequence."""
        sequence, x_TF, mine = where.sequence, x_TF.detach().float(), self.clusters.get(where.sequence, {})
        cluster_T = torch.tensor([mine.get(p, -1) for p in where.rows(len(x_TF)).tolist()], device=x_TF.device)
        rest_T = cluster_T < 0
        if not len(x_TF):
            return
        for rotated, y_TF in ((False, x_TF), *([(True, self.turn(x_TF))] if self.turn is not None else [])):
            mag_TF = y_TF.abs()
            amax_T = mag_TF.amax(1)
            for spares, given_T in ((False, amax_T), (True, amax_T[rest_T])):
                if len(given_T):
                    self.of_sequence[rotated, spares, sequence] = given_T.amax()
                    _raise(self.amax, (rotated, spares), given_T.amax())
            if not rotated:
                for spares, given_TF in ((False, mag_TF), (True, mag_TF[rest_T])):
                    if len(given_TF):
                        _raise(self.channels, spares, given_TF.amax(0))
            if not self.counted or sequence in self.counted:
                self._count(mag_TF, rest_T, rotated, sequence)
        if self.n_clusters:
            one_CT = torch.arange(self.n_clusters, device=x_TF.device)[:, None] == cluster_T
            self._sum(one_CT.double() @ x_TF.double(), one_CT.sum(1))

    def _count(self, mag_TF: Tensor, rest_T: Tensor, rotated: bool, sequence: int) -> None:
        """Histograms of one sequence."""
        looks = [look for look in self.looks if look.rotated == rotated]
        if any(look.whole for look in looks):
            self.magnitudes[rotated, sequence] = _histogram(mag_TF[rest_T])
        for look in looks:
            if not look.whole:
                given = mag_TF[rest_T] if look.spares else mag_TF
                share = _of_block(given, look)
                _add(self.shares, look, _histogram(share if look.spares else share[rest_T]))

    def _sum(self, sums: Tensor, tokens: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def merge(self, other: Self) -> None:
        """Add what another one of the same options has seen."""
        for key, value in other.amax.items():
            _raise(self.amax, key, value)
        for spares, channels in other.channels.items():
            _raise(self.channels, spares, channels)
        for look, counts in other.shares.items():
            _add(self.shares, look, counts)
        self.of_sequence |= other.of_sequence
        self.magnitudes |= other.magnitudes
        if other.sums is not None and other.tokens is not None:
            self._sum(other.sums, other.tokens)

    def result(self) -> Self:
        """Itself: tensors that schemes are made of."""
        return self

    def template(self) -> Tensor | None:
        """(C, F) mean of each cluster; NaN of one that was not seen."""
        if self.sums is None or self.tokens is None:
            return None
        return (self.sums / torch.where(self.tokens > 0, self.tokens, torch.nan)[:, None]).float()

    def share_below(self, look: Look, limit: float) -> float:
        """Share of the entries below a limit; NaN where none is known.

        Args:
            limit: of |x| where the look is static, else of |x| over the greatest of its block.
        """
        if not look.whole:
            known = [(counts, limit) for counts in [self.shares.get(look)] if counts is not None]
        else:
            known = [(counts, limit if look.sharing == "static" else limit * float(
                         self.of_sequence[rotated, look.spares, sequence]))
                     for (rotated, sequence), counts in self.magnitudes.items()
                     if rotated == look.rotated and bool(counts.any())]  # fmt: skip
        n = sum(int(counts.sum()) for counts, _ in known)
        return sum(_below(counts, at) for counts, at in known) / n if n else float("nan")


def _raise(held: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    held[key] = value if key not in held else torch.maximum(held[key], value)


def _add(held: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    held[key] = value if key not in held else held[key] + value


def _histogram(mag: Tensor) -> Tensor:
    """Entries that are not 0 by size: (BINS,)."""
    return torch.bincount(mag[mag > 0].view(torch.int32) >> SHIFT, minlength=BINS)


def _below(counts: Tensor, limit: float) -> float:
    """Entries below a limit, interpolated inside a bin, which is an eighth of an octave wide."""
    if not limit > 0:
        return 0.0
    at = int(np.float32(limit).view(np.int32)) >> SHIFT
    low, high = (float(np.int32(b << SHIFT).view(np.float32)) for b in (at, at + 1))
    return float(counts[:at].sum()) + (limit - low) / (high - low) * float(counts[at])


def _of_block(mag_TF: Tensor, look: Look) -> Tensor:
    """|x| over the greatest of its block; 0 in a block of zeros."""
    block = blocks_of(look.sharing, tuple(mag_TF.shape), look.group)
    rows, columns = (n // b for n, b in zip(mag_TF.shape, block, strict=True))
    split = mag_TF.reshape(rows, block[0], columns, block[1])
    greatest = split.amax((1, 3), keepdim=True)
    return torch.where(greatest > 0, split / greatest, 0.0).reshape(mag_TF.shape)
