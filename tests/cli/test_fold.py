"""`massact fold` as a user meets it: on a run, on a model, shown, reported, gone on with, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from massact.records.kinds.fold import Fold
from tests.cli.runs import copied_run, scanned_run
from tests.cli.test_cli import run
from tests.cli.test_explain import files, refused
from tests.facts import tells

SMALL = ["--n-sequences", "8", "--seq-len", "48"]
ONE = ["--prefix", "29"]  # '.', so that nothing is searched for


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scanned_run(tmp_path_factory, *SMALL, "--no-null", "--no-bos-contrast")


@pytest.fixture
def copied(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_run(scanned, tmp_path, monkeypatch)


def test_a_run_gets_the_folded_model_beside_its_tables(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(copied)
    assert run(monkeypatch, "fold", str(copied), *ONE, "--prune") == 0
    out = capsys.readouterr().out
    assert tells([out], "id 29", "prefix_kv.safetensors")
    after = files(copied)
    assert all(after[name] == content for name, content in before.items())
    assert {"fold.json", "prefixes.parquet", "fold_layers.parquet", "folded/prefix.json"} <= set(after)
    assert (copied / "folded" / "model" / "model.safetensors").is_file()
    assert run(monkeypatch, "show", str(copied)) == 0
    assert tells([capsys.readouterr().out], "id 29", "prefix_kv.safetensors")
    assert run(monkeypatch, "show", str(copied), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fold"]["ids"] == [29] and told["fold"]["after"]["n_findings"] == 0
    assert run(monkeypatch, "report", str(copied)) == 0
    page = next(copied.glob("*.html")).read_text(encoding="utf-8")
    assert 'id="fold"' in page and "prefix_kv.safetensors" in page


def test_the_folder_is_a_model_that_other_verbs_go_on_from(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fold", str(copied), *ONE, "-q") == 0
    model, out = copied / "folded" / "model", tmp_path / "again"
    assert run(monkeypatch, "scan", str(model), *SMALL, "--no-null", "--no-bos-contrast", "--out", str(out), "-q") == 0
    assert run(monkeypatch, "explain", str(out), "-q") == 0
    capsys.readouterr()
    assert run(monkeypatch, "show", str(out), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["findings"] == [] and max(h["slot_mass"] for h in told["explanation"]["heads"]) > 0.5
    assert refused(monkeypatch, capsys, "fold", str(out))  # nothing is massive


@pytest.mark.rendered
def test_a_model_is_scanned_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "fold", "embedded", "--out", str(out), "--seq-len", "48", *ONE, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    done = Fold.open(out)
    assert done is not None and told["ids"] == [29] == done.info.ids
    assert (out / "run.json").is_file() and (out / "figures" / "fold.png").stat().st_size > 10_000


@pytest.mark.parametrize("options", [["--slots", "5"], ["--prefix", "dot"], ["--prefix", "99999"],
                                     ["--prefix", "1,2,3,4,5"], ["--out", "elsewhere"]])  # fmt: skip
def test_bad_input_is_one_message(
    copied: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(monkeypatch, capsys, "fold", str(copied), *options)
    assert not (copied / "fold.json").exists() and not (copied / "folded").exists()
