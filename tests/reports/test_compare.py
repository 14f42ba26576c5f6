"""Runs side by side: the numbers are those that the runs recorded, and what is missing is said to be missing."""

from __future__ import annotations

import io
import json
import math
import shutil
import warnings
from collections import Counter
from pathlib import Path

import compared
import numpy as np
import pandas as pd
import pytest
import synthetic
from PIL import Image
from rich.console import Console

from massact.records.errors import UserError
from massact.records.kinds.comparison import Comparison, labels_of, open_compared
from massact.records.tables import columns_of, read_table
from massact.reports import compare, comparison_in_words, draw, show, to_json
from massact.reports.kinds.comparison.figures import COMPARE_FIGURES, draw_compare_layers, draw_compare_magnitudes
from massact.reports.kinds.comparison.words import shown
from massact.reports.render.sheets import figure_of
from massact.reports.spelling import cell
from tests.facts import tells


def compared_runs(paths: list[Path], labels: tuple[str, ...] = (), by_seed: bool = True) -> Comparison:
    return compare(open_compared(paths, labels), by_seed)


def printed(c: Comparison, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show(c, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compared.six(tmp_path_factory.mktemp("six"))


def test_the_numbers_of_a_run_are_those_that_it_recorded(paths: list[Path]) -> None:
    c = compared_runs(paths)
    row = c.compare.set_index("label").loc["softmax-s1"]
    scan = synthetic.massive(n_layers=12, span=(3, 11))
    assert (row["variant"], row["seed"], row["steps"], row["tokens"]) == ("softmax", 1, 40, 2560)
    assert (row["train_loss"], row["eval_loss"]) == (pytest.approx(3.6), pytest.approx(3.1))
    assert row["perplexity"] == pytest.approx(math.exp(3.1))
    assert (row["massive"], row["onset"], row["criterion"]) == (1.0, 3.0, "sun2024")
    assert row["max"] == scan.layers["max"].max() + 100 and row["ratio"] == scan.layers["ratio_max"].max()
    assert (row["sink_rate"], row["mass_first"]) == (1.0, pytest.approx(0.6))
    assert row["value_norm_first"] == 0.5 and math.isnan(row["slot_mass"])
    quiet = c.compare.set_index("label").loc["kv-seed0"]
    assert (quiet["massive"], quiet["sink_rate"], quiet["slot_mass"]) == (0.0, 0.0, pytest.approx(0.6))
    assert math.isnan(quiet["onset"]) and shown(quiet, "onset") == "none" and shown(quiet, "massive") == "no"


def test_the_table_shows_what_the_parquet_holds(paths: list[Path], tmp_path: Path) -> None:
    c = compared_runs(paths)
    c.save(tmp_path / "out")
    table = read_table(tmp_path / "out", "compare")
    pd.testing.assert_frame_equal(table, c.compare)
    pd.testing.assert_frame_equal(read_table(tmp_path / "out", "compare_layers"), c.compare_layers)
    assert list(table) == list(columns_of("compare"))
    text = printed(c, 160)
    for _, row in table[table["row"] == "run"].iterrows():
        lines = [line.split() for line in text.splitlines() if line.startswith(row["label"])]
        assert lines[0][1:] == [row["variant"], "40", "2,560", cell(row["train_loss"]), cell(row["eval_loss"]),
                                cell(row["perplexity"])]  # fmt: skip
        assert lines[1][3:5] == [cell(row["max"]), cell(row["ratio"])]
    layers = c.compare_layers[(c.compare_layers["label"] == "softmax-s0") & (c.compare_layers["row"] == "run")]
    scan = synthetic.massive(n_layers=12, span=(3, 11)).layers
    for name in ("top1", "top2", "top3", "median"):
        np.testing.assert_array_equal(layers[name], scan[name])
    assert math.isnan(layers["mass_first"].iloc[0]) and layers["mass_first"].iloc[5] == pytest.approx(0.5)
    assert cell(scan["top1"].max()) in text.split("Largest and median")[1]


def test_runs_that_differ_by_seed_only_are_grouped(paths: list[Path]) -> None:
    c = compared_runs(paths)
    assert c.groups == {"softmax (3 seeds)": [0, 1, 2], "kv (3 seeds)": [3, 4, 5]}
    rows = c.compare[c.compare["label"] == "softmax (3 seeds)"].set_index("row")
    assert list(rows.index) == ["mean", "min", "max"] and set(rows["n_runs"]) == {3}
    assert list(rows["eval_loss"]) == [pytest.approx(3.1), pytest.approx(3.0), pytest.approx(3.2)]
    assert rows.loc["mean", "massive"] == 1.0 and shown(rows.reset_index().iloc[0], "massive") == "3 of 3"
    assert rows["max"].loc["max"] - rows["max"].loc["min"] == pytest.approx(200.0)
    assert math.isnan(rows.loc["mean", "slot_mass"])
    layers = c.compare_layers[c.compare_layers["label"] == "softmax (3 seeds)"]
    at = layers[layers["layer"] == 4].set_index("row")["mass_first"]
    assert [at["mean"], at["min"], at["max"]] == [pytest.approx(x) for x in (0.6, 0.5, 0.7)]
    text = " ".join(printed(c, 160).split())
    assert "3.100 (3.000 to 3.200)" in text and "3 of 3" in text and "0 of 3" in text
    alone = compared_runs(paths, by_seed=False)
    assert alone.groups == {} and set(alone.compare["row"]) == {"run"} and len(alone.compare) == 6


def test_no_number_of_the_layers_is_cut_at_any_width(paths: list[Path]) -> None:
    c = compared_runs(paths)
    rows = c.compare_layers[c.compare_layers["row"] == "run"]
    for width in (60, 79, 80, 100, 117, 118, 200):
        words = printed(c, width).split("Largest and median |h|", 1)[1].split()
        for name in ("top1", "top2", "top3", "median"):
            for number, times in Counter(map(cell, rows[name])).items():
                assert words.count(number) >= times, (width, name, number)


def test_what_is_no_repetition_by_seed_is_not_grouped(tmp_path: Path) -> None:
    quiet = synthetic.quiet()
    same = [compared.write(tmp_path / n, compared.trained(seed=1), quiet) for n in ("a", "b")]
    other = compared.write(tmp_path / "c", compared.trained(seed=2, lr=2e-3), quiet)
    elsewhere = compared.write(tmp_path / "d", compared.trained(seed=3, tokens="xyz"), quiet)
    unfinished = compared.trained(seed=4)
    unfinished.info.status, unfinished.info.losses = "interrupted", {}
    half = compared.write(tmp_path / "e", unfinished, None)
    c = compared_runs([*same, other, elsewhere, half])
    assert c.groups == {}
    assert [note for note in tells(c.notes, unfinished.info.status) if note.startswith("e: ")]
    assert tells(c.notes, "different data")
    row = c.compare.iloc[4]
    assert [shown(row, x) for x in ("steps", "eval_loss", "perplexity", "massive", "max", "sink_rate")] == ["-"] * 6


def test_what_is_missing_is_a_dash_with_the_command_that_gets_it(tmp_path: Path) -> None:
    a = compared.write(tmp_path / "only trained", compared.trained(), None)
    b = compared.write(tmp_path / "unexplained", compared.trained(variant="kv-bias"), synthetic.quiet())
    d = compared.write(tmp_path / "scan", None, synthetic.massive(n_layers=12, span=(3, 11)))
    c = compared_runs([a, b, d])
    notes = "\n".join(c.notes)
    assert f"massact scan '{a / 'model'}' --out '{a / 'scan'}'" in notes
    assert f"massact explain {b / 'scan'}" in notes and f"massact explain {d}" in notes
    assert "train.json" in notes
    rows = c.compare.set_index("label", drop=False)
    for label, column in (("only trained", "massive"), ("only trained", "max"), ("unexplained", "sink_rate"),
                          ("unexplained", "slot_mass"), ("scan", "eval_loss"), ("scan", "steps")):  # fmt: skip
        assert math.isnan(rows.loc[label, column]) and shown(rows.loc[label], column) == "-"
    having, lacking = comparison_in_words(c)[0].split(";")
    assert tells([having], "scan") and tells([lacking], "none", "unexplained")
    assert "only trained" not in having + lacking  # not scanned is not none
    made = {p.stem for p in draw(c, tmp_path / "out")}
    assert made == {"compare_layers", "compare_magnitudes", "compare_losses"}  # nothing was explained


def test_that_runs_are_scans_alone_is_said_once(tmp_path: Path) -> None:
    alone = [compared.write(tmp_path / name, None, synthetic.quiet()) for name in "abc"]
    trained = [compared.write(tmp_path / name, compared.trained(), synthetic.quiet()) for name in "tu"]

    def untrained(*runs: Path) -> list[str]:
        return [note for note in compared_runs(list(runs)).notes if "train.json" in note]

    (note,) = untrained(*alone, trained[0])
    assert note.startswith("a, b and c are ")
    (note,) = untrained(trained[0], alone[0])
    assert note.startswith("a is ")
    assert not untrained(*trained)


def test_unlike_runs_are_compared_with_a_note(tmp_path: Path) -> None:
    first, second = synthetic.massive(n_layers=12, span=(3, 11)), synthetic.quiet()
    first.info.model |= {"n_layers": {"": 12}, "d_model": {"": 64}, "weights_sha256": "aa"}
    second.info.model |= {"n_layers": {"": 24}, "d_model": {"": 64}, "weights_sha256": "bb"}
    second.info.corpus["sha256"] = "ffff0000"
    second.info.criterion = second.info.criterion | {"thresholds": {"magnitude": 50.0, "ratio": 500.0}}
    paths = [
        compared.write(tmp_path / "a", compared.trained(weights="aa"), first, compared.explanation(12, 0.5)),
        compared.write(tmp_path / "b", compared.trained(weights="zz"), second, compared.explanation(12, 0.5, eps=0.2)),
    ]
    notes = "\n".join(compared_runs(paths).notes)
    for said in ("different shape", "different inputs", "different criteria", "different eps", "b: its scan is"):
        assert said in notes, said
    assert "a: its scan" not in notes


def test_layers_whose_attention_was_not_seen_are_named(tmp_path: Path) -> None:
    """Means of attention over some layers are not those of a run in which all were seen."""
    whole, part, none = (compared.explanation(12, 0.5) for _ in range(3))
    part.info.attention = {"": {"n_calls": 10, "unseen_layers": [5, 3]}}
    none.heads = none.heads.iloc[:0]
    paths = [
        compared.write(tmp_path / name, None, synthetic.massive(n_layers=12, span=(3, 11)), e)
        for name, e in (("whole", whole), ("part", part), ("none", none))
    ]
    c = compared_runs(paths)
    (note,) = tells(c.notes, "not", "attention", "layers 3, 5")
    assert note.startswith("part: ")
    words = comparison_in_words(c)
    assert [w for w in tells(words, "not seen", "attention") if w.startswith("none: ")]
    assert not [w for w in words if "NaN" in w]


def test_nan_and_infinity_are_shown_as_they_are(tmp_path: Path) -> None:
    training = compared.trained(loss=math.nan, weights="x")
    a = compared.write(tmp_path / "a", training, compared.overflowed(), compared.explanation(32, math.nan))
    b = compared.write(tmp_path / "b", compared.trained(loss=1e6), synthetic.empty())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = compared_runs([a, b])
        text = printed(c)
        draw(c, tmp_path / "out")
    rows = c.compare.set_index("label", drop=False)
    assert rows.loc["a", "max"] == math.inf and shown(rows.loc["a"], "max") == "inf"
    assert shown(rows.loc["a"], "eval_loss") == "NaN" and shown(rows.loc["a"], "mass_first") == "-"
    assert shown(rows.loc["b"], "max") == "NaN" and rows.loc["b", "perplexity"] == math.inf
    assert any("NaN or Inf" in note for note in c.notes) and "NaN" in text
    assert json.loads(to_json(c))["compare"][0]["max"] == "inf"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    paths = []
    for i, scan in enumerate((synthetic.hostile(), synthetic.two_stacks())):
        training = compared.trained(variant="[red]$x$\n", seed="[/]", **{"[link]": i})
        training.info.model["name"] = "\x1b[31m\udcff"
        paths.append(compared.write(tmp_path / str(i), training, scan, compared.explanation(12, 0.2)))
    labels = ("[bold]a[/bold]\n\u202egnp.\x1b[31m$x$ \U0001f600", "<b>" + "n" * 200)
    c = compared_runs(paths, labels)
    for width in (40, 80, 200):
        text = printed(c, width)
        assert "\x1b" not in text and "\u202e" not in text and all(len(line) <= width for line in text.splitlines())
    assert "[bold]a[/bold]\\n" in text and "[/bold]\\\\" not in text and "[red]$x$\\n" in text
    c.save(tmp_path / "out")
    assert list(read_table(tmp_path / "out", "compare")["label"]) == list(labels)
    json.loads(to_json(c))
    for file in draw(c, tmp_path / "out"):
        if file.suffix == ".png":
            assert np.asarray(Image.open(file).convert("L")).std() > 1


def test_an_encoding_without_the_characters_is_no_error(paths: list[Path]) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(compared_runs(paths, tuple(f"\u4e2d{i}" for i in range(6))), Console(file=raw, width=100))
    raw.flush()


def test_figures_have_one_axis_for_all_runs(paths: list[Path], tmp_path: Path) -> None:
    c = compared_runs(paths)
    layers = figure_of(draw_compare_layers(c))
    assert [axes.get_title() for axes in layers.axes] == ["softmax (3 seeds)", "kv (3 seeds)"]
    assert len({axes.get_ylim() for axes in layers.axes}) == 1 and layers.axes[0].get_yscale() == "log"
    assert len(layers.axes[0].collections) == 4  # a band for each curve
    top = c.compare_layers[(c.compare_layers["label"] == "softmax (3 seeds)") & (c.compare_layers["row"] == "mean")]
    np.testing.assert_array_equal(layers.axes[0].lines[0].get_ydata(), top["top1"])
    both = figure_of(draw_compare_magnitudes(c))
    assert len(both.axes) == 2 and len({axes.get_zlim() for axes in both.axes}) == 1
    assert "first of 3 seeds" in both.axes[0].get_title()
    files = draw(c, tmp_path, ("png", "svg"))
    assert {f.name for f in files} == {f"{n}.{kind}" for n in COMPARE_FIGURES for kind in ("png", "svg")}
    again = {f.name: f.read_bytes() for f in files}
    assert all(f.read_bytes() == again[f.name] for f in draw(c, tmp_path, ("png", "svg")))


def test_no_name_is_left_out_of_a_legend(paths: list[Path]) -> None:
    long = "n" * 60
    c = compared_runs([paths[0], paths[3], paths[4]], ("_hidden", f"{long}a", f"{long}b"), by_seed=False)
    for make in (COMPARE_FIGURES["compare_sinks"], COMPARE_FIGURES["compare_losses"]):
        figure = figure_of(make(c))
        (legend,) = [*figure.legends, *(x for x in (axes.get_legend() for axes in figure.axes) if x is not None)]
        names = [text.get_text() for text in legend.get_texts()]
        assert names[:3] == [" _hidden", f"{long[:31]}...", f"{long[:31]}..."]


def test_small_magnitudes_are_drawn_on_a_linear_axis(tmp_path: Path) -> None:
    few = synthetic.quiet()
    few.layers[["top1", "top2", "top3"]] = [3.0, 2.0, 1.0]
    few.layers["median"] = 0.5
    c = compared_runs([compared.write(tmp_path / n, None, few) for n in "ab"])
    assert figure_of(draw_compare_layers(c)).axes[0].get_yscale() == "linear"


def test_labels_tell_runs_apart() -> None:
    assert labels_of([Path("/r/a/scan"), Path("/r/b/scan")]) == ["a/scan", "b/scan"]
    assert labels_of([Path("/r/a"), Path("/r/b")]) == ["a", "b"]


def test_one_clear_message_for_what_cannot_be_compared(paths: list[Path], tmp_path: Path) -> None:
    first = paths[0]
    (tmp_path / "empty").mkdir()
    torn, newer, bad = (tmp_path / n for n in ("torn", "newer", "bad"))
    for copy in (torn, newer, bad):
        shutil.copytree(paths[1], copy)
    (torn / "scan" / "layers.parquet").write_bytes(b"PAR1")
    (newer / "train.json").write_text(json.dumps({"schema_version": 99}))
    (bad / "scan" / "explain.json").write_text("{")
    cases = [
        ([first], "two or more"), ([first, first], "given twice"), ([first, tmp_path / "none"], "No such run"),
        ([first, tmp_path / "empty"], "no run.json"), ([first, torn], "damaged"), ([first, newer], "version 99"),
        ([first, bad], "damaged"),
    ]  # fmt: skip
    for given, said in cases:
        with pytest.raises(UserError, match=said):
            open_compared(given)
    with pytest.raises(UserError, match="2 runs and 1 labels"):
        open_compared(paths[:2], ("a",))
    with pytest.raises(UserError, match="same label"):
        open_compared(paths[:2], ("a", "a"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        compared_runs(paths[:2]).save(tmp_path / "file" / "out")


def test_a_scan_that_did_not_finish_leaves_the_training(paths: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(paths[0], copy)
    record = json.loads((copy / "scan" / "run.json").read_text())
    (copy / "scan" / "run.json").write_text(json.dumps(record | {"status": "failed", "error": "no memory"}))
    c = compared_runs([copy, paths[3]])
    row = c.compare.iloc[0]
    assert shown(row, "eval_loss") == "3.000" and shown(row, "massive") == "-"
    assert tells(c.notes, "not", "scanned", copy.name)


def test_an_onset_is_no_promise_that_they_stay(tmp_path: Path) -> None:
    """They end at layer 11 of 12 here, and may be missing in between: the sentence names the first layer alone."""
    for name in ("one", "two"):
        compared.write(tmp_path / name, None, synthetic.massive(n_layers=12, span=(3, 11)))
    words = comparison_in_words(compared_runs([tmp_path / "one", tmp_path / "two"]))
    assert sum("first at layer 3" in line for line in words) == 2 and not any("layer 3 on" in line for line in words)
