"""Scenes drawn with matplotlib: |h| over positions and dims, in three dimensions (Sun 2024, Figs. 1 to 3)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from mpl_toolkits.mplot3d.axes3d import Axes3D

from massact.reports.panels import Scene, Scenes
from massact.reports.render.lettering import drawable, says
from massact.reports.spelling import number

MOST_COLUMNS, MOST_LABELS, MOST_BESIDE = 3, 14, 3
COLOUR, WARNING, MUTED = "#4a7fd4", "#c1272d", "#666666"
LARGE = (10.5, 5.9)  # inches


def draw_large(part: Scenes, title: str = "", size: tuple[float, float] = LARGE) -> Figure:
    """One scene large, the others small beside it in their order; above them what to see."""
    figure = Figure(figsize=size)
    beside = [scene for i, scene in enumerate(part.scenes) if i != part.shown][:MOST_BESIDE]
    head = ", ".join(x for x in (part.title, title) if x)
    figure.text(0.02, 0.985, drawable(head, 120), va="top", fontsize=10)
    told = textwrap.fill(drawable(" ".join(x for x in (part.sees, part.note) if x), 400), int(14.3 * size[0]))
    figure.text(0.02, 0.985 - 0.24 / size[1], told, va="top", fontsize=8, color=MUTED)
    if not part:
        says(_axes_at(figure, (0.05, 0.05, 0.9, 0.8)), part.empty)
        return figure
    wide = 0.68 if beside else 0.9
    _titled(_axes_at(figure, (0.02, 0.09, wide, 0.74)), part.scenes[part.shown], large=True)
    for i, scene in enumerate(beside):
        height = 0.82 / len(beside)
        _titled(_axes_at(figure, (0.72, 0.85 - (i + 1) * height, 0.26, height * 0.94)), scene)
    return figure


def draw_scenes(scenes: Sequence[Scene], title: str = "") -> Figure:
    """Scenes side by side; x: positions, the massive ones bold; y: dims; z: |h|."""
    columns = 2 if len(scenes) == 4 else min(len(scenes), MOST_COLUMNS)
    rows = math.ceil(len(scenes) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.3 * rows + 0.25))
    for i, scene in enumerate(scenes):
        place = ((i % columns + 0.03) / columns, 0.97 * (1 - (i // columns + 0.95) / rows), 0.88 / columns, 0.84 / rows)
        _titled(_axes_at(figure, place), scene)
    if title:
        figure.suptitle(drawable(title, 100), x=0.02, y=0.995, ha="left", fontsize=10)
    return figure


def _axes_at(figure: Figure, place: tuple[float, float, float, float]) -> Axes3D:
    axes = figure.add_axes(place, projection="3d", computed_zorder=False)
    assert isinstance(axes, Axes3D)
    return axes


def _titled(axes: Axes3D, scene: Scene, large: bool = False) -> None:
    said = (", " if large else "\n").join(textwrap.fill(drawable(s, 90), 48) for s in (scene.title, scene.caption) if s)
    axes.set_title(said, loc="center", y=0.97 if large else 0.95, fontsize=10 if large else 9)
    _scene(axes, scene, large)


def _scene(axes: Axes3D, scene: Scene, large: bool) -> None:
    """A line along the dims for each position, a stem for each massive value, and what is written at some."""
    if not scene:
        says(axes, scene.empty)
        return
    for x, (_, _, dims, heights) in reversed(list(enumerate(scene.curves))):
        axes.plot(np.full(len(dims), x), dims, heights, color=COLOUR, linewidth=0.7, alpha=0.85, clip_on=False)
    for x, dim, height in scene.spikes:
        axes.plot([x, x], [dim, dim], [0, height], color=COLOUR, linewidth=1.6, clip_on=False)
    for i, label in scene.named:
        x, dim, height = scene.spikes[i]
        axes.text(x, dim, height, f" {drawable(label)}", fontsize=9 if large else 7, color=WARNING, va="bottom")
    _letter(axes, [label for label, *_ in scene.curves], [x for x, *_ in scene.spikes], large)
    axes.set_yticks(list(scene.ticks), [str(d) for d in scene.ticks], fontsize=7.5)
    axes.set_ylim(0, scene.n_dims)
    axes.set_zlim(0, scene.top * 1.05 if scene.top > 0 else 1.0)
    axes.zaxis.set_major_formatter(FuncFormatter(lambda z, _: number(z)))
    pads, size = ((14, 2, 6), 9) if large else ((10, -4, 3), 7.5)
    sides = (axes.set_xlabel, axes.set_ylabel, axes.set_zlabel)
    for name, write, pad in zip(scene.sides, sides, pads, strict=True):
        write(drawable(name), labelpad=pad, fontsize=size)
    if scene.note:
        axes.text2D(0.5, 0.0, scene.note, color=WARNING, fontsize=8, ha="center", transform=axes.transAxes)


def _letter(axes: Axes3D, labels: Sequence[str], massive: Sequence[int], large: bool) -> None:
    """Ticks and labels; where positions are many, the massive ones first, others where there is room."""
    room = len(labels) / MOST_LABELS if large else 2 * len(labels) / MOST_LABELS
    named: list[int] = []
    for x in (*massive, *range(len(labels))):
        if all(abs(x - other) >= room for other in named):
            named.append(x)
    named.sort()
    shown = [drawable(labels[x], max(len(labels[x]), 14)) for x in named]
    axes.set_xticks(named, shown, rotation=50, ha="right", va="center", rotation_mode="anchor", fontsize=7.5)
    for label, x in zip(axes.get_xticklabels(), named, strict=True):
        label.set_fontweight("bold" if x in massive else "normal")
    axes.set_xlim(-0.3, len(labels) - 0.7)
    axes.tick_params(axis="x", pad=-4)
    axes.tick_params(axis="y", pad=-3)
    axes.tick_params(axis="z", pad=3 if large else 1, labelsize=7.5)
    axes.view_init(elev=18, azim=-60)
    axes.set_box_aspect((1.35, 1.0, 0.8), zoom=1.12 if large else 1.0)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1.0, 1.0, 1.0, 0.0))
        axis._axinfo["grid"].update(color="#e3e3e3", linewidth=0.6)
