"""`massact scan` of several checkpoints, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import massact as ma
from massact.records.kinds.trajectory import Trajectory
from massact.reports import READINGS
from tests import stepped
from tests.cli.test_cli import refused, run
from tests.facts import tells

FAST = ["--n-sequences", "2", "--seq-len", "16"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_figures_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of single runs are tested elsewhere, and take long."""
    monkeypatch.setitem(READINGS, "scan", replace(READINGS["scan"], figures={}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models") / "growing"
    return stepped.write_all(root, {"step9": 0.0, "step10": 99.0, "step100": 101.0})


def test_scan_show_and_json(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert run(monkeypatch, "scan", str(folder), "--checkpoints", "--out", str(out), *FAST) == 0
    printed, told = capsys.readouterr()
    assert "3 checkpoints: step9, step10, step100" in told
    assert tells(printed, "between step10 and step100", "layer 2", "dim 7")
    assert {p.name for p in out.iterdir()} == {"trajectory.json", "revisions.parquet", "figures", "step9", "step10",
                                               "step100"}  # fmt: skip
    assert {p.name for p in (out / "figures").iterdir()} == {"trajectory.png"}
    assert {p.suffix for p in (out / "step100" / "figures").iterdir()} == {".png"}
    assert len(ma.open_run(out / "step100").findings)
    assert run(monkeypatch, "show", str(out)) == 0
    assert capsys.readouterr().out.strip() in printed
    assert run(monkeypatch, "show", str(out), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["emergence"][0]["first"] == "step100" and len(record["revisions"]) == 3 * (stepped.LAYERS + 1)
    # A verb on one of the runs, and what a second scan into the same directory says.
    assert run(monkeypatch, "explain", str(out / "step100"), "--quiet") == 0
    again = ["scan", str(folder), "--checkpoints", "--out", str(out), "--json", *FAST]
    assert "--resume" in refused(monkeypatch, capsys, *again)
    code = (
        f"import sys; from massact.cli import main\nsys.argv = ['massact', 'show', {str(out)!r}]\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "step100" in done.stdout, done.stderr


@pytest.mark.usefixtures("no_figures_of_each")
def test_a_checkpoint_that_fails_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    root = stepped.write_all(tmp_path / "m", {"step1": 0.0, "step2": 0.0, "step3": 200.0})
    weights = root / "step2" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    arguments = ["scan", str(root), "--checkpoints", "--out", str(tmp_path / "out"), *FAST]
    assert run(monkeypatch, *arguments, "--json") == 1
    out, err = capsys.readouterr()
    assert [c["status"] for c in json.loads(out)["checkpoints"]] == ["ok", "failed", "ok"]
    assert "1 of 3" in err and "step2: The weights of" in err and "Traceback" not in err
    weights.write_bytes(whole)
    assert run(monkeypatch, *arguments, "--quiet", "--resume") == 0
    assert capsys.readouterr() == ("", "")
    assert len(Trajectory.open(tmp_path / "out").info.having("ok")) == 3


@pytest.mark.usefixtures("no_figures_of_each")
def test_interrupted_and_shown_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from massact.scans import revisions

    load = revisions.load

    def stopping(spec: str, **more: object) -> object:
        if Path(spec).name == "step100":
            raise KeyboardInterrupt
        return load(spec, **more)

    arguments = ["scan", str(folder), "--checkpoints", "--out", str(tmp_path / "out"), *FAST]
    monkeypatch.setattr(revisions, "load", stopping)
    assert run(monkeypatch, *arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, "show", str(tmp_path / "out")) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert tells(shown, "none of 2 checkpoints") and tells(shown, "1 checkpoint", "not", "interrupted")
    monkeypatch.setattr(revisions, "load", load)
    assert run(monkeypatch, *arguments, "--resume", "--quiet") == 0
    assert run(monkeypatch, *arguments[:3], "--out", str(tmp_path / "whole"), *FAST, "--quiet") == 0
    tables = [pd.read_parquet(tmp_path / name / "revisions.parquet") for name in ("out", "whole")]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.usefixtures("no_figures_of_each")
def test_the_checkpoints_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from tests.cli.test_train import SMALL

    pytest.importorskip("accelerate")
    assert run(monkeypatch, "train", "--steps", "6", "--out", str(tmp_path / "t"), "--quiet", *SMALL) == 0
    for i, given in enumerate((tmp_path / "t" / "checkpoints", tmp_path / "t")):
        out = tmp_path / f"out{i}"
        assert run(monkeypatch, "scan", str(given), "--checkpoints", "--out", str(out), "--json", *FAST) == 0
        record = json.loads(capsys.readouterr().out)
        steps = [c["step"] for c in record["checkpoints"]]
        assert len(steps) >= 2 and steps == sorted(steps) and steps[-1] == 6 and not record["emergence"]


@pytest.mark.usefixtures("hub_there")
def test_bad_input_is_one_message(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = ["--out", str(tmp_path / "out")]
    assert "--checkpoints" in refused(monkeypatch, capsys, "scan", str(folder))
    assert "--out" in refused(monkeypatch, capsys, "scan", str(folder), "--checkpoints")
    assert "exclude" in refused(monkeypatch, capsys, "scan", "a/b", "--revisions", "x", "--revision", "y", *out)
    assert "exclude" in refused(monkeypatch, capsys, "scan", "a/b", "--revisions", "x", "--checkpoints", *out)
    assert "needs a Hub model" in refused(monkeypatch, capsys, "scan", str(folder), "--revisions", "x", *out)
    assert "no range" in refused(monkeypatch, capsys, "scan", "a/b", "--revisions", "step1:x", *out)
    assert "embedded" in refused(monkeypatch, capsys, "scan", "--checkpoints", *out)
    assert "no checkpoints" in refused(monkeypatch, capsys, "scan", str(tmp_path), "--checkpoints", *out)
    assert "nowhere.txt" in refused(monkeypatch, capsys, "scan", str(folder), "--checkpoints", *out,
                                    "--json", "--corpus", "nowhere.txt")  # fmt: skip
    assert not (tmp_path / "out").exists()
