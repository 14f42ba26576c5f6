"""Panels drawn with matplotlib: rows of them on a sheet, with one legend where they agree, as a page has them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from massact.reports import panels
from massact.reports.panels import Axis, Bars, Color, Drawn, Gallery, Heat, Line, Panel, Points, Scene, Scenes, Sheet
from massact.reports.render.lettering import drawable, says
from massact.reports.render.solid import LARGE, draw_large, draw_scenes
from massact.reports.spelling import number

# What the names of colours are on white paper; those of Fig. 4 of Sun 2024 among them.
PAINT = {
    "--s1": "#4a7fd4",
    "--s2": "#d98a29",
    "--s3": "#3a9d5d",
    "--s4": "#8a5bb8",
    "--s5": "#5b6770",
    "--s6": "#7a7a7a",
    "--limit": "#b5543c",
    "--muted": "#666666",
    "--paper": "#ffffff",
    "--ink": "#000000",
}
MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
    "x": "x",
    "": "",
}
STROKES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1, 1.4)), "dashdot": "-.", "": "none"}
UNITS, INCHES_A_UNIT, INCHES_A_PIXEL = {"full": 6, "half": 3, "third": 2}, 1.75, 0.0088
MOST_IN_A_ROW = 7
Legend = dict[tuple[str, str], Any]  # (name, colour) -> what stands for it
Cell = tuple[int, float, Callable[[Axes], None]]


def figure_of(sheet: Sheet, size: tuple[float, float] | None = None) -> Figure:
    """Draw the parts of a sheet, in rows as wide as a page where they fill it; `size` in inches, None: as they need."""
    if sheet.parts and isinstance(sheet.parts[0], Scenes):
        return draw_large(sheet.parts[0], sheet.title, size or LARGE)
    if scenes := [part for part in sheet.parts if isinstance(part, Scene)]:
        return draw_scenes(scenes, sheet.title)
    legend: Legend = {}
    rows: list[list[Cell]] = [[]]
    for cell in (cell for part in sheet.parts for cell in _cells(part, legend)):
        if rows[-1] and sum(units for units, *_ in rows[-1]) + cell[0] > UNITS["full"]:
            rows.append([])
        rows[-1].append(cell)
    across = max(sum(units for units, *_ in row) for row in rows)
    heights = [max(height for _, height, _ in row) for row in rows]
    size = size or (INCHES_A_UNIT * across, sum(heights) + 0.3 * bool(sheet.title) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
    for i, row in enumerate(rows):
        widths = [units for units, *_ in row]
        left = [across - sum(widths)] * (across > sum(widths))
        cells = grid[i].subgridspec(1, len(widths + left), width_ratios=widths + left)
        for j, (_, _, draw) in enumerate(row):
            draw(figure.add_subplot(cells[j]))
    sees = [
        textwrap.fill(drawable(p.sees, 400), int(size[0] * 13))
        for p in sheet.parts
        if isinstance(p, Gallery) and p.sees
    ]
    if sheet.title or sees:
        figure.suptitle("\n".join([drawable(sheet.title, 100), *sees]), x=0.01, ha="left", fontsize=10)
    named = {key: handle for key, handle in legend.items() if key[0]}
    if len(named) > 1:
        columns = max(1, min(len(named), int(size[0] / 1.7)))
        labels = [_label(name) for name, _ in named]
        figure.legend(list(named.values()), labels, loc="outside lower center", ncols=columns)
    return figure


def _cells(part: Drawn, legend: Legend) -> list[Cell]:
    """The parts of a row that a part takes: width, inches of height, and what draws it."""
    if isinstance(part, Gallery):
        down = -(-len(part.pictures) // MOST_IN_A_ROW)
        return [(min(6, len(part.pictures) + 1), 1.8 * down + 0.4, lambda axes: _gallery(axes, part))]
    assert isinstance(part, Panel)
    units, height = UNITS[part.width], part.height * INCHES_A_PIXEL
    if part.both and part:
        drawn = (partial(_panel, panel=part, log=log, legend=legend) for log in (False, True))
        return [(units // 2, height, draw) for draw in drawn]
    return [(units, height, lambda axes: _panel(axes, part, True, legend))]


def _panel(axes: Axes, panel: Panel, log: bool, legend: Legend) -> None:
    """One panel; of one that is wanted on both scales that with or without `log`, the note on the first's right."""
    heads = not (panel.both and panel and log)
    _head(axes, [panel.title] * heads + [panel.note] * bool(panel.note and log), panel.sees if heads else "")
    if not panel:
        says(axes, panel.empty)
        return
    if panel.both and not log:
        values = np.concatenate([np.asarray(line.y, float) for line in panel.series if isinstance(line, Line)])
        panel = replace(panel, y=panels.linear_axis(values, panel.y.title))
    elif panel.both:
        panel = replace(panel, y=replace(panel.y, title=f"{panel.y.title} (log)"))
    _axis(axes, panel.x, "x")
    _axis(axes, panel.y, "y")
    for first, last in panel.shades:
        axes.axvspan(first, last, color="#000000", alpha=0.045, linewidth=0, zorder=0)
    for series in panel.series:
        DRAW[type(series)](axes, series, panel, legend)
    _words(axes, panel)
    if panel.square:
        axes.set_aspect("equal")


def _head(axes: Axes, lines: list[str], sees: str) -> None:
    """Lines above a panel, and smaller below them what to see."""
    inches, pad = _inches(axes), 6.0
    if sees:
        small = textwrap.fill(drawable(sees, 400), max(int(inches * 16.5), 24))
        look: dict[str, Any] = {"fontsize": 8, "color": PAINT[Color.MUTED], "linespacing": 1.15}
        axes.annotate(small, (0, 1), (0, 5), "axes fraction", "offset points", va="bottom", **look)
        pad += 8 * 1.38 * (small.count("\n") + 1)
    wrapped = [textwrap.fill(drawable(line, 160), max(int(inches * 14.5), 20)) for line in lines]
    axes.set_title("\n".join(wrapped), fontsize=9, pad=pad)


def _inches(axes: Axes) -> float:
    """How wide axes are."""
    assert isinstance(axes.figure, Figure)
    return axes.get_position().width * axes.figure.get_size_inches()[0]


def _axis(axes: Axes, axis: Axis, side: Literal["x", "y"]) -> None:
    """Scale, ends, ticks and name of one side."""
    along = getattr(axes, f"{side}axis")
    if axis.scale != "linear":
        getattr(axes, f"set_{side}scale")(axis.scale, **({"linthresh": axis.near} if axis.scale == "symlog" else {}))
    if axis.limits is not None:
        getattr(axes, f"set_{side}lim")(*axis.limits)
    along.set_major_formatter(FuncFormatter(lambda v, _: number(v, 6)))
    along.set_minor_formatter(NullFormatter())
    if axis.ticks is not None:
        labels = [drawable(label, min(max(len(label), 16), 40)) for _, label in axis.ticks]
        many, width = len(labels) > 16, _inches(axes)
        look: dict[str, Any] = {"fontsize": 6.5} if many else {}
        if side == "x" and sum(map(len, labels)) > 11 * width:
            look |= {"rotation": 90} if many else {"rotation": 30, "ha": "right"}
        along.set_major_locator(FixedLocator([place for place, _ in axis.ticks]))
        getattr(axes, f"set_{side}ticklabels")(labels, **look)
    elif axis.scale == "linear":
        along.set_major_locator(MaxNLocator(6, integer=axis.whole))
    if axis.hidden:
        along.set_visible(False)
    if not axis.grid and axis.ticks is not None:
        axes.tick_params(axis=side, length=0)
    getattr(axes, f"set_{side}label")(drawable(axis.title, 100))


def _words(axes: Axes, panel: Panel) -> None:
    """Lines across with their names, and notes."""
    right, above = axes.get_yaxis_transform(), axes.get_xaxis_transform()  # one side in data, the other a share
    for limit in panel.limits:
        draw = axes.axvline if limit.upright else axes.axhline
        color, label = PAINT[limit.color], drawable(limit.name, 60)
        look: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (4, 3))} if label else {"linewidth": 0.6}
        draw(limit.value, color=color, zorder=1, label=label or "_", **look)
        low, high = sorted(axes.get_xlim() if limit.upright else axes.get_ylim())
        if not low <= limit.value <= high:
            continue  # its name would lie outside of the panel
        if limit.upright:
            axes.text(limit.value, 1.0, f"{label} ", ha="right", va="top", color=color, fontsize=7.5, transform=above)
        else:
            axes.text(0.005, limit.value, label, va="bottom", color=color, fontsize=7.5, transform=right)
    for note in panel.notes:
        text, side = (f"{drawable(note.text)} ", "right") if note.ends else (f" {drawable(note.text)}", "left")
        look = {"ha": side, "fontsize": 7.5, "color": PAINT[Color.MUTED]}
        if note.y is None:
            axes.text(note.x, 0.985, text, va="top", transform=above, **look)
        else:
            axes.text(note.x, note.y, text, va="bottom", **look)


def _label(name: str) -> str:
    """A name for a legend, which would leave out one that begins with an underscore."""
    label = drawable(name, 34)
    return f" {label}" if label.startswith("_") else label


# ---- series
def _line(axes: Axes, line: Line, panel: Panel, legend: Legend) -> None:
    color, log = PAINT[line.color], panel.y.scale == "log"
    x, y, thin = np.asarray(line.x, float), panels.shown(line.y, log), line.symbol == ""
    look: dict[str, Any] = {"marker": MARKERS[line.symbol], "linestyle": STROKES[line.dash], "clip_on": bool(line.dash)}
    look |= {"markersize": (3.5 if line.dash else 4.5) if len(y) <= 60 else 2.0, "linewidth": 0.9 if thin else 1.2}
    look |= {"markeredgecolor": PAINT[line.edge], "markeredgewidth": 0.6} if line.edge else {}
    drawn = axes.plot(x, y, color=color, label=_label(line.name) or "_", zorder=3 if line.dash else 4, **look)[0]
    if line.low is not None:
        ends = panels.shown(line.low, log), panels.shown(line.high, log)
        axes.fill_between(x, *ends, color=color, alpha=0.17, linewidth=0, zorder=2)
    legend.setdefault((line.name, color), drawn)


def _points(axes: Axes, points: Points, panel: Panel, legend: Legend) -> None:
    x, at = panels.shown(points.x), np.asarray(points.y, float)
    reach = _reach(x, points.low, points.high)
    axes.errorbar(x, at, xerr=reach, fmt="none", ecolor=PAINT["--s5"], capsize=3, linewidth=1, zorder=2)
    for one, place, color, symbol in zip(x, at, points.colors, points.symbols, strict=True):
        axes.plot([one], [place], color=PAINT[color], marker=MARKERS[symbol], markersize=6, linestyle="none", zorder=3)
    look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
    for one, place, text in zip(x, at, points.told, strict=False):
        if np.isfinite(one):
            axes.annotate(drawable(text), (one, place), (0, 5), color="#444444", **look)


def _reach(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """How far intervals reach to both sides; 0 where an end is not finite."""
    a, b = np.asarray(low, float), np.asarray(high, float)
    reach = np.array([values - a, b - values])
    return np.where(np.isfinite(reach).all(axis=0) & (reach >= 0).all(axis=0), reach, 0.0)


def _bars(axes: Axes, bars: Bars, panel: Panel, legend: Legend) -> None:
    """Bars, side by side with others at their places, and what is told behind each."""
    beside = [id(one) for one in panel.series if isinstance(one, Bars)]
    thick = bars.thick / len(beside)
    at = np.asarray(bars.at, float) + (beside.index(id(bars)) - (len(beside) - 1) / 2) * thick
    values = panels.shown(bars.values)
    colors = [PAINT[c] for c in ([bars.colors] * len(at) if isinstance(bars.colors, str) else bars.colors)]
    draw = axes.barh if bars.flat else axes.bar
    draw(at, np.nan_to_num(values), thick, color=colors)
    if bars.low is not None:
        reach: dict[str, Any] = {"xerr" if bars.flat else "yerr": _reach(values, bars.low, bars.high)}
        x, y = (values, at) if bars.flat else (at, values)
        axes.errorbar(x, y, fmt="none", ecolor="#333333", capsize=2, linewidth=0.8, **reach)
    look: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": "#444444"}
    for place, value, text in zip(at, np.nan_to_num(values), bars.told, strict=False):
        axes.annotate(drawable(text), (value, place), (3, 0), **look)
    for name, color in zip(bars.groups or [bars.name] * len(at), colors, strict=True):
        legend.setdefault((name, color), Patch(color=color))


def _edges(centres: Any, n: int) -> np.ndarray:
    """Edges of n cells: as given, or halfway between their centres."""
    at = np.asarray(centres, float)
    if len(at) == n + 1:
        return at
    between = (at[1:] + at[:-1]) / 2 if n > 1 else at + 0.5
    first, last = 2 * at[0] - between[0], 2 * at[-1] - between[-1]
    return np.array([first, *between, last]) if n > 1 else np.array([first, *between])


def _heat(axes: Axes, heat: Heat, panel: Panel, legend: Legend) -> None:
    """A map with its scale; grey where nothing can be drawn on a log scale."""
    values = panels.shown(heat.values, heat.log)
    scale: dict[str, Any] = {"vmin": heat.low, "vmax": heat.high, "cmap": "YlGnBu"}
    ticks: dict[str, Any] = {}
    if heat.log:
        low, high = panels.ends_of(values, 1.0, 2.0)
        scale = {"norm": LogNorm(low, high if high > low else 2 * low), "cmap": "viridis"}
        ticks = {"ticks": panels.scale_ticks(low, high)}
        axes.set_facecolor("white" if panel.x.hidden else "#e9e9e9")
    edges = _edges(heat.x, values.shape[1]), _edges(heat.y, values.shape[0])
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(values), rasterized=True, **scale)
    bar = axes.figure.colorbar(mesh, ax=axes, shrink=0.9, pad=0.02, label=drawable(heat.what), **ticks)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


DRAW: dict[type, Callable[[Axes, Any, Panel, Legend], None]] = {Line: _line, Points: _points, Bars: _bars, Heat: _heat}


# ---- pictures
def _gallery(axes: Axes, gallery: Gallery) -> None:
    """Pictures side by side in the place of one panel, each with frames and a shade over the rest."""
    figure, place = axes.figure, axes.get_subplotspec()
    assert isinstance(figure, Figure) and place is not None
    axes.remove()
    down = -(-len(gallery.pictures) // MOST_IN_A_ROW)
    grid = place.subgridspec(down, -(-len(gallery.pictures) // down))
    for i, picture in enumerate(gallery.pictures):
        small = figure.add_subplot(grid[i])
        (height, width), (rows, columns) = picture.pixels.shape[:2], picture.grid
        look: dict[str, Any] = {"extent": (0, width, height, 0), "interpolation": "nearest"}
        small.imshow(picture.pixels, cmap="gray" if picture.pixels.ndim == 2 else None, vmin=0, vmax=255, **look)
        shade = np.ones((rows, columns, 4)) * (1, 1, 1, 0.45)
        across, down_by = width / columns, height / rows
        for y, x in picture.framed:
            shade[y, x, 3] = 0
            corner = (x * across, y * down_by)
            small.add_patch(Rectangle(corner, across, down_by, fill=False, edgecolor="#c1272d", linewidth=1.2))
        small.imshow(shade, **look)
        small.set_title(drawable(picture.label, 28), fontsize=8)
        small.set_axis_off()
