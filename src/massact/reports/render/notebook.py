"""How a result shows itself in a notebook: its words, and the first rows of its main table."""

from __future__ import annotations

from typing import Any

from massact.reports.kinds import reading_of
from massact.reports.parts import table_of
from massact.reports.render.markup import render_template

MOST_SENTENCES, MOST_COLUMNS = 8, 10


def notebook_html(result: Any) -> str:
    """A small piece of HTML: no script, no style but its own, everything escaped.

    Args:
        result: of any verb.
    """
    reading = reading_of(result.KIND)
    first = reading.first_rows(result)
    rows = None if first is None else table_of(reading.table, first, reading.table, most=10)
    columns = [] if rows is None else rows.columns[:MOST_COLUMNS]
    said = reading.words(result)
    return render_template("notebook.html", said=said, most=MOST_SENTENCES, rows=rows, columns=columns)
