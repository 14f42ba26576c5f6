"""What the positions of each stack are, text, image, video or audio; and which patch each image token of a text is.

Shapes: T positions of the text, I image tokens, P positions of the tower, D width.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from massact.corpora import Batch, Corpus, Modalities
from massact.models import Model
from massact.positions.embedding import embedding_outputs
from massact.positions.patch_grids import grids_of, merged_side
from massact.positions.patch_names import place_names
from massact.positions.tiles import tile_names
from massact.records.anatomy import Stack
from massact.records.errors import MassactError
from massact.records.sites import Site
from massact.trace import Edit

KINDS = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio", "input_values": "audio",
         "input_ids": "text", "decoder_input_ids": "text"}  # fmt: skip

Names = tuple[str, ...]
Tower = tuple[Stack, Names]  # that sees the images, and what its positions are called

_known: WeakKeyDictionary[nn.Module, dict[tuple[str, str, int, int], tuple[int, ...]]] = WeakKeyDictionary()


def modalities_of(model: Model, corpus: Corpus, read: Corpus, stack: str) -> Modalities:
    """What the positions of a stack are.

    Where a stack reads the text, its token ids say it: the configuration names the placeholders in whose place the
    model puts what its tower gives. A tower has the modality of its input. Where a stack that reads text has other
    positions than the text, each input is changed in turn: a position that changes at layer 0 is of its modality.

    Args:
        corpus: of the model.
        read: that corpus as the stack reads it, see `tokens_of`.
        stack: name of the stack.
    """
    name = model.reads(model.anatomy.stack(stack))
    if read.kind == "tokens":
        names = image_names(model, corpus, stack) if "pixel_values" in corpus.inputs else ()
        return Modalities("text", model.placeholders, names=names)
    if name == "input_ids":  # other positions than the text has, or no text at all
        mixed = "input_ids" in corpus.inputs and len(corpus.inputs) > 1
        return Modalities("", places=_by_experiment(model, corpus, stack) if mixed else ())
    return Modalities("image" if name is not None and name == model.image_input else KINDS.get(str(name), ""))


def _by_experiment(model: Model, corpus: Corpus, stack: str) -> tuple[str, ...]:
    """Modality of each position of the first sequence, '' where it depends on no input or on several."""
    one = corpus.head(1)
    still_TD = embedding_outputs(model, one, stack)[0]
    kinds_T: list[set[str]] = [set() for _ in still_TD]
    for name in set(one.inputs) & set(KINDS):
        x = one.inputs[name]
        other = torch.where(x == x.max(), x.min(), x.max()) if name.endswith("_ids") else x + torch.ones_like(x)
        moved_TD = embedding_outputs(model, replace(one, inputs={**one.inputs, name: other}), stack)[0]
        for t in np.flatnonzero((moved_TD != still_TD).any(-1)) if moved_TD.shape == still_TD.shape else ():
            kinds_T[t].add(KINDS[name])
    return tuple(kinds.pop() if len(kinds) == 1 else "" for kinds in kinds_T)


def image_names(model: Model, corpus: Corpus, stack: str) -> tuple[tuple[str, ...], ...]:
    """What the image tokens of each sequence are called, in order: 'image (row, column)' where that is known.

    A grid that is given with the image says it, divided by the number of patches that the model merges. Images that
    were cut into tiles: see `tile_names`. Else the positions of the tower are named by experiment (`place_names`), and
    by another one it is found which of them each image token is made of: each set of positions of the tower is moved
    where the model takes its features. Of several images in a sequence each token has the number of its image, from 1:
    'image#2 (row, column)', or 'image#2 17' where no more is known.

    Args:
        stack: the stack that reads the text.

    Returns:
        A tuple for each sequence, () where nothing is proved; () where no sequence has names.
    """
    ids = torch.tensor([i for i, kind in model.placeholders.items() if kind == "image"])
    towers = [s for s in model.anatomy.stacks if s.name != stack and model.reads(s) == model.image_input]
    asked = len(ids) and len(towers) == 1 and not {"image_grid_thw", "image_sizes"} & set(corpus.inputs)
    places = place_names(model, corpus, towers[0].name) if asked else None
    tower = None if places is None else (towers[0], places)
    found = [_named(model, corpus, (stack, tower), s, ids) for s in range(corpus.n_sequences)] if len(ids) else []
    return tuple(found) if any(found) else ()


def _named(model: Model, corpus: Corpus, stacks: tuple[str, Tower | None], sequence: int, ids: Tensor) -> Names:
    """What the image tokens of one sequence are called."""
    is_image_T = torch.isin(corpus.inputs["input_ids"][sequence], ids)
    n, rows = int(is_image_T.sum()), corpus.rows(sequence, sequence + 1)
    places: list[Names] = []  # of each image
    if n and "image_grid_thw" in rows:
        places = [_grid_names(*grid, merged_side(model) or 1) for grid in grids_of(corpus, sequence)]
    elif n and "image_sizes" in rows and rows["pixel_values"].ndim == 5:
        places = tile_names(model, rows["pixel_values"], rows["image_sizes"]) or []
    elif n and stacks[1] is not None:
        places = _of_tower(model, corpus, stacks[0], stacks[1], (sequence, n, ids))
    known = bool(places) and all(places) and sum(map(len, places)) == n
    if not known:
        places = _runs(is_image_T, corpus.n_images(sequence))
    several = len(places) > 1
    return tuple(f"image#{i} {name}" if several else f"image {name}" for i, names in enumerate(places, 1)
                 for name in names)  # fmt: skip


def _runs(is_image_T: Tensor, n_images: int) -> list[Names]:
    """Image tokens by number in their image, where there are as many runs of them as several images; else nothing."""
    runs: list[int] = []
    for now, before in zip(is_image_T.tolist(), [False, *is_image_T.tolist()], strict=False):
        if now and not before:
            runs.append(0)
        if now:
            runs[-1] += 1
    return [tuple(map(str, range(n))) for n in runs] if len(runs) == n_images > 1 else []


def _grid_names(frames: int, rows: int, columns: int, merge: int) -> tuple[str, ...]:
    if frames != 1:
        return ()
    return tuple(f"({r}, {c})" for r in range(rows // merge) for c in range(columns // merge))


def _of_tower(model: Model, corpus: Corpus, stack: str, of_tower: Tower, of: tuple[int, int, Tensor]) -> list[Names]:
    """Names of the n image tokens of one sequence, image by image, by the positions of the tower that they are of."""
    (sequence, n, ids), (tower, places) = of, of_tower
    n_images = corpus.n_images(sequence)
    if n % n_images:
        return []
    key = (tower.name, stack, n, n_images)
    found = _known.setdefault(model.module, {})
    if key not in found:
        try:
            found[key] = _sources(model, corpus.part(sequence, sequence + 1), tower, stack, ids.tolist())
        except MassactError:  # names must not cost the findings
            found[key] = ()
    if not found[key]:
        return []
    each, P, source = n // n_images, len(places), found[key]
    if any(p >= 0 and p // P != i // each for i, p in enumerate(source)):
        return []  # tokens of one image among those of another
    names = [places[p % P].removeprefix("patch ") if p >= 0 else str(i % each) for i, p in enumerate(source)]
    return [tuple(names[i : i + each]) for i in range(0, n, each)]


def _sources(model: Model, one: Corpus, tower: Stack, stack: str, ids: list[int]) -> tuple[int, ...]:
    """Position of the tower that each image token of a sequence is made of, -1 where it is not one alone.

    Args:
        one: of one sequence; of several images the positions of the tower follow one another.
    """
    is_image_T = torch.isin(one.inputs["input_ids"][0], torch.tensor(ids)).numpy()
    is_image_T = is_image_T if one.mask is None else is_image_T[one.mask[0].numpy()]  # what counts is seen
    still_TD = embedding_outputs(model, one, stack)[0]

    def moved_I(at: Site, chosen_P: Tensor | None) -> np.ndarray:
        def move(h_BPD: Tensor, _: Batch) -> Tensor:
            noise_D = torch.randn(h_BPD.shape[-1], generator=torch.Generator().manual_seed(0)).to(h_BPD)
            moved = h_BPD + h_BPD.abs().max() * noise_D
            return moved if chosen_P is None else torch.where(chosen_P.to(h_BPD.device)[:, None], moved, h_BPD)

        other_TD = embedding_outputs(model, one, stack, [Edit("move", str(at), move)])[0]
        return (other_TD != still_TD).any(-1)[is_image_T]

    sites = [Site(tower.name, layer, "resid_post") for layer in range(tower.n_layers, 0, -1)]
    taken = next((s for s in sites if moved_I(s, None).all()), None)
    if taken is None:
        return ()
    n = len(embedding_outputs(model, one, tower.name)[0])
    source_I, alone_I = np.zeros(int(is_image_T.sum()), np.int64), np.ones(int(is_image_T.sum()), bool)
    for bit in range(max(1, (n - 1).bit_length())):
        has_P = (torch.arange(n) >> bit & 1).bool()
        ones_I = moved_I(taken, has_P)
        zeros_I = moved_I(taken, ~has_P)
        alone_I &= ones_I ^ zeros_I
        source_I += ones_I.astype(np.int64) << bit
    return tuple(int(p) if ok else -1 for p, ok in zip(source_I, alone_I, strict=True))
