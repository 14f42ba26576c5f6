"""What a prompt, `print` and a notebook show of every kind of result."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import compared
import hostile_run
import labs
import matplotlib
import pytest
import synthetic
from matplotlib.figure import Figure
from PIL import Image
from test_page_text import parsed

import massact as ma
from massact.records.errors import UserError
from massact.records.kinds import results_in
from massact.records.kinds.reproduction import AGREES, DIFFERS
from massact.reports import READINGS

# The newest run of every kind.
OLD = Path(__file__).parents[1] / "golden"
NEWEST = ("schema_3", "explained_5", "intervened_3", "quantised_1", "folded_1", "classics_3", "reproduced_2",
          "trained_1", "lab_1", "stepped_1")  # fmt: skip
GOLDEN = [pytest.param(OLD / name, id=name) for name in NEWEST]


def kinds(place: Any) -> list[Any]:
    return list(results_in(place))


@pytest.mark.parametrize("place", GOLDEN)
def test_every_kind_is_printed_by_its_words_and_short_at_a_prompt(place: Any) -> None:
    for result in kinds(place):
        words = READINGS[result.KIND].words(result)
        told, printed = result.summary().split("\n"), str(result).split("\n")
        assert len(told) >= len(words) + 1 and all(w.split("\n")[0][:40] in result.summary() for w in words)
        assert printed[1] == told[1] and len(printed) <= 6 and len(printed) <= len(told)
        assert "\n" not in repr(result) and len(repr(result)) < 500


@pytest.mark.parametrize("place", GOLDEN)
def test_every_figure_can_be_asked_for_by_name(place: Any) -> None:
    for result in kinds(place):
        reading = READINGS[result.KIND]
        there = [name for name, make in reading.drawings(result).items() if make(result)]
        for name in there[:1]:
            figure = result.plot(name)
            assert isinstance(figure, Figure) and figure.axes
            assert [a.get_title("left") for a in result.plot().axes] == [a.get_title("left") for a in figure.axes]
        with pytest.raises(UserError) as told:
            result.plot("nothing")
        assert all(name in str(told.value) for name in there[:24])


def test_a_scan_is_plotted_as_its_file_is_drawn() -> None:
    result, before = synthetic.massive(), dict(matplotlib.rcParams)
    titles = [axes.get_title("left") for axes in result.plot().axes]
    assert titles == [axes.get_title("left") for axes in result.plot("layers").axes]
    assert titles != [axes.get_title("left") for axes in result.plot("clusters").axes]
    assert dict(matplotlib.rcParams) == before  # those of the user
    with pytest.raises(UserError, match="layers"):
        result.plot("layer")


def test_a_figure_is_shown_by_a_notebook_and_saved_by_its_owner(tmp_path: Path) -> None:
    figure: Any = synthetic.massive().plot()
    assert Image.open(io.BytesIO(figure._repr_png_())).format == "PNG"
    figure.axes[0].set_title("mine", loc="left")
    figure.savefig(tmp_path / "mine.svg")
    assert (tmp_path / "mine.svg").stat().st_size > 1000


def test_a_notebook_shows_words_layers_and_clusters() -> None:
    result = synthetic.massive()
    shown = result._repr_html_()
    picture = re.search(r'<img alt="layers" src="data:image/png;base64,([^"]+)"', shown)
    assert picture is not None and Image.open(io.BytesIO(base64.b64decode(picture.group(1)))).width > 400
    rows = parsed(shown.replace(picture.group(), "").replace(' style="max-width:100%"/>', "")).all("tr")
    heads = [th.text for th in rows[0].all("th")]
    assert {"label", "dim", "onset", "mean"} <= set(heads)
    first = dict(zip(heads, (td.text for td in rows[1].all("td")), strict=True))
    assert first["dim"] == str(result.clusters["dim"].iloc[0]) and len(rows) == min(10, len(result.clusters)) + 1


@pytest.mark.parametrize(
    "result",
    [synthetic.empty(), synthetic.unanswered(), synthetic.broken(), compared.trained(), labs.lab(),
     hostile_run.explanation(hostile_run.EVIL), hostile_run.intervention(hostile_run.EVIL)],
    ids=lambda r: type(r).__name__,
)  # fmt: skip
def test_odd_results_are_printed_on_lines_without_control_characters(result: Any) -> None:
    for text in (str(result), result.summary()):
        assert text.strip() and all(c == "\n" or c.isprintable() for c in text)


def test_a_comparison_is_read_as_any_result(tmp_path: Path) -> None:
    from massact.records.kinds.comparison import open_compared
    from massact.reports import compare

    places = [synthetic.massive().save(tmp_path / name) and tmp_path / name for name in ("one", "two")]
    result = compare(open_compared(places))
    assert "one" in repr(result) and "two" in repr(result) and "one" in result.summary()
    assert result.plot().axes and "<img" in result._repr_html_()


def test_a_reproduction_is_drawn_over_what_was_published() -> None:
    result = next(r for r in results_in(OLD / "reproduced_2") if r.KIND == "reproduction")
    rows = result.reproduced = result.reproduced.head(3).copy()
    rows["ours"], rows["published"] = [10.0, -200.0, 5.0], [11.0, -100.0, 0.0]
    rows["verdict"] = [AGREES, DIFFERS, DIFFERS]
    drawn = sorted((float(x), float(y)) for line in result.plot().axes[0].get_lines() if line.get_linestyle() == "None"
                   for x, y in line.get_xydata())  # fmt: skip
    assert drawn == [(11.0, 10.0), (100.0, 200.0)]  # by size, nothing of zero


def test_completion_offers_public_names_alone() -> None:
    assert [name for name in dir(ma) if not name.startswith("_")] == sorted(ma.__all__)
