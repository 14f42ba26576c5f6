"""A page: the answer, the sections of every result of a run, definitions and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from massact.records.kinds.comparison import Comparison
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.quantisation import Quantisation
from massact.reports import provenance
from massact.reports.contents import Contents
from massact.reports.kinds import reading_of
from massact.reports.kinds.comparison import sections as comparison
from massact.reports.kinds.scan.opening import opening
from massact.reports.kinds.scan.sections import definition
from massact.reports.kinds.scan.views import views
from massact.reports.model_cards import card_section
from massact.reports.parts import Part, Section, Table, Words, parts_of, table_of
from massact.reports.spelling import visible


@dataclass(frozen=True)
class Page:
    """A page: its title, what it is of, its sections, and its style: paper, or lecture with large type."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    style: str = "paper"


def page_of(run: Contents) -> Page:
    """The page of one run."""
    sections = sections_of(run)
    on = f" on {run.corpus}" if run.corpus else ""
    first = next(iter(run.records.values()))
    when = str(getattr(first, "started", ""))[:10]
    closing = [provenance.definitions(sections), provenance.provenance(run, card_section(run))]
    return Page(f"Massive activations of {run.model}", f"{', '.join(run.records)}{on}; {when}", [*sections, *closing])


def sections_of(run: Contents) -> list[Section]:
    """The answer, then the sections of every result; of those with one id, tables stand behind all else."""
    answer = answer_of(run)
    made: dict[str, Section] = {} if answer is None else {answer.id: answer}
    for kind, result in run.results.items():
        reading = reading_of(kind)
        told = Words(reading.words(result)) if kind == run.leads else None
        for section in reading.sections_of(result):
            parts = [part for part in section.parts if part != told]
            if (first := made.get(section.id)) is not None:
                parts = sorted([*first.parts, *parts], key=lambda part: isinstance(part, Table))
            made[section.id] = replace(section, parts=parts)
    return list(made.values())


def answer_of(run: Contents) -> Section | None:
    """The words of the result that leads, and the rule behind it; None where nothing is."""
    if not run.leads:
        return None
    reading, result = reading_of(run.leads), run.results[run.leads]
    words = reading.words(result)
    if run.scan is not None:
        there = [(kind.KIND, run.of(kind)) for kind in (Intervention, Quantisation)]
        told = ["" if one is None else reading_of(kind).in_brief(one) for kind, one in there]
        alone = opening(run.scan)
        if alone and words[: len(alone)] == alone:
            words = [*opening(run.scan, *told), *words[len(alone) :]]
        elif run.leads == run.scan.KIND:  # what was measured of it stands there too
            words = [*words[:1], *filter(None, told), *words[1:]]
    return Section("answer", "Answer", [Words(words, True), *reading.definition(result)])


def page_of_several(runs: Sequence[Contents], compared: Comparison) -> Page:
    """The page of several runs: side by side, then the answer of each."""
    sections = [*comparison.sections(runs, compared), _each(runs)]
    closing = [_provenance_of(run, i) for i, run in enumerate(runs)]
    labels = ", ".join(run.label for run in runs)
    return Page("Massive activations, compared", labels, [*sections, provenance.definitions(sections), *closing])


def _each(runs: Sequence[Contents]) -> Section:
    """The answer of every run on its own, and its coordinates."""
    parts: list[Part | None] = []
    for run in runs:
        name = visible(run.label)
        first, *rest = reading_of(run.leads).words(run.results[run.leads]) if run.leads else ["Nothing was measured."]
        parts.append(Words([f"{name}: {first}", *rest], True))
        if run.scan is not None:
            parts += definition(run.scan)
            rows = run.scan.coordinates.sort_values("count", ascending=False, kind="stable")
            parts.append(table_of("coordinates", rows, f"Coordinates in {name}", most=100))
            if not any(view.n_sequences for view in views(run.scan)):
                parts.append(Words([f"{name}: no sequences were scanned."]))
    return Section("runs", "Each run", parts_of(*parts))


def _provenance_of(run: Contents, place: int) -> Section:
    """The provenance of one of several runs."""
    made = provenance.provenance(run, card_section(run))
    return Section(f"{made.id}-{place + 1}", f"{made.title} of {visible(run.label)}", made.parts)
