"""Which positions of the text the rows of a forward pass are about, also where an edit of the inputs moves them.

An edit of the inputs gets one input more, `text_positions` (B, T), of the shape of the ids. One that takes tokens away,
adds some or puts them in another order does the same to it (an added token is -1). Of an edit that does not know it
the positions are read from the ids before and after, where these leave no choice.

Shapes: B batch, T tokens before, R after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from massact.corpora.masks import zero_one
from massact.records.errors import UserError

TEXT_POSITIONS = "text_positions"


@dataclass(frozen=True)
class TextRows:
    """What the rows of one forward pass are.

    Args:
        positions_BR: of every row its position in the text as it was, -1 for an added token; on the CPU.
        counted_BR: which rows the mask of that pass counts; None for all, or where the pass has no mask of its own.
    """

    positions_BR: Tensor
    counted_BR: Tensor | None


def ids_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The tokens of the text that is read; None where there are none."""
    ids = inputs.get("input_ids")
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None


def positions_like(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The input that edits move along with the ids; nothing where there are none."""
    ids = ids_of(inputs)
    if ids is None:
        return {}
    return {TEXT_POSITIONS: torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)}


def text_rows(before: Mapping[str, Any], after: Mapping[str, Any], moved: Any, name: str) -> TextRows | None:
    """What the rows of a forward pass are, from its inputs without and with an edit.

    Args:
        before: what the model would have read.
        after: what it reads.
        moved: what the edit made of `text_positions`; None where it lost it.
        name: of the edit, for the message.

    Returns:
        The rows; None where there are no tokens.
    Raises:
        UserError: the ids do not say where each token of the text is.
    """
    old, new = ids_of(before), ids_of(after)
    if old is None or new is None:
        return None
    old, new = old.cpu(), new.cpu()
    mask = after.get("attention_mask")
    counted = zero_one("attention_mask", mask).cpu() if isinstance(mask, Tensor) and mask.shape == new.shape else None
    if isinstance(moved, Tensor) and moved.shape == new.shape and not _only_reordered(old, new, moved.cpu()):
        return TextRows(moved.cpu(), counted)
    T, R = old.shape[1], new.shape[1]
    n, arange = abs(T - R), torch.arange(min(T, R))
    if R < T and torch.equal(old[:, n:], new):
        positions = arange + n
    elif R < T and torch.equal(old[:, :R], new):
        positions = arange
    elif R > T and torch.equal(new[:, n:], old):
        positions = torch.cat([torch.full((n,), -1), arange])
    elif R > T and torch.equal(new[:, :T], old):
        positions = torch.cat([arange, torch.full((n,), -1)])
    else:
        raise UserError(
            f"Edit {name!r} moves tokens, and does not say where to.",
            f"It makes {R} tokens of {T}, and these are not the same ones with some added or taken away at an end: "
            "which predictions are of the same tokens is not known.",
            f"Let it do to the input {TEXT_POSITIONS!r} (B, T) what it does to 'input_ids'; added tokens are -1.",
        )
    return TextRows(positions.expand(len(new), -1), counted)


def _only_reordered(old_BT: Tensor, new_BR: Tensor, moved_BR: Tensor) -> bool:
    """Whether the positions say something else than the ids: other tokens at them, and yet the same tokens in all."""
    said = old_BT.gather(1, moved_BR.clamp(min=0))
    other = (said != new_BR) & (moved_BR >= 0)
    return any(
        bool(row.any()) and old.shape == new.shape and torch.equal(old.sort().values, new.sort().values)
        for row, old, new in zip(other, old_BT, new_BR, strict=True)
    )
