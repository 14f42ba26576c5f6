"""Names of the positions of a tower that takes patches of images of any size, one row each (Qwen2-VL and later).

Shapes: P patches of all images of a sequence, D width, I images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from massact.corpora import Corpus
from massact.models import Model
from massact.positions.embedding import embedding_outputs

_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[int, ...] | None]] = WeakKeyDictionary()


def packed_names(model: Model, corpus: Corpus, stack: str) -> tuple[tuple[str, ...], ...] | None:
    """Name every position of such a tower by row and column of its patch: 'patch (0, 3)', 'image#2 patch (0, 3)'.

    Which row of the input each position is made of is found by experiment: patches are changed, those with a bit of
    their number set and those without, and the positions of layer 0 that move say it (some towers put patches in the
    order of windows first). Where a row of the input lies in its image, its grid says: the processors of these models
    write the squares of patches that are merged into one token one after another.

    Args:
        corpus: with an `image_grid_thw`.
        stack: name of the tower.

    Returns:
        Names for each sequence; None where positions and patches are not one to one.
    """
    grids, merge = corpus.inputs.get("image_grid_thw"), merged_side(model)
    if grids is None or merge is None or "pixel_values" not in corpus.packed:
        return None
    if model.reads(model.anatomy.stack(stack)) != "pixel_values":
        return None
    found: list[tuple[str, ...]] = []
    for s in range(corpus.n_sequences):
        mine = grids_of(corpus, s)
        order = _order(model, corpus, stack, s)
        places = [place for i, grid in enumerate(mine) for place in _places(grid, merge, i + 1 if len(mine) > 1 else 0)]
        if order is None or len(order) != len(places):
            return None
        found.append(tuple(places[row] for row in order))
    return tuple(found)


def merged_side(model: Model) -> int | None:
    """Side of the square of patches that are merged into one token; None where the configuration does not say it."""
    config = getattr(model.module, "config", None)
    sides = (getattr(c, "spatial_merge_size", None) for c in (getattr(config, "vision_config", None), config))
    return next((side for side in sides if isinstance(side, int)), None)


def grids_of(corpus: Corpus, sequence: int) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of patches of each image of a sequence."""
    return [tuple(grid) for grid in corpus.rows(sequence, sequence + 1)["image_grid_thw"].tolist()]


def merged_order(rows: int, columns: int, merge: int) -> list[tuple[int, int]]:
    """Row and column of each patch in the order of the input: square by square of `merge` x `merge`, row by row."""
    at = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    squares = at.reshape(rows // merge, merge, columns // merge, merge, 2).swapaxes(1, 2)
    return [(int(r), int(c)) for r, c in squares.reshape(-1, 2)]


def _places(grid: tuple[int, int, int], merge: int, image: int) -> list[str]:
    frames, rows, columns = grid
    which = f"image#{image} " if image else ""
    places = merged_order(rows, columns, merge)
    return [f"{which}{f'frame {f} ' if frames > 1 else ''}patch ({r}, {c})" for f in range(frames) for r, c in places]


def _order(model: Model, corpus: Corpus, stack: str, sequence: int) -> tuple[int, ...] | None:
    """The row of the input that each position of a sequence is made of; None where it is not one alone."""
    found = _known.setdefault(model.module, {})
    key = (stack, *grids_of(corpus, sequence))
    if key not in found:
        try:
            found[key] = _found(model, corpus.part(sequence, sequence + 1), stack)
        except Exception:  # whatever the model has against other patches, names must not cost the findings
            found[key] = None
    return found[key]


def _found(model: Model, one: Corpus, stack: str) -> tuple[int, ...] | None:
    x_PF = one.inputs["pixel_values"]
    n = len(x_PF)
    other_PF = torch.randn(x_PF.shape, generator=torch.Generator().manual_seed(0)).to(x_PF) + x_PF
    still_PD = _layer_0(model, one, x_PF, stack)
    if len(still_PD) != n:
        return None
    row_P, alone_P = np.zeros(n, np.int64), np.ones(n, bool)
    for bit in range(max(1, (n - 1).bit_length())):
        has_P = (torch.arange(n) >> bit & 1).bool()[:, None].to(x_PF.device)
        ones, zeros = (
            (_layer_0(model, one, torch.where(chosen, other_PF, x_PF), stack) != still_PD).any(-1)
            for chosen in (has_P, ~has_P)
        )
        alone_P &= ones ^ zeros
        row_P += ones.astype(np.int64) << bit
    return tuple(row_P.tolist()) if alone_P.all() and sorted(row_P) == list(range(n)) else None


def _layer_0(model: Model, one: Corpus, pixels: Tensor, stack: str) -> np.ndarray:
    return embedding_outputs(model, replace(one, inputs={**one.inputs, "pixel_values": pixels}), stack)[0]
