"""Results of kinds that other packages add, of which nothing is known but notes and tables."""

from __future__ import annotations

from collections.abc import Callable

from massact.records.result import Result
from massact.reports.parts import Part, Section, Words, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import visible


def words(result: Result) -> list[str]:
    """Whose result it is, and its notes."""
    return [f"A result of {result.VERB}.", *(visible(str(note)) for note in result.info.notes)]


def section(result: Result, tell: Callable[[Result], list[str]] = words) -> Section:
    """Its words, and every table."""
    return Section("others", "Results of other packages", [Words(tell(result)), *_tables(result, 600)])


def brief(result: Result) -> list[Section]:
    """The first rows of every table."""
    return [Section("others", "", _tables(result, 20))]


def _tables(result: Result, most: int) -> list[Part]:
    tables = result.tables().items()
    return parts_of(
        *(table_of(name, rows, f"{result.KIND}: {name}", most=most, shown_first=True) for name, rows in tables)
    )


READING = Reading(words, (section,), brief)
