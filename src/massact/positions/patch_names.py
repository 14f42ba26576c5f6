"""Names of the positions of a model of images, found by experiment: which pixels and which learned token each holds.

Shapes: N images, T positions, D width, H and W pixels, R rows and C columns of patches, P = R C.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from massact.corpora import Corpus
from massact.corpora import corpus as make_corpus
from massact.models import Model
from massact.positions.embedding import embedding_outputs
from massact.trace import WeightEdit, edited
from massact.trace.added_tokens import added_positions

MOST_EXTRA = 64  # positions that are no patch
LARGEST_PATCH = 64
_IGNORED = {"input_ids", "attention_mask", "labels"}  # a vision tower does not read them
_REL = 1e-3  # of the largest change: below it is rounding
# What a learned token is called, by the last part of its parameter's name. Where it stands, the experiment says.
_LEARNED = (
    (re.compile("dist"), "[DIST]"), (re.compile("reg"), "reg{}"), (re.compile("sink|massact_token"), "[SINK]"),
    (re.compile("cls|class"), "[CLS]"),
)  # fmt: skip

# Of each model: (stack, shape of an image, tokens, those of them that an edit has added) -> names.
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[str, ...] | None]] = WeakKeyDictionary()


def place_names(model: Model, corpus: Corpus, stack: str) -> tuple[str, ...] | None:
    """Name every position of a stack that reads images: '[CLS]', '[DIST]', 'reg1', 'patch (row, column)'.

    Two images of noise are mixed patch by patch, in pairs of mixtures: for each bit of the patch's number once the
    patches with that bit from the second image, once those without. The positions of the embedding output (layer 0)
    that change in exactly one of each pair depend on exactly one patch, and the bits say which; 1 + 2 ceil(log2 P)
    images suffice for P patches. A patch size is accepted only if each patch is seen at exactly one position. The
    positions that depend on no pixel get their names by changing the model's learned tokens one by one. Under an edit
    that adds tokens the names are those of the longer sequence.

    Args:
        corpus: images, of the size that matters.
        stack: name of the stack.

    Returns:
        T names, 'token 17' where nothing was proved of a position; None where the patches cannot be told apart:
        no images, patches that are shuffled (masked autoencoders) or mixed before the first block.
    """
    name = model.image_input
    pixels = None if name is None else corpus.inputs.get(name)
    if pixels is None or pixels.ndim != 4 or set(corpus.inputs) - {name} - _IGNORED:
        return None
    if not model.reaches(model.anatomy.stack(stack), {str(name)}):
        return None
    found = _known.setdefault(model.module, {})
    try:
        experiment = _Experiment(model, str(name), stack, tuple(pixels.shape[1:]))
        before = experiment.layer_0(experiment.one[None])[0]
    except Exception:  # whatever the model has against such images, names must not cost the findings
        return None
    # Edits and variants add tokens to a model that is known: how many there are now, the pass has shown.
    key = (stack, *pixels.shape[1:], len(before), added_positions(model.module, model.anatomy.stack(stack)))
    if key not in found:
        try:
            found[key] = experiment.names(before)
        except Exception:
            found[key] = None
    return found[key]


class _Experiment:
    """Layer 0 of one stack for images that differ in known places."""

    def __init__(self, model: Model, name: str, stack: str, shape: tuple[int, ...]) -> None:
        self.model, self.name, self.stack, self.shape = model, name, stack, shape
        generator = torch.Generator().manual_seed(0)
        self.one, self.other = torch.rand(2, *shape, generator=generator) * 2 - 1

    def names(self, before: np.ndarray) -> tuple[str, ...] | None:
        """The names; `before`: layer 0 (T, D) of the first image."""
        for patch in self.sizes(len(before)):
            patches = self.patches(patch, before)
            if patches is not None:
                return self.named(patches, before)
        return None

    def layer_0(self, images: Tensor) -> list[np.ndarray]:
        """The embedding output (T, D) of each image."""
        return embedding_outputs(self.model, make_corpus({self.name: images}), self.stack)  # type: ignore[arg-type]

    def sizes(self, n: int) -> list[int]:
        """Sides of a patch that leave few enough positions over; what the configuration says first."""
        height, width = self.shape[-2:]
        config = getattr(self.model.module, "config", None)
        holders = (config, getattr(config, "vision_config", None))
        said = [x for x in (getattr(h, "patch_size", None) for h in holders) if isinstance(x, int)]
        counts = {p: (height // p) * (width // p) for p in (*said, *range(1, LARGEST_PATCH + 1)) if p > 0}
        return [p for p, count in counts.items() if 2 <= count <= n <= count + MOST_EXTRA]

    def patches(self, patch: int, before: np.ndarray) -> list[tuple[int, int] | None] | None:
        """Row and column of the patch at each position, None at those without pixels; None if that is not so."""
        rows, columns = (x // patch for x in self.shape[-2:])
        number_HW = np.full(self.shape[-2:], -1)
        number_HW[: rows * patch, : columns * patch] = np.kron(
            np.arange(rows * columns).reshape(rows, columns), np.ones((patch, patch), int)
        )
        bits = max(1, (rows * columns - 1).bit_length())
        masks = [(number_HW >= 0) & ((number_HW >> b & 1) == side) for b in range(bits) for side in (1, 0)]
        mixed = torch.stack([torch.where(torch.from_numpy(m), self.other, self.one) for m in masks])
        changed_NT = self.changed(self.layer_0(mixed), before)
        ones_BT, zeros_BT = changed_NT[0::2], changed_NT[1::2]
        none_T = ~changed_NT.any(0)
        single_T = (ones_BT ^ zeros_BT).all(0)
        if not (none_T | single_T).all():
            return None
        index_T = (ones_BT * (1 << np.arange(bits))[:, None]).sum(0)
        if sorted(index_T[single_T]) != list(range(rows * columns)):
            return None
        return [divmod(int(i), columns) if single else None for i, single in zip(index_T, single_T, strict=True)]

    def changed(self, after: list[np.ndarray], before: np.ndarray) -> np.ndarray:
        """(N, T): which positions differ from those of `before`."""
        if any(a.shape != before.shape for a in after):
            return np.ones((len(after), len(before)), bool)
        size_NT = np.abs(np.stack(after) - before).max(-1)
        return size_NT > _REL * max(float(size_NT.max()), 1e-30)

    def named(self, patches: list[tuple[int, int] | None], before: np.ndarray) -> tuple[str, ...]:
        names = [f"token {t}" if at is None else f"patch ({at[0]}, {at[1]})" for t, at in enumerate(patches)]
        free = {t for t, at in enumerate(patches) if at is None}
        width = before.shape[1]
        for path, parameter in self.model.module.named_parameters():
            label = next((text for pattern, text in _LEARNED if pattern.search(path.rsplit(".", 1)[-1])), None)
            rows = parameter.numel() // width
            if label is None or parameter.shape[-1:] != (width,) or not 0 < rows <= len(free):
                continue
            for row in range(rows):
                moved = self.moved(path, row, before)
                if len(moved) == 1 and moved[0] in free:
                    names[moved[0]] = label.format(row + 1)
        return tuple(names)

    def moved(self, path: str, row: int, before: np.ndarray) -> list[int]:
        """The positions that differ when one learned token does."""

        def other(weight: Tensor) -> Tensor:
            shifted = weight.detach().clone()
            flat = shifted.view(-1, shifted.shape[-1])
            noise = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(1))
            flat[row] += noise.to(flat.device, flat.dtype)
            return shifted

        with edited(self.model, WeightEdit("another token", path, other)):
            after = self.layer_0(self.one[None])
        return [int(t) for t in np.flatnonzero(self.changed(after, before)[0])]
