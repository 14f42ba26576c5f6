"""What figures are made of, whatever draws them: panels of curves, bars, points and maps over two axes.

A panel is said once. `render/sheets.py` draws it with matplotlib for a file, `render/charts.py` says it in the words
of plotly for a page. Texts are as a reader sees them (`visible`); where something is not finite nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from massact.reports.spelling import number, real, shortened, visible


class Color(StrEnum):
    """The roles of colours: the names that a page has for them, which follow light and dark."""

    BLUE = "--s1"
    ORANGE = "--s2"
    GREEN = "--s3"
    PURPLE = "--s4"
    SLATE = "--s5"
    GREY = "--s6"
    LIMIT = "--limit"
    MUTED = "--muted"
    PAPER = "--paper"
    INK = "--ink"


SERIES = list(Color)[:6]
CLASSES = {"start": Color.BLUE, "delimiter": Color.ORANGE, "padding": Color.PURPLE, "other": Color.GREY}
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
DASHES = ("solid", "dash", "dot", "dashdot")
LARGEST = 1e200  # beyond it a number is as good as infinite: margins and decades around it must still be floats
MOST_TICKS = 8


@dataclass(frozen=True)
class Axis:
    """One side of a panel.

    Args:
        title: what runs along it.
        scale: linear, log, or symlog: linear up to `near` on both sides of zero, logarithmic beyond.
        limits: its ends; the first greater than the second turns it round. None: as the values are.
        ticks: places and labels; None: as the drawer likes, `whole` for whole numbers only.
        grid: whether lines stand at its ticks. hidden: neither line nor ticks.
    """

    title: str = ""
    scale: str = "linear"
    limits: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    whole: bool = False
    near: float = 1.0
    grid: bool = True
    hidden: bool = False

    def placed(self, values: Any) -> np.ndarray:
        """Where values stand: on a symlog axis in units of `near`, a unit for each decade beyond; else as they are."""
        at = np.asarray(values, float)
        if self.scale != "symlog":
            return at
        share = at / self.near
        return np.where(np.abs(share) <= 1, share, np.sign(share) * (1 + np.log10(np.fmax(np.abs(share), 1))))


@dataclass(frozen=True)
class Line:
    """A curve with its points.

    Args:
        x, y: of one length. low, high: a band around it.
        name: in the legend; without one it is not there.
        symbol: of a point, "" for none. dash: of the line, "" for none. edge: colour around each point.
        said: about each point; nothing: its name and place.
    """

    x: Any
    y: Any
    name: str = ""
    color: str = Color.BLUE
    symbol: str = "circle"
    dash: str = "solid"
    low: Any = None
    high: Any = None
    said: Sequence[str] = ()
    edge: str = ""


@dataclass(frozen=True)
class Points:
    """Points with a colour and a symbol each, and how far each reaches along x.

    Args:
        said: about each. told: what is written above each.
    """

    x: Any
    y: Any
    colors: Sequence[str]
    symbols: Sequence[str]
    low: Any
    high: Any
    said: Sequence[str]
    told: Sequence[str] = ()


@dataclass(frozen=True)
class Bars:
    """Bars from zero.

    Args:
        at: their places along the other axis. values: how long they are. low, high: ends of an interval of each.
        colors: one for all, or one each. groups: what the colours stand for, one each.
        flat: whether they lie. thick: share of the distance between two places.
        said: about each. told: what is written behind each. what: its unit, in words.
    """

    at: Any
    values: Any
    name: str = ""
    colors: str | Sequence[str] = Color.SLATE
    groups: Sequence[str] = ()
    low: Any = None
    high: Any = None
    flat: bool = False
    thick: float = 0.72
    said: Sequence[str] = ()
    told: Sequence[str] = ()
    what: str = ""


@dataclass(frozen=True)
class Heat:
    """A map of values.

    Args:
        values: (rows, columns). x, y: centres of columns and rows, or their edges, one more.
        what: name of the values. log: whether they are on a log scale, where only those above zero are drawn.
        low, high: ends of the scale; None: those of the values.
        said: about each value.
    """

    values: Any
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    what: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None
    said: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Limit:
    """A broken line across the panel at a value of y (of x if `upright`), with its name."""

    value: float
    name: str = ""
    upright: bool = False
    color: str = Color.LIMIT


@dataclass(frozen=True)
class Note:
    """Words in a panel at (x, y); without y at its upper edge. They begin there, or end there if `ends`."""

    x: float
    text: str
    y: float | None = None
    ends: bool = False


@dataclass(frozen=True)
class Panel:
    """Series over two axes.

    Args:
        title, caption: plain text. note: what must be read with the figure wherever it stands.
        sees: a sentence that says what to see, to who does not know the words of the title; it stands before all else.
        limits, shades, notes: lines across, (first, last) along x that are shaded, words.
        height: pixels on a page. width: "full", "half" or "third" of it.
        both: y is a log axis, and wanted on a linear one, too: side by side in a file, by a button on a page.
        square: whether one step is as long along x as along y.
        empty: what is said where there is nothing to draw.
    """

    title: str
    series: Sequence[Line | Points | Bars | Heat] = ()
    x: Axis = Axis()
    y: Axis = Axis()
    caption: str = ""
    note: str = ""
    limits: Sequence[Limit] = ()
    shades: Sequence[tuple[float, float]] = ()
    notes: Sequence[Note] = ()
    sees: str = ""
    height: int = 300
    width: str = "half"
    both: bool = False
    square: bool = False
    empty: str = "unavailable"

    def __bool__(self) -> bool:
        return bool(self.series)


@dataclass(frozen=True)
class Scene:
    """|h| of one sequence over positions and dims, in three dimensions.

    Args:
        curves: of each token: its label, its position, dims and |h| there. n_dims: how many dims there are.
        spikes: (place among the curves, dim, |h|) of what is massive. ticks: dims that are named.
        named: (which of the spikes, what is written at it). sides: titles of the three axes.
        top: end of the upright axis. note: what must be read with it. empty: said where there is nothing to draw.
    """

    title: str
    curves: Sequence[tuple[str, int, np.ndarray, np.ndarray]] = ()
    n_dims: int = 1
    spikes: Sequence[tuple[int, int, float]] = ()
    ticks: Sequence[int] = ()
    top: float = 1.0
    caption: str = ""
    note: str = ""
    sees: str = ""
    height: int = 300
    width: str = "third"
    empty: str = "All values are NaN or Inf."
    named: Sequence[tuple[int, str]] = ()
    sides: tuple[str, str, str] = ("Token", "Dim", "|h|")

    def __bool__(self) -> bool:
        return bool(self.curves)


@dataclass(frozen=True)
class Scenes:
    """Scenes with the same axes, one of them large: on a page a slider goes through them, a file has the others beside.

    Args:
        scenes: none of them empty. shown: which is large at first.
    """

    title: str
    scenes: Sequence[Scene] = ()
    shown: int = 0
    caption: str = ""
    note: str = ""
    sees: str = ""
    height: int = 560
    width: str = "full"
    empty: str = "All values are NaN or Inf."

    def __bool__(self) -> bool:
        return bool(self.scenes)


@dataclass(frozen=True)
class Picture:
    """A picture of a gallery, cells of a grid over it that are framed, and what is said below it.

    Args:
        pixels: (height, width) or (height, width, 3), uint8.
        grid: (rows, columns) of the grid. framed: (row, column) of each frame.
        label: plain text. described: the picture in words, for who points at it or cannot see it.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    framed: Sequence[tuple[int, int]]
    label: str
    described: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, a figure that needs no script; what is not framed is dimmed."""

    title: str
    pictures: Sequence[Picture]
    caption: str = ""
    note: str = ""
    sees: str = ""


Drawn = Panel | Scene | Scenes | Gallery


@dataclass(frozen=True)
class Sheet:
    """What one file of figures shows: parts in rows as on a page, under a title; `page`: whether a page has room."""

    parts: Sequence[Drawn]
    title: str = ""
    page: bool = True

    def __bool__(self) -> bool:
        return bool(self.parts)


def slides_of(sheet: Sheet) -> list[Sheet]:
    """A sheet for each of its parts, and for each scene, the large one first; of two scales the log one."""
    made: list[Drawn] = []
    for part in sheet.parts:
        if isinstance(part, Scenes) and part:
            rest = [scene for i, scene in enumerate(part.scenes) if i != part.shown]
            made += [replace(part, scenes=[scene], shown=0) for scene in (part.scenes[part.shown], *rest)]
        elif isinstance(part, Scene):
            made.append(Scenes("", [part] * bool(part), empty=part.empty))
        else:
            made.append(replace(part, both=False, width="full") if isinstance(part, Panel) else part)
    return [replace(sheet, parts=[part]) for part in made]


def parts_in(sheet: Sheet | None) -> list[Any]:
    """The parts of a sheet, for a page; none of none."""
    return list(sheet.parts) if sheet is not None else []


def unmeasured() -> Sheet:
    """The figure of a scan of nothing."""
    return Sheet([Panel("", empty="Nothing was measured: no sequences.", height=200, width="full")])


def caption_of(part: Drawn) -> list[str]:
    """What stands with a figure, in this order: its title, what to see, its caption, and the note if that lacks it."""
    note = "" if part.note.rstrip(".") in part.caption else part.note
    return [f"{text.rstrip('.')}." for text in (part.title, part.sees, part.caption, note) if text]


def headed(head: str, title: str) -> str:
    """'encoder: title', or the title alone."""
    return f"{head}: {title}" if head else title


def looks(n: int) -> list[dict[str, str]]:
    """n colours with a symbol each; beyond the colours also another dash."""
    return [
        {
            "color": SERIES[i % len(SERIES)],
            "symbol": SYMBOLS[i % len(SYMBOLS)],
            "dash": DASHES[i // len(SERIES) % len(DASHES)],
        }
        for i in range(n)
    ]


def column(rows: Any, name: str) -> np.ndarray:
    """One column of a table as floats; NaN for what is missing or no number."""
    return np.array([real(v) for v in rows[name]], float)


def token_label(token: Any, limit: int = 14) -> str:
    """A token for the axis of a prompt, as in Fig. 1: without the space in front."""
    text = token if isinstance(token, str) else ""
    return shortened(visible(text.strip(" ")), limit) or (quoted_label(text, limit) if text else "(no token)")


def quoted_label(token: Any, limit: int = 22) -> str:
    """A token in quotes, where ' and' and 'and' must not look the same."""
    return f"\u201c{shortened(visible(token), limit)}\u201d" if isinstance(token, str) and token else "(no token)"


# ---- axes
def layer_axis(n_layers: int) -> Axis:
    """Layers 0 to L with ticks at 1, L/4, L/2, 3L/4 and L, as in Fig. 4."""
    quarters = {1, *(round(n_layers * q / 4) for q in (1, 2, 3, 4))} - {0}
    ticks = sorted(quarters) if n_layers >= 8 else range(n_layers + 1)
    margin = max(0.5, 0.02 * n_layers)
    return Axis("Layer", limits=(-margin, n_layers + margin), ticks=[(float(t), str(t)) for t in ticks])


def linear_axis(values: Any, title: str = "") -> Axis:
    """From 0 to a little above the greatest of the values."""
    known = _known(values)
    return Axis(title, limits=(0.0, float(known.max()) * 1.13 if known.size and known.max() > 0 else 1.0))


def log_axis(values: Any, title: str = "") -> Axis:
    """A log scale over the whole decades around what can be drawn on it, one at least, with plain numbers as ticks."""
    known = _known(values)
    known = known[known > 1 / LARGEST]
    low, high = (math.floor(np.log10(known.min())), math.ceil(np.log10(known.max()))) if known.size else (0, 1)
    high = max(high, low + 1)
    powers = [10.0**p for p in range(low, high + 1, -(-(high - low) // MOST_TICKS))]
    return Axis(title, "log", (10.0 ** (low - 0.1), 10.0 ** (high + 0.1)), [(p, number(p)) for p in powers])


def symlog_axis(values: Any, near: float, title: str) -> Axis:
    """Both sides of zero: linear within `near`, logarithmic beyond, as the title says; either side is always there."""
    known = _known(values)
    axis = Axis(f"{title}; linear within \u00b1{number(near)}, then log", "symlog", near=near)
    least, most = axis.placed([known.min(initial=-near), known.max(initial=near)])
    ends = (float(least) - 0.4, float(most) + 0.4)
    step = -(-math.ceil(ends[1] - ends[0]) // MOST_TICKS)
    up, down = (range(1, math.floor(end) + 1, step) for end in (ends[1], -ends[0]))
    ticks = [*(-_unplaced(i, near) for i in reversed(down)), 0.0, *(_unplaced(i, near) for i in up)]
    limits = (-_unplaced(-ends[0], near), _unplaced(ends[1], near))
    return replace(axis, limits=limits, ticks=[(x, number(x)) for x in ticks])


def _unplaced(at: float, near: float) -> float:
    """The value beyond `near` that stands at a place of a symlog axis."""
    return float(near * 10.0 ** (at - 1))


def share_axis(title: str = "") -> Axis:
    """From 0 to 1."""
    return Axis(title, limits=(-0.03, 1.03))


def named_axis(labels: Sequence[str], title: str = "", slots: int = 4) -> Axis:
    """Names at 0, 1, ... from the top down, with room for `slots`: bars of panels side by side are equally thick."""
    ends = (max(len(labels), slots) - 0.5, -0.5)
    return Axis(title, limits=ends, ticks=[(float(i), label) for i, label in enumerate(labels)], grid=False)


def cell_axis(title: str, at: Sequence[int]) -> Axis:
    """Whole numbers with room for a cell around each."""
    ticks, ends = thinned(at, [str(i) for i in at]), (at[0] - 0.5, at[-1] + 0.5) if len(at) else None
    return Axis(title, limits=ends, ticks=ticks, grid=False)


def thinned(places: Iterable[float], labels: Sequence[str], most: int = MOST_TICKS) -> list[tuple[float, str]]:
    """Ticks at some of the places, evenly, as many as have room."""
    ticks = [(float(x), label) for x, label in zip(places, labels, strict=True)]
    return ticks[:: max(1, -(-len(ticks) // most))]


def _known(values: Any) -> np.ndarray:
    flat = np.asarray(values, float).ravel()
    return flat[np.abs(flat) < LARGEST]


def shown(values: Any, log: bool = False) -> np.ndarray:
    """NaN where a value cannot be drawn: Inf and its like, and what is not above 0 on a log axis."""
    given = np.asarray(values, float)
    return np.where((np.abs(given) < LARGEST) & ((given > 1 / LARGEST) | (not log)), given, np.nan)


def ends_of(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The least and the greatest that is finite; `low` and `high` where nothing is."""
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (low, high)


def scale_ticks(low: float, high: float) -> list[float]:
    """Ones, twos and fives of the decades between two numbers above zero, 8 at most."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return ticks[:: -(-len(ticks) // MOST_TICKS)] if ticks else [low, high]
