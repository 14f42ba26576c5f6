"""Pages as one HTML file that needs no network: style, script and plotly are in it, each once."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from massact.reports.pages import Page
from massact.reports.parts import (
    UNAVAILABLE,
    Chart,
    Code,
    Column,
    Facts,
    Gallery,
    Part,
    Picture,
    Section,
    Table,
    Words,
)
from massact.reports.render.markup import Markup, inlined_json, join, prose, tag, text
from massact.reports.spelling import counted

# What the page may do: nothing that leaves it. Its own style and script are in it; plotly draws 3-D with functions that
# it makes itself, and saves pictures as blobs.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
FILTERED = 15  # rows from which on a table has a box to filter them


def html(page: Page) -> str:
    """The whole page."""
    drawn = any(isinstance(part, Chart) for section in page.sections for part in section.parts)
    contents = tag("nav", tag("ul", *(tag("li", tag("a", s.title, href=f"#{s.id}")) for s in page.sections)),
                   aria_label="Contents")  # fmt: skip
    head = tag(
        "head", tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("meta", name="generator", content="massact"),
        tag("title", page.title), tag("style", Markup(_data("page.css"))),
    )  # fmt: skip
    top = tag("header", tag("h1", prose(page.title)), tag("p", prose(page.subtitle), class_="subtitle"))
    without = tag("noscript", tag("p", "Figures and sorting need JavaScript; all numbers are in the tables.",
                                  class_="note"))  # fmt: skip
    numbers = itertools.count(1)
    main = tag("main", top, without, *(_section(s, numbers) for s in page.sections))
    scripts = [tag("script", Markup(_plotly()))] if drawn else []
    scripts.append(tag("script", Markup(_data("page.js"))))
    body = tag("body", tag("a", "Skip to the answer", href="#answer", class_="skip"), contents, main, *scripts)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


@cache
def _data(name: str) -> str:
    return (resources.files("massact.reports.render") / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Plotly's own script, which comes with its Python package."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _section(section: Section, numbers: Iterator[int]) -> Markup:
    parts: list[Any] = []
    for together, group in itertools.groupby(section.parts, lambda part: isinstance(part, Chart | Gallery)):
        made = [_part(part, numbers) for part in group]
        parts.append(tag("div", *made, class_="figures") if together else join(made))
    return tag("section", tag("h2", section.title, id=f"{section.id}-title"), *parts, id=section.id,
               aria_labelledby=f"{section.id}-title")  # fmt: skip


def _part(part: Part, numbers: Iterator[int]) -> Markup:
    if isinstance(part, Words):
        return _words(part)
    if isinstance(part, Chart):
        return _chart(part, next(numbers))
    if isinstance(part, Gallery):
        return _gallery(part, next(numbers))
    if isinstance(part, Table):
        return table(part)
    if isinstance(part, Facts):
        return _facts(part)
    return _code(part)


def _words(part: Words) -> Markup:
    lead = part.sentences[:1] if part.lead else []
    rest = part.sentences[len(lead) :]
    first = join(tag("p", prose(s), class_="lead") for s in lead)
    if not rest:
        return first
    if len(part.sentences) == 1:
        return tag("p", prose(rest[0]))
    return join([first, tag("ul", *(tag("li", prose(s)) for s in rest), class_="said")])


def _facts(part: Facts) -> Markup:
    pairs = tag("dl", *(join([tag("dt", name), tag("dd", prose(value, links=True))]) for name, value in part.pairs))
    if not part.open:
        return tag("details", tag("summary", part.title), pairs)
    return join([tag("h3", part.title) if part.title else "", pairs])


def _code(part: Code) -> Markup:
    copy = tag("button", "Copy", type="button", class_="copy")
    body = tag("pre", tag("code", Markup("\n".join(text(line) for line in part.body.split("\n")))), tabindex="0")
    return tag("details", tag("summary", part.title), tag("div", copy, class_="tools"), body)


def _chart(part: Chart, number: int) -> Markup:
    """A figure: what plotly needs is JSON in it, which the script of the page draws."""
    given = inlined_json({"data": part.data, "layout": part.layout, "height": part.height})
    scale = tag("button", "Linear scale", type="button", class_="scale", aria_pressed="false") if part.log else None
    name = f"Figure {number}: {part.title}"
    return tag(
        "figure", _caption(part, number, scale),
        tag("div", class_="plot", role="img", aria_label=name, style=f"height:{part.height}px"),
        tag("script", given, type="application/json"), class_=part.width, id=f"figure-{number}",
    )  # fmt: skip


def _caption(part: Chart | Gallery, number: int, scale: Markup | None = None) -> Markup:
    said = prose(f"{part.title}. {part.caption}".rstrip())
    return tag("figcaption", tag("b", f"Figure {number}. "), said, scale)


def _gallery(part: Gallery, number: int) -> Markup:
    """A figure of pictures, each a drawing of its own: the picture, a shade with holes, and frames."""
    tiles = [tag("div", _drawing(one), tag("span", one.label), class_="tile") for one in part.pictures]
    return tag("figure", _caption(part, number), tag("div", *tiles, class_="gallery"), class_="full",
               id=f"figure-{number}")  # fmt: skip


def _drawing(one: Picture) -> Markup:
    (height, width), (rows, columns) = one.size, one.grid
    across, down = width / columns, height / rows
    frames = "".join(f"M{x * across:.5g} {y * down:.5g}h{across:.5g}v{down:.5g}h{-across:.5g}z" for y, x in one.framed)
    source = f"data:image/jpeg;base64,{base64.b64encode(one.jpeg).decode('ascii')}"
    return tag(
        "svg", tag("title", one.described), tag("image", href=source, width=str(width), height=str(height)),
        tag("path", d=f"M0 0H{width}V{height}H0z{frames}", class_="shade"), tag("path", d=frames, class_="halo"),
        tag("path", d=frames, class_="frame"), viewBox=f"0 0 {width} {height}", role="img", aria_label=one.described,
    )  # fmt: skip


def table(part: Table) -> Markup:
    """A table that sorts, filters and copies; in a box of its own, in which it scrolls."""
    rows = [
        tag("tr", *(_cell(column, i, first=not j) for j, column in enumerate(part.columns))) for i in range(part.n_rows)
    ]
    heads = [tag("th", tag("button", c.name.replace("_", " "), type="button", title=c.meaning), scope="col",
                 aria_sort="none", data_name=c.name, class_="n" if c.numeric else None)
             for c in part.columns]  # fmt: skip
    whole = tag("table", tag("caption", prose(part.title)), tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    search = tag("input", type="search", placeholder="Filter rows", aria_label=f"Filter rows of: {part.title}")
    tools = tag("div", search if part.n_rows >= FILTERED else None,
                tag("button", "Copy as CSV", type="button", class_="csv"), tag("span", class_="told", role="status"),
                class_="tools")  # fmt: skip
    meanings = tag("dl", *(join([tag("dt", c.name), tag("dd", c.meaning)]) for c in part.columns))
    defined = tag("details", tag("summary", "What the columns mean"), meanings, class_="meanings")
    notes = [tag("p", prose(note), class_="note") for note in part.notes]
    box = tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=part.title)
    inside = [tools, box, *notes, defined]
    if part.open:
        return tag("div", *inside, class_="table")
    few = f"{part.n_rows:,} of " if part.n_rows < part.total else ""
    count = f" ({few}{counted(part.total, 'row')})"
    return tag("details", tag("summary", prose(part.title), tag("small", count)), *inside, class_="table")


def _cell(column: Column, row: int, first: bool) -> Markup:
    """One cell: what is shown, and of a number the number itself, for sorting and copying."""
    shown, value = column.shown[row], column.values[row]
    exact = repr(float(value)) if isinstance(value, float) else str(value) if column.numeric else None
    kind = "n" if column.numeric else "t" if column.name in ("token", "tokens") else None
    if shown == UNAVAILABLE:
        kind, exact = f"{kind or ''} na".strip(), ""
    inside = tag("bdi", shown) if not column.numeric else shown
    return tag("th" if first else "td", inside, scope="row" if first else None, class_=kind, data_v=exact)
