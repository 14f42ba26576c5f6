"""Sequences of a hidden state, measured in one pass: in blocks on a CPU, whole on an accelerator.

`blocked_pass` is the fast one for finite fp16, bf16 and fp32 values on a CPU: what is counted of tokens and dims is
counted of all of its sequences at once, since a small model spends its time in calls. `whole_pass` takes anything on
any device, one sequence, without a branch on a value; on a CPU it computes in float64 and serves what the fast one
declines.

Shapes: B sequences, T tokens, D dims, K top, R rows of one block, N values.
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
    """What one pass gives of one sequence; tensors on the device of the input.

    Args:
        scalars: (len(SCALARS),).
        top_value_K: signed values, descending in magnitude; min(k, T*D) of them or fewer.
        top_row_K, top_dim_K: their row and dim, -1 where there was no finite value.
        token_norm_T, token_max_T: per token, NaN where it has no finite value.
    """

    scalars: Tensor
    top_value_K: Tensor
    top_row_K: Tensor
    top_dim_K: Tensor
    token_norm_T: Tensor
    token_max_T: Tensor


Passed = tuple[Columns, list[Measured]]  # sums per dim of all sequences, and what was measured of each


def measured(h_BTD: Tensor, ask: Ask, blocked: bool | None = None) -> Passed | None:
    """Measure sequences together by the path that fits them; None where several have to be measured one by one.

    Args:
        h_BTD: (B, T, D), not empty.
        ask: what to measure.
        blocked: False forces the path of accelerators, None chooses.
    """
    on_cpu = h_BTD.device.type == "cpu"
    if blocked is None and on_cpu:
        fast = blocked_pass(h_BTD, ask) if h_BTD.dtype != torch.float64 else None
        return whole_pass(h_BTD[0], ask, exact=True) if fast is None and len(h_BTD) == 1 else fast
    return whole_pass(h_BTD[0], ask, exact=False) if len(h_BTD) == 1 else None


# ------------------------------------------------------------------------------------------------- blocked
class _TokenSums:
    """Per token max|x|, sum x, sum x^2, sqrt sum x^4 (float32)."""

    def __init__(self, T: int) -> None:
        self.max_T, self.one_T, self.two_T, self.four_T = torch.empty(4, T)

    def add(self, block: Block) -> None:
        """Take the next block; its squares are left in its spare buffer."""
        rows, square_RD = block.rows, torch.mul(block.x_RD, block.x_RD, out=block.spare_RD)
        torch.amax(block.mag_RD, 1, out=self.max_T[rows])
        torch.sum(block.x_RD, 1, out=self.one_T[rows])
        torch.sum(square_RD, 1, out=self.two_T[rows])
        torch.linalg.vector_norm(square_RD, dim=1, out=self.four_T[rows])


class _SequenceSums:
    """Of all values of one sequence: sum |x|, sum x^3, and the bracket of the median."""

    def __init__(self, h_TD: Tensor) -> None:
        self.one = self.three = 0.0
        self.bracket = selection.MedianBracket(selection.strided_sample(h_TD), h_TD.numel())

    def add(self, block: Block, rows: slice) -> None:
        """Take some rows of a block, which holds the squares in its spare buffer."""
        self.one += block.mag_RD[rows].sum().item()
        self.three += torch.dot(block.spare_RD[rows].view(-1), block.x_RD[rows].view(-1)).item()
        self.bracket.add(block.mag[rows], block.low[rows], block.high[rows])


def blocked_pass(h_BTD: Tensor, ask: Ask) -> Passed | None:
    """Everything from row blocks in cache; None for values that are not finite or too great or small."""
    h_BTD = h_BTD.detach().contiguous()
    B, T, D = h_BTD.shape
    h_ND = h_BTD.view(B * T, D)
    sums, tokens = ColumnBlocks(B * T, D, ask.hit), _TokenSums(B * T)
    each = [_SequenceSums(h_TD) for h_TD in h_BTD]
    for block in blocks_of(h_ND):
        sums.add(block)
        tokens.add(block)
        start, stop = block.rows.start, block.rows.stop
        for b in range(start // T, -(-stop // T)):
            each[b].add(block, slice(max(b * T, start) - start, min((b + 1) * T, stop) - start))
    max_BT = tokens.max_T.view(B, T).numpy()
    top_B = max_BT.max(1)
    if not ((_LEAST <= top_B) & (top_B <= _GREATEST) | (top_B == 0)).all():  # NaN and Inf land here too
        return None
    tiny_T = torch.nonzero((tokens.max_T < _LEAST) & (tokens.max_T > 0)).flatten()  # their powers leave float32
    moments = _moments(h_BTD, tokens, [of.three for of in each])
    norm_BT, osp_B = _norms(h_ND, tokens, tiny_T).view(B, T), _osp_blocked(h_ND, tokens, tiny_T, B)
    columns = with_tiny_dims(sums.total(), h_ND)
    found = []
    for b, h_TD in enumerate(h_BTD):
        median = each[b].bracket.median()
        median = _median_of_all(h_TD) if median is None else median
        mad = _mad_blocked(h_TD, median) if ask.mad else math.nan
        mean, std, rms, kurtosis = moments[b]
        scalars = (median, mad, mean, std, rms, each[b].one / (T * D), top_B[b], kurtosis, osp_B[b], 0.0, 0.0)
        rows_K, dims_K = map(torch.from_numpy, selection.top_of_rows(h_TD, max_BT[b], ask.top_k))
        found.append(
            Measured(
                scalars=torch.tensor(scalars, dtype=torch.float64),
                top_value_K=h_TD[rows_K, dims_K],
                top_row_K=rows_K,
                top_dim_K=dims_K,
                token_norm_T=norm_BT[b],
                token_max_T=tokens.max_T[b * T : (b + 1) * T].clone(),  # a view would keep the other sums alive
            )
        )
    return columns, found


def _moments(h_BTD: Tensor, tokens: _TokenSums, three_B: list[float]) -> list[tuple[float, float, float, float]]:
    """Mean, std, rms and Pearson kurtosis m4 / m2^2 of all values of each sequence, from the sums of the pass.

    m2 = S2 - mean^2 and m4 = S4 - 4 mean S3 + 6 mean^2 S2 - 3 mean^4 (S = mean of powers) lose digits only where the
    mean exceeds the std; then the powers are taken about the mean, in another pass and in float64.
    """
    B, n = len(h_BTD), h_BTD[0].numel()
    one_B, two_B, four_B = (
        (t.view(B, -1).double() ** power).sum(1).tolist()
        for t, power in ((tokens.one_T, 1), (tokens.two_T, 1), (tokens.four_T, 2))
    )
    found = []
    for h_TD, one, s2, s3, s4 in zip(h_BTD, one_B, two_B, three_B, four_B, strict=True):
        mean, s2, s3, s4 = one / n, s2 / n, s3 / n, s4 / n
        m2 = s2 - mean**2
        m4 = s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * mean**4
        if mean * mean > m2:
            mean, m2, m4 = _moments_about_the_mean(h_TD)
        rms = math.sqrt(mean * mean + m2)
        found.append((mean, math.sqrt(m2), rms, m4 / m2**2 if m2 > _CONSTANT * rms * rms else math.nan))
    return found


def _moments_about_the_mean(h_TD: Tensor) -> tuple[float, float, float]:
    """Mean, m2 and m4 of all values, in float64 block by block."""
    n = h_TD.numel()
    mean = sum(block.x_RD.sum(dtype=torch.float64).item() for block in blocks_of(h_TD)) / n
    off = m2 = m4 = 0.0
    for block in blocks_of(h_TD):
        d_RD = block.x_RD.double().sub_(mean)
        off += d_RD.sum().item() / n
        m2 += d_RD.square_().sum().item() / n
        m4 += d_RD.square_().sum().item() / n
    return mean + off, max(0.0, m2 - off**2), m4


def _norms(h_TD: Tensor, tokens: _TokenSums, tiny_T: Tensor) -> Tensor:
    """L2 norm of each token; in float64 where its squares leave float32."""
    norm_T = tokens.two_T.sqrt()
    if len(tiny_T):
        norm_T = norm_T.double()
        norm_T[tiny_T] = torch.linalg.vector_norm(h_TD[tiny_T].double(), dim=1)
    return norm_T


def _osp_blocked(h_TD: Tensor, tokens: _TokenSums, tiny_T: Tensor, B: int) -> list[float]:
    """Of each sequence, mean over its tokens of relu(mean(x^4) / std(x)^4 - 3), from the sums of the pass."""
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
    excess_T = np.maximum(four_T**2 / D / np.where(kept_T, variance_T, 1.0) ** 2 - 3, 0) * kept_T
    n_B, sum_B = kept_T.reshape(B, -1).sum(1), excess_T.reshape(B, -1).sum(1)
    return [float(total / n) if n else math.nan for total, n in zip(sum_B, n_B, strict=True)]


def _median_of_all(h_TD: Tensor) -> float:
    """Lower median of |h| by partition of a whole copy, in a reused buffer."""
    mag_N = scratch("all magnitudes", (h_TD.numel(),), torch.float32)
    return selection.lower_median(mag_N.copy_(h_TD.view(-1)).abs_().numpy())


def _mad_blocked(h_TD: Tensor, median: float) -> float:
    """Lower median of | |h| - median |, differences rounded to float32."""
    sample_S = selection.strided_sample(h_TD)
    sample_S = None if sample_S is None else np.abs(sample_S - np.float32(median))
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
def whole_pass(h_TD: Tensor, ask: Ask, exact: bool) -> Passed:
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
    made = Measured(
        scalars=torch.stack([scalars[name] for name in SCALARS]),
        top_value_K=torch.where(real_K, top_value_K, math.nan),
        top_row_K=torch.where(real_K, top_row_K, -1),
        top_dim_K=torch.where(real_K, top_dim_K, -1),
        token_norm_T=torch.where(n_T > 0, norm_T * s, none),
        token_max_T=torch.where(n_T > 0, max_T.to(A), none),
    )
    return columns, [made]


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
