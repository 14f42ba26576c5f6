"""A GGUF file as MODEL on the command line: every verb follows, and its run is reopened from its record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import FAST, run
from tests.facts import tells
from tests.families import build
from tests.gguf_files import write_gguf

TEXT = "a b a!? b c d e f a b ( ) a * b + c , d - e . f / g a b " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model as GGUF, a text, and a scan of it."""
    path = tmp_path_factory.mktemp("gguf")
    (path / "notes.txt").write_text(TEXT)
    write_gguf(path / "tiny.gguf", build("llama"), types={"ffn_up.weight": "Q8_0"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("massact.reports.draw", lambda *_, **__: [])
        options = ["--corpus", str(path / "notes.txt"), "--criterion", "sun2024", "--threshold", "magnitude=0.01",
                   "--threshold", "ratio=3"]  # fmt: skip
        assert run(patch, "scan", str(path), "--gguf-file", "tiny.gguf", *options, "--out", str(path / "run"),
                   "--quiet", *FAST) == 0  # fmt: skip
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def test_the_record_names_the_file_its_types_and_that_they_were_unpacked(folder: Path) -> None:
    info = json.loads((folder / "run" / "run.json").read_text())
    model: dict[str, Any] = info["model"]
    assert (model["id"], model["name"], model["dtype"]) == (str(folder / "tiny.gguf"), "tiny.gguf", "float32")
    assert model["gguf"]["types"]["Q8_0"] == 3 and model["gguf"]["dequantised"] is True
    assert tells(info["notes"], "unpacked", "tiny.gguf", "3 Q8_0")


@pytest.mark.parametrize("verb", [
    ("explain",), ("intervene", "--set", "zero"), ("classics", "--which", "norm-weights"), ("report",), ("show",),
    ("reproduce", "--only", "E1"),
])  # fmt: skip
def test_verbs_follow(verb: tuple[str, ...], copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, verb[0], str(copied), *verb[1:]) == 0


def test_another_file_of_that_name_is_refused(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", build("llama", seed=1))
    assert run(monkeypatch, "explain", str(copied), str(tmp_path / "tiny.gguf")) == 2
    scanned_hash = json.loads((copied / "run.json").read_text())["model"]["weights_sha256"]
    assert tells([capsys.readouterr().err], "tiny.gguf", "scanned", scanned_hash[:12])


def test_report_says_what_it_was(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "report", str(copied)) == 0
    page = (copied / "report.html").read_text()
    assert tells(page, "unpacked", "tiny.gguf", "SHA-256", "3 Q8_0")


@pytest.mark.parametrize("arguments", [
    ("scan", "FOLDER/tinny.gguf"), ("scan", "FOLDER", "--gguf-file", "tinny.gguf"), ("scan", "FOLDER"),
    ("classics", "FOLDER", "--gguf-file", "tinny.gguf"), ("reproduce", "FOLDER", "--gguf-file", "tinny.gguf"),
])  # fmt: skip
def test_a_file_that_is_not_there_is_one_message(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(monkeypatch, *(a.replace("FOLDER", str(folder)) for a in arguments))
    said = capsys.readouterr().err
    assert status == 2 and "tiny.gguf" in said and "Traceback" not in said
