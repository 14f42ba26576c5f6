"""A known layout again, under the edits that are in force."""

from __future__ import annotations

from collections.abc import Sequence

from massact.corpora import Corpus
from massact.models import Model
from massact.records.errors import UserError
from massact.scans import Layout, read_layout


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
