"""The same sequences with a token in front and without it.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from massact.corpora.batch import Corpus
from massact.records.errors import UserError


def both_ways(corpus: Corpus, first: int, context: int | None = None) -> dict[str, Corpus]:
    """The text of a corpus with one token in front of every sequence, and without it.

    A sequence that begins with this token already is without it behind it. Both ways have the same text, cut at its end
    to the length of the shortest and to what the model takes; padding stays masked.

    Args:
        corpus: token ids (B, T), padded on the right.
        first: the token: BOS, or CLS.
        context: most positions that the model takes.

    Returns:
        {"with": ..., "without": ...}.

    Raises:
        UserError: no text is left.
    """
    ids_BT = corpus.inputs["input_ids"]
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool) if corpus.mask is None else corpus.mask.bool()
    has = [int(row[0]) == first for row in ids_BT]
    room = ids_BT.shape[1] - any(has)
    room = room if context is None else min(room, context - 1)
    if room < 1:
        raise UserError("The sequences hold no text beside their first token.")
    text_BT, counts_BT = (torch.stack([row[h : h + room] for h, row in zip(has, of, strict=True)])
                          for of in (ids_BT, mask_BT))  # fmt: skip
    if not bool(counts_BT.any(1).all()):
        raise UserError("A sequence holds no text beside its first token.")
    front_B1 = torch.full_like(text_BT[:, :1], first)

    def made(ids: torch.Tensor, mask: torch.Tensor) -> Corpus:
        return replace(corpus, inputs={"input_ids": ids}, mask=None if bool(mask.all()) else mask)

    return {
        "with": made(torch.cat([front_B1, text_BT], 1), torch.cat([torch.ones_like(counts_BT[:, :1]), counts_BT], 1)),
        "without": made(text_BT, counts_BT),
    }
