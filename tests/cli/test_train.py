"""`massact train` as a user meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from massact.records.kinds.training import Trained
from massact.training import RECIPES, VARIANTS
from tests.cli.test_cli import hears_ctrl_c, run

SMALL = [
    f"--set={name}" for name in
    ("model.n_layer=1", "model.n_embd=32", "model.n_inner=64", "model.n_positions=16", "seq_len=16", "batch=4",
     "warmup=2", "decay_steps=3", "log_every=2", "save_every=2", "eval_windows=8", "monitor_every=2")
]  # fmt: skip


def test_train_show_and_scan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("It was the best of times, it was the worst of times.\n" * 400)
    assert run(monkeypatch, "train", "--config", "tiny", "--data", str(text), "--attention", "kv-bias", "--steps", "8",
               "--seed", "3", "--out", str(out), *SMALL) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "kv-bias" in printed and "8 steps, 512 tokens" in printed and "Layers at step 8" in printed
    done = Trained.open(out)
    config = done.info.config
    assert (config["variant"], config["seed"], config["steps"], config["model"]["n_layer"]) == ("kv-bias", 3, 8, 1)
    assert run(monkeypatch, "show", str(out)) == 0
    assert capsys.readouterr().out.strip() in printed
    assert run(monkeypatch, "show", str(out), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["losses"] == done.info.losses and len(record["monitor"]) == len(done.monitor)
    scan = ["--n-sequences", "2", "--seq-len", "16", "--no-null", "--no-bos-contrast", "--json"]
    assert run(monkeypatch, "scan", str(out / "model"), *scan) == 0
    assert json.loads(capsys.readouterr().out)["model"]["n_layers"] == {"": 1}


def test_json_and_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "train", "--steps", "2", "--out", str(tmp_path / "a"), "--json", *SMALL) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"
    assert run(monkeypatch, "train", "--steps", "2", "--out", str(tmp_path / "b"), "--quiet", *SMALL) == 0
    assert capsys.readouterr().out == ""


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "train", "--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*RECIPES, *VARIANTS)) and "24.6B" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "gpt2-124"], "gpt2-124m"),
        (["--attention", "kv-bais", "--out", "OUT"], "kv-bias"),
        (["--set", "lr"], "name=value"),
        (["--set", "learning_rate=1", "--out", "OUT"], "no option 'learning_rate'"),
        (["--set", "lr=fast", "--out", "OUT"], "lr='fast'"),
        ([], "--out"),
        (["--out", "OUT", "--resume"], "no training"),
        (["--out", "OUT", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    assert run(monkeypatch, "train", *given) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_interrupted_by_the_user_and_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, options = tmp_path / "run", ["--steps", "4000", *SMALL, "--set=eval_every=0", "--set=save_every=50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "massact", "train", "--out", str(out), *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    until = time.monotonic() + 120
    while not list((out / "checkpoints").glob("checkpoint-*")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=180)[1]
    assert process.returncode == 130 and "--resume" in told and "Traceback" not in told
    before = Trained.open(out)
    assert before.info.status == "interrupted"
    assert run(monkeypatch, "train", "--out", str(out), "--resume", *options[:1], "2", *options[2:]) == 2
