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
from massact.reports.kinds.comparison.tables import deltas
from massact.reports.parts import MOST_ROWS, MOST_SAVED, table_of


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
    assert all(a == b for a, b in plain if b.isascii() and b.isprintable() and len(b) <= 40 and "\\" not in b)


def test_a_run_without_a_strip_has_no_such_section(tmp_path: Path) -> None:
    for kept in ({}, synthetic_tables.strip(["a", "b"], 3, 8) | {"value": np.full((2, 3, 4), np.nan, np.float32)}):
        result = synthetic.massive()
        result.strip = kept
        made = read_page.read(report(result, tmp_path / "page.html").read_text(encoding="utf-8"))
        read_page.check(made)
        assert not strips(made)


def test_every_table_can_be_saved_as_it_lies_in_the_run(run: Path, page: read_page.Page) -> None:
    saved = {}
    for box in (e for e in page.every if str(e.attributes.get("class")) == "table"):
        packed = [s.text for s in box.all("script") if s.attributes.get("class") == "whole"]
        if packed:
            raw = gzip.decompress(base64.b64decode(packed[0]))
            saved[box.all("caption")[0].text] = pd.read_csv(io.BytesIO(raw), keep_default_na=False, na_values=[""])
    (findings,) = [t for name, t in saved.items() if name.startswith("Findings")]
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
    rows = dict(zip(made.columns[0].shown, zip(*(col.shown for col in made.columns[1:]), strict=True), strict=True))
    largest = read_table(a, "clusters").iloc[0]
    bigger, _ = rows[f"dim {largest['dim']} at {largest['position_class']}"]
    change, percent = bigger.split(" ")
    assert math.isclose(float(change.replace(",", "")), 0.25 * largest["mean"], rel_tol=1e-3)
    assert percent == "(+25.0%)"
    assert rows["onset layer"] == ("+0", "-")  # the quiet one has none: not a difference of zero


def test_runs_that_are_alike_do_not_differ(tmp_path: Path) -> None:
    from massact.records.kinds.comparison import open_compared

    a = compared.write(tmp_path / "a", None, synthetic.massive())
    b = compared.write(tmp_path / "b", None, synthetic.massive())
    made = deltas(compare(open_compared([a, b])))
    assert made is not None and {said.split(" ")[0] for said in made.columns[1].shown} <= {"+0", "0"}
