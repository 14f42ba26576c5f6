"""Mean, standard deviation, greatest and mean magnitude of every dim, streamed in float64.

Shapes: T tokens, D dims, R rows of one block, N blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.protocol import Where, check_2d, to_numpy
from massact.stats.row_blocks import Block, block_rows, blocks_of, scratch

# Squares of deviations, a millionth of a value among them, are normal in float32 from here on.
_TINY = 1e-12
_JOIN_VALUES = 1 << 15  # float64 values of one step of the join: its few temporaries stay in L2


@dataclass
class Columns:
    """Per-dim sums of some tokens; `n` counts the finite values, the others are left out of the rest.

    Every field is (D,): n, mean, m2 (sum of squared deviations), abs_sum and max float64, hits int64. The
    maximum of no value is -1.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    abs_sum: Tensor
    max: Tensor
    hits: Tensor

    def joined(self, other: Columns) -> Columns:
        """Both together (Chan, Golub, LeVeque 1979): m2 = m2_a + m2_b + delta^2 n_a n_b / n."""
        if self.n.shape != other.n.shape:
            raise ValueError(f"one site has {len(self.n)} dims and {len(other.n)} dims")
        n = self.n + other.n
        share = other.n / n.clamp(min=1)
        delta = other.mean - self.mean
        return Columns(
            n=n,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * self.n * share,
            abs_sum=self.abs_sum + other.abs_sum,
            max=torch.maximum(self.max, other.max),
            hits=self.hits + other.hits,
        )

    def to(self, device: torch.device) -> Columns:
        """The same on another device."""
        return Columns(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def round_up(threshold: float) -> float:
    """The least float32 >= threshold; every float32 compares alike with both."""
    near = np.float32(threshold)
    return float(near if float(near) >= threshold else np.nextafter(near, np.float32(np.inf)))


class ColumnBlocks:
    """The `Columns` of one sequence on the CPU, from row blocks in L2.

    Each block is centred on the mean of a few of its own rows before it is squared, so neither a huge mean
    nor a drifting one costs digits; blocks are joined in float64.

    Args:
        T, D: shape of the sequence.
        hit: magnitude from which a value is a hit; None: do not count.
    """

    def __init__(self, T: int, D: int, hit: float | None = None) -> None:
        rows = min(T, block_rows(D))
        self.sizes: list[int] = []
        self.sums_SND = scratch("column sums", (5, -(-T // rows), D), torch.float32)
        self.hits_D = torch.zeros(D, dtype=torch.int64)
        self.hit = None if hit is None else np.float32(round_up(hit))

    def add(self, block: Block) -> None:
        """Take the next block."""
        shift_D, sum_D, square_D, abs_D, max_D = self.sums_SND[:, len(self.sizes)]
        self.sizes.append(len(block.x))
        few_RD = block.x[:: max(1, len(block.x) // 16)]
        np.multiply(np.add.reduce(few_RD, axis=0), np.float32(1 / len(few_RD)), out=shift_D.numpy())
        d_RD = torch.sub(block.x_RD, shift_D, out=block.spare_RD)
        torch.sum(d_RD, 0, out=sum_D)
        torch.sum(d_RD.mul_(d_RD), 0, out=square_D)
        torch.sum(block.mag_RD, 0, out=abs_D)
        torch.amax(block.mag_RD, 0, out=max_D)
        if self.hit is not None and not max_D.max().item() < self.hit:
            hit_RD = np.greater_equal(block.mag, self.hit, out=block.low).view(np.uint8)
            self.hits_D += torch.from_numpy(np.add.reduce(hit_RD, axis=0, dtype=np.int16))

    def total(self) -> Columns:
        """The sums of the whole sequence, if all of its values were finite."""
        D = self.sums_SND.shape[2]
        several = max(1, _JOIN_VALUES // D)
        parts_SND = self.sums_SND.split(several, dim=1)
        sizes_N = torch.tensor(self.sizes, dtype=torch.float64).split(several)
        columns = functools.reduce(Columns.joined, map(_joined_blocks, parts_SND, sizes_N))
        columns.hits = self.hits_D
        return columns


def _joined_blocks(sums_SND: Tensor, n_N: Tensor) -> Columns:
    """Blocks of n_N rows as one: mean_b = shift + off, m2_b = square - n off^2, in float64."""
    shift_ND, sum_ND, square_ND, abs_ND, max_ND = sums_SND
    n, n_N1 = n_N.sum(), n_N[:, None]
    off_ND = sum_ND / n_N1
    mean_ND = off_ND + shift_ND
    m2_D = off_ND.square_().mul_(n_N1).neg_().add_(square_ND).clamp_(min=0).sum(0)
    mean_D = (mean_ND * n_N1).sum(0) / n
    m2_D += mean_ND.sub_(mean_D).square_().mul_(n_N1).sum(0)
    return Columns(
        n=n.expand(len(mean_D)).clone(),
        mean=mean_D,
        m2=m2_D,
        abs_sum=abs_ND.sum(0, dtype=torch.float64),
        max=max_ND.amax(0).double(),
        hits=torch.zeros(len(mean_D), dtype=torch.int64),
    )


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def columns_whole(v_TD: Tensor, finite_TD: Tensor, scale: Tensor, hit: float | None) -> Columns:
    """The `Columns` of scale * v in one block, on any device, with no branch on a value.

    Args:
        v_TD: values, zero where not finite; scaled by a power of two, so that no square overflows.
        finite_TD: which values count.
        scale: 0-d.
    """
    A = sum_dtype(v_TD.device)
    n_D = finite_TD.sum(0).to(A)
    safe_D = n_D.clamp(min=1)
    first_D = v_TD.sum(0, dtype=A) / safe_D
    d_TD = (v_TD - first_D.to(v_TD.dtype)).mul_(finite_TD)
    off_D = d_TD.sum(0, dtype=A) / safe_D
    square_D = torch.linalg.vector_norm(d_TD, dim=0, dtype=A).square()  # float32 squares of tiny values would be 0
    m2_D = (square_D - n_D * off_D * off_D).clamp(min=0)
    mag_TD, s = v_TD.abs(), scale.to(A)
    hits_D = torch.zeros_like(n_D, dtype=torch.int64)
    if hit is not None:
        limit = hit if v_TD.dtype == torch.float64 else round_up(hit)
        hits_D = ((mag_TD * scale >= limit) & finite_TD).sum(0)
    return Columns(
        n=n_D,
        # the block's own mean as it was subtracted, plus what was left over
        mean=torch.where(n_D > 0, (first_D.to(v_TD.dtype).to(A) + off_D) * s, 0.0),
        m2=m2_D * s * s,
        abs_sum=mag_TD.sum(0, dtype=A) * s,
        max=torch.where(n_D > 0, mag_TD.amax(0).to(A) * s, -1.0),
        hits=hits_D,
    )


@dataclass(frozen=True)
class DimResult:
    """Per dim over all tokens seen; (D,) float64. NaN where a dim had no finite value.

    Args:
        n_tokens: tokens seen.
        n: finite values of each dim, (D,) int64.
        max, mean_abs, mean, std: of the finite values; std is the population's.
    """

    n_tokens: int
    n: np.ndarray
    max: np.ndarray
    mean_abs: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class DimTotals:
    """Running `Columns` of a site: the per-dim half of a statistic."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.columns: Columns | None = None

    def add(self, columns: Columns, n_tokens: int) -> None:
        """Join the sums of one sequence, or of another statistic."""
        if self.columns is None:
            self.columns = columns
        else:
            # towards the new sums: loaded ones come from the CPU, and nothing may go back there in a hook
            self.columns = self.columns.to(columns.n.device).joined(columns)
        self.n_tokens += n_tokens

    def merge(self, other: DimTotals) -> None:
        """Join all that another one has seen."""
        if other.columns is not None:
            self.add(other.columns, other.n_tokens)

    def result(self) -> DimResult:
        """Mean, std, greatest and mean magnitude; empty if nothing was seen."""
        c = self.arrays()
        n = np.where(c["n"] > 0, c["n"], np.nan)
        return DimResult(
            n_tokens=self.n_tokens,
            n=c["n"].astype(np.int64),
            max=np.where(c["n"] > 0, c["max"], np.nan),
            mean_abs=c["abs_sum"] / n,
            mean=np.where(c["n"] > 0, c["mean"], np.nan),
            std=np.sqrt(c["m2"] / n),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums as arrays; (0,) each if nothing was seen."""
        if self.columns is None:
            return {f.name: np.zeros(0) for f in fields(Columns)}
        return {f.name: to_numpy(getattr(self.columns, f.name)) for f in fields(Columns)}

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        return {"dim_n_tokens": np.array(self.n_tokens, np.int64)} | {f"dim_{k}": v for k, v in self.arrays().items()}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The totals that `state()` came from."""
        self = cls()
        self.n_tokens = int(state["dim_n_tokens"])
        if len(state["dim_n"]):
            tensors = {f.name: torch.from_numpy(np.array(state[f"dim_{f.name}"])) for f in fields(Columns)}
            self.columns = Columns(**tensors | {"hits": tensors["hits"].long()})
        return self


class DimMoments:
    """Mean, std, max and mean magnitude per dim, and nothing else; a third of the cost of `HiddenStats`."""

    def __init__(self) -> None:
        self.totals = DimTotals()

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take one sequence (T, D)."""
        check_2d(h_TD)
        if h_TD.numel():
            self.totals.add(columns_of(h_TD.detach()), len(h_TD))

    def merge(self, other: DimMoments) -> None:
        """Add what another one has seen."""
        self.totals.merge(other.totals)

    def result(self) -> DimResult:
        """The statistics of every dim."""
        return self.totals.result()

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        return self.totals.state()

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls()
        self.totals = DimTotals.from_state(state)
        return self


def columns_of(h_TD: Tensor) -> Columns:
    """The `Columns` of one sequence on any device, without hits."""
    if h_TD.device.type == "cpu" and h_TD.dtype != torch.float64:
        sums = ColumnBlocks(*h_TD.shape)
        for block in blocks_of(h_TD.contiguous()):
            sums.add(block)
        columns = sums.total()
        # A square overflows above 1.8e19; NaN and Inf fail the comparison too.
        if bool((columns.max < 1e18).all()):
            return with_tiny_dims(columns, h_TD)
    v_TD, finite_TD, scale = scaled(h_TD, torch.float64 if h_TD.device.type == "cpu" else compute_dtype(h_TD))
    return columns_whole(v_TD, finite_TD, scale, hit=None)


def with_tiny_dims(columns: Columns, h_TD: Tensor) -> Columns:
    """The same, with mean and m2 in float64 for dims so small that squares in float32 lose digits, or are 0."""
    tiny_D = (columns.max < _TINY) & (columns.max > 0)
    if bool(tiny_D.any()):
        x_TD = h_TD[:, tiny_D].double()
        columns.mean[tiny_D] = x_TD.mean(0)
        columns.m2[tiny_D] = x_TD.var(0, correction=0) * len(x_TD)
    return columns


def compute_dtype(h_TD: Tensor) -> torch.dtype:
    """What an accelerator computes in: float32, float64 only for float64."""
    return torch.float64 if h_TD.dtype == torch.float64 else torch.float32


def scaled(h_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(v, finite, scale) with h = scale * v where h is finite, v = 0 elsewhere, and |v| < 2^31.

    The scale is a power of two (the bits of max|h| without the mantissa), so the division is exact. It is 1 between 1
    and 2^30, whose fourth powers are finite, so that no value beside them is lost.
    """
    finite_TD = torch.isfinite(h_TD)
    x_TD = torch.where(finite_TD, h_TD, 0).to(dtype)
    top = x_TD.abs().amax().view(1)
    integer, exponent = (torch.int32, 0x7F800000) if dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    scale = (top.view(integer) & exponent).view(dtype)[0]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = torch.where(scale > 1, (scale * 2.0**-30).clamp(min=1), scale)
    return x_TD.div_(scale), finite_TD, scale
