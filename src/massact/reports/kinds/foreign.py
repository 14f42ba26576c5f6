"""Results of kinds that other packages add, of which nothing is known but notes and tables."""

from __future__ import annotations

from collections.abc import Callable

from massact.records.result import Result
from massact.reports.parts import Section, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import or_dash, visible

MOST_ROWS = 20  # in a terminal


def noted(result: Result) -> list[str]:
    """Whose result it is, and its notes."""
    return [f"A result of {result.VERB}.", *(visible(str(note)) for note in result.info.notes)]


def section(result: Result, words: Callable[[Result], list[str]] = noted) -> Section:
    """Its words, and every table."""
    tables = [
        table_of(name, rows, f"{result.KIND}: {name}", most=600, shown_first=True)
        for name, rows in result.tables().items()
    ]
    return Section("others", "Results of other packages", parts_of(Words(words(result)), *tables))


def brief(result: Result) -> list[Section]:
    """The first rows of every table."""
    made = []
    for name, table in result.tables().items():
        numeric = {c for c, (dtype, _) in result.TABLES[name].items() if dtype in ("int64", "float64")}
        rows = [[or_dash(row[c]) if c in numeric else visible(str(row[c])) for c in table.columns]
                for _, row in table.head(MOST_ROWS).iterrows()]  # fmt: skip
        more = f", {MOST_ROWS} of {len(table):,} rows" if len(table) > MOST_ROWS else ""
        heads = [c if c in numeric else f"<{c}" for c in table.columns]
        made.append(grid(f"{name}{more}", heads, rows))
    return [Section("others", "", parts_of(*made))]


READING = Reading(noted, (section,), brief)
