"""How a result shows itself in Python: sentences as text, and in a notebook with a figure and a table."""

from __future__ import annotations

import base64
from typing import Any

from massact.reports.kinds import reading_of
from massact.reports.parts import table_of
from massact.reports.render.markup import plain, render_template
from massact.reports.render.terminal import heading, notes_beside

MOST_SENTENCES, MOST_COLUMNS, FEW_SENTENCES = 8, 10, 4
NOTEBOOK_DPI = 80  # a figure of a report is as wide as a page of a notebook


def answer(result: Any) -> str:
    """The first sentences of a result of any verb, plain text, a line each."""
    said = _lines(result)
    more = len(said) - FEW_SENTENCES - 1
    rest = [f"({more:,} more sentence{'s' * (more > 1)}: .summary())"] if more > 0 else []
    return "\n".join([*said[: FEW_SENTENCES + 1], *rest])


def summary(result: Any) -> str:
    """All sentences and notes of a result of any verb, plain text, a line each."""
    notes = notes_beside(result, reading_of(result.KIND).words(result))
    return "\n".join([*_lines(result), *notes])


def _lines(result: Any) -> list[str]:
    """What it is of, then its sentences."""
    reading = reading_of(result.KIND)
    said = [plain(sentence) for sentence in reading.words(result)]
    return [f"{plain(heading(result, reading.noun))}", *said[:1], *(f"- {sentence}" for sentence in said[1:])]


def notebook_html(result: Any) -> str:
    """A small piece of HTML: no script, no style but its own, everything escaped.

    Args:
        result: of any verb.
    """
    reading = reading_of(result.KIND)
    first = reading.first_rows(result)
    rows = None if first is None else table_of(reading.table, first, reading.table, reading.columns, 10)
    columns = [] if rows is None else rows.columns[:MOST_COLUMNS]
    said = reading.words(result)
    figure = _figure(result)
    return render_template("notebook.html", said=said, most=MOST_SENTENCES, rows=rows, columns=columns, figure=figure)


def _figure(result: Any) -> tuple[str, str] | None:
    """Name of the main figure, and its PNG in base64; None where it has none."""
    from massact.reports.render.figures import png_of, shown_figure  # matplotlib is slow to import

    for name, make in reading_of(result.KIND).drawings(result).items():
        if sheet := make(result):
            return name, base64.b64encode(png_of(shown_figure(sheet), NOTEBOOK_DPI)).decode()
    return None
