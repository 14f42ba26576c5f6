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
    (trace,), axes = both(Panel("t", [points], Axis(), panels.named_axis(["p", "q"])))
    assert trace["x"] == [1.0, None] and trace["error_x"]["array"] == [1.0, None]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["p", "q"]
    values = np.array([[1.0, 10.0], [0.0, 1000.0]])
    for log in (False, True):
        (trace,), axes = both(Panel("t", [Heat(values, [0, 1], [3, 4], "v", log)]))
        drawn = np.ma.filled(axes.collections[0].get_array(), np.nan).reshape(2, 2)
        shown = np.array([floats(row) for row in trace["z"]])
        np.testing.assert_allclose(10**shown if log else shown, drawn, rtol=1e-3)
        assert np.isnan(drawn[1, 0]) == log  # zero has no place on a log scale


def test_effects_of_any_size_stand_on_both_sides_of_zero_in_both() -> None:
    """Linear within 0.1, a step for each decade beyond: 10 stands at 1 + log10(10 / 0.1) = 3, -0.05 at half a step."""
    values, low, high = [10.0, -0.05, 0.001], [1.0, -0.1, -0.001], [1000.0, 0.0, 0.003]
    points = Points(values, [0, 1, 2], [Color.LIMIT] * 3, ["circle"] * 3, low, high, ["a", "b", "c"], ["A", "B", "C"])
    axis = panels.symlog_axis([values, low, high], 0.1, "Change")
    panel = Panel("t", [points], axis, panels.named_axis(["a", "b", "c"]))
    (trace,), axes = both(panel)
    np.testing.assert_allclose(trace["x"], [3.0, -0.5, 0.01])
    np.testing.assert_allclose(np.add(trace["x"], trace["error_x"]["array"]), [5.0, 0.0, 0.03], atol=1e-5)
    np.testing.assert_allclose(np.subtract(trace["x"], trace["error_x"]["arrayminus"]), [2.0, -1.0, -0.01], atol=1e-5)
    assert trace["customdata"] == values and trace["text"] == ["A", "B", "C"]  # what hovers is in the axis's own unit
    side = chart(panel)["layout"]["xaxis"]
    named = dict(zip(side["ticktext"], side["tickvals"], strict=True))
    assert named["0"] == 0 and named["-0.1"] == -1 and named["0.1"] == 1 and named["100"] == pytest.approx(4)
    assert side["range"][0] < -1 and side["range"][1] > 5 and "\u00b10.1" in side["title"]["text"]
    assert [t.get_text() for t in axes.get_xticklabels()] == side["ticktext"] and axes.get_xscale() == "symlog"
    assert {t.get_text() for t in axes.texts} == {"A", "B", "C"}


@pytest.mark.parametrize("values", [[5.0, 7.0], [-5.0, -7.0], [math.nan], [1e150, -1e-150]])
def test_zero_and_both_its_sides_are_on_a_symlog_axis_whatever_the_values(values: list[float]) -> None:
    axis = panels.symlog_axis(values, 0.01, "x")
    assert axis.limits is not None and axis.limits[0] < -0.01 and axis.limits[1] > 0.01
    places = [place for place, _ in axis.ticks or ()]
    assert 0.0 in places and min(places) < 0 < max(places) and places == sorted(places) and len(places) <= 18
    assert all(axis.limits[0] <= v <= axis.limits[1] for v in values if math.isfinite(v))


def test_what_to_see_comes_right_behind_the_title() -> None:
    panel = Panel("A title", [Line(X, [1.0, 2.0, 3.0, 4.0])], caption="More.", note="Read this.", sees="Look here.")
    assert panels.caption_of(panel) == ["A title.", "Look here.", "More.", "Read this."]
    _, axes = both(panel)
    assert axes.get_title("left") == "A title\nRead this." and [t.get_text() for t in axes.texts] == ["Look here."]


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
