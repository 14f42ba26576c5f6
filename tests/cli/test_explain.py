"""`massact explain` and `massact show` as a user meets them: files, answers, and one clear message for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import massact as ma
from massact.models.loading import EMBEDDED, location_of
from massact.records.kinds.explanation import Explanation
from massact.reports import story_in_words
from massact.reports.kinds.explanation import READING
from massact.reports.kinds.explanation.words import CAUSES
from tests.cli.runs import copied_run, scanned_run
from tests.cli.test_cli import run
from tests.facts import tells

FAST = ["--n-sequences", "2", "--seq-len", "32", "--no-null", "--no-bos-contrast"]

TABLES = [t for t in Explanation.TABLES if t not in ("patch_attention", "states")]  # of a language model that attends


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a scan of the embedded model."""
    return scanned_run(tmp_path_factory, *FAST)


@pytest.fixture
def copied(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be explained, without the figures: `explained` has them."""
    return copied_run(scanned, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def explained(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its explanation."""
    folder = Path(shutil.copytree(scanned, tmp_path_factory.mktemp("cli") / "explained"))
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "explain", "--quiet", str(folder)) == 0
    return folder


# ------------------------------------------------------------------------------------------------- the answer
def test_explain_adds_its_files_and_leaves_those_of_the_scan(scanned: Path, explained: Path) -> None:
    before, after = files(scanned), files(explained)
    assert all(after[name] == data for name, data in before.items())
    added = {*(f"{t}.parquet" for t in TABLES), "explain.json", "attention.npz"}
    assert {n for n in after if "/" not in n} - set(before) == added
    drawn = {Path(n).name for n in set(after) - set(before) if n.startswith("figures")}
    assert drawn == {f"{name}.png" for name in READING.figures if "patch" not in name}
    for name in drawn:
        if name.endswith(".png"):
            with Image.open(explained / "figures" / name) as image:
                assert len(image.convert("L").getcolors(256) or range(257)) > 2, f"{name} is blank"
    record = json.loads((explained / "explain.json").read_text())
    run_json = json.loads((explained / "run.json").read_text())
    assert record["model"]["weights_sha256"] == run_json["model"]["weights_sha256"]
    assert record["corpus"]["sha256"] == run_json["corpus"]["sha256"]
    assert len(pd.read_parquet(explained / "heads.parquet")) > 0


def test_explain_and_show_print_the_story(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", str(copied)) == 0
    printed = capsys.readouterr().out
    assert run(monkeypatch, "show", str(copied)) == 0
    shown = capsys.readouterr().out
    explanation = Explanation.open(copied)
    assert explanation is not None
    flat_printed, flat_shown = (" ".join(text.replace("│", " ").split()) for text in (printed, shown))
    for sentence in story_in_words(explanation):
        assert sentence in flat_printed and sentence in flat_shown
    assert f"massact show {copied}" in printed


def test_json_is_one_document(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def strict(text: str) -> dict:
        def no(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        return json.loads(text, parse_constant=no)

    assert run(monkeypatch, "explain", str(copied), "--json") == 0
    out, err = capsys.readouterr()
    record = strict(out)
    assert err == "" and set(TABLES) <= set(record) and len(record["heads"]) > 0
    assert run(monkeypatch, "show", str(copied), "--json") == 0
    shown = strict(capsys.readouterr().out)
    assert shown["verb"] == "scan" and shown["explanation"] == record
    assert {k for k in shown if k != "explanation"} == set(ma.open_run(copied).as_dict())


def test_options_are_recorded(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-all-keys", "--eps", "0.5", "--n-sequences", "1", "--seed", "7", "--batch-size", "1"]
    assert run(monkeypatch, "explain", str(copied), "--json", *options) == 0
    record = json.loads(capsys.readouterr().out)
    wanted = {"columns": False, "eps": 0.5, "n_sequences": 1, "seed": 7, "batch_size": 1}
    assert wanted.items() <= record["config"].items() and record["positions"] == []
    assert record["corpus"]["n_sequences"] == 1


def test_quiet_prints_nothing_and_explaining_again_replaces(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", str(copied), "--quiet", "--n-sequences", "1") == 0
    assert capsys.readouterr().out == ""
    assert run(monkeypatch, "explain", str(copied), "--quiet") == 0
    e = Explanation.open(copied)
    assert e is not None and e.info.corpus["n_sequences"] == 2 and not list(copied.rglob(".*.tmp"))


def test_model_and_text_may_lie_elsewhere_now(
    copied: Path, explained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(location_of(EMBEDDED), tmp_path / "moved")
    text = tmp_path / "text.txt"
    text.write_text("The boat is old. The sea is cold, and the wind is up!\n" * 100)
    assert run(monkeypatch, "explain", "--quiet", str(copied), str(moved)) == 0
    for table in TABLES:
        a, b = (pd.read_parquet(folder / f"{table}.parquet") for folder in (copied, explained))
        pd.testing.assert_frame_equal(a, b)
    assert run(monkeypatch, "explain", "--quiet", str(copied), str(moved), "--corpus", str(text)) == 0
    e = Explanation.open(copied)
    assert e is not None and any("scanned anew" in note for note in e.info.notes)


def test_show_of_an_explanation_imports_no_torch(explained: Path) -> None:
    code = (
        "import sys; from massact.cli import main\nsys.argv = ['massact', 'show', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(explained)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tells([done.stdout], CAUSES)


# ------------------------------------------------------------------------------------------------- bad input
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a refused command: status 2, no traceback, nothing on stdout."""
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(("arguments", "says"), [
    (["--eps", "2"], ["eps", "between 0 and 1"]), (["--eps", "0"], ["eps"]), (["--eps", "nan"], ["eps"]),
    (["--batch-size", "many"], ["many"]), (["--device", "gpu9"], ["gpu9", "cpu"]),
    (["--corpus", "./no-such.txt"], ["no-such.txt"]), (["./no/such/model"], ["no/such/model"]),
])  # fmt: skip
def test_bad_arguments_write_nothing(
    arguments: list[str], says: list[str], copied: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = files(copied)
    message = refused(monkeypatch, capsys, "explain", str(copied), *arguments)
    assert all(word in message for word in says)
    assert files(copied) == before


def test_bad_usage_is_status_2(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["explain"], ["explain", str(copied), "--n-sequences", "0"], ["explain", str(copied), "--epss"]):
        assert run(monkeypatch, *arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("corpus", [False, True], ids=["its corpus", "another corpus"])
def test_other_weights_are_refused(
    corpus: bool, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight of one layer differs; refused with the hashes, whichever text is given."""
    folder = Path(shutil.copytree(location_of(EMBEDDED), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "mlp" in n)
    weights[name].view(-1)[3] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("The boat is old. The sea is cold, and the wind is up!\n" * 100)
    before = files(copied)
    more = ["--corpus", str(text)] if corpus else []
    message = refused(monkeypatch, capsys, "explain", str(copied), str(folder), *more)
    scanned_hash = json.loads((copied / "run.json").read_text())["model"]["weights_sha256"]
    assert tells([message], "scanned", scanned_hash[:12])
    assert files(copied) == before


def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "thesis", tmp_path / "thesis.tex"
    folder.mkdir()
    file.write_text("x")
    assert "nowhere" in refused(monkeypatch, capsys, "explain", str(tmp_path / "nowhere"))
    assert "thesis" in refused(monkeypatch, capsys, "explain", str(folder))
    assert "thesis.tex" in refused(monkeypatch, capsys, "explain", str(file))
    assert not list(folder.iterdir()) and not (tmp_path / "nowhere").exists()


def test_unfinished_runs(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((copied / "run.json").read_text())
    for status in ("running", "interrupted", "failed"):
        (copied / "run.json").write_text(json.dumps(record | {"status": status}))
        before = files(copied)
        message = refused(monkeypatch, capsys, "explain", str(copied))
        assert "not finished" in message or "failed" in message
        assert files(copied) == before


def test_a_corpus_that_no_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token ids given as tensors cannot be read again: the message says where to give them."""
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    ma.scan(ma.load(), ids, out=tmp_path / "run", null=False, bos_contrast=False)
    before = files(tmp_path / "run")
    message = refused(monkeypatch, capsys, "explain", str(tmp_path / "run"))
    assert tells([message], "again", "--corpus")
    assert files(tmp_path / "run") == before


def test_a_damaged_explanation_is_one_message(
    explained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("explain.json", b"{"), ("heads.parquet", b"PAR1"), ("writers.parquet", None)):
        bad = Path(shutil.copytree(explained, tmp_path / "bad"))
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        assert name in refused(monkeypatch, capsys, "show", str(bad))
        assert name in refused(monkeypatch, capsys, "show", str(bad), "--json")
        shutil.rmtree(bad)


def test_an_interrupt_leaves_the_run_as_it_was(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = files(copied)
    monkeypatch.setattr("massact.explanations.job.measure", interrupt)
    assert run(monkeypatch, "explain", str(copied)) == 130
    assert files(copied) == before and "Traceback" not in capsys.readouterr().err
