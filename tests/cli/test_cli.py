"""The command line as a user meets it: answers, files, and one clear message for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import massact as ma
from massact import cli
from massact.models.loading import EMBEDDED, location_of
from massact.scans import CRITERIA
from tests.facts import tells
from tests.families import build

FAST = ["--n-sequences", "2", "--seq-len", "32", "--no-null", "--no-bos-contrast"]


def hears_ctrl_c() -> None:
    """For `preexec_fn`: what is started in the background of a script would pass SIGINT on as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`massact ARGUMENTS` in this process; gives the exit status."""
    monkeypatch.setattr(sys, "argv", ["massact", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def embedded() -> Path:
    return Path(location_of(EMBEDDED))


@pytest.fixture
def copied(tmp_path: Path, embedded: Path) -> Path:
    """A writable copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(embedded, tmp_path / "model"))


# ------------------------------------------------------------------------------------------------- the answer
@pytest.mark.rendered
def test_scan_show_and_json_say_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "scan", "--out", str(out), *FAST) == 0
    printed = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "run.json", "layers.parquet", "findings.parquet", "near_misses.parquet", "coordinates.parquet",
        "clusters.parquet", "criteria.parquet", "dims.parquet", "ranks.parquet", "portrait.npz", "strip.npz",
        "figures"}  # fmt: skip
    assert {p.suffix for p in (out / "figures").iterdir()} == {".png"}
    assert run(monkeypatch, "show", str(out)) == 0
    shown = capsys.readouterr().out
    assert shown.strip() and shown.strip() in printed
    assert run(monkeypatch, "show", str(out), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    info = json.loads((out / "run.json").read_text())
    assert record["model"] == info["model"] and info["status"] == "ok"
    assert len(record["layers"]) == len(pd.read_parquet(out / "layers.parquet"))
    assert info["model"]["proof"]["outputs_identical"] is True
    assert info["corpus"]["sha256"] and info["criterion"]["thresholds"] == {"magnitude": 100.0, "ratio": 1000.0}


def test_json_prints_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "scan", "--json", *FAST) == 0
    assert json.loads(capsys.readouterr().out)["verb"] == "scan"


def test_thresholds_are_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "scan", "--json", "--threshold", "magnitude=0.5", "--threshold", "ratio=3", *FAST) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["criterion"]["thresholds"] == {"magnitude": 0.5, "ratio": 3.0}
    assert record["criterion"]["published"] == {"magnitude": 100.0, "ratio": 1000.0}
    assert record["findings"] and all(f["magnitude"] > 0.5 and f["ratio"] >= 3 for f in record["findings"])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs(
    criterion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unset = [f"--threshold={n}=1.0" for n, v in CRITERIA[criterion].thresholds.items() if v != v]
    status = run(monkeypatch, "scan", "--json", "--criterion", criterion, *unset, *FAST)
    if "modality" in CRITERIA[criterion].needs:
        assert status == 2 and tells(capsys.readouterr().err, "image tokens")  # the embedded model reads text
        return
    assert status == 0
    record = json.loads(capsys.readouterr().out)
    assert record["criterion"]["name"] == criterion
    assert all(f["criterion"] == criterion for f in record["findings"])


def test_same_command_gives_the_same_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(monkeypatch, "scan", "--quiet", "--out", str(tmp_path / name), *FAST) == 0
    for table in ("layers", "findings", "dims", "ranks"):
        a, b = (pd.read_parquet(tmp_path / n / f"{table}.parquet") for n in ("a", "b"))
        pd.testing.assert_frame_equal(a, b)


# ------------------------------------------------------------------------------------------------- bad input
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a refused command: status 2, no traceback, nothing on stdout."""
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(("arguments", "says"), [
    (["scan", "--criterion", "sun2042"], ["sun2042", "sun2024"]),
    (["scan", "--threshold", "magnitude"], ["name=value"]),
    (["scan", "--threshold", "magnitud=5"], ["magnitud", "magnitude"]),
    (["scan", "--threshold", "ratio=nan"], ["ratio"]),
    (["scan", "--criterion", "osp2025"], ["no published value", "--threshold token_kurtosis"]),
    (["scan", "--batch-size", "many"], ["many"]),
    (["scan", "--device", "gpu9"], ["gpu9", "cpu"]),
    (["scan", "--dtype", "int4"], ["int4", "bfloat16"]),
    (["scan", "--bos", "maybe"], ["maybe", "always"]),
    (["scan", "--resume"], ["--out"]),
    (["scan", "--seq-len", "100000"], ["100000"]),
    (["scan", "--n-sequences", "100000"], ["100000"]),
    (["scan", "./no/such/folder"], ["no/such/folder"]),
    (["scan", "no-such-org/no-such-model"], ["no-such-org/no-such-model"]),
    (["scan", "--corpus", "./no-such.txt"], ["no-such.txt"]),
    (["show", "./no-such-run"], ["no-such-run", "massact scan"]),
])  # fmt: skip
def test_bad_arguments(
    arguments: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(monkeypatch, capsys, *arguments)
    for word in says:
        assert word in message


def test_bad_usage_is_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "scan", "--no-such-option") == 2
    assert run(monkeypatch, "scam") == 2
    assert "Traceback" not in capsys.readouterr().err


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "perceptron9"}')


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _lost_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "mlp" in n)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _nan_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "mlp" in n)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("damage", "says"), [
    (_truncate, "corrupt"), (_garbage, "corrupt"), (_no_config, "no config.json"),
    (_broken_config, "not valid JSON"), (_unknown_type, "does not know the model type"),
    (_no_tokenizer, "tokenizer"), (_no_weights, "holds no weights"), (_pickle_only, "--allow-pickle"),
    (_lost_weight, "1 missing"), (_nan_weight, "NaN or Inf"),
])  # fmt: skip
def test_damaged_model(
    damage: object, says: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(copied)  # type: ignore[operator]
    out = tmp_path / "run"
    assert says in refused(monkeypatch, capsys, "scan", str(copied), "--out", str(out), *FAST)
    assert not out.exists()


def test_pickle_weights_are_read_when_asked(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pickle_only(copied)
    assert run(monkeypatch, "scan", str(copied), "--allow-pickle", "--json", *FAST) == 0
    a = json.loads(capsys.readouterr().out)["model"]["weights_sha256"]
    assert run(monkeypatch, "scan", "--json", *FAST) == 0
    assert json.loads(capsys.readouterr().out)["model"]["weights_sha256"] == a


def test_pickle_that_runs_code_is_not_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "owned"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    (copied / "model.safetensors").unlink()
    torch.save({"x": Evil()}, copied / "pytorch_model.bin")
    refused(monkeypatch, capsys, "scan", str(copied), "--allow-pickle", *FAST)
    assert not marker.exists()


@pytest.mark.parametrize(("name", "content", "says"), [
    ("empty.txt", b"", "empty"), ("blank.txt", b" \n \n", "e"), ("short.txt", b"Too short.", "token"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "2"), ("other.jsonl", b'{"body": "a"}\n', "body"),
    ("latin.txt", b"caf\xe9 " * 200, "UTF-8"), ("binary.txt", bytes(range(256)) * 8, "e"),
])  # fmt: skip
def test_bad_text(
    name: str, content: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / name
    file.write_bytes(content)
    assert says in refused(monkeypatch, capsys, "scan", "--corpus", str(file), "--seq-len", "64")


def test_out_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, file, run_dir = tmp_path / "full", tmp_path / "file", tmp_path / "run"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    file.write_text("x")
    assert "not empty" in refused(monkeypatch, capsys, "scan", "--out", str(full))
    assert "is a file" in refused(monkeypatch, capsys, "scan", "--out", str(file))
    assert "cannot be written" in refused(monkeypatch, capsys, "scan", "--out", "/proc/nowhere")
    assert run(monkeypatch, "scan", "--quiet", "--out", str(run_dir), *FAST) == 0
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert "already holds a run" in refused(monkeypatch, capsys, "scan", "--out", str(run_dir), *FAST)
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_resume_with_other_options_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("massact.scans.job.measure", _interrupt)
    assert run(monkeypatch, "scan", "--quiet", "--out", str(out), *FAST) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert "not finished" in refused(monkeypatch, capsys, "show", str(out))
    message = refused(monkeypatch, capsys, "scan", "--out", str(out), "--resume", "--seed", "5", *FAST)
    assert "another config" in message and "seed" in message
    assert run(monkeypatch, "scan", "--quiet", "--out", str(out), "--resume", *FAST) == 0
    assert ma.open_run(out).info.status == "ok"


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_resume_of_a_finished_run_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "scan", "--quiet", "--out", str(out), *FAST) == 0
    assert run(monkeypatch, "scan", "--json", "--out", str(out), "--resume", *FAST) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"


def test_failed_work_is_status_1_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from massact.records.errors import WorkError

    def fail(*args: object, **kwargs: object) -> None:
        raise WorkError("One sequence does not fit into memory.")

    monkeypatch.setattr("massact.scans.job.measure", fail)
    out = tmp_path / "run"
    assert run(monkeypatch, "scan", "--out", str(out), *FAST) == 1
    assert "does not fit" in capsys.readouterr().err
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "failed" and "does not fit" in info["error"]
    assert "failed" in refused(monkeypatch, capsys, "show", str(out))


def test_a_defect_is_one_message_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("massact.scans.job.measure", lambda *a, **k: 1 / 0)
    assert run(monkeypatch, "scan", *FAST) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "Traceback" not in err


def test_damaged_run_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    assert run(monkeypatch, "scan", "--quiet", "--out", str(good), *FAST) == 0
    for name, content in (("run.json", b"{"), ("run.json", b"[]"), ("run.json", b"\xff\xfe"),
                          ("run.json", b'{"schema_version": 99, "verb": "scan"}'), ("layers.parquet", b"PAR1"),
                          ("findings.parquet", None), ("portrait.npz", b"PK")):  # fmt: skip
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        assert "bad" in refused(monkeypatch, capsys, "show", str(bad))


# ------------------------------------------------------------------------------------------ killed and resumed
def test_interrupted_scan_resumes_to_the_same_result(tmp_path: Path) -> None:
    """SIGINT in the middle of a real process: status 130, finished work kept, --resume gives the same tables."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    module = build("llama")
    module.save_pretrained(folder)
    arguments = [str(folder), "--out", str(tmp_path / "run")]
    code = (
        "import sys, time\nimport massact.scans.resumption as s\ns.SAVE_EVERY_S = 0\n"
        "import massact.corpora as c\nimport torch\nimport massact as ma\n"
        "ids = torch.randint(5, 90, (64, 16), generator=torch.Generator().manual_seed(0))\n"
        "def slow(stage, done, total):\n    print(stage, done, flush=True)\n    time.sleep(0.05)\n"
        "m = ma.load(sys.argv[1])\n"
        "ma.scan(m, ids, out=sys.argv[3], resume='--resume' in sys.argv, batch_size=2, progress=slow,\n"
        "        null=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=hears_ctrl_c)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"scan 1"):
            break
    process.send_signal(signal.SIGINT)
    process.wait(timeout=180)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"] == "interrupted" and (tmp_path / "run" / "state.npz").is_file()
    done = subprocess.run([sys.executable, "-c", code, *arguments, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = int(done.stdout.splitlines()[0].split()[1])
    assert first > 10, "it began again instead of going on"
    whole = ma.scan(
        ma.load(folder),
        torch.randint(5, 90, (64, 16), generator=torch.Generator().manual_seed(0)),
        batch_size=2,
        null=False,
    )
    resumed = ma.open_run(tmp_path / "run")
    for table in ("layers", "findings", "dims", "coordinates"):
        pd.testing.assert_frame_equal(getattr(resumed, table), getattr(whole, table))
    assert not (tmp_path / "run" / "state.npz").exists()
