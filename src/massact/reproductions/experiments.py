"""All experiments by their number: those of the paper, and those beyond it."""

from __future__ import annotations

from massact.records.errors import UserError, near
from massact.reproductions.attention_entries import ATTENTION
from massact.reproductions.effect_entries import EFFECTS
from massact.reproductions.entries import Entry
from massact.reproductions.image_entries import IMAGES
from massact.reproductions.place_entries import PLACES
from massact.reproductions.theory_entries import THEORY
from massact.reproductions.variation_entries import TRAINED, VARIATIONS

ENTRIES: dict[str, Entry] = {e.id: e for e in (*PLACES, *EFFECTS, *ATTENTION, TRAINED, *IMAGES, *VARIATIONS, *THEORY)}


def chosen(only: tuple[str, ...]) -> list[Entry]:
    """The entries that are asked for, in their own order; all without a choice.

    Raises:
        UserError: an unknown one (says which are near).
    """
    wanted = {name.upper() for name in only}
    for name in sorted(wanted - set(ENTRIES)):
        raise UserError(f"There is no experiment {name!r}.", do=near(name, ENTRIES))
    return [e for e in ENTRIES.values() if not wanted or e.id in wanted]
