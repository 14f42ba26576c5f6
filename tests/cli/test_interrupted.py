"""Runs that were interrupted, damaged, resumed with other inputs, or written by two processes at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import massact as ma
from massact.models import Model
from massact.records.errors import UserError
from massact.records.runinfo import RunInfo
from massact.records.tables import load_arrays, save_arrays
from massact.scans.resumption import Saved
from massact.stats import HiddenStats
from tests.cli.test_cli import FAST, refused, run
from tests.families import build

IDS = torch.randint(5, 90, (6, 12), generator=torch.Generator().manual_seed(0))
OFF = {"null": False, "batch_size": 2}
TABLES = ("layers", "findings", "dims", "coordinates")


@pytest.fixture(scope="module")
def model() -> Model:
    return ma.load(build("llama"))


def stop_at(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("scan", 4):
        raise KeyboardInterrupt


@pytest.fixture
def interrupted(model: Model, tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        ma.scan(model, IDS, out=tmp_path / "run", progress=stop_at, **OFF)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    return tmp_path / "run"


def same_tables(model: Model, out: Path) -> None:
    whole, resumed = ma.scan(model, IDS, **OFF), ma.open_run(out)
    for table in TABLES:
        pd.testing.assert_frame_equal(getattr(resumed, table), getattr(whole, table))


def test_an_interrupt_while_a_batch_is_added_is_not_kept(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some sites have seen the batch, others have not: a resumed run would count it twice."""
    merges, merge = iter(range(100)), HiddenStats.merge

    def interrupted(self: HiddenStats, other: HiddenStats) -> None:
        if next(merges) == 6:  # the third site of the second batch
            raise KeyboardInterrupt
        merge(self, other)

    monkeypatch.setattr(HiddenStats, "merge", interrupted)
    monkeypatch.setattr("massact.scans.resumption.SAVE_EVERY_S", 0)
    with pytest.raises(KeyboardInterrupt):
        ma.scan(model, IDS, out=tmp_path / "run", **OFF)
    monkeypatch.undo()
    assert int(load_arrays(tmp_path / "run" / "state.npz")["n_sequences"]) == 2
    ma.scan(model, IDS, out=tmp_path / "run", resume=True, **OFF)
    same_tables(model, tmp_path / "run")


def test_what_a_killed_process_left_is_swept_up(model: Model, interrupted: Path) -> None:
    (interrupted / ".state.npz.4711.tmp").write_bytes(b"PK")
    ma.scan(model, IDS, out=interrupted, resume=True, **OFF)
    same_tables(model, interrupted)
    assert not [p.name for p in interrupted.iterdir() if p.name.startswith(".") or p.name == "state.npz"]


def test_killed_before_run_json_was_there(model: Model, tmp_path: Path) -> None:
    (tmp_path / ".run.json.4711.tmp").write_text("{")
    assert ma.scan(model, IDS, out=tmp_path, **OFF).info.status == "ok"


def test_proofs_may_differ_by_rounding(model: Model, interrupted: Path) -> None:
    """Another machine, or another number of threads, rounds otherwise: it is the same model all the same."""
    record = json.loads((interrupted / "run.json").read_text())
    record["model"]["proof"] = {"another": "machine"}
    (interrupted / "run.json").write_text(json.dumps(record))
    ma.scan(model, IDS, out=interrupted, resume=True, **OFF)
    same_tables(model, interrupted)


@pytest.mark.parametrize("damage", ["lost", "shape", "cut", "count"])
def test_damaged_state_is_refused(model: Model, interrupted: Path, damage: str) -> None:
    file = interrupted / "state.npz"
    arrays = load_arrays(file)
    if damage == "lost":
        del arrays["1:top_value"]
    elif damage == "shape":
        arrays["1:token_offsets"] = np.zeros(1, np.int64)
    elif damage == "count":
        arrays["n_sequences"] = np.array(2)
    save_arrays(file, arrays)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"state\.npz cannot be"):
        ma.scan(model, IDS, out=interrupted, resume=True, **OFF)


def test_a_finished_run_answers_for_its_own_inputs_only(model: Model, interrupted: Path) -> None:
    ma.scan(model, IDS, out=interrupted, resume=True, **OFF)
    again = ma.scan(model, IDS, out=interrupted, resume=True, **OFF)
    assert again.info.status == "ok" and not (interrupted / "state.npz").exists()
    for other, ids, options in ((ma.load(build("llama", seed=9)), IDS, {}), (model, IDS.flip(1), {}),
                                (model, IDS, {"thresholds": {"ratio": 5.0}})):  # fmt: skip
        with pytest.raises(UserError, match="has another (model|corpus|config)"):
            ma.scan(other, ids, out=interrupted, resume=True, **(OFF | options))


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    info = RunInfo("scan")
    first = Saved(tmp_path, info, False)
    with pytest.raises(UserError, match="Another massact"):
        Saved(tmp_path, info, True)
    first.release()
    Saved(tmp_path, info, True).release()


# ------------------------------------------------------------------------------- refused before the work begins
def test_a_prompt_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at most" in refused(monkeypatch, capsys, "scan", "--prompt", "word " * 2000, *FAST)
    assert "no token" in refused(monkeypatch, capsys, "scan", "--prompt", "", *FAST)


def test_odd_names_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "²" in refused(monkeypatch, capsys, "scan", "--batch-size", "²")
    assert "No such run" in refused(monkeypatch, capsys, "show", "a" * 5000)
    assert "cannot be written" in refused(monkeypatch, capsys, "scan", "--out", "a" * 5000)


def test_a_prompt_and_names_that_are_no_unicode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not Unicode" in refused(monkeypatch, capsys, "scan", "--prompt", "ab\udcff", *FAST)
    text = tmp_path / "c\udcff.txt"
    try:
        text.write_text("A kettle sings. " * 40)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert run(monkeypatch, "scan", "--quiet", "--corpus", str(text), "--out", str(tmp_path / "r\udcff"), *FAST) == 0
    assert ma.open_run(tmp_path / "r\udcff").info.corpus["name"] == text.name
    capsys.readouterr()
    assert run(monkeypatch, "show", str(tmp_path / "r\udcff")) == 0


def test_a_refused_model_leaves_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "scan", "./no/such/model", "--out", str(tmp_path / "a" / "b" / "c")) == 2
    assert not (tmp_path / "a").exists()
