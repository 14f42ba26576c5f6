"""Image tokens of models that cut an image into tiles: a small whole image, the tiles, and marks at the ends of rows.

Shapes: K tiles of all images, P features of a tile, D width of the text.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from massact.models import Model
from massact.records.anatomy import Place
from massact.trace import tapped

_NEWLINE = -1  # no feature, but the mark at the end of a row

_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], list[tuple[str, ...]] | None]] = WeakKeyDictionary()


def tile_names(model: Model, pixels: Tensor, sizes: Tensor) -> list[tuple[str, ...]] | None:
    """What the image tokens of some images are called: 'base (0, 3)' of the small whole image, '(0, 3)' of the tiles,
    'newline 0'.

    The model's own code says where its features go: they are replaced by their numbers behind the projector, and
    read where they come out. Rows are counted by the marks at their ends.

    Args:
        pixels: (images, tiles, channels, height, width), as the model takes them.
        sizes: (images, 2), of each image before it was cut.

    Returns:
        Names for each image, '7' where nothing is known of a token; None where the model cannot be asked.
    """
    projector = next((n for n, _ in model.module.named_modules() if n.endswith("multi_modal_projector")), None)
    if projector is None or not hasattr(model.module, "get_image_features"):
        return None
    known, key = _known.setdefault(model.module, {}), (tuple(pixels.shape), *map(tuple, sizes.tolist()))
    if key not in known:
        try:
            tokens = _numbered(model, projector, pixels, sizes)
        except Exception:  # another signature: names must not cost the findings
            tokens = None
        known[key] = None if tokens is None else [_names(numbers, n) for numbers, n in tokens]
    return known[key]


def _numbered(model: Model, projector: str, pixels: Tensor, sizes: Tensor) -> list[tuple[list[int], int]] | None:
    """Of each image the numbers of its tokens (tile P + feature), `_NEWLINE`, or -2; and P."""
    shape: list[tuple[int, int]] = []

    def number(out: Tensor) -> Tensor:
        K, P = out.shape[:2]
        shape.append((K, P))
        numbers = torch.arange(K * P, dtype=torch.float32, device=out.device)
        return numbers.view(K, P, 1).expand(K, P, out.shape[-1]).clone()

    newline = next((p for n, p in model.module.named_parameters() if n.endswith("image_newline")), None)
    given = {"pixel_values": pixels.to(model.device, model.dtype), "image_sizes": sizes.to(model.device)}
    with torch.inference_mode(), tapped(model.module, [(Place(projector, "out"), number)]) as state:
        state.begin()
        out = model.module.get_image_features(**given, return_dict=True).pooler_output
    if len(shape) != 1 or not isinstance(out, list | tuple) or len(out) != len(sizes):
        return None
    return [(_read(x.float(), newline), shape[0][1]) for x in out]


def _read(x_TD: Tensor, newline: Tensor | None) -> list[int]:
    first_T = x_TD[:, 0]
    is_number_T = (x_TD == first_T[:, None]).all(-1) & (first_T == first_T.round()) & (first_T >= 0)
    found = torch.where(is_number_T, first_T, torch.full_like(first_T, -2.0)).long()
    if newline is not None:
        found[(x_TD == newline.detach().float().to(x_TD)).all(-1)] = _NEWLINE
    return [int(n) for n in found]


def _names(numbers: list[int], P: int) -> tuple[str, ...]:
    """Names of the tokens of one image, whose first tile is the whole image."""
    base, side = min((n // P for n in numbers if n >= 0), default=0), math.isqrt(P)
    cut = any(n >= 0 and n // P != base for n in numbers)  # else there is one tile, which is the image
    names, row, column = [], 0, 0
    for i, n in enumerate(numbers):
        if n == _NEWLINE:
            names.append(f"newline {row}")
            row, column = row + 1, 0
        elif n >= 0 and n // P == base and side * side == P:
            at = divmod(n % P, side)
            names.append(f"{'base ' if cut else ''}({at[0]}, {at[1]})")
        elif n >= 0 and n // P != base and _NEWLINE in numbers:
            names.append(f"({row}, {column})")
            column += 1
        else:
            names.append(str(i))
    return tuple(names)
