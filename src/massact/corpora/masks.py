"""Masks of what counts: 1 or True is seen, 0 or False is not. Nothing else is guessed at.

Shapes: N sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from massact.records.errors import UserError

_ANY = {"head_mask", "decoder_head_mask", "cross_attn_head_mask"}  # factors of heads, any number
_DECODER = "decoder_attention_mask"


def is_mask(name: str) -> bool:
    """Whether an input of a model is a mask of what is seen or hidden, by its name."""
    return (name.endswith("mask") and name not in _ANY) or name == "bool_masked_pos"


def zero_one(name: str, mask: torch.Tensor) -> torch.Tensor:
    """A mask as bool, where it holds only 0 and 1, or True and False.

    Args:
        name: of the input, for the message.
        mask: any shape, any dtype.

    Raises:
        UserError: any other value: numbers that are added to the logits (0 and -inf), NaN, a weight, a segment.
    """
    if mask.dtype == torch.bool:
        return mask
    kept = mask == 1
    if bool((kept | (mask == 0)).all()):
        return kept
    values = mask.detach().flatten().unique()
    seen = sorted({float(x) for x in values if not x.isnan()}) + [float("nan")] * bool(values.isnan().any())
    told = ", ".join(f"{x:g}" for x in (seen if len(seen) <= 6 else [*seen[:3], *seen[-2:]]))
    more = f" and {len(seen) - 5} others" if len(seen) > 6 else ""
    added = all(x <= 0 for x in seen) and min(seen) < -1
    why = f"It holds {told}{more}."
    if added:
        why += " That looks like an additive mask, whose numbers are added to the logits: 0 is seen, the others hidden."
    raise UserError(
        f"The {name} holds other values than 0 and 1.", why,
        f"Give 1 (or True) for what counts and 0 for padding: {'mask == 0' if added else 'mask > 0, say,'} makes such "
        "a mask.",
    )  # fmt: skip


def kept_of(mask: torch.Tensor, like: torch.Tensor | None, name: str = "attention_mask") -> torch.Tensor | None:
    """What counts of every sequence: (N, T) bool on the CPU; None where all does.

    A row may begin with padding, end with it, or have holes: positions that are not counted in any statistic.

    Args:
        mask: (N, T) of 0 and 1.
        like: the token ids (N, T) that it is about; None where nothing is known.
        name: of the input, for messages.

    Raises:
        UserError: another shape, other values, or a sequence in which nothing counts.
    """
    if mask.ndim != 2 or (like is not None and mask.shape != like.shape):
        wanted = f"like the ids, {tuple(like.shape)}" if like is not None else "(sequences, positions)"
        whose = " A mask of queries and keys says more than which tokens count." if mask.ndim > 2 else ""
        raise UserError(f"The {name} does not fit.", f"Its shape is {tuple(mask.shape)}.{whose}",
                        f"It must be {wanted}.")  # fmt: skip
    mask = zero_one(name, mask).cpu()
    if not mask.any(dim=1).all():
        row = int((~mask.any(dim=1)).nonzero()[0])
        raise UserError(f"Sequence {row} has no position that counts.", f"Its {name} is all 0.", "Leave it out.")
    return None if mask.all() else mask


def first_kept(mask: Any, width: int) -> torch.Tensor | None:
    """Where every row begins behind its padding: (N,); None where nothing says that one begins later than at 0.

    Args:
        mask: what a model was given as `attention_mask`: (N, T) of 0 and 1, or (N, 1 or H, T, T) of queries and keys.
        width: T; a mask of another width is about something else.

    Raises:
        UserError: a mask of queries and keys whose last query does not see the first key: a window, or padding.
    """
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] != width:
        return None
    if mask.ndim == 2:
        return zero_one("attention_mask", mask).long().argmax(1)
    if mask.ndim == 4:
        last = mask[:, :, -1, 0]
        if bool((last if last.dtype == torch.bool else last == 0).all()):
            return None
        raise UserError(
            "The attention_mask does not say where the sequences begin.",
            f"It is one of queries and keys, {tuple(mask.shape)}, and the last query does not see the first key: "
            "a window, or padding before the text.",
            "Give the mask of tokens (sequences, tokens): 1 for what counts, 0 for padding.",
        )
    return None


def decoder_counts(
    parts: Mapping[str, Any], mask: torch.Tensor | None, reads: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The mask of what a decoder reads, as one of the masks of a corpus that are told apart by their width.

    Args:
        parts: the inputs of the corpus.
        mask: (N, T) what counts of the encoder's input, or None.
        reads: (N, T) its ids, or None.

    Raises:
        UserError: as `kept_of`; or the encoder reads as many positions, so that the masks cannot be told apart.
    """
    if _DECODER not in parts:
        return ()
    kept = kept_of(parts[_DECODER], parts.get("decoder_input_ids"), _DECODER)
    if kept is None:
        return ()
    other = mask if mask is not None else reads
    if other is not None and other.shape[1] == kept.shape[1]:
        raise UserError(
            f"The {_DECODER} cannot be told from the mask of the encoder.",
            f"Both read {kept.shape[1]} positions.",
            "Give the decoder's ids and their mask one more column of padding (mask 0) at the end.",
        )
    return (kept,)
