"""Where the rows of attention in windows stand in their sequence: found by rows that are equal bit for bit.

Shapes: B sequences, T tokens, W windows of a sequence, P positions of a window, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Windows = tuple[tuple[int, ...], ...]  # (W, P)


def windows_from(
    tokens_BTD: Tensor | None, inputs: Iterable[Tensor], shape: tuple[int, int, int, int], B: int
) -> Windows | None:
    """The windows of a call whose queries and keys are made of the tokens of a sequence, each of them once.

    What a projection in front of the call reads are the same rows in the order of windows: every one of them must be
    that of exactly one token, bit for bit, with the same order in every sequence.

    Args:
        tokens_BTD: what the sublayer reads, in the order of the sequence.
        inputs: what projections before the call have read.
        shape: of the call, (rows, heads, queries, keys).
        B: sequences.

    Returns:
        None where that is not so: windows that overlap or are padded, tokens that are alike, other keys than queries.
    """
    n_rows, _, P, S = shape
    if tokens_BTD is None or tokens_BTD.ndim != 3 or len(tokens_BTD) != B or P != S or n_rows % B:
        return None
    if n_rows * P != B * tokens_BTD.shape[1]:
        return None
    orders = (order_of(tokens_BTD, x) for x in inputs if x.shape[-1] == tokens_BTD.shape[-1])
    order = next((found for found in orders if found is not None), None)
    return None if order is None else tuple(order[i : i + P] for i in range(0, len(order), P))


def order_of(tokens_BTD: Tensor, rows: Tensor) -> tuple[int, ...] | None:
    """Which token each of some rows is, the same in every sequence; None where the rows are not the tokens."""
    B, T, D = tokens_BTD.shape
    if rows.numel() != tokens_BTD.numel() or rows.shape[-1] != D:
        return None
    found = {_order(mine, other) for mine, other in zip(tokens_BTD, rows.reshape(B, T, D), strict=True)}
    return found.pop() if len(found) == 1 else None


def _order(tokens_TD: Tensor, rows_TD: Tensor) -> tuple[int, ...] | None:
    at = {row: t for t, row in enumerate(_bits(tokens_TD))}
    found = [at.get(row, -1) for row in _bits(rows_TD)]
    return tuple(found) if len(at) == len(tokens_TD) and sorted(found) == list(range(len(tokens_TD))) else None


def _bits(x_TD: Tensor) -> list[bytes]:
    return [row.tobytes() for row in x_TD.detach().cpu().contiguous().view(torch.uint8).numpy()]
