"""Results of kinds that other packages add, of which nothing is known but notes and tables."""

from __future__ import annotations

from massact.reports.contents import Contents, words_of
from massact.reports.parts import Part, Section, parts_of, table_of
from massact.reports.readings import READINGS


def of_other_packages(held: Contents) -> Section | None:
    """Results of kinds that other packages add: their words, and every table."""
    parts: list[Part | None] = []
    for kind, result in held.results.items():
        if kind not in READINGS:
            parts.append(words_of(held, kind))
            parts += [table_of(name, rows, f"{kind}: {name}", most=600, shown_first=True)
                      for name, rows in result.tables().items()]  # fmt: skip
    return Section("others", "Results of other packages", parts_of(*parts)) if parts else None
