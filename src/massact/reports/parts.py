"""What a page is made of, whatever it is written as: sections of words, tables, panels and definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from massact.records.tables import all_columns
from massact.reports.panels import Drawn, Panel, Scene, Scenes
from massact.reports.render.markup import cut
from massact.reports.spelling import cell, listed, token_list, visible

MOST_ROWS, MOST_SAVED = 200, 20_000  # shown, and saved from a page
TOKEN_LIMIT = 40
# Whole numbers that name something: no separators in them, and -1 stands for none.
NAMES = {"layer", "dim", "pos", "position", "head", "neuron", "expert", "sequence", "token_id", "step", "rank", "seed"}
# Left out where they are the same in every row; what is not clear from the title is told.
TOLD = {"cluster", "group", "origin"}
SAME = {"stack", "site", "modality", "mixer", "median_so_far", *TOLD}
TOKENS = {"token", "tokens"}
UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Words:
    """Sentences; the first one leads if `lead`."""

    sentences: Sequence[str]
    lead: bool = False


@dataclass(frozen=True)
class Column:
    """A column: its name in the file, what it means, its values as they are and as they are shown.

    Args:
        folds: whether its cells may take several lines where room is scarce, as words do anyway.
    """

    name: str
    meaning: str
    values: Sequence[Any]
    shown: Sequence[str]
    numeric: bool
    folds: bool = False


@dataclass(frozen=True)
class Table:
    """A table of a run.

    Args:
        title: what it is of.
        columns: all of one length.
        notes: what is left out, and what is unavailable, a sentence each.
        total: rows that there are in the file.
        open: whether it is shown at once; otherwise it is folded under its title.
        looks: of every row "", "dim" or "red", where there are colours.
        abreast: so many columns, behind the first, go together; where there is no room for all, the table breaks
            between such groups. 0: it does not break.
        whole: its rows as they lie in the file, up to a bound, to be saved from a page; None: as they are shown.
    """

    title: str
    columns: Sequence[Column]
    total: int
    notes: Sequence[str] = ()
    open: bool = False
    looks: Sequence[str] = ()
    abreast: int = 0
    whole: pd.DataFrame | None = None

    @property
    def n_rows(self) -> int:
        return len(self.columns[0].values) if self.columns else 0


@dataclass(frozen=True)
class Facts:
    """Names and what they are: provenance, definitions. Values are plain text."""

    pairs: Sequence[tuple[str, str]]
    title: str = ""
    open: bool = True


@dataclass(frozen=True)
class Code:
    """Text to copy as it is."""

    title: str
    body: str


@dataclass(frozen=True)
class Strip:
    """Texts whose tokens are coloured by their size at a point and layer that the reader of a page chooses.

    Args:
        title: what it is of. sees: what to see.
        texts: of each its tokens, as they are shown, with their positions; N in all.
        points, layers: to choose from, Q and L.
        values, dims: (Q, L, N) signed and NaN where there is none, its dim.
        medians: (Q, L, K) of each text.
        shown: the point and the layer that come first, by their places.
    """

    title: str
    sees: str
    texts: Sequence[Sequence[tuple[str, int]]]
    points: Sequence[str]
    layers: Sequence[int]
    values: np.ndarray
    dims: np.ndarray
    medians: np.ndarray
    shown: tuple[int, int]


Part = Words | Table | Drawn | Facts | Code | Strip


@dataclass(frozen=True)
class Section:
    """A section of the page: an id for links, a title, and its parts in order."""

    id: str
    title: str
    parts: Sequence[Part]


def shown_value(name: str, dtype: str, value: Any) -> str:
    """A value of a table as a reader sees it; what is not there is said, never blank and never zero."""
    if value is None or value is pd.NA:
        return UNAVAILABLE
    if dtype == "bool":
        return "yes" if value else "no"
    if dtype == "int64":
        if name in NAMES:
            return "none" if int(value) == -1 else str(int(value))
        return f"{int(value):,}"
    if dtype == "float64":
        return UNAVAILABLE if math.isnan(float(value)) else cell(value)
    if name == "tokens":
        return ", ".join(f"\u201c{cut(visible(t), TOKEN_LIMIT)}\u201d" for t in token_list(value)[:6]) or "none"
    if name == "token":
        return f"\u201c{cut(visible(value), TOKEN_LIMIT)}\u201d" if value else "no token"
    return cut(visible(str(value)), 120) or "none"


def table_of(
    name: str,
    rows: pd.DataFrame,
    title: str,
    columns: Sequence[str] = (),
    most: int = MOST_ROWS,
    *,
    shown_first: bool = False,
) -> Table | None:
    """Rows of a run's table, with the meaning of every column.

    Args:
        name: of the table in `massact.records.tables`.
        rows: in the order in which they are to be shown.
        title: what they are.
        columns: only these; nothing: all.
        most: no more rows than these; a note says how many there are.
        shown_first: not folded.

    Returns:
        None without rows. Columns without any value are left out and named in a note; a stack, site, mixer or modality
        that is the same everywhere is left out, a cluster or group with a note.
    """
    if not len(rows):
        return None
    declared, few = all_columns(name, rows), rows.head(most)
    kept: list[Column] = []
    missing: list[str] = []
    same: list[str] = []
    for column in columns or declared:
        dtype, meaning = declared[column]
        values = few[column].tolist()
        if column in SAME and len(rows) > 1 and rows[column].fillna("").nunique() == 1:
            same += [f"{column} {shown_value(column, dtype, values[0])}"] if column in TOLD and values[0] else []
            continue
        if dtype == "float64" and rows[column].isna().all():
            missing.append(column)
            continue
        shown = [shown_value(column, dtype, v) for v in values]
        kept.append(Column(column, meaning, values, shown, dtype in ("int64", "float64")))
    notes = []
    if len(rows) > most:
        notes.append(f"{most:,} of {len(rows):,} rows; all are in {name}.parquet.")
    if len(rows) > MOST_SAVED:
        notes.append(f"Saved as CSV: the first {MOST_SAVED:,} rows.")
    if same:
        notes.append(f"The same in every row: {listed(same)}.")
    if missing:
        notes.append(f"Unavailable in this run: {listed(missing)}.")
    return Table(title, kept, len(rows), notes, shown_first, whole=rows.head(MOST_SAVED))


def grid(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], looks: Sequence[str] = (), abreast: int = 0
) -> Table | None:
    """A small table of cells that are spelled already, for narrow places; None without rows.

    Args:
        title: what it is of.
        heads: over the columns, with line breaks where they are long. `<` in front: cells of words, on the left, which
            fold; `>`: on the right, which fold; `=` or nothing: numbers, on the right.
        rows: cells, as many as there are heads.
        looks, abreast: see `Table`.
    """
    cells = list(zip(*rows, strict=True)) if rows else []
    columns = [
        Column(head[head[:1] in tuple("<>=") :], "", shown, shown, head[:1] != "<", head[:1] == ">")
        for head, shown in zip(heads, cells, strict=False)
    ]
    return Table(title, columns, len(rows), (), True, looks, abreast) if rows else None


def narrow(
    table: Table | None, title: str, heads: Mapping[str, str] | None = None, looks: Sequence[str] = ()
) -> Table | None:
    """A table for narrow places: under another title, those of some columns that it has, under short heads."""
    if table is None:
        return None
    columns = table.columns
    if heads is not None:
        columns = [replace(column, name=heads[column.name]) for column in columns if column.name in heads]
    return replace(table, title=title, columns=columns, looks=looks)


def parts_of(*parts: Part | None) -> list[Part]:
    """Those parts that are there, and have something to draw."""
    return [part for part in parts if part]


def said_where_empty(drawn: Sequence[Panel | Scene | Scenes], tail: str = ".") -> list[Part]:
    """Panels, and a sentence instead of each that has nothing to draw."""
    said = [f"{part.title}: {part.empty[:1].lower()}{part.empty[1:].rstrip('.')}{tail}" for part in drawn]
    return [part or Words([sentence]) for part, sentence in zip(drawn, said, strict=True)]
