"""`massact compare`, and the scan that `massact train` ends with, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from massact.cli import closing_scan
from massact.records.errors import WorkError
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import open_run
from massact.records.kinds.training import Trained
from massact.records.tables import read_table
from massact.training import TrainConfig
from massact.training.data import open_tokens
from tests.cli.runs import render_nothing
from tests.cli.test_cli import run
from tests.facts import tells

SMALL = [
    f"--set={name}" for name in
    ("model.n_layer=2", "model.n_embd=32", "model.n_inner=64", "model.n_positions=32", "seq_len=16", "batch=4",
     "warmup=2", "decay_steps=3", "log_every=2", "save_every=0", "eval_windows=8", "monitor_every=0")
]  # fmt: skip
VIT = [
    "--config=vit-tiny", *(f"--set={name}" for name in (
        "model.hidden_size=16", "model.num_hidden_layers=2", "model.num_attention_heads=2",
        "model.intermediate_size=32", "model.image_size=16", "model.patch_size=4", "model.num_labels=3",
        "dtype=float32", "batch=4", "accumulate=1", "warmup=1", "log_every=1", "save_every=0", "monitor_every=0",
        "report_to=", "val_share=0.2")),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Softmax with two seeds and kv-bias with one, each trained for a few steps and scanned."""
    folder, out = tmp_path_factory.mktemp("runs"), []
    with pytest.MonkeyPatch.context() as patch:
        render_nothing(patch)
        for name, variant, seed in (("plain-s0", "softmax", "0"), ("plain-s1", "softmax", "1"), ("kv", "kv-bias", "0")):
            out.append(folder / name)
            given = ["--steps", "4", "--attention", variant, "--seed", seed, "--out", str(out[-1]), "--quiet"]
            assert run(patch, "train", *given, *SMALL) == 0
    return out


def test_a_training_ends_with_a_scan_of_held_out_windows(runs: list[Path]) -> None:
    done, scan = Trained.open(runs[2]), open_run(runs[2] / "scan")
    why = Explanation.open(runs[2] / "scan")
    assert scan.info.corpus["name"] == "held-out text" and scan.info.corpus["n_sequences"] == 8
    assert scan.info.model["weights_sha256"] == done.info.model["weights_sha256"]
    assert why.heads["slot_mass"].notna().all() and len(why.heads) == 2 * 4
    assert sorted(scan.portrait["layers"]) == [0, 1, 2]  # any layer can be compared
    assert len(list((runs[2] / "scan" / "figures").glob("layers.*"))) == 1
    other = open_run(runs[0] / "scan")
    assert other.info.corpus["sha256"] == scan.info.corpus["sha256"]


def test_held_out_windows_are_those_that_no_step_read(runs: list[Path]) -> None:
    config = TrainConfig.of("tiny", seq_len=16, eval_windows=8)
    corpus = closing_scan.held_out(runs[0], config, None)
    (file,) = (runs[0] / "data").glob("tokens-*.bin")
    ids = np.asarray(open_tokens(file).ids)
    held = ids[len(ids) - round(config.val_share * len(ids)) :]
    windows = {tuple(held[i : i + 16]) for i in range(len(held) - 16)}
    assert all(tuple(row) in windows for row in corpus.inputs["input_ids"].numpy())
    assert corpus.inputs["input_ids"].shape == (8, 16)


@pytest.mark.rendered
def test_compare_prints_saves_and_draws(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    assert run(monkeypatch, "compare", *map(str, runs), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "plain-s0" in printed and "kv-bias" in printed and "Over seeds" in printed and "Saved in" in printed
    table = read_table(out, "compare").set_index("label")
    heads = read_table(runs[2] / "scan", "heads")
    assert table.loc["kv", "slot_mass"] == pytest.approx(heads["slot_mass"].mean())
    assert table.loc["kv", "mass_first"] == pytest.approx(heads["mass_first"].mean())
    assert table.loc["kv", "eval_loss"] == Trained.open(runs[2]).info.losses["eval_loss"]
    assert list(table.loc["plain (2 seeds)", "row"]) == ["mean", "min", "max"]
    names = {p.name for p in (out / "figures").iterdir()}
    assert names == {f"compare_{n}.png" for n in ("layers", "magnitudes", "losses", "sinks")}
    assert run(monkeypatch, "compare", *map(str, runs), "--json", "--label", "a", "--label", "b", "--label", "c") == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in record["compare"]][:3] == ["a", "b", "c"]
    assert record["groups"] == {"softmax (2 seeds)": ["a", "b"]}
    assert run(monkeypatch, "compare", str(runs[0] / "scan"), str(runs[2] / "scan"), "--no-by-seed", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_compare_needs_no_torch(runs: list[Path], tmp_path: Path) -> None:
    code = (
        f"import sys; from massact.cli import main\nsys.argv = ['massact', 'compare', *{[*map(str, runs)]!r}, '--out', "
        f"{str(tmp_path / 'out')!r}]\ntry:\n    main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [WorkError("No memory.", "Too long.", "Use less."), RuntimeError("odd\nthing")])
def test_a_scan_that_fails_does_not_lose_the_training(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(closing_scan, "held_out", fail)
        assert run(patch, "train", "--steps", "2", "--out", str(out), *SMALL) == 0
    told = capsys.readouterr()
    assert tells(told.err, "not", "scanned") and str(error).split()[0] in told.err and "Traceback" not in told.err
    assert f"massact scan {out / 'model'}" in told.err and "2 steps" in told.out
    done = Trained.open(out)
    assert done.info.status == "ok" and (out / "model" / "config.json").is_file()
    assert len(tells(done.info.notes, "not", "scanned")) == 1
    assert run(monkeypatch, "train", "--steps", "2", "--out", str(out), "--resume", "--quiet", *SMALL) == 0
    assert Explanation.open(out / "scan") is not None
    assert not tells(Trained.open(out).info.notes, "not", "scanned")


def test_no_scan_and_a_scan_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["train", "--steps", "2", "--out", str(out), "--quiet", *SMALL]
    assert run(monkeypatch, *given, "--no-scan") == 0 and not (out / "scan").exists()
    assert run(monkeypatch, *given, "--resume") == 0 and open_run(out / "scan").info.status == "ok"
    moved = out.rename(tmp_path / "moved")  # where the model lay when it was scanned is no part of the result
    monkeypatch.setattr(closing_scan, "held_out", lambda *_: pytest.fail("scanned again"))
    assert run(monkeypatch, *given[:4], str(moved), *given[5:], "--resume") == 0
    assert not tells(Trained.open(moved).info.notes, "not", "scanned")


def test_a_context_shorter_than_the_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*SMALL, "--set=model.n_positions=13", "--set=seq_len=5", "--steps", "2", "--quiet"]
    for seed in ("0", "1"):
        assert run(monkeypatch, "train", *short, "--seed", seed, "--out", str(tmp_path / seed)) == 0
    scan = open_run(tmp_path / "0" / "scan")
    assert scan.portrait == {} and any("No portrait" in note for note in scan.info.notes)
    assert Explanation.open(tmp_path / "0" / "scan") is not None
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, "compare", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "c")) == 0
    assert "2 seeds" in capsys.readouterr().out
    assert not (tmp_path / "c" / "figures" / "compare_magnitudes.png").exists()


def test_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, file = np.random.default_rng(0), tmp_path / "images.npz"
    images = rng.integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    np.savez(file, images=images, labels=rng.integers(0, 3, 20))
    for name in ("softmax", "sink-token"):
        given = ["--data", str(file), "--attention", name, "--steps", "2", "--out", str(tmp_path / name), "--quiet"]
        assert run(monkeypatch, "train", *VIT, *given) == 0
        assert capsys.readouterr().err == ""
        scan = open_run(tmp_path / name / "scan")
        assert (scan.info.corpus["name"], scan.info.corpus["n_sequences"]) == ("held-out images", 4)
    assert run(monkeypatch, "compare", str(tmp_path / "softmax"), str(tmp_path / "sink-token"), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["compare"][0]["perplexity"] == "nan" and isinstance(record["compare"][0]["mass_first"], float)
    assert any("no perplexity" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN"], "two or more"),
        (["RUN", "RUN"], "given twice"),
        (["RUN", "nowhere"], "No such run directory"),
        (["RUN", "."], "no run.json"),
        (["RUN", "RUN/model"], "no run.json"),
        (["RUN", "RUN/scan", "--label", "a"], "2 runs and 1 labels"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], said: str, runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "compare", *(a.replace("RUN", str(runs[0])) for a in arguments)) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
