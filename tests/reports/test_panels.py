"""A panel is said once: both that draw it show the same numbers, and neither draws what cannot be drawn."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes as Drawn

from massact.reports import panels
from massact.reports.panels import Axis, Bars, Color, Heat, Limit, Line, Note, Panel, Points, Scene, Sheet
from massact.reports.render.charts import chart
from massact.reports.render.lettering import style
from massact.reports.render.sheets import figure_of

X, Y = [0, 1, 2, 3], [1.0, math.inf, 1e300, 20.0]
SHOWN = [1.0, math.nan, math.nan, 20.0]


def both(panel: Panel) -> tuple[list[dict[str, Any]], Drawn]:
    """Traces of a page, which are JSON, and axes of a file."""
    with style():
        figure = figure_of(Sheet([panel]))
        figure.canvas.draw()
    return json.loads(json.dumps(chart(panel)["data"], allow_nan=False)), figure.axes[0]


def floats(values: Any) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], float)


@pytest.mark.parametrize("axis", [Axis("y"), panels.log_axis(Y, "y"), panels.linear_axis(Y, "y")])
def test_a_curve_has_gaps_where_a_value_cannot_be_drawn(axis: Axis) -> None:
    (trace,), axes = both(Panel("t", [Line(X, Y, "_a <b>$")], panels.layer_axis(3), axis))
    (line,) = axes.get_lines()
    for drawn in (floats(trace["y"]), line.get_ydata()):
        np.testing.assert_allclose(np.asarray(drawn, float), SHOWN)
    assert "<" not in trace["name"] and "$" not in trace["name"] and line.get_label() == " _a <b>$"
    if axis.limits is not None:
        np.testing.assert_allclose(axes.get_ylim(), axis.limits)


def test_bars_points_and_maps_are_the_same_in_both() -> None:
    (one, other), axes = both(Panel("t", [Bars(X, [1, 2, 3, 4], "a"), Bars(X, [4, 3, 2, 1], "b", Color.BLUE)]))
    heights = [p.get_height() for p in axes.patches]
    assert one["y"] + other["y"] == heights and one["x"] == other["x"] == X
    points = Points([1.0, math.nan], [0, 1], [Color.LIMIT] * 2, ["circle"] * 2, [0.5, 0], [2.0, 1], ["p", "q"])
    (trace,), axes = both(Panel("t", [points], Axis(scale="symlog"), panels.named_axis(["p", "q"])))
    assert trace["x"] == [1.0, None] and trace["error_x"]["array"] == [1.0, None]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["p", "q"] and axes.get_xscale() == "symlog"
    values = np.array([[1.0, 10.0], [0.0, 1000.0]])
    for log in (False, True):
        (trace,), axes = both(Panel("t", [Heat(values, [0, 1], [3, 4], "v", log)]))
        drawn = np.ma.filled(axes.collections[0].get_array(), np.nan).reshape(2, 2)
        shown = np.array([floats(row) for row in trace["z"]])
        np.testing.assert_allclose(10**shown if log else shown, drawn, rtol=1e-3)
        assert np.isnan(drawn[1, 0]) == log  # zero has no place on a log scale


def test_limits_shades_and_notes_stand_where_they_belong() -> None:
    panel = Panel(
        "t",
        [Line([0, 9], [1.0, 50.0], "a"), Line([0, 9], [2.0, 3.0], "b")],
        y=panels.log_axis([1.0, 50.0]),
        limits=[Limit(10.0, "ten"), Limit(1e6, "far")],
        shades=[(2, 4)],
        notes=[Note(2, "on")],
    )
    _, axes = both(panel)
    layout = chart(panel)["layout"]
    assert [s["type"] for s in layout["shapes"]] == ["rect", "line", "line"]
    assert {a["text"]: a["y"] for a in layout["annotations"]} == {"ten": 1.0, "far": 6.0, "on": 1}
    assert [t.get_text().strip() for t in axes.texts] == ["ten", "on"]  # the name of what lies beyond is not there


def test_two_scales_and_nothing_to_draw() -> None:
    line = Line(X, [1.0, 2.0, 3.0, 400.0], "a")
    with style():
        linear, log = figure_of(Sheet([Panel("t", [line], y=panels.log_axis(line.y), both=True, width="full")])).axes
    assert linear.get_yscale() == "linear" and log.get_yscale() == "log" and log.get_title("left") == ""
    _, axes = both(Panel("t", empty="Not seen."))
    assert not axes.axison and [t.get_text() for t in axes.texts] == ["Not seen."] and not Panel("t") and not Scene("t")


def test_ticks_are_plain_and_few() -> None:
    assert [t for _, t in panels.log_axis([0.02, 4000.0]).ticks or ()] == "0.01 0.1 1 10 100 1,000 10,000".split()
    assert len(panels.log_axis([1e-30, 1e30]).ticks or ()) <= panels.MOST_TICKS
    assert len(panels.thinned(range(100), [str(i) for i in range(100)])) <= panels.MOST_TICKS
    assert panels.scale_ticks(3.0, 60.0) == [5.0, 10.0, 20.0, 50.0] and panels.scale_ticks(3.0, 4.0) == [3.0, 4.0]


@pytest.mark.parametrize(("end", "ticks"), [(2.3, [0, 1, 2]), (32.0, None)])
def test_a_short_axis_of_counts_has_whole_ticks_only(end: float, ticks: list[int] | None) -> None:
    """Halves would be written as the whole numbers next to them, twice each."""
    panel = Panel("Counts", [Bars(range(2), [1.0, 2.0], flat=True)], Axis("n", limits=(0.0, end), whole=True))
    axis = chart(panel)["layout"]["xaxis"]
    assert axis["tickformat"] == ",d" and ("dtick" in axis) == (ticks is not None)
    if ticks is not None:
        assert [axis["tick0"] + i * axis["dtick"] for i in range(len(ticks))] == ticks
