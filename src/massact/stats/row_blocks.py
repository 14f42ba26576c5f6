"""Row blocks of one sequence on a CPU, small enough to stay in cache, with the buffers that they share.

A fresh buffer per layer would double the cost of a reduction (page faults), so there is one set per thread,
which grows to the largest request and never per layer.

Shapes: T tokens, D dims, R rows of one block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_VALUES = 3 << 16  # measured with 2 MB of L2: smaller blocks pay more per call than they save in cache
MAX_ROWS = 1 << 14  # hits of one block are counted in int16
_BUFFERS = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU buffer; the next call of this thread with its name and dtype overwrites it."""
    buffers: dict[Any, Tensor] = _BUFFERS.__dict__
    key, n = (name, dtype), math.prod(shape)
    if key not in buffers or buffers[key].numel() < n:
        # Made inside inference mode, it could not be written outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(n, dtype=dtype)
    return buffers[key][:n].view(shape)


@dataclass(frozen=True)
class Block:
    """Some rows of a sequence; all but `x_RD` of a float32 input are buffers that the next block overwrites.

    Args:
        rows: which.
        x_RD, mag_RD: values and magnitudes, float32 and contiguous.
        spare_RD: float32, free to use.
        low_RD, high_RD: bool, free to use.
        x, mag, low, high: the same memory as NumPy arrays, whose comparisons are faster than torch's.
    """

    rows: slice
    x_RD: Tensor
    mag_RD: Tensor
    spare_RD: Tensor
    x: np.ndarray
    mag: np.ndarray
    low: np.ndarray
    high: np.ndarray


def block_rows(D: int) -> int:
    """Rows of a block of about BLOCK_VALUES values."""
    return max(1, min(MAX_ROWS, BLOCK_VALUES // max(1, D)))


def blocks_of(h_TD: Tensor) -> Iterator[Block]:
    """The blocks of a contiguous fp16, bf16 or fp32 tensor on the CPU, one after the other."""
    T, D = h_TD.shape
    rows = min(T, block_rows(D))
    mag, spare, copy = (scratch(name, (rows, D), torch.float32) for name in ("magnitude", "spare", "float32"))
    low, high = (scratch(name, (rows, D), torch.bool).numpy() for name in ("low", "high"))
    mag_np, copy_np = mag.numpy(), copy.numpy()
    as_it_is = h_TD.dtype == torch.float32
    for start in range(0, T, rows):
        r = min(rows, T - start)
        block_RD, mag_RD = h_TD[start : start + r], mag[:r]
        x_RD = block_RD if as_it_is else copy[:r].copy_(block_RD)
        torch.abs(x_RD, out=mag_RD)
        x = x_RD.numpy() if as_it_is else copy_np[:r]
        yield Block(slice(start, start + r), x_RD, mag_RD, spare[:r], x, mag_np[:r], low[:r], high[:r])
