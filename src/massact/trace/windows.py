"""Attention calls whose rows are windows of a sequence, seen as one call of the whole sequence, and back.

Shapes: B sequences, W windows of each, P positions of a window, T = W P positions of a sequence, H and K heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from massact.corpora import Batch
from massact.records.anatomy import AttentionPlace
from massact.trace.attention import AttentionCall

Windows = Sequence[Sequence[int]]  # (W, P): of each window, where its rows stand in the sequence


def windows_of(call: AttentionCall, place: AttentionPlace, batch: Batch) -> Windows:
    """Where the rows of a call stand in their sequence: of windows as they were proved, of several images one behind
    the other; () for a call with one row for each sequence, and for one that was cut otherwise than when it was proved.
    """
    rows, _, P, S = call.shape
    if place.windows:
        W = len(place.windows)
        return place.windows if rows % W == 0 and P == S == len(place.windows[0]) else ()
    if len(batch.sequences) == 1 < batch.pieces == rows and S == P:
        return tuple(tuple(range(i * P, (i + 1) * P)) for i in range(rows))
    return ()


def joined(h: Tensor, batch: Batch) -> Tensor:
    """A hidden state with one row for each sequence, where a tower has a row for each of several images."""
    several = h.ndim == 3 and len(batch.sequences) == 1 < batch.pieces == len(h)
    return h.reshape(1, -1, h.shape[-1]) if several else h


def whole(call: AttentionCall, windows: Windows) -> AttentionCall:
    """The same call with one row for each sequence: keys outside a query's own window are hidden by the mask.

    Rows move, no number changes. The mask, and scores where these were seen, are (T, T) then.

    Args:
        windows: every position of the sequence once.
    """
    order_WP = torch.as_tensor(windows)
    W, P = order_WP.shape
    at_T = order_WP.flatten().argsort()

    def joined(x: Tensor | None) -> Tensor | None:
        """(B W, H, P, ...) -> (B, H, T, ...)."""
        if x is None:
            return None
        x = x.unflatten(0, (-1, W)).transpose(1, 2).flatten(2, 3)
        return x.index_select(2, at_T.to(x.device))

    def spread(x: Tensor) -> Tensor:
        """(B W, H or 1, P, P) -> (B, H or 1, T, T), -inf between windows."""
        x_BHWPP = x.unflatten(0, (-1, W)).transpose(1, 2)
        full = x.new_full((*x_BHWPP.shape[:3], P, W, P), -torch.inf)
        each = torch.arange(W, device=x.device)
        full[:, :, each, :, each] = x_BHWPP.permute(2, 0, 1, 3, 4)
        at = at_T.to(x.device)
        return full.flatten(4, 5).flatten(2, 3).index_select(2, at).index_select(3, at)

    n, given = call.shape[0], next(x for x in (call.q_BHTE, call.scores_BHTS) if x is not None)
    mask = call.mask
    if mask is None:
        mask = torch.zeros(1, 1, P, P, device=given.device, dtype=given.dtype)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    # Of masks that are the same for all sequences one is enough.
    mask = (
        mask.expand(W if len(mask) == 1 else -1, -1, P, P)
        if len(mask) in (1, n)
        else mask.repeat(n // len(mask), 1, 1, 1)
    )
    return replace(
        call, q_BHTE=joined(call.q_BHTE), k_BKSE=joined(call.k_BKSE), v_BKSF=joined(call.v_BKSF),
        out_BHTF=joined(call.out_BHTF), lse_BHT=joined(call.lse_BHT), mask=spread(mask),
        scores_BHTS=None if call.scores_BHTS is None else spread(call.scores_BHTS),
    )  # fmt: skip


def apart(x_BHTF: Tensor, windows: Windows) -> Tensor:
    """The rows of whole sequences as those of their windows: (B, H, T, F) -> (B W, H, P, F)."""
    order_WP = torch.as_tensor(windows)
    cut = x_BHTF.index_select(2, order_WP.flatten().to(x_BHTF.device)).unflatten(2, order_WP.shape)
    return cut.transpose(1, 2).flatten(0, 1)
