"""`massact reproduce` as a user meets it, on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from massact.reports import READINGS, findings_in_words
from massact.reproductions import ENTRIES
from tests.cli.runs import scanned_run
from tests.cli.test_cli import run
from tests.facts import tells
from tests.golden.make import TRAINED

FEW = ("--n-sequences", "3", "--seq-len", "48", "--no-null")
TEXT = "The lamp is lit. The door is shut, and the rain falls.\n" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that applies to the embedded model, on a little text, and one more text; figures are only named."""
    place = tmp_path_factory.mktemp("reproduce")
    (place / "other.txt").write_text(TEXT)

    def named(result: Any, folder: Path, *, only: Any = (), **_: Any) -> None:
        (folder / "figures").mkdir(exist_ok=True)
        for name in READINGS[result.KIND].figures:
            if not only or name in only:
                (folder / "figures" / f"{name}.png").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("massact.reports.draw", named)
        assert run(patch, "reproduce", "--out", str(place / "run"), "--n-sequences", "3", "--seq-len", "48", "--quiet",
                   "--evaluate-on", str(place / "other.txt")) == 0  # fmt: skip
    return place / "run"


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(monkeypatch, *arguments) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_all_that_applies_in_one_go(made: Path) -> None:
    record = json.loads((made / "reproduce.json").read_text())
    assert list(record["experiments"]) == list(ENTRIES)
    verdicts = {name: e["verdict"] for name, e in record["experiments"].items()}
    assert {n for n, v in verdicts.items() if v == "not run"} == {"E12", "E18", "E25"}
    assert {n for n, v in verdicts.items() if v == "not applicable"} == {"E19", "E20", "E21", "E22", "E23"}
    assert {v for n, v in verdicts.items() if n in ("E1", "E2", "E13", "E15", "E16", "E17", "E11")} == {
        "no published value"
    }
    states = {name: step["state"] for name, step in record["steps"].items()}
    assert {n for n, s in states.items() if s == "not run"} == {"tuned", "trained"}
    assert set(states.values()) == {"done", "not run"}
    for name, e in record["experiments"].items():  # the figures that the record names are drawn
        if verdicts[name] == "no published value":
            assert all((made / figure).is_file() for figure in e["figures"]), name
    assert sorted(p.name for p in (made / "prompts").iterdir()) == ["choices", "warm-cold", "warm-cold-newline", "why"]
    table = pd.read_parquet(made / "reproduced.parquet")
    e11 = table[table["experiment"] == "E11"]
    assert set(e11["place"]) == {"embedded", "other.txt"} and len(list((made / "texts").iterdir())) == 1
    assert (e11.set_index(["place", "quantity"])["ours"] > 1).all()
    prompts = table[(table["experiment"] == "E1") & table["quantity"].str.startswith("peak")]
    assert set(prompts["place"]) == {"start, dim 99"} and len(prompts) == 4


def test_a_line_for_each_and_show_says_the_same(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(monkeypatch, capsys, "show", str(made))
    for i in range(1, 26):
        assert f"- E{i}, " in said
    assert "Published values" not in said
    assert tells(said, "No published values") and tells(said, "gpt2", "6 layers", "128 wide")
    record = json.loads((made / "reproduce.json").read_text())
    for e in record["experiments"].values():
        assert " ".join(e["says"].split()) in said
    again = told(monkeypatch, capsys, "reproduce", str(made), "--only", "E5, e17")
    lines = [line for line in again.split(" - ") if line.startswith(("E5", "E17"))]
    assert len(lines) == 2 and all(line.split("[no")[0] in said for line in lines)
    everything = json.loads((made / "reproduce.json").read_text())["experiments"]
    assert len(everything) == len(ENTRIES)  # those that were not asked for are kept
    out = told(monkeypatch, capsys, "show", str(made), "--json")
    assert json.loads(out)["reproduction"]["experiments"]["E5"]["section"] == "2.1"


def test_the_list_says_what_is_missing(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "reproduce", "--list") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(ENTRIES)
    assert "needs --tuned MODEL" in lines["E25"] and "needs" not in lines["E4"] and "not applicable" not in lines["E21"]
    assert run(monkeypatch, "reproduce", str(made), "--list", "--tuned", "x") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "needs --tuned" not in lines["E25"] and "not applicable" in lines["E21"]


def test_trainings_are_put_side_by_side(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "run"))
    runs = [str(shutil.copytree(TRAINED, tmp_path / name)) for name in ("one", "two")]
    said = told(
        monkeypatch, capsys, "reproduce", str(place), "--only", "E18", "--trained", runs[0], "--trained", runs[1]
    )
    assert f"E18, {ENTRIES['E18'].title}" in said and "validation loss" in said
    assert (place / "trained" / "compare.parquet").is_file()
    table = pd.read_parquet(place / "reproduced.parquet")
    rows = table[(table["experiment"] == "E18") & table["quantity"].str.endswith("validation loss")]
    losses = pd.read_parquet(place / "trained" / "compare.parquet")["eval_loss"]
    assert rows["ours"].dropna().tolist() == losses[:2].tolist()
    assert run(monkeypatch, "reproduce", str(place), "--only", "E18", "--quiet") == 0  # what was compared is kept
    assert json.loads((place / "reproduce.json").read_text())["steps"]["trained"]["state"] == "kept"


def test_without_a_directory_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    said = told(monkeypatch, capsys, "reproduce", "--only", "E5", "--n-sequences", "2", "--seq-len", "32")
    assert tells(said, "1 experiment") and tells(said, "Not saved") and f"E5, {ENTRIES['E5'].title}" in said


@pytest.mark.parametrize(("arguments", "said"), [
    (("--only", "E99"), "There is no experiment 'E99'"),
    (("--only", "4"), "Did you mean"),
    (("nowhere/run",), "nowhere/run"),
    (("--tasks", "piqa", "--batch-size", "many"), "--batch-size"),
    (("--trained", "nowhere"), "A comparison takes two or more"),
    (("--as", "GPT-5", "--only", "E5", "--n-sequences", "1", "--seq-len", "8"), "There is no published model 'GPT-5'"),
])  # fmt: skip
def test_bad_input_is_one_message(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "reproduce", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_of_a_run_other_scan_options_and_a_lost_model_are_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = Path(shutil.copytree(scanned_run(tmp_path_factory, "--n-sequences", "2", "--seq-len", "32", *FEW[-1:]),
                                 tmp_path / "run"))  # fmt: skip
    assert run(monkeypatch, "reproduce", str(place), "--seq-len", "64") == 2
    assert "not for a run" in capsys.readouterr().err
    info: dict[str, Any] = json.loads((place / "run.json").read_text())
    info["model"]["id"] = "gone/away"
    (place / "run.json").write_text(json.dumps(info))
    assert run(monkeypatch, "reproduce", str(place), "--only", "E4", "--quiet") == 0  # needs no model
    assert run(monkeypatch, "reproduce", str(place), "--only", "E17", "--quiet") == 1
    error = capsys.readouterr().err
    assert "1 of 2 steps failed" in error and "gone/away" in error


def test_numbers_are_put_into_words_with_their_place() -> None:
    rows = pd.DataFrame({
        "quantity": ["top 1", "dims", "unsaid"], "stack": "", "layer": [3, -1, 1], "place": ["start, dim 7", "", ""],
        "unit": ["|h|", "", ""], "ours": [2622.0, float("nan"), 1.0], "ours_text": ["", "7, 9", ""],
        "published": [2600.0, float("nan"), float("nan")], "published_text": ["", "7", ""],
        "verdict": ["agrees", "differs", "no published value"], "headline": [True, True, False],
    })  # fmt: skip
    first, second = findings_in_words(rows).split("; ")
    assert tells([first], "top 1", "(layer 3, start, dim 7)", "2,620", "2,600")
    assert tells([second], "dims", "7, 9 (published 7)") and "unsaid" not in first + second
