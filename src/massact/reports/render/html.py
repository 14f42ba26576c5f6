"""Pages as one HTML file that needs no network: style, script and plotly are in it, each once."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import re
from collections.abc import Iterator
from functools import cache, partial
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from massact.reports.pages import Page
from massact.reports.panels import Drawn, Panel, Picture, Scene, Scenes, caption_of
from massact.reports.parts import UNAVAILABLE, Column, Part, Section, Strip, Table
from massact.reports.render.charts import chart, drawable
from massact.reports.render.markup import render_template

# What the page may do: nothing that leaves it. Its own style and script are in it; plotly draws 3-D with functions that
# it makes itself, and saves pictures as blobs.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)


def html(page: Page) -> str:
    """The whole page."""
    drawn = any(isinstance(part, Panel | Scene | Scenes) for section in page.sections for part in section.parts)
    scripts = [*([_data("plotly", "package_data/plotly.min.js")] if drawn else []), _data(__package__, "page.js")]
    functions = {"groups": partial(_groups, itertools.count(1)), "cells": _cells, "frames": _frames, "url": _url}
    functions |= {"chart_of": chart, "caption_of": _caption, "strip_of": _strip, "packed": _packed, "file_of": _file_of}
    style = _data(__package__, "page.css")
    return render_template("page.html", page=page, policy=POLICY, style=style, scripts=scripts, **functions) + "\n"


@cache
def _data(package: str, name: str) -> Markup:
    """A file of a package as it is; plotly's own script comes with its Python package."""
    return Markup((resources.files(package) / name).read_text(encoding="utf-8"))


def _groups(numbers: Iterator[int], section: Section) -> list[tuple[bool, list[tuple[Part, int]]]]:
    """Parts of a section, figures that follow one another together and each with its number."""
    groups = itertools.groupby(section.parts, lambda part: isinstance(part, Drawn))
    return [(drawn, [(part, next(numbers) if drawn else 0) for part in group]) for drawn, group in groups]


def _cells(table: Table) -> list[list[tuple[str, bool, dict[str, Any]]]]:
    """Of every cell what is shown, whether that is a number, and its attributes."""
    return [[_cell(c, row, first=not i) for i, c in enumerate(table.columns)] for row in range(table.n_rows)]


def _cell(column: Column, row: int, first: bool) -> tuple[str, bool, dict[str, Any]]:
    """One cell; of a number the number itself is an attribute, for sorting and copying."""
    shown, value = column.shown[row], column.values[row]
    exact = repr(float(value)) if isinstance(value, float) else str(value) if column.numeric else None
    kind = "n" if column.numeric else "t" if column.name in ("token", "tokens") else None
    if shown == UNAVAILABLE:
        kind, exact = f"{kind or ''} na".strip(), ""
    return shown, column.numeric, {"scope": "row" if first else None, "class": kind, "data-v": exact}


def _packed(rows: pd.DataFrame) -> str:
    """Rows as CSV, gzipped and in base64: a table of a run in a tenth of its bytes."""
    packed = gzip.compress(rows.to_csv(index=False, lineterminator="\r\n").encode(), mtime=0)
    return base64.b64encode(packed).decode("ascii")


def _file_of(table: Table) -> str:
    """A table's title as a file is called."""
    return re.sub(r"\W+", "-", table.title, flags=re.ASCII).strip("-").lower()[:60] + ".csv"


def _strip(part: Strip) -> dict[str, Any]:
    """The numbers of a strip: four digits are seen of them."""
    values, medians = ([[drawable(row, 4) for row in layers] for layers in of] for of in (part.values, part.medians))
    return {"layers": part.layers, "values": values, "dims": part.dims.tolist(), "medians": medians}


def _frames(one: Picture) -> str:
    """The path of the frames on a picture."""
    (height, width), (rows, columns) = one.pixels.shape[:2], one.grid
    across, down = width / columns, height / rows
    return "".join(f"M{x * across:.5g} {y * down:.5g}h{across:.5g}v{down:.5g}h{-across:.5g}z" for y, x in one.framed)


def _url(one: Picture) -> str:
    file = io.BytesIO()  # of photographs a JPEG is a tenth of a PNG
    Image.fromarray(np.asarray(one.pixels, np.uint8)).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _caption(part: Drawn) -> tuple[list[str], list[str]]:
    """What is said of a figure: its title and what to see, then all else."""
    head = bool(part.title) + bool(part.sees)
    said = caption_of(part)
    return said[:head], said[head:]
