"""One sequence of a hidden state, measured in one pass: in blocks on a CPU, whole on an accelerator.

`blocked_pass` is the fast one for finite fp16, bf16 and fp32 values on a CPU. `whole_pass` takes anything on
any device, without a branch on a value; on a CPU it computes in float64 and serves what the fast one
declines.

Shapes: T tokens, D dims, K top, R rows of one block, N values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from massact.stats import selection
from massact.stats.dims import (
    ColumnBlocks,
    Columns,
    columns_whole,
    compute_dtype,
    scaled,
    sum_dtype,
    with_tiny_dims,
)
from massact.stats.row_blocks import Block, blocks_of, scratch

# One number per sequence each, in the order of `Measured.scalars`.
SCALARS = (
    *("median", "mad", "mean", "std", "rms", "mean_abs", "max"),
    *("kurtosis", "osp_kurtosis", "n_nan", "n_inf"),
)
# Fourth powers stay finite and normal in float32 between these; outside, the float64 path measures.
_LEAST, _GREATEST = 1e-6, 1e8
# Below this ratio of variance to mean square, float32 values differ by their rounding only.
_CONSTANT = 1e-13


@dataclass(frozen=True)
class Ask:
    """What to measure.

    Args:
        top_k: how many of the greatest magnitudes to keep.
        hit: magnitude from which a value counts in its dim's hits.
        mad: also the median absolute deviation (a second pass).
    """

    top_k: int
    hit: float
    mad: bool


@dataclass
class Measured:
    """What one pass gives; tensors on the device of the input.

    Args:
        columns: sums per dim.
        scalars: (len(SCALARS),).
        top_value_K: signed values, descending in magnitude; min(k, T*D) of them or fewer.
        top_row_K, top_dim_K: their row and dim, -1 where there was no finite value.
        token_norm_T, token_max_T: per token, NaN where it has no finite value.
    """

    columns: Columns
    scalars: Tensor
    top_value_K: Tensor
    top_row_K: Tensor
    top_dim_K: Tensor
    token_norm_T: Tensor
    token_max_T: Tensor


def measured(h_TD: Tensor, ask: Ask, blocked: bool | None = None) -> Measured:
    """Measure one sequence by the path that fits it.

    Args:
        h_TD: (T, D), not empty.
        ask: what to measure.
        blocked: False forces the path of accelerators, None chooses.
    """
    on_cpu = h_TD.device.type == "cpu"
    if blocked is None and on_cpu:
        fast = blocked_pass(h_TD, ask) if h_TD.dtype != torch.float64 else None
        return whole_pass(h_TD, ask, exact=True) if fast is None else fast
    return whole_pass(h_TD, ask, exact=False)


# ------------------------------------------------------------------------------------------------- blocked
class _TokenSums:
    """Per token max|x|, sum x, sum x^2, sqrt sum x^4 (float32), and sum x^3 of all values."""

    def __init__(self, T: int) -> None:
        self.max_T, self.one_T, self.two_T, self.four_T = torch.empty(4, T)
        self.three = 0.0

    def add(self, block: Block) -> None:
        rows, square_RD = block.rows, torch.mul(block.x_RD, block.x_RD, out=block.spare_RD)
        torch.amax(block.mag_RD, 1, out=self.max_T[rows])
        torch.sum(block.x_RD, 1, out=self.one_T[rows])
        torch.sum(square_RD, 1, out=self.two_T[rows])
        torch.linalg.vector_norm(square_RD, dim=1, out=self.four_T[rows])
        self.three += torch.dot(square_RD.view(-1), block.x_RD.view(-1)).item()


def blocked_pass(h_TD: Tensor, ask: Ask) -> Measured | None:
    """Everything from row blocks in cache; None for values that are not finite or too great or small."""
    h_TD = h_TD.detach().contiguous()
    T, D = h_TD.shape
    sums, tokens = ColumnBlocks(T, D, ask.hit), _TokenSums(T)
    bracket = selection.MedianBracket(selection.strided_sample(h_TD, selection.sample_size(T * D)), T * D)
    for block in blocks_of(h_TD):
        sums.add(block)
        tokens.add(block)
        bracket.add(block.mag, block.low, block.high)
    top = tokens.max_T.max().item()
    if not (_LEAST <= top <= _GREATEST or top == 0):  # NaN and Inf land here too
        return None
    median = bracket.median()
    if median is None:
        median = _median_of_all(h_TD)
    columns = with_tiny_dims(sums.total(), h_TD)
    tiny_T = torch.nonzero((tokens.max_T < _LEAST) & (tokens.max_T > 0)).flatten()  # their powers leave float32
    mean, std, rms, kurtosis = _moments(h_TD, columns, tokens)
    scalars = {
        "median": median,
        "mad": _mad_blocked(h_TD, median) if ask.mad else math.nan,
        "mean": mean,
        "std": std,
        "rms": rms,
        "mean_abs": columns.abs_sum.sum().item() / (T * D),
        "max": top,
        "kurtosis": kurtosis,
        "osp_kurtosis": _osp_blocked(h_TD, tokens, tiny_T),
        "n_nan": 0.0,
        "n_inf": 0.0,
    }
    rows_K, dims_K = map(torch.from_numpy, selection.top_of_rows(h_TD, tokens.max_T.numpy(), ask.top_k))
    return Measured(
        columns=columns,
        scalars=torch.tensor([scalars[name] for name in SCALARS], dtype=torch.float64),
        top_value_K=h_TD[rows_K, dims_K],
        top_row_K=rows_K,
        top_dim_K=dims_K,
        token_norm_T=_norms(h_TD, tokens, tiny_T),
        token_max_T=tokens.max_T.clone(),  # a view would keep the other three sums alive
    )


def _moments(h_TD: Tensor, columns: Columns, tokens: _TokenSums) -> tuple[float, float, float, float]:
    """Mean, std, rms and Pearson kurtosis m4 / m2^2 of all values, from the sums of the pass.

    m2 joins the dims (no cancellation); m4 = S4 - 4 mean S3 + 6 mean^2 S2 - 3 mean^4 (S = mean of powers)
    loses digits only where the mean exceeds the std; then the powers are taken about the mean, in another
    pass and in float64.
    """
    n, D = h_TD.numel(), h_TD.shape[1]
    mean = columns.mean.sum().item() / D
    m2 = (columns.m2.sum().item() + len(h_TD) * (columns.mean - mean).square_().sum().item()) / n
    rms = math.sqrt(mean * mean + m2)
    if m2 <= _CONSTANT * rms * rms:
        return mean, math.sqrt(m2), rms, math.nan
    if mean * mean <= m2:
        s2 = tokens.two_T.sum(dtype=torch.float64).item() / n
        s4 = tokens.four_T.double().square_().sum().item() / n
        m4 = s4 - 4 * mean * tokens.three / n + 6 * mean**2 * s2 - 3 * mean**4
    else:
        m4 = 0.0
        for block in blocks_of(h_TD):
            m4 += block.x_RD.double().sub_(mean).square_().square_().sum().item() / n
    return mean, math.sqrt(m2), rms, m4 / m2**2


def _norms(h_TD: Tensor, tokens: _TokenSums, tiny_T: Tensor) -> Tensor:
    """L2 norm of each token; in float64 where its squares leave float32."""
    norm_T = tokens.two_T.sqrt()
    if len(tiny_T):
        norm_T = norm_T.double()
        norm_T[tiny_T] = torch.linalg.vector_norm(h_TD[tiny_T].double(), dim=1)
    return norm_T


def _osp_blocked(h_TD: Tensor, tokens: _TokenSums, tiny_T: Tensor) -> float:
    """Mean over tokens of relu(mean(x^4) / std(x)^4 - 3), from the sums of the pass."""
    D = h_TD.shape[1]
    one_T, two_T, four_T = (s.numpy().astype(np.float64) for s in (tokens.one_T, tokens.two_T, tokens.four_T))
    if len(tiny_T):
        x_RD, at_R = h_TD[tiny_T].double(), tiny_T.numpy()
        one_T[at_R], two_T[at_R] = x_RD.sum(1).numpy(), x_RD.square().sum(1).numpy()
        four_T[at_R] = torch.linalg.vector_norm(x_RD.square_(), dim=1).numpy()
    variance_T, square_T = two_T / D - (one_T / D) ** 2, two_T / D
    # Where the mean of a token dwarfs its std the difference has lost digits: these few again, in float64.
    lost_T = np.flatnonzero(variance_T < 0.02 * square_T)
    if len(lost_T):
        variance_T[lost_T] = h_TD[torch.from_numpy(lost_T)].double().var(1, correction=0).numpy()
    kept_T = variance_T > _CONSTANT * square_T
    if not kept_T.any():
        return math.nan
    return float(np.maximum(four_T[kept_T] ** 2 / D / variance_T[kept_T] ** 2 - 3, 0).mean())


def _median_of_all(h_TD: Tensor) -> float:
    """Lower median of |h| by partition of a whole copy, in a reused buffer."""
    mag_N = scratch("all magnitudes", (h_TD.numel(),), torch.float32)
    return selection.lower_median(mag_N.copy_(h_TD.view(-1)).abs_().numpy())


def _mad_blocked(h_TD: Tensor, median: float) -> float:
    """Lower median of | |h| - median |, differences rounded to float32."""
    sample_S = np.abs(selection.strided_sample(h_TD, selection.sample_size(h_TD.numel())) - np.float32(median))
    bracket = selection.MedianBracket(sample_S, h_TD.numel())
    for block in blocks_of(h_TD):
        block.mag_RD.sub_(median).abs_()
        bracket.add(block.mag, block.low, block.high)
    mad = bracket.median()
    if mad is None:
        mag_N = scratch("all magnitudes", (h_TD.numel(),), torch.float32).copy_(h_TD.view(-1))
        mad = selection.lower_median(mag_N.abs_().sub_(median).abs_().numpy())
    return mad


# --------------------------------------------------------------------------------------------------- whole
def whole_pass(h_TD: Tensor, ask: Ask, exact: bool) -> Measured:
    """Everything from the whole (T, D) at once, over its finite values, with no branch on a value.

    Args:
        h_TD: any float dtype, any device.
        ask: what to measure.
        exact: CPU only: compute in float64 and select by partition; else float32 (float64 for float64) with
            float64 sums, and histograms.
    """
    h_TD = h_TD.detach()
    T, D = h_TD.shape
    C = torch.float64 if exact else compute_dtype(h_TD)
    A = sum_dtype(h_TD.device)
    v_TD, finite_TD, scale = scaled(h_TD, C)
    columns = columns_whole(v_TD, finite_TD, scale, ask.hit)
    n_T = finite_TD.sum(1)
    n = n_T.sum()
    norm_T = torch.linalg.vector_norm(v_TD, dim=1, dtype=A)
    mean, std, rms, kurtosis, osp = _moments_whole(v_TD, finite_TD, n_T.to(A), norm_T)

    order_TD = torch.where(finite_TD, h_TD.abs(), -1)  # what is not finite sorts last
    max_T = order_TD.amax(1)
    top_row_K, top_dim_K = selection.top_of_rows_device(order_TD, max_T, ask.top_k)
    flat_K = top_row_K * D + top_dim_K
    top_value_K = h_TD.reshape(-1).index_select(0, flat_K)
    real_K = torch.isfinite(top_value_K)

    median = _median_whole(h_TD, finite_TD, n, exact)
    mad = torch.full_like(median, math.nan)
    if ask.mad:
        off_TD = h_TD.to(C).abs().sub_(median.to(C)).abs_()
        mad = _median_whole(torch.where(finite_TD, off_TD, math.inf), finite_TD, n, exact)

    s, none = scale.to(A), torch.full((), math.nan, dtype=A, device=h_TD.device)
    max_ = max_T.amax().to(A)
    scalars = {
        "median": median.to(A),
        "mad": mad.to(A),
        "mean": mean * s,
        "std": std * s,
        "rms": rms * s,
        "mean_abs": columns.abs_sum.sum() / n,
        "max": torch.where(n > 0, max_, none),
        "kurtosis": kurtosis,
        "osp_kurtosis": osp,
        "n_nan": torch.isnan(h_TD).sum().to(A),
        "n_inf": torch.isinf(h_TD).sum().to(A),
    }
    return Measured(
        columns=columns,
        scalars=torch.stack([scalars[name] for name in SCALARS]),
        top_value_K=torch.where(real_K, top_value_K, math.nan),
        top_row_K=torch.where(real_K, top_row_K, -1),
        top_dim_K=torch.where(real_K, top_dim_K, -1),
        token_norm_T=torch.where(n_T > 0, norm_T * s, none),
        token_max_T=torch.where(n_T > 0, max_T.to(A), none),
    )


def _moments_whole(v_TD: Tensor, finite_TD: Tensor, n_T: Tensor, norm_T: Tensor) -> tuple[Tensor, ...]:
    """Mean, std, rms, kurtosis and OSP's number of the finite v: two passes, so that nothing cancels.

    Powers of one token are taken of v over its norm: beside a great token they would leave float32.
    """
    A, C = n_T.dtype, v_TD.dtype
    n, safe_T = n_T.sum(), n_T.clamp(min=1)
    mean_T = v_TD.sum(1, dtype=A) / safe_T
    mean = (mean_T * n_T).sum() / n
    d_TD = (v_TD - mean.to(C)).mul_(finite_TD)
    square_TD = d_TD * d_TD
    off = mean - mean.to(C).to(A)  # what the rounding of the mean left in d
    s2, s3 = square_TD.sum(dtype=A) / n, d_TD.mul_(square_TD).sum(dtype=A) / n
    s4 = square_TD.square_().sum(dtype=A) / n
    m2 = s2 - off**2
    m4 = s4 - 4 * off * s3 + 6 * off**2 * s2 - 3 * off**4
    rms = (mean * mean + m2).sqrt()
    none = torch.full_like(m2, math.nan)
    kurtosis = torch.where(m2 > _CONSTANT * rms * rms, m4 / (m2 * m2), none)

    unit_T = torch.where(norm_T > 0, norm_T, 1.0).to(C).to(A)  # as it divides below
    off_TD = (v_TD - mean_T.to(C)[:, None]).mul_(finite_TD)
    variance_T = torch.linalg.vector_norm(off_TD, dim=1, dtype=A).square() / safe_T
    variance_T = (variance_T - (mean_T - mean_T.to(C).to(A)) ** 2) / unit_T.square()
    second_T = (norm_T / unit_T).square() / safe_T
    square_TD = (v_TD / unit_T.to(C)[:, None]).square_()
    fourth_T = torch.linalg.vector_norm(square_TD, dim=1, dtype=A).square() / safe_T
    kept_T = variance_T > _CONSTANT * second_T
    excess_T = torch.where(kept_T, fourth_T / (variance_T * variance_T) - 3, torch.zeros_like(second_T))
    osp = excess_T.clamp(min=0).sum() / kept_T.sum()  # 0 / 0 = NaN where no token varies
    return mean, m2.clamp(min=0).sqrt(), rms, kurtosis, osp


def _median_whole(x_TD: Tensor, finite_TD: Tensor, n: Tensor, exact: bool) -> Tensor:
    """Lower median of |x| over the finite values, 0-d."""
    if not exact:
        return selection.lower_median_device(x_TD, n)
    mag_N = x_TD[finite_TD].abs().double().numpy()
    return torch.tensor(selection.lower_median(mag_N), dtype=torch.float64)
