#!/usr/bin/env python
"""What one hidden state costs: ns per value of HiddenStats and its parts, beside plain torch.

    python benchmarks/reductions.py                       # one thread, all sizes
    python benchmarks/reductions.py --size 1024x768 --dtype bfloat16 --repeats 50

Every cell is the least time over the repeats: CPU time of the thread, or wall time with several. The rows
of a column take turns in one process, on tensors that alternate (a branch predictor learns a single one by
heart) and that were just read (a hook sees what its block just wrote). `x` is the ratio to `HiddenStats`.

Shapes: T tokens, D dims.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from massact.stats import DimMoments, HiddenStats, Ranks, TokenMax, Where, passes, selection
from massact.stats.dims import ColumnBlocks
from massact.stats.row_blocks import blocks_of

SIZES = ("1024x768", "2048x768", "4096x4096")
DTYPES = ("float32", "bfloat16")
SLOW = 8  # the peers are run this many times less often


def hidden_state(T: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Gaussian tokens with massive activations at the start token and wide dims, (T, D)."""
    generator = torch.Generator().manual_seed(seed)
    h_TD = torch.randn(T, D, generator=generator) * (0.5 + torch.rand(D, generator=generator))
    h_TD[:, D // 3] *= 10
    h_TD[0, D // 2], h_TD[0, D // 5] = 1500.0, -900.0
    return h_TD.to(dtype)


def updated(make: Callable[[], object]) -> Callable[[Tensor], object]:
    """One update of a new statistic."""
    return lambda h_TD: make().update(h_TD, Where(0))  # type: ignore[attr-defined]


def only_median(h_TD: Tensor) -> float | None:
    """The bracketed median and the blocks that it reads."""
    n = h_TD.numel()
    bracket = selection.MedianBracket(selection.strided_sample(h_TD), n)
    for block in blocks_of(h_TD):
        bracket.add(block.mag, block.low, block.high)
    return bracket.median()


def only_blocks(h_TD: Tensor) -> None:
    """The conversion to float32 and the magnitudes, which all parts share."""
    for _ in blocks_of(h_TD):
        pass


def only_columns(h_TD: Tensor) -> object:
    """Mean, variance, maximum, mean magnitude and hits per dim."""
    sums = ColumnBlocks(*h_TD.shape, hit=6.0)
    for block in blocks_of(h_TD):
        sums.add(block)
    return sums.total()


def only_tokens(h_TD: Tensor) -> object:
    """Norm, maximum and moments per token."""
    tokens = passes._TokenSums(len(h_TD))
    for block in blocks_of(h_TD):
        tokens.add(block)
    return tokens


def torch_topk_median(h_TD: Tensor) -> object:
    """What a user writes: top 16 and median of |h|, and nothing else."""
    mag = h_TD.abs().flatten()
    return mag.topk(16), mag.median()


def sort_float64(h_TD: Tensor) -> object:
    """The published code of the paper: a float64 copy, sorted whole, and its median."""
    mag = h_TD.double().abs().flatten()
    return mag.sort(descending=True), mag.median()


ROWS: dict[str, Callable[[Tensor], object]] = {
    "HiddenStats": updated(HiddenStats),
    "  of which blocks (copy, |h|)": only_blocks,
    "  blocks + median": only_median,
    "  blocks + dims": only_columns,
    "  blocks + tokens": only_tokens,
    "HiddenStats(mad=True)": updated(lambda: HiddenStats(mad=True)),
    "DimMoments": updated(DimMoments),
    "TokenMax": updated(TokenMax),
}
PEERS: dict[str, Callable[[Tensor], object]] = {
    "HiddenStats, accelerator path": updated(lambda: HiddenStats(blocked=False)),
    "Ranks": updated(Ranks),
    "torch: |h|, topk, median": torch_topk_median,
    "paper: float64 full sort": sort_float64,
}


def ns_per_value(size: str, dtype: str, repeats: int) -> dict[str, float]:
    """Least ns per value of every row, the rows taking turns."""
    T, D = map(int, size.split("x"))
    inputs = [hidden_state(T, D, getattr(torch, dtype), seed) for seed in range(3)]
    # One thread: its own CPU time, which a busy machine disturbs least.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, float] = {}
    for repeat in range(repeats):
        rows = ROWS if repeat % SLOW else ROWS | PEERS
        for name, reduce in rows.items():
            h_TD = inputs[repeat % len(inputs)]
            h_TD.sum()
            start = clock()
            reduce(h_TD)
            seconds = clock() - start
            best[name] = min(best.get(name, float("inf")), seconds * 1e9 / h_TD.numel())
    return best


def main() -> None:
    """Print one table: a row per reduction, a column per size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=SIZES)
    parser.add_argument("--dtype", nargs="+", default=DTYPES)
    parser.add_argument("--repeats", type=int, default=0, help="0: about as many as fit in ten seconds a column")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.size:
        T, D = map(int, size.split("x"))
        repeats = args.repeats or max(3, min(64, 10**8 // (T * D)))
        table = {dtype: ns_per_value(size, dtype, repeats) for dtype in args.dtype}
        print(f"\n{size}, {args.threads} thread(s), ns per value (x HiddenStats), least of {repeats}")
        print(f"{'':32s}" + "".join(f"{dtype:>18s}" for dtype in table))
        for name in ROWS | PEERS:
            cells = (f"{ns[name]:9.2f} ({ns[name] / ns['HiddenStats']:5.1f})" for ns in table.values())
            print(f"{name:32s}" + "".join(f"{cell:>18s}" for cell in cells))


if __name__ == "__main__":
    main()
