"""The figures: there, valid, not blank, the same every time, and with everything in them."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pictured_run
import pytest
import read_page
import synthetic
import synthetic_tables
from matplotlib.figure import Figure
from PIL import Image

from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.records.tables import frame
from massact.reports import draw, report
from massact.reports.contents import contents_of
from massact.reports.kinds import READINGS
from massact.reports.kinds.scan.census import draw_census
from massact.reports.kinds.scan.cluster_curves import draw_clusters
from massact.reports.kinds.scan.curves import draw_headroom, draw_layers, draw_norms
from massact.reports.kinds.scan.portrait import draw_magnitudes, named_spikes, outline, peaks
from massact.reports.kinds.scan.views import rule_of
from massact.reports.panels import Line, Panel, Sheet, slides_of, token_label
from massact.reports.render.charts import chart
from massact.reports.render.figures import SLIDE
from massact.reports.render.lettering import drawable, style
from massact.reports.render.sheets import figure_of
from massact.reports.spelling import visible
from tests.facts import tells

NAMES = ("layers", "clusters", "magnitudes", "census", "headroom", "norms")


@pytest.fixture(scope="module")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The files of a synthetic result by name, drawn once for all tests."""

    @cache
    def paths(name: str) -> list[Path]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return draw(synthetic.EVERY[name](), tmp_path_factory.mktemp("run"), ("png", "svg"))

    return paths


@pytest.mark.parametrize("name", synthetic.EVERY)
def test_files_are_valid_and_not_blank(name: str, drawn_once: Callable[[str], list[Path]]) -> None:
    paths = drawn_once(name)
    names = [n for n in NAMES if n != "magnitudes" or synthetic.EVERY[name]().portrait]
    folder = paths[0].parent
    assert folder.name == "figures"
    assert paths == [folder / f"{n}.{kind}" for n in names for kind in ("png", "svg")]
    assert sorted(paths) == sorted(folder.iterdir())
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
            continue
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
            assert image.info["dpi"][0] == pytest.approx(160, abs=0.1)
        assert pixels.std() > 1 and (pixels < 128).sum() > 100


def test_two_draws_are_the_same_bytes(tmp_path: Path, drawn_once: Callable[[str], list[Path]]) -> None:
    for one, other in zip(drawn_once("hostile"), draw(synthetic.hostile(), tmp_path, ("png", "svg")), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_drawing_leaves_the_users_settings_and_ignores_them(
    tmp_path: Path, drawn_once: Callable[[str], list[Path]]
) -> None:
    plain = drawn_once("quiet")
    with matplotlib.rc_context(
        {"font.size": 30, "axes.grid": True, "text.parse_math": True, "figure.facecolor": "red"}
    ):
        before = dict(matplotlib.rcParams)
        styled = draw(synthetic.quiet(), tmp_path, ("png", "svg"))
        assert dict(matplotlib.rcParams) == before
    for one, other in zip(plain, styled, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_svg_has_no_date_and_no_path_and_is_small(drawn_once: Callable[[str], list[Path]]) -> None:
    for path in drawn_once("massive"):
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            assert "<dc:date>" not in text and str(path.parent) not in text
            assert path.stat().st_size < 600_000


def test_unwritable_directory_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="Figures"):
        draw(synthetic.quiet(), tmp_path / "run")


def drawn(make: object, result: ScanResult) -> Figure:
    with style():
        figure = figure_of(make(result))  # type: ignore[operator]
    assert isinstance(figure, Figure)
    return figure


def lines(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), float) for line in figure.axes[panel].get_lines()}


def test_layers_figure_draws_the_table() -> None:
    result = synthetic.massive()
    figure = drawn(draw_layers, result)
    for panel in (0, 1):
        curves = lines(figure, panel)
        for label, column in (("Top 1", "top1"), ("Top 2", "top2"), ("Top 3", "top3"), ("Median", "median")):
            np.testing.assert_array_equal(curves[label], result.layers[column])
        assert set(curves["|h| = 100 (sun2024)"]) == {100.0}
    assert figure.axes[0].get_yscale() == "linear" and figure.axes[1].get_yscale() == "log"
    assert list(figure.axes[0].get_xticks()) == [1, 8, 16, 24, 32]
    texts = " ".join(t.get_text() for t in figure.axes[0].texts)
    assert "onset 2" in texts and "offset 30" in texts


def test_clusters_are_drawn_by_what_they_are() -> None:
    """A hump at layers 10 to 16 beside what is massive from 2 to 30; the threshold is 1,000 medians, 100 at least."""
    result = synthetic.massive()
    curves = lines(drawn(draw_clusters, result), 0)
    found = result.findings.query("dim == 2533 and position_class == 'delimiter'").groupby("layer")["magnitude"].mean()
    loud, hump = curves["Massive: dim 2533, delimiter"], curves["Hump: dim 1512, delimiter"]
    np.testing.assert_allclose(loud[2:31], found.to_numpy())
    assert np.isnan(loud[[0, 1, 31, 32]]).all() and list(np.flatnonzero(hump == 160.0)) == list(range(10, 17))
    np.testing.assert_allclose(curves["Threshold"], np.maximum(1000 * result.layers["median"], 100))
    assert set(curves["onset 2"]) and len([name for name in curves if name.startswith("onset")]) == 1


def test_a_hump_of_the_same_tokens_is_a_line_of_its_own() -> None:
    result = synthetic.massive(span=(12, 30))
    rows = [synthetic.finding(x, s, 0, 2533, 200.0, 0.38, "Summer", "start") for x in range(3, 8) for s in range(8)]
    result.near_misses = frame("near_misses", rows)
    curves = lines(drawn(draw_clusters, synthetic.clustered(result)), 0)
    massive, hump = (np.flatnonzero(np.isfinite(curves[f"{x}: dim 2533, start"])) for x in ("Massive", "Hump"))
    assert list(massive) == list(range(12, 31)) and list(hump) == list(range(3, 8))


def test_one_row_of_panels_for_each_stack() -> None:
    assert len(drawn(draw_layers, synthetic.two_stacks()).axes) == 4
    assert len(drawn(draw_norms, synthetic.two_stacks()).axes) == 2
    assert {"encoder", "decoder"} <= set(lines(drawn(draw_headroom, synthetic.two_stacks()), 0))


def test_no_threshold_line_for_rules_without_one() -> None:
    result = synthetic.quiet()
    result.info.criterion = {"name": "gallego2025", "thresholds": {"ratio": 1000.0}}
    assert set(lines(drawn(draw_layers, result), 0)) == {"Top 1", "Top 2", "Top 3", "Median"}


def test_headroom_and_norms_draw_the_tables() -> None:
    result = synthetic.massive()
    curves = lines(drawn(draw_headroom, result), 0)
    np.testing.assert_array_equal(curves["max |h|"], result.layers["max"])
    assert {float(y[0]) for y in curves.values()} >= {65504.0, 448.0}
    norms = lines(drawn(draw_norms, result), 0)
    np.testing.assert_array_equal(norms["Position 0"], result.layers["norm_first"])
    np.testing.assert_array_equal(norms["All other positions"], result.layers["norm_rest"])


def test_broken_layers_are_marked() -> None:
    figure = drawn(draw_headroom, synthetic.broken())
    crosses = next(line for line in figure.axes[0].get_lines() if line.get_label() == "NaN or Inf")
    assert list(crosses.get_xdata()) == list(range(20, 33))
    assert tells([drawn(draw_layers, synthetic.broken()).axes[1].get_title("left")], "NaN or Inf", "20-32")


def test_census_is_a_map_of_layers_and_dims_and_counts_of_the_peak_layer() -> None:
    """Each of the planted dims has 8 + 8 findings at each of layers 2 to 30, and none at others."""
    result = synthetic.massive()
    map_, tokens, positions = [a for a in drawn(draw_census, result).axes if a.get_label() != "<colorbar>"]
    assert [t.get_text() for t in map_.get_yticklabels()] == ["1415", "2533"] and map_.get_xlabel() == "Layer"
    shown = np.ma.filled(map_.collections[0].get_array().astype(float), np.nan).reshape(2, 33)
    wanted = np.full((2, 33), np.nan)
    wanted[:, 2:31] = 16
    np.testing.assert_array_equal(shown, wanted)
    assert [t.get_text() for t in tokens.get_yticklabels()] == ["\u201c.\u201d", "\u201cSummer\u201d"]
    assert [p.get_width() for p in tokens.patches[:2]] == [8, 8]  # of 8 sequences each: its two dims are one token
    assert tokens.get_xlabel() == "Positions with findings"
    assert [t.get_text() for t in positions.get_yticklabels()] == ["0", "3"]
    assert [p.get_width() for p in positions.patches] == [8, 8] and positions.get_xlabel() == "Sequences"


def test_the_map_on_a_page_tells_how_many_and_how_large() -> None:
    (heat,) = chart(draw_census(synthetic.massive()).parts[0])["data"]
    found = synthetic.massive().findings.query("layer == 30 and dim == 2533")
    assert tells([heat["text"][1][30]], "layer 30", "dim 2533", len(found), found["magnitude"].mean())
    assert heat["z"][1][31] is None and tells([heat["text"][1][31]], "no finding")


def test_census_without_findings_says_how_far_the_nearest_is() -> None:
    (axes,) = drawn(draw_census, synthetic.quiet()).axes
    nearest = synthetic.quiet().near_misses.nlargest(1, "ratio").iloc[0]
    where = (f"layer {nearest['layer']}", f"pos {nearest['pos']}", f"dim {nearest['dim']}")
    assert tells([axes.get_title("left")], "No findings", "sun2024", nearest["ratio"], *where)
    assert len(axes.patches) == 2
    (axes,) = drawn(draw_census, synthetic.quiet(near=False)).axes
    assert "No near misses" in axes.texts[0].get_text()


def test_a_new_figure_is_one_function_for_file_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(result: ScanResult) -> Sheet:
        return Sheet([Panel("A toy", [Line(result.layers["layer"], result.layers["mean"], "mean")])])

    monkeypatch.setitem(READINGS, "scan", replace(READINGS["scan"], figures={"toy": toy}))
    result = synthetic.massive()
    assert [path.name for path in draw(result, tmp_path)] == ["toy.png"]
    page = read_page.read(report(result, tmp_path / "page.html").read_text(encoding="utf-8"))
    (trace,) = page.figures()[next(title for title in page.figures() if "A toy" in title)]["data"]
    assert trace["name"] == "mean" and np.allclose(trace["y"], result.layers["mean"], rtol=1e-5)
    np.testing.assert_array_equal(lines(drawn(toy, result), 0)["mean"], result.layers["mean"])


def test_massive_tokens_are_bold_and_every_spike_is_drawn() -> None:
    result = synthetic.massive()
    axes = drawn(draw_magnitudes, result).axes[0]  # the peak layer is the large one
    bold = [t.get_text() for t in axes.get_xticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["Summer", "."] and [t.get_text() for t in axes.get_yticklabels()] == ["1415", "2533"]
    stems = [line.get_data_3d() for line in axes.get_lines() if len(line.get_data_3d()[0]) == 2]
    assert sorted((int(x[0]), int(y[0]), round(float(z[1]))) for x, y, z in stems) == [
        (0, 1415, 470),
        (0, 2533, 800),
        (3, 1415, 1500),
        (3, 2533, 2600),
    ]
    assert not any(line.get_clip_on() for line in axes.get_lines())


def test_one_layer_is_large_its_axes_are_named_and_its_spike_has_dim_and_token() -> None:
    large, *beside = drawn(draw_magnitudes, synthetic.massive()).axes
    assert len(beside) == 2 and large.bbox.width > 2 * beside[0].bbox.width
    for axes in (large, *beside):
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_zlabel()) == ("Token", "Dim", "|h|")
        assert axes.get_zlim() == large.get_zlim()
    (greatest, *_) = [t.get_text() for t in large.texts]
    assert tells([greatest], "dim 2533", "\u201c.\u201d", 2600.0)


def test_spikes_that_stand_together_have_one_name() -> None:
    spikes, tokens = [(0, 10, 9.0), (0, 12, 8.0), (1, 11, 7.0), (0, 80, 6.0), (9, 10, 5.0)], list("abcdefghij")
    assert [i for i, _ in named_spikes(spikes, tokens, 100)] == [0, 3, 4]
    assert tells([named_spikes(spikes, tokens, 100)[2][1]], "dim 10", "j", 5.0)


def test_long_prompts_keep_their_massive_tokens() -> None:
    result = synthetic.massive()
    words = [f"w{i}" for i in range(400)]
    result.portrait = synthetic_tables.portrait(words, 64, (1, 2), [(333, 5, 900.0), (0, 5, 800.0)])
    axes, other = drawn(draw_magnitudes, result).axes
    assert [t.get_text() for t in axes.get_xticklabels() if t.get_fontweight() == "bold"] == ["w0", "w333"]
    assert len(other.get_lines()) + 2 == len(axes.get_lines())  # the same tokens, and two stems
    assert "48 tokens of 400" in axes.get_title() or "47 tokens of 400" in axes.get_title()
    assert len(axes.get_xticklabels()) <= 16


def test_peaks_are_those_of_the_criterion() -> None:
    h_TD = np.full((4, 50), 0.1)
    h_TD[1, 7], h_TD[2, 8], h_TD[3, 9], h_TD[0, 0] = 200.0, 100.0, 150.0, np.inf
    assert peaks(h_TD, rule_of(synthetic.quiet())) == [(1, 7), (3, 9)]
    assert peaks(h_TD * 10, rule_of(synthetic.quiet())) == [(1, 7), (3, 9), (2, 8)]


def test_outline_keeps_every_maximum() -> None:
    row = np.random.default_rng(0).random(4096)
    row[[17, 2533]] = 5.0, 9.0
    dims, heights = outline(row, 160)
    assert {17, 2533} <= set(dims) and len(dims) == 160
    np.testing.assert_array_equal(heights, row[dims])


@pytest.mark.parametrize("token", synthetic.HOSTILE)
def test_labels_are_short_and_drawable(token: str) -> None:
    assert 0 < len(token_label(token)) <= 16 and token_label(token).isprintable()
    assert len(drawable(visible(token), 20)) <= 20


def test_a_lecture_has_a_slide_of_16_to_9_for_each_part_and_forgets_those_of_before(tmp_path: Path) -> None:
    result, kinds = synthetic.massive(), ("png", "svg")
    names = ["layers", "magnitudes", "magnitudes-2", "magnitudes-3"]
    slides = draw(result, tmp_path, kinds, ("layers", "magnitudes"), style="lecture")
    assert [path.name for path in slides] == [f"{name}.{kind}" for name in names for kind in kinds]
    sizes = {Image.open(path).size for path in slides if path.suffix == ".png"}
    assert sizes == {(1920, 1080)}
    letters = [
        t.get_fontsize() / 72 for t in figure_of(slides_of(draw_layers(result))[0], SLIDE).axes[0].get_xticklabels()
    ]
    assert min(letters) / SLIDE[1] > 1 / 32  # of the height of the wall; 1 / 40 is where the last row stops reading
    (tmp_path / "figures" / "layers-by.png").write_bytes(b"of another")
    draw(result, tmp_path, kinds, ("layers", "magnitudes"))
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert left == {"layers.png", "layers.svg", "magnitudes.png", "magnitudes.svg", "layers-by.png"}


def test_an_unknown_style_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for call in (lambda: draw(synthetic.quiet(), tmp_path, style="lectur"),
                 lambda: report(synthetic.quiet(), tmp_path / "x.html", style="lectur")):  # fmt: skip
        with pytest.raises(UserError, match="lectur") as told:
            call()
        assert "lecture" in told.value.do and not list(tmp_path.iterdir())


def test_a_page_for_a_lecture_says_so_to_its_style_and_script(tmp_path: Path) -> None:
    pages = [report(synthetic.massive(), tmp_path / "x.html", style=style).read_text(encoding="utf-8")
             for style in ("paper", "lecture")]  # fmt: skip
    styles = [read_page.read(page).root.all("html")[0].attributes["data-style"] for page in pages]
    assert styles == ["paper", "lecture"] and "data-style=lecture" in pages[0]


def test_every_figure_says_what_to_see_to_who_does_not_know_its_words() -> None:
    """Of all kinds of results that there are records of: golden ones, pictured ones, and several beside one another."""
    golden = Path(__file__).parents[1] / "golden"
    results = [pictured_run.scan(), synthetic.two_stacks(), synthetic.quiet()]
    for folder in sorted(golden.iterdir()):
        if folder.is_dir() and not folder.name.startswith("retired"):
            results += contents_of(folder, "").results.values()
    mute, drawn_parts = [], 0
    for result in results:
        for name, make in READINGS[result.KIND].figures.items():
            sheet = make(result)
            for part in sheet.parts if sheet is not None else ():
                drawn_parts += bool(part)
                mute += [(result.KIND, name, part.title)] if part and not part.sees.endswith(".") else []
    assert drawn_parts > 60 and not mute
