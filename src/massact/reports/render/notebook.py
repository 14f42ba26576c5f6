"""How a result shows itself in a notebook: its words, and the first rows of its main table."""

from __future__ import annotations

from typing import Any

from massact.reports.kinds import reading_of
from massact.reports.parts import table_of
from massact.reports.render.markup import join, prose, tag

MOST_SENTENCES, MOST_COLUMNS = 8, 10
_CELL = "padding:2px 8px;text-align:"


def notebook_html(result: Any) -> str:
    """A small piece of HTML: no script, no style but its own, everything escaped.

    Args:
        result: of any verb.
    """
    reading = reading_of(result.KIND)
    said, first = reading.words(result), reading.first_rows(result)
    rows = None if first is None else table_of(reading.table, first, reading.table, most=10)
    left = len(said) - MOST_SENTENCES
    more = [tag("li", f"{left:,} more sentences: print it, or massact.report(...)")] if left > 0 else []
    words = [
        tag("p", tag("b", prose(said[0]))),
        tag("ul", *(tag("li", prose(s)) for s in said[1:MOST_SENTENCES]), *more),
    ]
    if rows is None:
        return tag("div", *words)
    columns = rows.columns[:MOST_COLUMNS]
    sides = ["right" if c.numeric else "left" for c in columns]
    heads = [tag("th", c.name, scope="col", style=_CELL + side) for c, side in zip(columns, sides, strict=True)]
    body = [
        tag(
            "tr",
            *(tag("td", tag("bdi", c.shown[i]), style=_CELL + side) for c, side in zip(columns, sides, strict=True)),
        )
        for i in range(rows.n_rows)
    ]
    notes = [tag("p", tag("small", prose(note))) for note in rows.notes]
    whole = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    return str(tag("div", *words, whole, join(notes)))
