"""The HTML page: its values are those of the run, nothing leaves it, and it survives every run."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compared
import hostile_run
import labs
import numpy as np
import pandas as pd
import pictured_run
import pytest
import read_page
import synthetic
from test_trajectory import growing
from test_trajectory import hostile as hostile_trajectory

from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.sidecars import Sidecar
from massact.records.tables import read_table
from massact.reports import lab_in_words, report
from massact.reports.provenance import command_of
from tests.facts import tells

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run of 32 layers with everything in it, its page written, and the seconds of work that took."""
    run = hostile_run.write(tmp_path_factory.mktemp("hostile") / "run")
    start = time.process_time()
    report(run)
    return run, time.process_time() - start


@pytest.fixture(scope="module")
def page(hostile: tuple[Path, float]) -> read_page.Page:
    return read_page.read((hostile[0] / "report.html").read_text(encoding="utf-8"))


def page_of(run: Any, tmp_path: Path) -> read_page.Page:
    """The page of any run, read and checked."""
    made = read_page.read(report(run, tmp_path / "page.html").read_text(encoding="utf-8"))
    read_page.check(made)
    return made


def test_a_hostile_run_gives_a_page_that_fetches_nothing_and_runs_nothing(page: read_page.Page) -> None:
    read_page.check(page)
    scripts = [s for s in page.root.all("script") if "type" not in s.attributes]
    assert not any("alert" in s.text for s in scripts[1:])
    assert page.root.all("title")[0].text.endswith(" </title><script>alert(1)//")


def test_it_is_small_and_quick(hostile: tuple[Path, float]) -> None:
    run, seconds = hostile
    assert (run / "report.html").stat().st_size < 8e6
    assert seconds < 5


def test_the_same_run_gives_the_same_bytes_wherever_they_go(hostile: tuple[Path, float], tmp_path: Path) -> None:
    run, _ = hostile
    again = report(run, tmp_path / "a" / "page.html")
    assert again.read_bytes() == (run / "report.html").read_bytes()


def _sorted(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.sort_values(column, ascending=False, kind="stable")


def test_every_number_of_every_table_is_that_of_the_file(hostile: tuple[Path, float], page: read_page.Page) -> None:
    run, checked = hostile[0], 0
    writers, near = read_table(run, "writers"), _sorted(read_table(run, "near_misses"), "ratio")
    orders: dict[str, pd.DataFrame] = {
        "Largest and median": read_table(run, "layers"),
        "All statistics": read_table(run, "layers"),
        "Clusters": read_table(run, "clusters"),
        "Coordinates": _sorted(read_table(run, "coordinates"), "count"),
        "Findings": _sorted(read_table(run, "findings"), "magnitude"),
        "Near misses": near,
        "Concentration": read_table(run, "axes"),
        "Heads": read_table(run, "heads"),
        "Sinks": _sorted(read_table(run, "sinks"), "heads"),
        "Positions": _sorted(read_table(run, "positions"), "alpha"),
        "Decomposition": read_table(run, "decomposition"),
        "Writers": writers.iloc[np.argsort(-writers["share"].abs(), kind="stable")],
        "Effects": read_table(run, "effects"),
    }
    for caption, rows in orders.items():
        for name, cells in page.table(caption).items():
            if name == "verdict" or not pd.api.types.is_numeric_dtype(rows[name]) or rows[name].dtype == bool:
                continue
            wanted = rows[name].tolist()[: len(cells)]
            assert len(cells) == min(len(rows), 1200 if caption == "Heads" else len(cells))
            for cell, value in zip(cells, wanted, strict=True):
                if isinstance(value, float) and math.isnan(value):
                    assert cell.text == "unavailable" and cell.attributes["data-v"] == ""
                else:
                    assert float(str(cell.attributes["data-v"])) == value, (caption, name)
                    checked += 1
    assert checked > 10_000
    unread = [caption for caption in page.tables() if not caption.startswith(tuple(orders))]
    assert len(unread) == 2 and all(tells([one], f"Table {i}", "layer 30") for i, one in enumerate(unread, 1))


def test_what_is_left_out_is_said(hostile: tuple[Path, float], page: read_page.Page) -> None:
    text, findings = page.root.text, read_table(hostile[0], "findings")
    at_peak = findings[findings["layer"] == 30]
    tokens = {(s, p): t for s, p, t in zip(at_peak["sequence"], at_peak["pos"], at_peak["token"], strict=True)}
    shown = len(page.table("Findings")["dim"])
    assert shown < len(findings) and tells(text, f"{shown} of {len(findings)}", "findings.parquet")
    assert tells(text, "Unavailable", "slot_mass")  # a column of NaN: neither blank nor zero
    assert len(tokens) == 16 < len(at_peak) and tells(text, f"{len(set(tokens.values())) - 12} more", "not")


def test_curves_are_those_of_the_file(hostile: tuple[Path, float], page: read_page.Page) -> None:
    layers = read_table(hostile[0], "layers")
    title = next(t for t in page.figures() if "The three greatest |h|" in t)
    figure = page.figures()[title]
    assert [t["name"] for t in figure["data"]] == ["Top 1", "Top 2", "Top 3", "Median"]
    for trace, column in zip(figure["data"], ("top1", "top2", "top3", "median"), strict=True):
        assert trace["x"] == layers["layer"].tolist()
        assert np.allclose(trace["y"], layers[column], rtol=1e-5, atol=0)
    heads = read_table(hostile[0], "heads").pivot(index="head", columns="layer", values="mass_findings")
    (shown,) = [f for t, f in page.figures().items() if "Attention of each head" in t]
    assert np.allclose(np.array(shown["data"][0]["z"]), heads.to_numpy(), rtol=1e-3)
    effects = read_table(hostile[0], "effects")
    (shown,) = [f for t, f in page.figures().items() if "Change under each edit" in t]
    trace, finite = shown["data"][0], np.isfinite(effects["delta"].to_numpy())
    assert [x is None for x in trace["x"]] == list(~finite)
    kept = effects[finite & effects["ci_low"].notna().to_numpy()]
    assert np.allclose([x for x in trace["customdata"] if x is not None], kept["delta"])
    at = np.array([x for x in trace["x"] if x is not None])
    back = np.array([e for e, ok in zip(trace["error_x"]["arrayminus"], finite, strict=True) if ok])
    near = 0.1  # a hundredth of a perplexity of ten and more: linear up to it, a step for each decade beyond
    for place, value in ((at, kept["delta"]), (at - back, kept["ci_low"])):
        far = place > 1
        np.testing.assert_allclose(np.where(far, near * 10 ** (place - 1), near * place), value, rtol=1e-4)
    colors = [c for c, ok in zip(trace["marker"]["color"], finite, strict=True) if ok]
    assert set(colors[::2]) == {"--limit"} and set(colors[1::2]) == {"--s3"}  # harmful, harmless in turn


def test_the_portrait_keeps_every_spike(hostile: tuple[Path, float], page: read_page.Page) -> None:
    h_PTD = open_run(hostile[0]).portrait["magnitude"]
    (figure,) = [f for f in page.figures().values() if f["data"][0]["type"] == "scatter3d"]
    shown = [trace for trace in figure["data"] if trace["mode"] == "lines"]
    assert len(shown) == len(h_PTD) == 3
    (slider,) = figure["layout"]["sliders"]
    for i, step in enumerate(slider["steps"]):  # each step shows its layer alone, the first one shown the greatest
        (seen,) = (one["visible"] for one in step["args"])
        assert [t for t, on in zip(figure["data"], seen, strict=True) if on and t["mode"] == "lines"] == [shown[i]]
    greatest = int(h_PTD.max((1, 2)).argmax())
    assert slider["active"] == greatest and [trace["visible"] for trace in shown] == [i == greatest for i in range(3)]
    labels = [trace["text"] for trace in figure["data"] if trace["mode"] != "lines" and trace["visible"]]
    assert "dim 3," in labels[0][0] and figure["layout"]["scene"]["yaxis"]["title"]["text"] == "Dim"
    for trace, h_TD in zip(shown, h_PTD, strict=True):
        peak = int(np.argmax([-1 if z is None else z for z in trace["z"]]))
        pos, dim = np.unravel_index(int(h_TD.argmax()), h_TD.shape)
        assert (trace["x"][peak], trace["y"][peak]) == (pos, dim)  # all tokens are shown: the place is the position
        assert trace["z"][peak] == pytest.approx(float(h_TD.max()), rel=1e-3)


def _painted(value: Any, key: str = "") -> Any:
    """What the script of the page makes of the names of colours."""
    if isinstance(value, dict):
        return {k: _painted(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_painted(v, key) for v in value]
    if key == "colorscale":
        return "Viridis"
    return "#123456" if key.endswith("color") and str(value).startswith("--") else value


def test_plotly_takes_every_figure_and_no_label_is_markup(page: read_page.Page) -> None:
    from plotly.graph_objects import Figure

    for title, figure in page.figures().items():
        Figure(_painted({"data": figure["data"], "layout": figure["layout"]}))  # refuses what plotly does not know
        for key, text in _strings(figure):
            left = text.replace("<br>", "").replace("<extra></extra>", "")
            assert "<" not in left, (title, text)
            assert "$" not in left or (key == "ticktext" and "scene" in figure["layout"]), (title, text)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _strings(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v, key)
    elif isinstance(value, str):
        yield key, value


def test_colours_of_figures_are_colours_of_the_style(page: read_page.Page) -> None:
    style = page.root.all("style")[0].text
    for figure in page.figures().values():
        for key, text in _strings(figure):
            assert not key.endswith("color") or f" {text}:" in style, text
            assert key != "colorscale" or all(f"{text}{i}:" in style for i in range(4))


def test_every_synthetic_result_has_a_page(every: ScanResult, tmp_path: Path) -> None:
    made = page_of(every, tmp_path)
    given = "".join(s.text for s in made.root.all("script") if "type" in s.attributes)
    assert "NaN" not in given.replace('"NaN or Inf"', "")  # which is the name of a series


def test_nothing_measured_and_nothing_found_are_said(tmp_path: Path) -> None:
    assert "Nothing was measured" in page_of(synthetic.empty(), tmp_path).root.text
    assert tells(page_of(synthetic.unanswered(), tmp_path).root.text, "no answer", "failed")
    quiet = page_of(synthetic.quiet(), tmp_path).root.text
    assert tells(quiet, "No: acme/quiet", "no massive activations") and tells(quiet, "No findings", "sun2024")
    broken = page_of(synthetic.broken(), tmp_path)
    bad = synthetic.broken().layers.query("nonfinite > 0")["layer"]
    assert tells(broken.root.text, "NaN or Inf", f"layers {bad.min()}-{bad.max()}", "drawn")
    cells = broken.table("Largest and median")["top1"]
    assert [i for i, c in enumerate(cells) if c.text == "unavailable"] == list(bad)


@pytest.mark.parametrize(
    "name", ["schema_1", "explained_1", "intervened_1", "classics_1", "reproduced_1", "trained_1", "stepped_1", "lab_1"]
)
def test_old_runs_have_a_page(name: str, tmp_path: Path) -> None:
    sections = {s.attributes["id"] for s in page_of(GOLDEN / name, tmp_path).root.all("section")}
    more = {"schema_1": {"layers"}, "explained_1": {"attention"}, "intervened_1": {"interventions"},
            "classics_1": {"classics"}, "reproduced_1": {"paper"}, "trained_1": {"training"},
            "stepped_1": {"checkpoints"}, "lab_1": {"lab"}}  # fmt: skip
    assert sections >= {"answer", "definitions", "provenance"} | more[name]


def test_a_training_a_lab_and_checkpoints_have_a_page(tmp_path: Path) -> None:
    run = compared.write(tmp_path / "run", compared.trained(3.0), synthetic.quiet(), compared.explanation(12, 0.5))
    made = page_of(run, tmp_path)
    sections = [s.attributes["id"] for s in made.root.all("section")]
    assert sections[0] == "answer" and set(sections) >= {"training", "layers", "attention"}
    assert sections.index("layers") < sections.index("attention") < sections.index("training")
    assert [float(str(c.attributes["data-v"])) for c in made.table("Losses")["step"]] == [40, 30, 20, 10]
    lab = page_of(labs.lab(), tmp_path)
    assert lab.root.text.count(lab_in_words(labs.lab())[0]) == 1  # the answer is not said again in its section
    assert len(lab.table("Every variant")["variant"]) == len(labs.lab().variants)
    grown = page_of(growing(), tmp_path)
    assert tells(grown.root.text, "Yes", "2 of 5 checkpoints") and any("Ratio" in t for t in grown.figures())
    page_of(hostile_trajectory(), tmp_path)


def test_several_runs_are_put_side_by_side(tmp_path: Path) -> None:
    a = compared.write(tmp_path / "a", None, synthetic.massive(), compared.explanation(32, 0.5))
    b = compared.write(tmp_path / "b", None, synthetic.quiet())
    hostile_run.intervention(["zero"]).save(a)
    made = page_of([a, b], tmp_path)
    (curves,) = [f for t, f in made.figures().items() if "Greatest |h| of each layer" in t]
    for trace, run in zip(curves["data"], (a, b), strict=True):
        layers = read_table(run, "layers")
        assert trace["name"] == run.name and np.allclose(trace["y"], layers["top1"], rtol=1e-5)
    rows = made.table("Runs")
    assert [c.text for c in rows["massive"]] == ["yes", "no"] and rows["mass_first"][1].text == "unavailable"
    (labels,) = [t["label"] for name, t in made.tables().items() if name.startswith("Effects") and "label" in t]
    assert [c.text for c in labels] == ["a"]
    assert {s.attributes["id"] for s in made.root.all("section")} >= {"provenance-1", "provenance-2"}
    with pytest.raises(UserError, match="of several runs"):
        report([a, b])
    with pytest.raises(UserError, match="Only run directories"):
        report([synthetic.massive(), synthetic.quiet()], tmp_path / "x.html")


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    for given, out, message in (
        (tmp_path / "nowhere", None, "nowhere"), (synthetic.quiet(), None, "no directory"),
        (tmp_path, None, "no run.json"), (GOLDEN / "schema_1", tmp_path, "is a directory"), (3, None, "not of int"),
        ([], None, "No run"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            report(given, out)
    with pytest.raises(UserError, match="No format 'pdf'"):
        report(GOLDEN / "schema_1", tmp_path / "x", kind="pdf")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report(GOLDEN / "schema_1", file / "below" / "page.html")


def test_the_command_of_a_record_is_one_that_the_command_line_takes(hostile: tuple[Path, float]) -> None:
    from typer.main import get_command

    from massact.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    records: list[tuple[str, Any]] = [("scan", open_run(GOLDEN / "explained_1").info)]
    for verb, folder in (("explain", "explained_1"), ("intervene", "intervened_1"), ("classics", "classics_1"),
                         ("reproduce", "reproduced_1")):  # fmt: skip
        record = json.loads((GOLDEN / folder / f"{verb}.json").read_text())
        records.append((verb, Sidecar(config=record["config"], model=record["model"])))
    records[0][1].config.update(thresholds={"ratio": 500.0}, null=False, bos_contrast=True, preprocess={"crop": "224"})
    for verb, info in records:
        words = shlex.split(command_of(verb, info))
        assert words[:2] == ["massact", verb]
        context = commands[verb].make_context(verb, words[2:])
        for name in ("seed", "batch_size", "eps", "seq_len", "n_sequences"):
            if name in context.params and info.config.get(name) is not None:
                assert str(context.params[name]) == str(info.config[name]), (verb, name)
    (scan, info), *_ = records
    assert context_of(commands, scan, info)["thresholds"] == ["ratio=500.0"]
    info.config["prompt"] = "it's\n\\n"
    (said,) = [w for w in command_of(scan, info).split(" --") if w.startswith("prompt")]
    shell = subprocess.run(["bash", "-c", f"printf %s {said.removeprefix('prompt ')}"], capture_output=True, text=True)
    assert shell.stdout == "it's\n\\n"


def context_of(commands: Any, verb: str, info: Any) -> dict[str, Any]:
    return commands[verb].make_context(verb, shlex.split(command_of(verb, info))[2:]).params


def test_a_report_needs_no_torch_and_no_plotly_in_python(tmp_path: Path) -> None:
    code = (
        f"import sys, massact\nmassact.report({str(GOLDEN / 'explained_1')!r}, {str(tmp_path / 'x.html')!r})\n"
        "assert not {'torch', 'transformers', 'plotly.graph_objects'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium (see tests/SKIPS.md)")
@pytest.mark.parametrize("run", [GOLDEN / "explained_1", pictured_run.scan()], ids=["text", "images"])
def test_a_browser_draws_every_figure_and_complains_of_nothing(run: Any, tmp_path: Path) -> None:
    path = report(run, tmp_path / "page.html")
    for _ in range(4):  # on a busy machine its virtual time may end before the first frame
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--dump-dom",
             "--window-size=1280,20000", "--virtual-time-budget=5000", "--enable-logging=stderr", "--log-level=0",
             f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if 'class="plot-container' in done.stdout:
            break
    figures = done.stdout.count("<figure ") - done.stdout.count('class="gallery"')
    assert figures > 10 and done.stdout.count('class="plot-container') == figures
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "MathJax" not in line]
    assert not [line for line in console if "rror" in line or "Refused" in line], console


def test_a_peak_without_findings_is_no_error(tmp_path: Path) -> None:
    result = synthetic.massive()
    result.findings = result.findings[result.findings["layer"] != 30].reset_index(drop=True)
    assert any(tells([title], "dim", "layer 30") for title in page_of(result, tmp_path).figures())
