"""The layout of an image model, read before or under the edits that are in force."""

from __future__ import annotations

from collections.abc import Sequence

from massact.corpora import Corpus
from massact.models import Model
from massact.records.anatomy import Stack
from massact.records.errors import UserError
from massact.scans import Layout, layout_of


def image_stack(model: Model, stack: str | None = None) -> Stack:
    """The stack that sees images: the named one, the only one, or the one that is called after vision.

    Raises:
        UserError: there are several, and none or more than one of them is.
    """
    stacks = model.anatomy.stacks
    if stack is not None:
        return model.anatomy.stack(stack)
    seeing = [s for s in stacks if len(stacks) == 1 or "vision" in s.name or "visual" in s.name]
    if len(seeing) != 1:
        raise UserError("It is not known which part of the model sees images.", do="Name one of the stacks: "
                        + ", ".join(s.name for s in stacks) + ".")  # fmt: skip
    return seeing[0]


def read_layout(model: Model, corpus: Corpus, *, stack: str | None = None) -> Layout:
    """Find patches, registers and class token by experiment, see `massact.scans.patches.place_names`.

    Tokens that an edit adds at the moment are told apart, and may stand in front of the patches or behind them.

    Args:
        corpus: images, of the size that matters.
        stack: of several, which.

    Raises:
        UserError: the corpus holds no images, or the patches cannot be told apart.
    """
    chosen = image_stack(model, stack)
    pixels = corpus.inputs.get(model.image_input or "")
    if pixels is None or pixels.ndim != 4:
        raise UserError("The corpus holds no images.", f"It has {', '.join(corpus.inputs)}.",
                        "Give {'pixel_values': (N, channels, height, width)}.")  # fmt: skip
    layout = layout_of(model, corpus, chosen.name)
    if layout is None:
        raise UserError(
            "The patches of this model cannot be told apart.",
            f"In images of {pixels.shape[-2]} x {pixels.shape[-1]} pixels no size of patch changes exactly one token "
            "of the embedding: patches are drawn at random, overlap, or are mixed before the first block.",
        )
    return layout


def layout_now(model: Model, corpus: Corpus, layout: Layout) -> Layout:
    """The layout under the edits that are in force, whose tokens but for added ones are those of a known layout.

    Raises:
        UserError: they are not.
    """
    now = read_layout(model, corpus, stack=layout.stack)
    if (len(now.own), now.grid) != (len(layout.own), layout.grid):
        raise UserError(f"The layout is of {len(layout.own)} tokens, the model has {len(now.own)}.",
                        do="Read the layout of these images: read_layout(model, corpus).")  # fmt: skip
    return now


def places_now(positions: Sequence[int], layout: Layout, now: Layout) -> list[int]:
    """Where patches of one layout stand in another one of the same grid."""
    return [now.patches[layout.patches.index(p)] for p in positions]
