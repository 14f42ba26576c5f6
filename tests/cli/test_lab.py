"""`massact train --task bigram-backcopy` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from massact import cli
from massact.records.kinds.lab import Lab
from tests.facts import tells

SMALL = [f"--set={x}" for x in ("width=16", "mlp=32", "length=20", "layers=2", "batch=8", "every=3")]
TASK = ["train", "--task", "bigram-backcopy"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["massact", *arguments])
    # One process: what two of them do is tested where they are made.
    monkeypatch.setattr("massact.labs.job.cores", lambda: 1)
    monkeypatch.setenv("COLUMNS", "300")  # so that no sentence is broken
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.rendered
def test_a_lab_is_shown_saved_and_its_models_are_scanned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lab"
    assert run(monkeypatch, *TASK, "--attention", "softmax", "--attention", "kv-bias", "--steps", "6", "--seed", "2",
               "--set", "starts=bos", "--out", str(out), *SMALL) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert tells(printed, "6 steps", "adamw", "seed 2", "every sequence", "BOS") and "does not show" in printed
    assert (out / "figures" / "lab.png").is_file()
    lab = Lab.open(out)
    assert lab.variants == ["softmax", "kv-bias"] and lab.info.config["seed"] == 2
    assert run(monkeypatch, "show", str(out)) == 0
    assert capsys.readouterr().out.strip() in printed
    assert run(monkeypatch, "show", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["lab"][0]["step"] == 0
    scan = ["--corpus", str(out / "held_out.jsonl"), "--seq-len", "20", "--n-sequences", "2", "--no-null", "--json",
            "--no-bos-contrast"]  # fmt: skip
    assert run(monkeypatch, "scan", str(out / "model-kv-bias"), *scan) == 0
    assert json.loads(capsys.readouterr().out)["model"]["n_layers"] == {"": 2}


def test_json_quiet_and_unsaved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*TASK, "--attention", "softmax", "--steps", "2", *SMALL]
    assert run(monkeypatch, *few, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["variants"]) == ["softmax"]
    assert run(monkeypatch, *few, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert run(monkeypatch, *few) == 0
    assert "Not saved." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "bigram-backcoppy"], "Known: bigram-backcopy"),
        ([*TASK[1:], "--attention", "softmaxx"], "softmax"),
        ([*TASK[1:], "--config", "gou"], "guo"),
        ([*TASK[1:], "--set", "start=bos"], "starts"),
        ([*TASK[1:], "--data", "text.txt"], "--data is not for"),
        ([*TASK[1:], "--resume"], "--resume is not for"),
        (["--attention", "softmax", "--attention", "kv-bias", "--out", "OUT"], "one attention variant"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", *arguments) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_interrupting_is_said_in_words_that_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("massact.labs.job.run_lab", interrupted)
    assert run(monkeypatch, *TASK) == 130
    told = capsys.readouterr().err
    assert tells(told, "no", "training") and "--resume" not in told
