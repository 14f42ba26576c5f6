"""Which sections a page has, and in which order. A new section is one function in `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from massact.records.kinds.comparison import Comparison
from massact.reports.page import beside, closing, explained, others, pictured, scanned
from massact.reports.page.held import Held
from massact.reports.page.parts import Section

# Each gives its section of a run, or None where the run holds nothing of it.
SECTIONS: tuple[Callable[[Held], Section | None], ...] = (
    scanned.answer,
    scanned.layers,
    scanned.where,
    pictured.patches,
    scanned.portrait,
    scanned.ranks,
    explained.attention,
    explained.bias,
    explained.writers,
    others.interventions,
    others.classic_works,
    others.founding_paper,
    others.training,
    others.checkpoints,
    others.toy_lab,
    others.of_other_packages,
)


@dataclass(frozen=True)
class Page:
    """A page: its title, what it is of, and its sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def page_of(held: Held) -> Page:
    """The page of one run."""
    sections = [made for make in SECTIONS if (made := make(held)) is not None]
    on = f" on {held.corpus}" if held.corpus else ""
    first = next(iter(held.records.values()))
    when = str(getattr(first, "started", ""))[:10]
    return Page(f"Massive activations of {held.model}", f"{', '.join(held.records)}{on}; {when}",
                [*sections, closing.definitions(sections), closing.provenance(held)])  # fmt: skip


def page_of_several(runs: Sequence[Held], comparison: Comparison) -> Page:
    """The page of several runs: side by side, then the answer of each."""
    sections = [made for make in beside.SECTIONS if (made := make(runs, comparison)) is not None]
    labels = ", ".join(held.label for held in runs)
    return Page("Massive activations, compared", labels,
                [*sections, closing.definitions(sections), *(beside.provenance_of(held, i)
                                                             for i, held in enumerate(runs))])  # fmt: skip
