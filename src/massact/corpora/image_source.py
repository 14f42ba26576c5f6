"""Named images that still wait for a model: its processor says how they become pixel values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from massact.corpora.batch import Corpus, Origin
from massact.corpora.image_files import Pictures, opened
from massact.corpora.preprocessing import Recipe, checked, recipe_of
from massact.corpora.readiness import Reader, Wish, how_many, refuse_text_options
from massact.records.errors import UserError

MOST_BYTES = 4 << 30  # all images of a corpus are held as float32
MOST_NAMES = 1000  # file names kept in run.json


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images, not yet read; the model brings the preprocessing.

    Args:
        name: what the user called them.
        pictures: where they are, and their classes.
        n_sequences: how many, from the start; None or 'all' for all.
        preprocess: steps that are to be other than the model's, see `massact.corpora.preprocessing.checked`.
    """

    name: str
    pictures: Pictures
    n_sequences: int | Literal["all"] | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)

    def ready(self, model: Reader, wish: Wish) -> Corpus:
        """Read and prepared for a model, see `massact.corpora.readiness.ready`."""
        whose, name = model.name or "The model", model.image_input
        if name is None:
            raise UserError(f"{whose} takes {model.main_input}, not images.", do="Give text, or tensors by name.")
        example = model.example.get(name)
        if example is not None and example.ndim == 4 and example.shape[1] != 3:
            raise UserError(
                f"{whose} takes images of {example.shape[1]} channels.",
                "Files are read as three (RGB).",
                f"Give tensors: corpus({{{name!r}: tensor}}).",
            )
        refuse_text_options("images", wish)
        processor = getattr(model.processor, "image_processor", model.processor)  # the part of a mixed model's
        return self.encode(processor, input_name=name, n_sequences=wish.n_sequences, preprocess=wish.preprocess)

    def encode(
        self,
        processor: Any,
        *,
        input_name: str = "pixel_values",
        n_sequences: int | Literal["all"] | None = None,
        preprocess: Mapping[str, Any] | None = None,
    ) -> Corpus:
        """Read and prepare the images: a corpus of (N, 3, H, W) float32, all in memory (0.6 MB each at 224 x 224).

        Args:
            processor: see `recipe_of`.
            input_name: the model's name for its pixels.
            n_sequences, preprocess: None: as given to `corpus()`.

        Raises:
            UserError: nothing says how to prepare them, one cannot be read, they differ in size, or are too many.
        """
        asked = self.preprocess | checked(preprocess)
        recipe = recipe_of(processor, asked)
        n = how_many(n_sequences, self.n_sequences, len(self.pictures), "images", self.name)
        pictures = self.pictures.part(0, n)
        pixels = _read(self.name, pictures, recipe)
        source = {
            "kind": "images", "form": pictures.form, "n_classes": len(pictures.classes or ()) or None,
            "labelled": pictures.labels is not None, "files": list(pictures.names[:MOST_NAMES]),
            "preprocess": recipe.record(), "asked": asked,
        }  # fmt: skip
        origin = Origin(bos_requested="auto", packing={"method": "given"}, source=source)
        kept = replace(pictures, images=())
        return Corpus(self.name, "tensors", {input_name: pixels}, origin=origin, pictures=kept)


def _read(name: str, pictures: Pictures, recipe: Recipe) -> torch.Tensor:
    first = _prepared(pictures, 0, recipe)
    if len(pictures) * first.nbytes > MOST_BYTES:
        fit = MOST_BYTES // first.nbytes
        raise UserError(
            f"{len(pictures):,} images of {first.shape[1]} x {first.shape[2]} pixels do not fit.",
            f"They would take {len(pictures) * first.nbytes / 2**30:.1f} GiB; {MOST_BYTES >> 30} are allowed.",
            f"Use --n-sequences {fit} or less.",
        )
    pixels = np.empty((len(pictures), *first.shape), np.float32)
    pixels[0] = first
    for i in range(1, len(pictures)):
        one = _prepared(pictures, i, recipe)
        if one.shape != first.shape:
            raise UserError(
                f"The images of {name!r} differ in size after preprocessing.",
                f"{pictures.names[0]!r} is {first.shape[1]} x {first.shape[2]}, {pictures.names[i]!r} "
                f"{one.shape[1]} x {one.shape[2]}.",
                "Crop them: --preprocess crop=224, or resize to both sides: --preprocess resize=224x224.",
            )
        pixels[i] = one
    return torch.from_numpy(pixels)


def _prepared(pictures: Pictures, i: int, recipe: Recipe) -> np.ndarray:
    return recipe.apply(opened(pictures.images[i], pictures.names[i]))
