"""The text of a report token by token, its tables as files, runs as differences: the numbers are those of the run."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import compared
import hostile_run
import numpy as np
import pandas as pd
import pytest
import read_page
import synthetic
import synthetic_tables

from massact.records.kinds.scan import ScanResult, open_run
from massact.records.tables import read_table
from massact.reports import compare, report
from massact.reports.contents import contents_of
from massact.reports.kinds.comparison.tables import deltas, differences, layer_deltas
from massact.reports.kinds.scan.text_strip import MOST_VALUES
from massact.reports.pages import sections_of
from massact.reports.panels import Axis, Panel, Points
from massact.reports.parts import MOST_ROWS, MOST_SAVED, UNAVAILABLE, Strip, Words, table_of
from massact.reports.render.charts import chart
from massact.reports.spelling import number
from massact.scans.strip import TOKENS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run.write(tmp_path_factory.mktemp("strips") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> read_page.Page:
    made = read_page.read(report(run).read_text(encoding="utf-8"))
    read_page.check(made)
    return made


def strips(page: read_page.Page) -> list[tuple[read_page.Element, dict[str, Any]]]:
    boxes = [e for e in page.every if e.attributes.get("class") == "strip"]
    return [(box, json.loads(box.all("script")[0].text)) for box in boxes]


def saved_tables(page: read_page.Page) -> dict[str, pd.DataFrame]:
    """Caption -> what is saved of a table of the run."""
    saved = {}
    for box in (e for e in page.every if str(e.attributes.get("class")) == "table"):
        for packed in (s.text for s in box.all("script") if s.attributes.get("class") == "whole"):
            raw = gzip.decompress(base64.b64decode(packed))
            saved[box.all("caption")[0].text] = pd.read_csv(io.BytesIO(raw), keep_default_na=False, na_values=[""])
    return saved


def test_a_strip_holds_the_numbers_of_the_run(run: Path, page: read_page.Page) -> None:
    ((box, given),) = strips(page)
    kept = open_run(run).strip
    values, medians = (np.array(given[k], float) for k in ("values", "medians"))
    np.testing.assert_allclose(values, kept["value"], rtol=1e-3)
    np.testing.assert_allclose(medians, kept["median"], rtol=1e-3)
    np.testing.assert_array_equal(given["dims"], kept["dim"])
    assert given["layers"] == kept["layers"].tolist()
    assert [o.text for o in box.all("option")] == [p.replace("_", " ") for p in kept["points"]]
    (layer,) = box.all("input")
    peak = np.nanargmax(np.abs(kept["value"][0]).max(1))
    assert int(str(layer.attributes["value"])) == peak and box.attributes["data-point"] == "0"


def test_tokens_of_a_strip_are_text(run: Path, page: read_page.Page) -> None:
    ((box, _),) = strips(page)
    kept = open_run(run).strip
    shown = [span for line in box.all("p") if line.attributes.get("class") == "tokens" for span in line.all("span")]
    assert [int(str(s.attributes["data-p"])) for s in shown] == kept["position"].tolist()
    assert all([c.name for c in span.children] == ["bdi"] and len(span.text) < 80 for span in shown)  # type: ignore[union-attr]
    plain = [(span.text, str(token)) for span, token in zip(shown, kept["tokens"], strict=True)]
    assert all(a == b for a, b in plain if b and b.isascii() and b.isprintable() and len(b) <= 40 and "\\" not in b)


def test_a_run_without_a_strip_has_no_such_section(tmp_path: Path) -> None:
    for kept in ({}, synthetic_tables.strip(["a", "b"], 3, 8) | {"value": np.full((2, 3, 4), np.nan, np.float32)}):
        result = synthetic.massive()
        result.strip = kept
        made = read_page.read(report(result, tmp_path / "page.html").read_text(encoding="utf-8"))
        read_page.check(made)
        assert not strips(made)


def test_a_strip_of_very_many_layers_is_bounded() -> None:
    result = synthetic.massive()
    result.strip = kept = synthetic_tables.strip([f"t{i}" for i in range(120)], 700, 8)
    (section,) = [s for s in sections_of(contents_of(result)) if s.id == "text"]
    (strip,) = [part for part in section.parts if isinstance(part, Strip)]
    n_first, n_second = (len(text) for text in strip.texts)
    assert strip.values.size <= MOST_VALUES and strip.values.shape == (2, 700, n_first + n_second) and n_second == 2
    np.testing.assert_array_equal(strip.values[..., :n_first], kept["value"][..., :n_first])
    np.testing.assert_array_equal(strip.values[..., n_first:], kept["value"][..., 120:])  # the second text's own
    np.testing.assert_array_equal(strip.dims[..., n_first:], kept["dim"][..., 120:])
    (words,) = [part for part in section.parts if isinstance(part, Words)]
    assert str(120 - n_first) in " ".join(words.sentences)  # how many are left out


def test_a_token_without_a_letter_can_be_pointed_at(tmp_path: Path) -> None:
    result = synthetic.massive()
    result.strip = synthetic_tables.strip(["a", "", "\u202e", "\u200b"], 3, 8)
    made = read_page.read(report(result, tmp_path / "page.html").read_text(encoding="utf-8"))
    lines = [line for line in made.root.all("p") if line.attributes.get("class") == "tokens"]
    shown = [span.text for line in lines for span in line.all("span")]
    assert len(shown) == 6 and all(text.strip() and text.isprintable() for text in shown)


def test_every_table_can_be_saved_as_it_lies_in_the_run(run: Path, page: read_page.Page) -> None:
    (findings,) = [t for name, t in saved_tables(page).items() if name.startswith("Findings")]
    kept = read_table(run, "findings")
    assert len(findings) == len(kept) > MOST_ROWS  # more than are shown
    kept = kept.sort_values("magnitude", ascending=False, kind="stable")
    for name in kept:
        if pd.api.types.is_float_dtype(kept[name]):
            np.testing.assert_array_equal(findings[name].to_numpy(float), kept[name].to_numpy())  # every digit
    names = [str(b.attributes["data-name"]) for b in page.root.all("button") if b.attributes.get("class") == "save"]
    assert len(names) == len(page.tables()) and all(
        n.endswith(".csv") and n[:-4].replace("-", "").isalnum() for n in names
    )


def test_what_is_saved_is_bounded() -> None:
    row = pd.DataFrame([synthetic.massive().findings.iloc[0]])
    made = table_of("findings", pd.concat([row] * (MOST_SAVED + 5), ignore_index=True), "x")
    assert made is not None and made.whole is not None and len(made.whole) == MOST_SAVED


def changed(result: ScanResult, factor: float) -> ScanResult:
    """The same scan with all values so many times as large."""
    for table, names in ((result.layers, ("top1", "top2", "top3", "max")), (result.clusters, ("mean",))):
        for name in names:
            table[name] = table[name] * factor
    return result


def test_differences_are_of_the_numbers_of_the_runs(tmp_path: Path) -> None:
    from massact.records.kinds.comparison import open_compared

    a = compared.write(tmp_path / "a", None, synthetic.massive())
    b = compared.write(tmp_path / "b", None, changed(synthetic.massive(), 1.25))
    c = compared.write(tmp_path / "c", None, synthetic.quiet())
    made = deltas(compare(open_compared([a, b, c])))
    assert made is not None
    place = {of: i for i, of in enumerate(made.columns[0].values)}
    bigger, percent, quiet, _ = made.columns[1:]
    largest = read_table(a, "clusters").iloc[0]
    row = place[f"dim {largest['dim']} at {largest['position_class']}"]
    assert math.isclose(bigger.values[row], 0.25 * largest["mean"], rel_tol=1e-12)  # every digit, for a file
    assert math.isclose(percent.values[row], 25.0, rel_tol=1e-9) and percent.shown[row] == "+25.0%"
    assert bigger.shown[row].startswith("-" if largest["mean"] < 0 else "+")
    onset = place["onset layer"]
    assert (bigger.values[onset], bigger.shown[onset]) == (0.0, "+0")
    assert math.isnan(quiet.values[onset])  # it has none: not a difference of zero
    assert quiet.shown[onset] == percent.shown[onset] == UNAVAILABLE  # nor a percent of a layer's number


def test_the_sign_and_the_percent_are_of_the_size_of_the_first() -> None:
    rows = [("a", [-4.0, -5.0, math.inf], False), ("b", [0.0, 2.0, 0.0], False), ("c", [math.nan, 1.0, 2.0], False)]
    made = differences("x", ["one", "two", "three"], rows, "y")
    assert made is not None
    values = [list(column.values) for column in made.columns]
    assert values[0] == ["a", "b"]  # of the third nothing is known
    np.testing.assert_array_equal(values[1:], [[-1.0, 2.0], [-25.0, math.nan], [math.nan, 0.0], [math.nan, math.nan]])


def test_layers_and_edits_differ_by_their_numbers(tmp_path: Path) -> None:
    runs = []
    for name, factor in (("a", 1.0), ("b", 1.25)):
        compared.write(tmp_path / name, None, changed(synthetic.massive(), factor))
        edits = hostile_run.intervention(["zero", "mean"])
        edits.effects["delta"] *= factor
        edits.save(tmp_path / name)
        runs.append(tmp_path / name)
    made = read_page.read(report(runs, tmp_path / "both.html").read_text(encoding="utf-8"))
    read_page.check(made)

    def numbers(caption: str, column: str) -> list[float]:
        return [float(str(cell.attributes["data-v"])) for cell in made.table(caption)[column]]

    top1 = read_table(runs[0], "layers")["top1"].to_numpy()
    np.testing.assert_allclose(numbers("Largest |h|", "b"), 0.25 * top1, rtol=1e-9)
    np.testing.assert_allclose(numbers("Largest |h|", "b (%)"), 25.0, rtol=1e-9)
    np.testing.assert_allclose(numbers("What edits do", "b"), [0.25 * 5.0, 0.25 * 0.001], rtol=1e-9)
    effects = saved_tables(made)["Effects of every edit, run by run"]
    assert effects["label"].tolist() == ["a", "a", "b", "b"]  # rows of two runs can be told apart in the file
    assert [c.attributes["data-v"] for c in made.table("Clusters of each run")["dim"]][0].isdigit()  # type: ignore[union-attr]


def test_runs_of_other_layers_have_no_difference_by_layer(tmp_path: Path) -> None:
    from massact.records.kinds.comparison import open_compared

    a, b = synthetic.massive(), synthetic.massive()
    b.layers = b.layers[b.layers["layer"] < 5].reset_index(drop=True)
    paths = [compared.write(tmp_path / name, None, made) for name, made in (("a", a), ("b", b))]
    assert layer_deltas(compare(open_compared(paths))) is None
    assert layer_deltas(compare(open_compared([paths[0], compared.write(tmp_path / "c", None, a)]))) is not None


def test_runs_that_are_alike_do_not_differ(tmp_path: Path) -> None:
    from massact.records.kinds.comparison import open_compared

    a = compared.write(tmp_path / "a", None, synthetic.massive())
    b = compared.write(tmp_path / "b", None, synthetic.massive())
    made = deltas(compare(open_compared([a, b])))
    assert made is not None and set(made.columns[1].values) == {0.0}


def test_what_an_intervention_found_stands_in_the_answer(tmp_path: Path) -> None:
    for result in (synthetic.massive(), synthetic.quiet()):
        run = compared.write(tmp_path / f"run{len(result.findings)}", None, result)
        made = hostile_run.intervention(["mean"])
        made.save(run)
        page = read_page.read(report(run).read_text(encoding="utf-8"))
        (answer,) = [s for s in page.root.all("section") if s.attributes["id"] == "answer"]
        row = made.effects[made.effects["group"] == "all"].iloc[0]
        assert number(row["baseline"]) in answer.text and number(row["edited"]) in answer.text


def test_a_run_without_a_strip_says_why(tmp_path: Path) -> None:
    """Another reason where the run is old, where its positions are no tokens, and where nothing is finite."""
    old, image, broken = (synthetic.massive() for _ in range(3))
    for result in (old, image):
        result.strip = {}
    image.info.corpus = {**image.info.corpus, "source": {"kind": "images"}}
    values = np.full((2, 3, 4), np.nan, np.float32)
    broken.strip = synthetic_tables.strip(["a", "b"], 3, 8) | {"value": values}
    said = []
    for result in (old, image, broken):
        made = read_page.read(report(result, tmp_path / "page.html").read_text(encoding="utf-8"))
        said += [s.text for s in made.root.all("section") if s.attributes["id"] == "text"]
    assert len(set(said)) == 3 and all("navailable" in text for text in said)


def test_what_a_strip_leaves_out_is_said(run: Path, tmp_path: Path) -> None:
    result = open_run(run)
    result.info.corpus = {**result.info.corpus, "n_sequences": 77, "n_tokens": 123_456}
    made = read_page.read(report(result, tmp_path / "page.html").read_text(encoding="utf-8"))
    (section,) = [s for s in made.root.all("section") if s.attributes["id"] == "text"]
    first = int((result.strip["text"] == 0).sum())
    assert all(told in section.text for told in (f"{first} tokens", "77 sequences", "123,456"))


def test_a_strip_of_a_deep_model_is_small(tmp_path: Path) -> None:
    """The most that a scan keeps: two whole texts, of 126 layers at four points."""
    n, points, layers = 2 * TOKENS, 4, 127
    rng = np.random.default_rng(0)
    kept = {
        "value": rng.normal(0, 1e3, (points, layers, n)).astype(np.float32),
        "dim": rng.integers(0, 16_384, (points, layers, n)).astype(np.int32),
        "median": np.ones((points, layers, 2), np.float32),
        "tokens": np.array([f" token{i}" for i in range(n)]),
        "position": np.tile(np.arange(TOKENS), 2),
        "text": np.repeat([0, 1], TOKENS),
        "points": np.array([f"point_{i}" for i in range(points)]),
        "layers": np.arange(layers),
        "stack": np.array(""),
    }
    sizes = []
    for strip in ({}, kept):
        result = synthetic.massive()
        result.strip = strip
        sizes.append(len(report(result, tmp_path / "page.html").read_bytes()))
    assert sizes[1] - sizes[0] < 3e6


def test_words_at_dots_point_into_the_panel() -> None:
    values = np.array([-90.0, 0.0, 95.0])
    points = Points(values, range(3), ["--s1"] * 3, ["circle"] * 3, values, values, ["x"] * 3, ["x"] * 3)
    (trace,) = chart(Panel("x", [points], Axis(limits=(-100, 100))))["data"]
    assert [side.split()[1] for side in trace["textposition"]] == ["right", "center", "left"]
