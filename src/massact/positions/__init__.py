"""What a position is: tokens, classes, frames, patches, placeholders, layout.

Takes a model and a corpus; gives the corpus as each stack of blocks reads it (names, modalities, which positions count)
and the layout of an image (class token, registers, grid of patches). Knows how to find by experiment what a position
holds: where an input is changed, the embedding output (layer 0) moves. Must not know what is massive, files, figures,
or what a family of models looks like.
"""

from massact.positions.continuation import continued
from massact.positions.layout import Layout, image_stack, layout_now, layout_of, places_now, read_layout
from massact.positions.patch_names import place_names
from massact.positions.sound import prompts_for, ready_corpus
from massact.positions.tokens import notes_on_positions, tokens_of

__all__ = [
    "Layout",
    "continued",
    "image_stack",
    "layout_now",
    "layout_of",
    "notes_on_positions",
    "place_names",
    "places_now",
    "prompts_for",
    "read_layout",
    "ready_corpus",
    "tokens_of",
]
