"""Mean, standard deviation, greatest and mean magnitude of every dim, streamed in float64.

Shapes: T tokens, D dims, R rows of one block, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.protocol import Where, check_2d, to_numpy
from massact.stats.scratch import scratch

BLOCK_VALUES = 3 << 15  # measured: a block and its three buffers stay in a 1 MB L2 and its neighbourhood
MAX_ROWS = 255  # a block's hits are counted in uint8


@dataclass
class Columns:
    """Per-dim sums of some tokens; `n` counts the finite values, the others are left out of the rest.

    Every field is (D,): n, mean, m2 (sum of squared deviations), abs_sum and max float64, hits int64. The maximum
    of no value is -1.
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


def block_rows(D: int) -> int:
    """Rows of a block of about BLOCK_VALUES values."""
    return max(1, min(MAX_ROWS, BLOCK_VALUES // max(1, D)))


def round_up(threshold: float) -> float:
    """The least float32 >= threshold: x >= threshold and x >= round_up(threshold) agree for every float32 x."""
    near = np.float32(threshold)
    return float(near if float(near) >= threshold else np.nextafter(near, np.float32(np.inf)))


class ColumnBlocks:
    """The `Columns` of one sequence on the CPU, from row blocks in L2.

    Each block is centred on the mean of a few of its own rows before it is squared, so neither a huge mean nor a
    drifting one costs digits; blocks are joined in float64.

    Args:
        T, D: shape of the sequence.
        hit: magnitude from which a value is a hit; None: do not count.
    """

    def __init__(self, T: int, D: int, hit: float | None) -> None:
        rows = block_rows(D)
        self.starts = list(range(0, T, rows))
        self.ends = [min(T, start + rows) for start in self.starts]
        self.sums_SND = scratch("column sums", (5, len(self.starts), D), torch.float32)
        self.hits_D = torch.zeros(D, dtype=torch.int64)
        self.hit = None if hit is None else round_up(hit)

    def add(self, block: int, x_RD: Tensor, mag_RD: Tensor) -> None:
        """Take block number `block`: its values and its magnitudes, float32."""
        shift_D, sum_D, square_D, abs_D, max_D = self.sums_SND[:, block]
        torch.mean(x_RD[:: max(1, len(x_RD) // 16)], 0, out=shift_D)
        d_RD = torch.sub(x_RD, shift_D, out=scratch("spare", x_RD.shape, torch.float32))
        torch.sum(d_RD, 0, out=sum_D)
        torch.sum(d_RD.mul_(d_RD), 0, out=square_D)
        torch.sum(mag_RD, 0, out=abs_D)
        torch.amax(mag_RD, 0, out=max_D)
        if self.hit is not None and not max_D.max().item() < self.hit:
            hit_RD = scratch("hits", mag_RD.shape, torch.bool).numpy()
            np.greater_equal(mag_RD.numpy(), self.hit, out=hit_RD)
            self.hits_D += torch.from_numpy(np.add.reduce(hit_RD.view(np.uint8), axis=0, dtype=np.uint8))

    def total(self) -> Columns:
        """The sums of the whole sequence, if all of its values were finite."""
        shift_ND, sum_ND, square_ND, abs_ND, max_ND = self.sums_SND
        n_N1 = torch.tensor(self.ends, dtype=torch.float64).sub_(torch.tensor(self.starts))[:, None]
        n, D = self.ends[-1], self.sums_SND.shape[2]
        # float64 from the first operation on: mean = shift + off, sum of squares about it = square - n off^2
        off_ND = sum_ND / n_N1
        mean_ND = off_ND + shift_ND
        mean_D = (mean_ND * n_N1).sum(0) / n
        m2_D = (square_ND - n_N1 * off_ND.square_()).clamp_(min=0).sum(0)
        m2_D += mean_ND.sub_(mean_D).square_().mul_(n_N1).sum(0)
        return Columns(
            n=torch.full((D,), float(n), dtype=torch.float64),
            mean=mean_D,
            m2=m2_D,
            abs_sum=abs_ND.sum(0, dtype=torch.float64),
            max=max_ND.amax(0).double(),
            hits=self.hits_D,
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
    m2_D = ((d_TD * d_TD).sum(0, dtype=A) - n_D * off_D * off_D).clamp(min=0)
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
        self.n_tokens += n_tokens
        if self.columns is None:
            self.columns = columns
        else:
            self.columns = self.columns.joined(columns.to(self.columns.n.device))

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
        return {"dim_n_tokens": np.int64(self.n_tokens)} | {f"dim_{k}": v for k, v in self.arrays().items()}

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
    """Mean, std, max and mean magnitude per dim, and nothing else: about a third of the cost of `HiddenStats`."""

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
        blocks = ColumnBlocks(*h_TD.shape, hit=None)
        for block, (start, end) in enumerate(zip(blocks.starts, blocks.ends, strict=True)):
            x_RD = as_float32(h_TD[start:end])
            blocks.add(block, x_RD, torch.abs(x_RD, out=scratch("magnitude", x_RD.shape, torch.float32)))
        columns = blocks.total()
        # A square overflows above 1.8e19; NaN and Inf fail the comparison too.
        if bool((columns.max < 1e18).all()):
            return columns
    v_TD, finite_TD, scale = scaled(h_TD, torch.float64 if h_TD.device.type == "cpu" else compute_dtype(h_TD))
    return columns_whole(v_TD, finite_TD, scale, hit=None)


def as_float32(x_RD: Tensor) -> Tensor:
    """A block as contiguous float32: itself, or a copy in the reused buffer."""
    if x_RD.dtype == torch.float32 and x_RD.is_contiguous():
        return x_RD
    return scratch("float32", x_RD.shape, torch.float32).copy_(x_RD)


def compute_dtype(h_TD: Tensor) -> torch.dtype:
    """What an accelerator computes in: float32, float64 only for float64."""
    return torch.float64 if h_TD.dtype == torch.float64 else torch.float32


def scaled(h_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(v, finite, scale) with h = scale * v where h is finite, v = 0 elsewhere, and |v| < 2.

    The scale is a power of two (the bits of max|h| without the mantissa), so the division is exact.
    """
    finite_TD = torch.isfinite(h_TD)
    x_TD = torch.where(finite_TD, h_TD, 0).to(dtype)
    top = x_TD.abs().amax().view(1)
    integer, exponent = (torch.int32, 0x7F800000) if dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    scale = (top.view(integer) & exponent).view(dtype)[0]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return x_TD.div_(scale), finite_TD, scale
