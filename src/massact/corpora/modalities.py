"""What each position of a sequence is: text, image, video or audio, and what the image tokens are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("text", "image", "video", "audio")


@dataclass(frozen=True)
class Modalities:
    """Modality of the positions of one stack of blocks.

    Args:
        default: of every position that nothing else is said of; empty where it is not known.
        ids: token id -> modality, of the placeholders in whose place a model puts what its tower gives.
        places: of each position, the same in every sequence; () where the ids or the default say it.
        names: of each sequence, what its image tokens are called, in order; () where that is not known.
    """

    default: str
    ids: Mapping[int, str] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()

    def of(self, token_id: int, pos: int) -> str:
        """Return the modality of a position, which holds `token_id` (-1: none)."""
        return self.places[pos] if pos < len(self.places) else self.ids.get(token_id, self.default)

    def name(self, ids_T: Tensor, sequence: int, pos: int) -> str:
        """Return the name of a placeholder: 'image (0, 3)' where its patch is known, of several
        images 'image#2 (0, 3)', else 'image 17' (from 0)."""
        mine = int(ids_T[pos])
        index = int((ids_T[:pos] == mine).sum())
        names = self.names[sequence] if self.names and self.ids[mine] == "image" else ()
        # As many names as there are image tokens, or nothing is known of their order.
        return names[index] if len(names) == int((ids_T == mine).sum()) else f"{self.ids[mine]} {index}"


def token_types(ids: Tensor, placeholders: Mapping[int, str]) -> Tensor:
    """The `mm_token_type_ids` of transformers: 0 text, 1 image, 2 video, 3 audio; of the shape of `ids`."""
    types = torch.zeros_like(ids)
    for token_id, kind in placeholders.items():
        types[ids == token_id] = NAMES.index(kind)
    return types
