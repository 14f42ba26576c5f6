"""Exact order statistics of magnitudes: the k greatest, and the lower median.

Shapes: N values, K top, T tokens, D dims, S sample, C chunk.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 18  # values; up to here a partition of all is cheaper than sampling and bracketing
_TIES = 64  # every so many-th value tells whether many are zero
_CHUNK = 1 << 22  # values per histogram update on an accelerator: their int64 index takes 32 MB
_LANES = 8  # copies of the histogram, so that equal values do not all wait for one counter
_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEVELS = {2: (0,), 4: (16, 0), 8: (48, 32, 16, 0)}


# ------------------------------------------------------------------------------------------------ top k
def top_k_stable(v_N: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k greatest values, descending; equal values in order of their index. No NaN."""
    n = len(v_N)
    if k >= n:
        return np.argsort(-v_N, kind="stable")
    kth = np.partition(v_N, n - k)[n - k]
    greater = np.flatnonzero(v_N > kth)
    index = np.concatenate([greater, np.flatnonzero(v_N == kth)[: k - len(greater)]])
    return index[np.argsort(-v_N[index], kind="stable")]


def rank_stable(v_N: np.ndarray, rank: int) -> int:
    """Index of the element at a 0-based rank of the descending order; ties in order of their index."""
    at = len(v_N) - 1 - rank
    value = np.partition(v_N, at)[at]
    return int(np.flatnonzero(v_N == value)[rank - np.count_nonzero(v_N > value)])


def top_of_rows(h_TD: Tensor, row_max_T: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, dims) of the k greatest |h|, descending, ties by flat index, on the CPU.

    If an element is among the k greatest, its row's maximum is among the k greatest row maxima (else k other
    rows each hold a greater element). So only k rows are searched, and they are contiguous.
    """
    D = h_TD.shape[1]
    rows_K = np.sort(top_k_stable(row_max_T, k))  # sorted, so that flat order is kept
    near_N = h_TD[torch.from_numpy(rows_K)].abs().to(_searchable(h_TD)).numpy().reshape(-1)
    # The least of these row maxima bounds the k-th greatest from below, and few elements reach it.
    few = np.flatnonzero(near_N >= row_max_T[rows_K].min()) if len(rows_K) == k else np.arange(len(near_N))
    best_K = few[top_k_stable(near_N[few], k)]
    return rows_K[best_K // D], best_K % D


def _searchable(h_TD: Tensor) -> torch.dtype:
    return torch.float64 if h_TD.dtype == torch.float64 else torch.float32


def top_of_rows_device(mag_TD: Tensor, row_max_T: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same without a synchronisation: min(k, T*D) rows and dims; ties agree, as both sort stably."""
    T, D = mag_TD.shape
    order_T = torch.sort(row_max_T, descending=True, stable=True).indices
    rows_K = torch.sort(order_T[: min(k, T)]).values
    near_N = mag_TD.index_select(0, rows_K).flatten()
    best_K = torch.sort(near_N, descending=True, stable=True).indices[:k]
    return rows_K.index_select(0, best_K // D), best_K % D


# --------------------------------------------------------------------------------------- median, on the CPU
def strided_sample(h_TD: Tensor) -> np.ndarray | None:
    """Some magnitudes, float32 (S,), at a stride that visits every dim evenly; None of few. h is contiguous.

    So many that the cost of a sample (~ S) is balanced with that of what its bracket lets through (~ n / sqrt S).
    """
    n, D = h_TD.numel(), h_TD.shape[1]
    if n <= SMALL:
        return None
    size = int(1.5 * n ** (2 / 3))
    step = max(1, n // max(1, size))
    while math.gcd(step, D) != 1:
        step += 1
    strided_S = h_TD.view(-1)[::step]
    return np.abs(strided_S.numpy() if h_TD.dtype == torch.float32 else strided_S.float().numpy())


class MedianBracket:
    """The exact lower median of a stream of blocks, without keeping the stream.

    A sample gives lo <= hi that hold the median most probably (3 standard errors of its rank). Every block
    then counts what lies below lo and keeps what lies in [lo, hi] (about 1 %), and the median is selected
    among those. When the bracket misses (the sample was not representative), `median()` is None and the
    caller must select among all values: the answer is exact either way.

    Args:
        sample_S: some of the magnitudes; None: every value is kept, which is cheaper for a few.
        n: number of values in the stream.
    """

    def __init__(self, sample_S: np.ndarray | None, n: int) -> None:
        self.rank = (n - 1) // 2
        self.n_low = self.n_between = 0
        self.between: list[np.ndarray] = []
        self.lo, self.hi = np.float32(0), np.float32(np.inf)
        self.whole = sample_S is None
        if sample_S is None:
            return
        m = len(sample_S)
        margin = int(1.5 * math.sqrt(m)) + 1 if m < n else 1
        sample_S.sort()  # much faster than a partition at two ranks, or a selection, where many values are equal
        self.lo, self.hi = sample_S[max(0, m // 2 - margin)], sample_S[min(m - 1, m // 2 + margin)]

    def add(self, mag: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Take one block of float32 magnitudes; `low` and `high` are bool buffers of its shape."""
        if self.whole:
            self.n_between += mag.size
            self.between.append(mag.reshape(-1).copy())
            return
        np.less(mag, self.lo, out=low)
        np.less_equal(mag, self.hi, out=high)
        self.n_low += int(np.count_nonzero(low))
        if self.lo == self.hi:  # nothing but ties: no need to keep them
            self.n_between += int(np.count_nonzero(np.not_equal(low, high, out=high)))
            return
        inside = mag.reshape(-1).compress(np.not_equal(low, high, out=high).reshape(-1))
        self.n_between += len(inside)
        self.between.append(inside)

    def median(self) -> float | None:
        """The value of rank (n - 1) // 2 of the stream, or None if the bracket missed it."""
        index = self.rank - self.n_low
        if not 0 <= index < self.n_between:
            return None
        if self.lo == self.hi:
            return float(self.lo)
        inside = np.concatenate(self.between) if len(self.between) > 1 else self.between[0]
        if self.whole and np.count_nonzero(inside[::_TIES] == 0) * _TIES < 0.1 * len(inside):
            inside.partition(index)
            return float(inside[index])
        above = inside[inside > self.lo]  # half zeros, for instance: a partition is slow among ties
        index -= len(inside) - len(above)
        if index < 0:
            return float(self.lo)
        above.partition(index)
        return float(above[index])


def lower_median(mag_N: np.ndarray) -> float:
    """The value of rank (N - 1) // 2; reorders its input. NaN if there is none."""
    if not len(mag_N):
        return math.nan
    rank = (len(mag_N) - 1) // 2
    mag_N.partition(rank)
    return float(mag_N[rank])


# --------------------------------------------------------------------------------- median, on an accelerator
def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of x without the sign: integers of its width that order like |x|, with Inf and NaN last."""
    dtype = _INT[x.element_size()]
    return x.contiguous().view(dtype) & torch.iinfo(dtype).max


def lower_median_device(x: Tensor, n_valid: Tensor) -> Tensor:
    """Exact lower median of the n_valid smallest |x|, 0-d and of the dtype of x, with no synchronisation.

    Histograms of 16 bits of the magnitude at a time, from the top: the bin that holds the rank gives the
    next 16 bits. One level for 16-bit types, two for fp32, four for fp64.

    Args:
        x: any shape; what must not count (NaN, Inf) has to be Inf or NaN.
        n_valid: 0-d int64, number of finite values; the result is NaN where it is 0.
    """
    bits_N = magnitude_bits(x).flatten()
    rank = ((n_valid - 1) // 2).clamp(min=0).view(1)
    prefix = torch.zeros(1, dtype=torch.int64, device=x.device)
    for shift in _LEVELS[x.element_size()]:
        count_B = _histogram(bits_N, prefix, shift).cumsum(0)
        bin_ = (count_B <= rank).sum(dtype=torch.int64).view(1)
        before = torch.where(bin_ > 0, count_B.gather(0, (bin_ - 1).clamp(min=0)), torch.zeros_like(rank))
        rank, prefix = rank - before, (prefix << 16) | bin_
    value = prefix.to(bits_N.dtype).view(x.dtype)[0]
    return torch.where(n_valid > 0, value, torch.full_like(value, math.nan))


def _histogram(bits_N: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """Counts (65536,) of the 16 bits at `shift`, of the values whose bits above them equal `prefix` (1,)."""
    count_N = torch.zeros(_LANES << 16, dtype=torch.int64, device=bits_N.device)
    lane_C = torch.arange(min(len(bits_N), _CHUNK), device=bits_N.device) % _LANES
    top_level = shift == max(_LEVELS[bits_N.element_size()])
    for chunk_C in bits_N.split(_CHUNK):
        key_C = chunk_C.to(torch.int64) >> shift
        # Values of other bins add 0, spread over all counters, instead of piling up on one.
        one_C = torch.ones_like(key_C) if top_level else (key_C >> 16 == prefix).to(torch.int64)
        # In one dimension: torch's deterministic mode refuses a scatter in two.
        count_N.scatter_add_(0, (key_C & 0xFFFF) * _LANES + lane_C[: len(key_C)], one_C)
    return count_N.view(-1, _LANES).sum(1)
