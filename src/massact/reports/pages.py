"""Which sections a page has, and in which order. A new section is one function in `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from massact.records.kinds.comparison import Comparison
from massact.reports import provenance
from massact.reports.contents import Contents
from massact.reports.kinds import classics, foreign, intervention, lab, reproduction, training
from massact.reports.kinds.comparison import sections as comparison
from massact.reports.kinds.explanation import sections as explanation
from massact.reports.kinds.scan import images
from massact.reports.kinds.scan import sections as scan
from massact.reports.kinds.trajectory import sections as trajectory
from massact.reports.parts import Section

# Each gives its section of a run, or None where the run holds nothing of it.
SECTIONS: tuple[Callable[[Contents], Section | None], ...] = (
    scan.answer,
    scan.layers,
    scan.where,
    images.patches,
    scan.portrait,
    scan.ranks,
    explanation.attention,
    explanation.bias,
    explanation.writers,
    intervention.interventions,
    classics.classic_works,
    reproduction.founding_paper,
    training.training,
    trajectory.checkpoints,
    lab.toy_lab,
    foreign.of_other_packages,
)


@dataclass(frozen=True)
class Page:
    """A page: its title, what it is of, and its sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def page_of(held: Contents) -> Page:
    """The page of one run."""
    sections = [made for make in SECTIONS if (made := make(held)) is not None]
    on = f" on {held.corpus}" if held.corpus else ""
    first = next(iter(held.records.values()))
    when = str(getattr(first, "started", ""))[:10]
    return Page(f"Massive activations of {held.model}", f"{', '.join(held.records)}{on}; {when}",
                [*sections, provenance.definitions(sections), provenance.provenance(held)])  # fmt: skip


def page_of_several(runs: Sequence[Contents], compared: Comparison) -> Page:
    """The page of several runs: side by side, then the answer of each."""
    sections = [made for make in comparison.SECTIONS if (made := make(runs, compared)) is not None]
    labels = ", ".join(held.label for held in runs)
    return Page("Massive activations, compared", labels,
                [*sections, provenance.definitions(sections), *(comparison.provenance_of(held, i)
                                                             for i, held in enumerate(runs))])  # fmt: skip
