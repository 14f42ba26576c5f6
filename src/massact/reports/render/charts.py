"""Panels in the words of plotly, as plain dictionaries: small, and made without importing plotly.

Colours are names of the page's own (`--s1`): its script puts in what light or dark has for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from massact.reports import panels
from massact.reports.panels import Axis, Bars, Heat, Line, Panel, Points, Scene, Scenes, shown
from massact.reports.render.markup import figure_text
from massact.reports.spelling import number

MOST_SCENE_LABELS = 12
FEW_WHOLE = 6  # an axis so short has a tick at every whole number


def drawable(values: Any, digits: int = 6) -> list[float | None]:
    """Numbers for JSON with some significant digits; None, which plotly leaves out, for NaN and Inf."""
    flat = np.asarray(values, float).ravel()
    return [float(f"{v:.{digits}g}") if math.isfinite(v) and abs(v) < panels.LARGEST else None for v in flat]


def chart(part: Panel | Scene | Scenes) -> dict[str, Any]:
    """Traces, layout and height of a figure."""
    if isinstance(part, Scene):
        layout: dict[str, Any] = {"scene": _scene(part), "showlegend": False}
        return {"data": _solid(part), "layout": layout, "height": part.height}
    if isinstance(part, Scenes):
        return _slid(part)
    data = [trace for series in part.series for trace in TRACES[type(series)](series, part)]
    layout = {"xaxis": _axis(part.x), "yaxis": _axis(part.y)}
    if part.square:
        layout["xaxis"]["constrain"] = "domain"
        layout["yaxis"] |= {"constrain": "domain", "scaleanchor": "x"}
    shapes = [_shape("rect", "x", *ends) | {"fillcolor": "--shade", "line": {"width": 0}} for ends in part.shades]
    notes = []
    for limit in part.limits:
        stroke = {"color": limit.color, "width": 1, "dash": "dash" if limit.name else "solid"}
        shapes.append(_shape("line", "x" if limit.upright else "y", limit.value, limit.value) | {"line": stroke})
        at = _placed(limit.value, part.x if limit.upright else part.y)
        if limit.upright:
            notes.append(_note(limit.name, limit.color, (at, "x", "right"), (1, "paper", "top")))
        else:
            notes.append(_note(limit.name, limit.color, (0, "paper", "left"), (at, "y", "bottom")))
    for note in part.notes:
        x = (_placed(note.x, part.x), "x", "right" if note.ends else "left")
        y = (1, "paper", "top") if note.y is None else (_placed(note.y, part.y), "y", "bottom")
        notes.append(_note(note.text, panels.Color.MUTED, x, y))
    notes = [note for note in notes if note["text"]]
    layout |= {"shapes": shapes} if shapes else {}
    layout |= {"annotations": notes} if notes else {}
    layout |= {"barmode": "group"} if any(isinstance(s, Bars) and not s.flat for s in part.series) else {}
    if sum(bool(trace.get("name")) for trace in data) < 2:
        layout["showlegend"] = False
    return {"data": data, "layout": layout, "height": part.height}


def _placed(value: float, axis: Axis) -> float:
    """Where a value stands along an axis as plotly has it: it knows log axes, and symlog ones are linear to it."""
    return math.log10(value) if axis.scale == "log" and value > 0 else float(axis.placed(value))


def _shape(kind: str, along: str, first: float, last: float) -> dict[str, Any]:
    """A shape behind the curves, over the whole of the panel but for one side."""
    across = "y" if along == "x" else "x"
    ends = {f"{along}0": first, f"{along}1": last, f"{across}0": 0, f"{across}1": 1}
    return {"type": kind, f"{along}ref": along, f"{across}ref": "paper", **ends, "layer": "below"}


def _note(text: str, color: str, x: tuple[float, str, str], y: tuple[float, str, str]) -> dict[str, Any]:
    """Words at a place: along each side where, in what, and by which end."""
    place = {
        f"{side}{key}": v for side, at in (("x", x), ("y", y)) for key, v in zip(("", "ref", "anchor"), at, strict=True)
    }
    return {**place, "text": figure_text(text), "showarrow": False, "font": {"color": color, "size": 11}}


def _axis(axis: Axis) -> dict[str, Any]:
    made: dict[str, Any] = {"title": {"text": figure_text(axis.title)}, "showgrid": axis.grid}
    if axis.scale == "log":
        made["type"] = "log"
    if axis.limits is not None:
        made |= {"range": [_placed(end, axis) for end in axis.limits], "zeroline": False}
    if axis.ticks is not None:
        made |= {"tickmode": "array", "tickvals": axis.placed([place for place, _ in axis.ticks]).tolist()}
        made |= {"ticktext": [figure_text(label, 22) for _, label in axis.ticks]}
    elif axis.whole:
        made["tickformat"] = ",d"
        if (
            axis.limits is not None and axis.limits[1] - axis.limits[0] < FEW_WHOLE
        ):  # halves would be rounded: 1, 1, 2, 2
            made |= {"tick0": 0, "dtick": 1}
    return made | ({"visible": False} if axis.hidden else {})


def _said(texts: Sequence[str]) -> list[str]:
    return [figure_text(text, 120) for text in texts]


def _line(line: Line, panel: Panel) -> list[dict[str, Any]]:
    """A curve with its points, after its band; gaps where a value is not finite."""
    marker: dict[str, Any] = {"color": line.color, "size": 5, "symbol": line.symbol or "circle"}
    marker |= {"line": {"color": line.edge, "width": 1}} if line.edge else {}
    mode = "+".join(["lines"] * bool(line.dash) + ["markers"] * bool(line.symbol))
    trace: dict[str, Any] = {"type": "scatter", "mode": mode, "x": drawable(line.x), "y": drawable(line.y)}
    trace["marker"] = marker
    trace |= {"line": {"color": line.color, "width": 1.6, "dash": line.dash or "solid"}, "connectgaps": False}
    trace["hovertemplate"] = f"%{{fullData.name}}<br>{panel.x.title.lower()} %{{x}}: %{{y:.4~g}}<extra></extra>"
    trace |= {"name": figure_text(line.name)} if line.name else {"showlegend": False}
    if line.said:
        trace |= {"text": _said(line.said), "hovertemplate": "%{text}: %{y:.4~g}<extra></extra>"}
    return [*_band(line), trace]


def _band(line: Line) -> list[dict[str, Any]]:
    if line.low is None:
        return []
    x, low, high = (np.asarray(v, float) for v in (line.x, line.low, line.high))
    known = np.isfinite(shown(low)) & np.isfinite(shown(high))
    if not known.any() or (low[known] == high[known]).all():
        return []
    around = {"x": drawable([*x[known], *x[known][::-1]]), "y": drawable([*low[known], *high[known][::-1]])}
    area = {"type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": line.color, "opacity": 0.16}
    return [{**area, **around, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}]


def _reach(values: Any, low: Any, high: Any) -> dict[str, Any]:
    """Intervals; none where an end is not finite."""
    v, a, b = (np.where(np.isfinite(low) & np.isfinite(high), x, 0.0) for x in (values, low, high))
    ends = {"array": drawable(b - v), "arrayminus": drawable(v - a)}
    return {"type": "data", "symmetric": False, **ends, "color": "--muted", "thickness": 1.4}


def _side(place: float, axis: Axis) -> str:
    """Where words at a point stand, so that they stay within a panel that is narrow, too."""
    low, high = (_placed(end, axis) for end in axis.limits or (0.0, 0.0))
    share = (place - low) / (high - low) if high > low else 0.5
    return f"top {'left' if share > 2 / 3 else 'right' if share < 1 / 3 else 'center'}"


def _points(points: Points, panel: Panel) -> list[dict[str, Any]]:
    """Dots with their intervals at their places; what hovers has the values themselves."""
    marker = {"size": 9, "color": list(points.colors), "symbol": list(points.symbols)}
    x, low, high = (panel.x.placed(v) for v in (points.x, points.low, points.high))
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "x": drawable(x), "y": list(points.y)}
    trace["marker"] = marker
    if points.told:
        sides = [_side(place, panel.x) for place in x]
        trace |= {"mode": "markers+text", "text": _said(points.told), "textposition": sides, "cliponaxis": False}
    trace |= {"hovertext": _said(points.said), "customdata": drawable(points.x)}
    trace["hovertemplate"] = "%{hovertext}<br>change %{customdata:+.4~g}<extra></extra>"
    return [trace | {"error_x": _reach(x, low, high)}]


def _bars(bars: Bars, panel: Panel) -> list[dict[str, Any]]:
    """Bars at whole places: labels are ticks, so that two alike stay two."""
    at, values = [int(p) if p == int(p) else float(p) for p in bars.at], drawable(bars.values)
    color = bars.colors if isinstance(bars.colors, str) else list(bars.colors)
    (length, place), where = ("xy", panel.y.title) if bars.flat else ("yx", panel.x.title)
    trace = {"type": "bar", "marker": {"color": color}, length: values, place: at}
    trace |= {"orientation": "h"} if bars.flat else {}
    trace |= {"name": figure_text(bars.name)} if bars.name else {}
    trace |= {f"error_{length}": _reach(bars.values, bars.low, bars.high)} if bars.low is not None else {}
    said = f"%{{fullData.name}}, {where.lower()} %{{{place}}}: %{{{length}:+.4~g}}"
    if bars.said:
        trace |= {"text": _said(bars.said), "textposition": "none"}
        said = f"%{{text}}<br>{bars.what}: %{{{length}:,.4~g}}"
    return [trace | {"hovertemplate": f"{said}<extra></extra>"}]


def _heat(heat: Heat, panel: Panel) -> list[dict[str, Any]]:
    """A heat map; what cannot be drawn is left empty. A log scale bears the numbers themselves."""
    values = shown(heat.values, heat.log)
    low, high = heat.low, heat.high
    bar: dict[str, Any] = {}
    if heat.log:
        ends = panels.ends_of(values, 1.0, 10.0)
        ticks = panels.scale_ticks(*ends)
        bar = {"tickmode": "array", "tickvals": np.log10(ticks).tolist(), "ticktext": [number(t) for t in ticks]}
        values, (low, high) = np.log10(values), np.log10(ends).tolist()
        low -= 0.15 * max(high - low, 1.0)  # the least is told from nothing
    z = [drawable(row, 4) for row in values]
    trace: dict[str, Any] = {"type": "heatmap", "z": z, "x": drawable(heat.x), "y": drawable(heat.y)}
    bar |= {"thickness": 10, "outlinewidth": 0, "len": 0.9, "tickfont": {"size": 11}}
    trace |= {"zmin": low, "zmax": high, "colorscale": "--heat", "hoverongaps": False, "colorbar": bar}
    sides = [f"{figure_text(side.title.lower())} %{{{name}}}" for name, side in (("x", panel.x), ("y", panel.y))]
    trace["hovertemplate"] = f"{', '.join(sides)}: %{{z:.4~g}}<extra></extra>"
    if len(heat.said):
        value = "" if heat.log else f"<br>{figure_text(heat.what)}: %{{z:.4~g}}"
        trace |= {"text": [_said(row) for row in heat.said], "hovertemplate": f"%{{text}}{value}<extra></extra>"}
    return [{k: v for k, v in trace.items() if v is not None}]


TRACES: Mapping[type, Any] = {Line: _line, Points: _points, Bars: _bars, Heat: _heat}


# ---- three dimensions
def _slid(part: Scenes) -> dict[str, Any]:
    """The traces of all scenes, of which those of one are seen, and a slider that goes through them."""
    each = [_solid(scene) for scene in part.scenes]
    data = [trace | {"visible": i == part.shown} for i, traces in enumerate(each) for trace in traces]
    steps = []
    for i, scene in enumerate(part.scenes):
        seen = [j == i for j, traces in enumerate(each) for _ in traces]
        steps.append({"label": figure_text(scene.title), "method": "restyle", "args": [{"visible": seen}]})
    layout: dict[str, Any] = {"scene": _scene(part.scenes[part.shown]), "showlegend": False}
    if len(steps) > 1:
        layout["sliders"] = [{"active": part.shown, "steps": steps, "currentvalue": {"visible": False}}]
    return {"data": data, "layout": layout, "height": part.height}


def _solid(scene: Scene) -> list[dict[str, Any]]:
    """The curves of a scene, and a dot with its name on each spike that has one."""
    named = [(scene.spikes[i], label) for i, label in scene.named]
    if not named:
        return [_curves(scene)]
    x, y, z = ([spike[side] for spike, _ in named] for side in range(3))
    trace = {"type": "scatter3d", "mode": "markers+text", "x": x, "y": y, "z": drawable(z, 4)}
    trace |= {"text": [_flat(label) for _, label in named], "textposition": "top center", "hoverinfo": "skip"}
    look = {"marker": {"color": "--limit", "size": 3}, "textfont": {"color": "--ink", "size": 12}}
    return [_curves(scene), trace | look]


def _curves(scene: Scene) -> dict[str, Any]:
    """One trace for all tokens, with a gap between two."""
    x: list[int | None] = []
    y: list[int | None] = []
    z: list[float | None] = []
    said: list[str] = []
    for i, (label, position, dims, heights) in enumerate(scene.curves):
        x += [*[i] * len(dims), None]
        y += [*(int(d) for d in dims), None]
        z += [*drawable(heights, 4), None]
        said += [f"{figure_text(label)} (position {position})"] * (len(dims) + 1)
    trace = {"type": "scatter3d", "mode": "lines", "x": x, "y": y, "z": z, "text": said, "connectgaps": False}
    told = "%{text}, dim %{y}: |h| = %{z:.4~g}<extra></extra>"
    return trace | {"line": {"color": "--s1", "width": 2.5}, "hovertemplate": told}


def _scene(scene: Scene) -> dict[str, Any]:
    labels = [_flat(label) for label, *_ in scene.curves]
    at = list(range(0, len(labels), max(1, math.ceil(len(labels) / MOST_SCENE_LABELS))))
    x, y, z = ({"title": {"text": _flat(name)}, "tickfont": {"size": 10}} for name in scene.sides)
    return {
        "xaxis": {**x, "tickmode": "array", "tickvals": at, "ticktext": [labels[i] for i in at]},
        "yaxis": {**y, "range": [0, scene.n_dims], "nticks": 4},
        "zaxis": {**z, "range": [0, scene.top * 1.05 or 1.0], "nticks": 5},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.15, "y": 1.15, "z": 0.95},
        "camera": {"eye": {"x": 1.15, "y": -2.1, "z": 0.85}, "center": {"x": -0.12, "y": -0.06, "z": -0.06}},
    }


def _flat(label: str) -> str:
    """Text in a scene, which reads tags but no entities: angle quotes stand for angle brackets, a wide $ for a $."""
    return label.replace("<", "\u2039").replace(">", "\u203a").replace("$", "\uff04")
