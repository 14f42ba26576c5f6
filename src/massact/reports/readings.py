"""How a kind of result is read: what its words, its sections and its figures are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from massact.reports.panels import Drawn, Sheet
from massact.reports.parts import Part, Section


def _nothing(result: Any) -> Sequence[Any]:
    return ()


@dataclass(frozen=True)
class Reading:
    """How one kind of result is read.

    Args:
        words: its sentences, the answer first.
        sections: each gives a section of a page, or None where the result holds nothing of it. Where its words stand
            in one of them, they are left out if they are the answer of the page already.
        brief: sections of small tables, for a terminal.
        definition: parts of a page behind the answer: the rule that it goes by.
        noun: what it is called above its words, behind the names of model and corpus; None: its kind.
        figures: name of the file -> its sheet of panels; None where there is nothing to show.
        table: the one whose first rows stand for it. by: the column whose greatest come first; "": as they lie.
            columns: those of it that stand for it; nothing: all.
        in_brief: a sentence at the top of a page that another result leads; "" for none.
    """

    words: Callable[[Any], list[str]]
    sections: Sequence[Callable[[Any], Section | None]] = ()
    brief: Callable[[Any], Sequence[Section]] = _nothing
    definition: Callable[[Any], Sequence[Part]] = _nothing
    noun: str | None = None
    figures: Mapping[str, Callable[[Any], Sheet | None]] = field(default_factory=dict)
    table: str = ""
    by: str = ""
    columns: Sequence[str] = ()
    in_brief: Callable[[Any], str] = lambda _: ""

    def sections_of(self, result: Any) -> list[Section]:
        """Its sections of a page; figures that none of them shows stand in one of their own."""
        made = [section for make in self.sections if (section := make(result)) is not None]
        shown = {getattr(part, "title", "") for section in made for part in section.parts}
        sheets = [sheet for draw in self.figures.values() if (sheet := draw(result)) is not None and sheet.page]
        sheets = [sheet for sheet in sheets if not shown & {part.title for part in sheet.parts}]
        left = [part for sheet in sheets for part in sheet.parts if part]
        return [*made, *([Section("figures", "Figures", left)] if left else [])]

    def drawings(self, result: Any) -> Mapping[str, Callable[[Any], Sheet | None]]:
        """Name -> what draws it, the main figure first; of a kind without figures the panels of its sections."""
        if self.figures:
            return self.figures
        parts = [part for section in self.sections_of(result) for part in section.parts if isinstance(part, Drawn)]
        return {result.KIND: lambda _: Sheet(parts)} if parts else {}

    def first_rows(self, result: Any) -> pd.DataFrame | None:
        """The rows of its main table, those first that a reader wants first."""
        if not self.table:
            return None
        rows: pd.DataFrame = getattr(result, self.table)
        return rows.sort_values(self.by, ascending=False, kind="stable") if self.by else rows
