"""Which token of an image model is what: class token, registers, patches and their grid.

Shapes: T tokens, Y rows and X columns of patches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from massact.corpora import Corpus
from massact.models import Model
from massact.positions.patch_names import place_names
from massact.records.anatomy import Stack
from massact.records.errors import UserError
from massact.trace.added_tokens import added_positions

_PATCH = re.compile(r"patch \((\d+), (\d+)\)")


@dataclass(frozen=True)
class Layout:
    """The tokens of one image.

    Args:
        stack: name of the stack.
        n_tokens: T.
        patches: positions of the patches, row by row.
        grid: rows and columns of patches.
        registers: positions of the registers and of a learned sink token; () where the model has none.
        added: positions of tokens that an edit has added (`AddedTokens`), anywhere.
    """

    stack: str
    n_tokens: int
    patches: tuple[int, ...]
    grid: tuple[int, int]
    registers: tuple[int, ...] = ()
    added: tuple[int, ...] = ()

    @classmethod
    def of_names(cls, stack: str, names: Sequence[str], added: Sequence[int] = ()) -> Layout:
        """The layout that the names of `place_names` say."""
        found = {t: m for t, name in enumerate(names) if (m := _PATCH.fullmatch(name))}
        at = {(int(m[1]), int(m[2])): t for t, m in found.items()}
        grid = max(row for row, _ in at) + 1, max(column for _, column in at) + 1
        registers = tuple(t for t, name in enumerate(names) if re.fullmatch(r"reg\d+|\[SINK\]", name))
        return cls(stack, len(names), tuple(at[place] for place in sorted(at)), grid, registers, tuple(added))

    @property
    def n_prefix(self) -> int:
        """Tokens in front of the first patch."""
        return min(self.patches)

    @property
    def class_tokens(self) -> tuple[int, ...]:
        """Positions that are no patches, registers or added tokens: the class token (and DeiT's for distillation)."""
        others = {*self.patches, *self.registers, *self.added}
        return tuple(p for p in range(self.n_tokens) if p not in others)

    @property
    def own(self) -> tuple[int, ...]:
        """Positions of the model's own tokens, in order: all but the added ones."""
        return tuple(p for p in range(self.n_tokens) if p not in self.added)

    def place(self, position: int) -> tuple[int, int]:
        """Row and column of a patch."""
        return divmod(self.patches.index(position), self.grid[1])


def layout_of(model: Model, corpus: Corpus, stack: str) -> Layout | None:
    """The layout of a stack that reads images, under the edits in force; None if its patches cannot be told apart."""
    names = place_names(model, corpus, stack)
    if names is None:
        return None
    return Layout.of_names(stack, names, added_positions(model.module, model.anatomy.stack(stack)))


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
    """Find patches, registers and class token by experiment, see `place_names`.

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
