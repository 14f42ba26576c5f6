"""Sections in a terminal: the words of a result in a frame, then its small tables, as plain text at any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.panel import Panel
from rich.table import Table as Grid
from rich.text import Text

from massact.reports.kinds import reading_of
from massact.reports.parts import UNAVAILABLE, Column, Table
from massact.reports.render.markup import plain
from massact.reports.spelling import visible


def show(result: Any, console: Console) -> None:
    """Print a result of any kind: its words, then its tables.

    Args:
        result: fresh, or of a run directory.
        console: where to; colours and width are its own. Nothing in a result is read as markup, and what the terminal
            cannot encode is escaped.
    """
    reading = reading_of(result.KIND)
    words = reading.words(result)
    console.print(_frame(words, heading(result, reading.noun), console.encoding))
    for note in notes_beside(result, words):
        console.print(_text(note, console.encoding, "dim"))
    for section in reading.brief(result):
        tables = [part for part in section.parts if isinstance(part, Table)]
        if section.title and tables:
            console.print(_text(f"\n{section.title}", console.encoding, "bold underline"))
        for table in tables:
            for piece in _broken(table, console.width):
                console.print()
                console.print(_text(table.title, console.encoding, "bold"))
                console.print(_grid(piece, console.encoding, console.width))
            for note in table.notes:
                console.print(_text(note, console.encoding, "dim"))


def notes_beside(result: Any, words: Sequence[str]) -> list[str]:
    """The notes of a result that its words do not tell."""
    told = "\n".join(words)
    notes = [visible(str(note)) for note in getattr(getattr(result, "info", None), "notes", ())]
    return [note for note in notes if note not in told]


def heading(result: Any, noun: str | None) -> str:
    """'gpt2 on wikitext-2: explanation'."""
    info = getattr(result, "info", None)
    model, corpus = (getattr(info, name, None) or {} for name in ("model", "corpus"))
    names = (model.get("name") or model.get("id"), corpus.get("name"))
    of = " on ".join(visible(str(x)) for x in names if x)
    return ": ".join(x for x in (of, result.KIND if noun is None else noun) if x)


def _text(text: str, encoding: str, style: str = "") -> Text:
    """Text that rich prints as it is, with what the terminal cannot encode escaped."""
    if not encoding.lower().startswith("utf"):
        text = text.replace("±", "+-")
    return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)


def _frame(lines: Sequence[str], title: str, encoding: str) -> Panel:
    """Sentences in a frame, the first in bold."""
    body = Grid.grid(padding=(0, 1))
    body.add_column(width=1)
    body.add_column(overflow="fold")  # an ellipsis is a character that not every terminal has
    for i, line in enumerate(lines):
        body.add_row("-" if i else "", _text(plain(line), encoding, "" if i else "bold"))
    return Panel(
        body,
        title=_text(f" {title} ", encoding) if title else None,
        title_align="left",
        border_style="dim",
        box=box.SQUARE,
    )


def _grid(table: Table, encoding: str, width: int) -> Grid:
    """A table of numbers on the right and words on the left; '-' stands for what is unavailable.

    Where there is no room for whole cells they fold between words, and within these only where that is too wide too.
    """
    least = [
        _width(column) if column.numeric and not column.folds else _longest(column) + 2 for column in table.columns
    ]
    words = sum(least) <= width
    made = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in table.columns:
        side: JustifyMethod = "right" if column.numeric else "left"
        whole = column.numeric and not column.folds
        least_width = _longest(column) if words and not whole else None
        made.add_column(
            _text(column.name, encoding), justify=side, overflow="fold", no_wrap=whole, min_width=least_width
        )
    for i in range(table.n_rows):
        shown = ("-" if (said := column.shown[i]) == UNAVAILABLE else plain(said) for column in table.columns)
        made.add_row(*(_text(said, encoding) for said in shown), style=table.looks[i] if table.looks else "")
    return made


def _broken(table: Table, width: int) -> Iterator[Table]:
    """The table, or where it is too wide as many of its groups of columns at once as there is room for."""
    first, rest, n = table.columns[:1], table.columns[1:], table.abreast or len(table.columns)
    groups = [rest[i : i + n] for i in range(0, len(rest), n)] or [()]
    while groups:
        few = 1
        while few < len(groups) and sum(map(_width, [*first, *(c for g in groups[: few + 1] for c in g)])) <= width:
            few += 1
        yield replace(table, columns=[*first, *(column for group in groups[:few] for column in group)])
        groups = groups[few:]


def _longest(column: Column) -> int:
    """Cells of the longest word of a column."""
    return max(cell_len(word) for text in (column.name, *column.shown) for word in text.split() or [""])


def _width(column: Column) -> int:
    """Cells that a column takes, with the space behind it and that between columns."""
    return 2 + max(cell_len(line) for text in (column.name, *column.shown) for line in text.split("\n"))
