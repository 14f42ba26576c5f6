"""`train`: the run directory, exact resume, and every way in which a training can be refused or fail."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import massact as ma
from massact.records.errors import UserError, WorkError
from massact.records.kinds.training import Trained
from massact.records.tables import frame
from massact.training import TrainConfig, checkpoints, train
from massact.training.loop import MassactTrainer
from tests.facts import each
from tests.training.small import STEPS, small


class StopAt(TrainerCallback):
    """Interrupts after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(small(), tmp_path_factory.mktemp("whole") / "run")


def interrupted(out: Path, config: TrainConfig | None = None, step: int = 10) -> Path:
    with pytest.raises(KeyboardInterrupt):
        train(config or small(), out, callbacks=[StopAt(step)])
    return out


def same(a: Trained, b: Trained) -> None:
    """Bit for bit, but for the clock."""
    assert a.info.losses == b.info.losses
    pd.testing.assert_frame_equal(a.training.drop(columns="step_s"), b.training.drop(columns="step_s"))
    pd.testing.assert_frame_equal(a.monitor, b.monitor)
    mine, other = (load_file(t.directory / "model" / "model.safetensors") for t in (a, b))
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


# ------------------------------------------------------------------------------------------------ the run directory
def test_what_a_run_holds(whole: Trained) -> None:
    out = whole.directory
    assert {p.name for p in out.iterdir()} == {
        "train.json", "training.parquet", "monitor.parquet", "checkpoints", "model", "data"}  # fmt: skip
    assert [p.name for p in checkpoints.listed(out / "checkpoints")] == ["checkpoint-12", "checkpoint-8"]
    record = json.loads((out / "train.json").read_text())
    assert record["status"] == "ok" and record["config"]["model"]["n_layer"] == 2
    assert record["corpus"]["tokens_sha256"] and record["versions"]["accelerate"] and record["wall_s"] > 0
    assert record["losses"]["step"] == STEPS and record["losses"]["tokens"] == STEPS * 4 * 16
    assert record["losses"]["train_loss"] == whole.training["loss"].iloc[-1]
    again = Trained.open(out)
    assert again is not None and again.as_dict() == whole.as_dict()


def test_the_tables(whole: Trained) -> None:
    rows = whole.training
    assert list(rows["step"]) == [3, 6, 9, 12] and list(rows["tokens"]) == [192, 384, 576, 768]
    assert rows["eval_loss"].notna().tolist() == [False, True, False, True]
    # warm-up of 2, constant, cooldown over the last 3 to min_lr
    assert rows["lr"].to_numpy() == pytest.approx([2e-3, 2e-3, 2e-3, 1e-4])
    assert (rows[["loss", "grad_norm", "step_s"]] > 0).all(axis=None) and rows["loss"].is_monotonic_decreasing
    assert list(rows.columns) == list(frame("training").columns)
    assert sorted(set(whole.monitor["step"])) == [1, 5, 10] and set(whole.monitor["layer"]) == {0, 1, 2}


def test_the_model_can_be_scanned(whole: Trained) -> None:
    model = ma.load(whole.directory / "model")
    assert model.tokenizer is not None and model.info().weights_sha256 == whole.info.model["weights_sha256"]
    result = ma.scan(model, None, n_sequences=2, seq_len=16, null=False, bos_contrast=False)
    assert set(result.layers["layer"]) == {0, 1, 2}


def test_the_loss_is_the_models(whole: Trained) -> None:
    """The last evaluation again, by hand: mean over the held-out windows of the nats of tokens 2 and later."""
    from massact.training.data import Windows, prepare, split

    tokens = prepare(None, ma.load(whole.directory / "model").tokenizer, whole.directory / "data")
    _, held = split(tokens, 0.03)
    windows = Windows(held, 16, 8, order="even")
    model = ma.load(whole.directory / "model").module
    total, n = 0.0, 0
    for i in range(8):
        item = windows[i]
        with torch.no_grad():
            logp = model(item["input_ids"][None]).logits[0].double().log_softmax(-1)
        total -= logp[torch.arange(1, 16), item["labels"][1:]].sum().item()
        n += 15
    assert total / n == pytest.approx(whole.info.losses["eval_loss"], rel=1e-6)


def test_the_monitor_changes_nothing(whole: Trained, tmp_path: Path) -> None:
    unwatched = train(small(monitor_every=0), tmp_path / "run")
    assert unwatched.info.losses == whole.info.losses and not len(unwatched.monitor)
    assert unwatched.info.model["weights_sha256"] == whole.info.model["weights_sha256"]


def test_micro_batches_give_the_same_step(whole: Trained, tmp_path: Path) -> None:
    other = train(small(batch=2, accumulate=2), tmp_path / "run")
    np.testing.assert_allclose(other.training["loss"], whole.training["loss"], rtol=1e-5)
    np.testing.assert_allclose(other.training["grad_norm"], whole.training["grad_norm"], rtol=1e-3)


def test_progress_rows_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told, rows = [], []
    done = train(
        small(report_to=("tensorboard",), per_layer=True),
        tmp_path / "run",
        progress=lambda *p: told.append(p),
        on_row=rows.append,
    )
    assert [p for p in told if p[0] == "train"] == [("train", i, STEPS) for i in range(1, STEPS + 1)]
    assert [r["step"] for r in rows if r["loss"] == r["loss"]][-1] == STEPS
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = events.Scalars("train/massact/layer_01/ratio")
    expected = done.monitor[done.monitor["layer"] == 1]
    assert [e.step for e in logged] == list(expected["step"])
    np.testing.assert_allclose([e.value for e in logged], expected["ratio"], rtol=1e-6)
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6, 9, 12]


@pytest.mark.parametrize("variant", ["kv-bias", "softmax-off-by-one"])
def test_variants_train_resume_and_load(variant: str, tmp_path: Path) -> None:
    config = small(variant=variant)
    straight = train(config, tmp_path / "a")
    resumed = train(config, interrupted(tmp_path / "b", config), resume=True)
    same(straight, resumed)
    assert straight.monitor["sink_mass"].notna().sum() == 6
    model = ma.load(tmp_path / "a" / "model")
    assert model.info().weights_sha256 == straight.info.model["weights_sha256"]


def test_bf16_and_other_parts_run(tmp_path: Path) -> None:
    config = small(dtype="bf16", optimizer="muon", tweo=0.01, remedies={"dyt": {}}, rescale_every=5, steps=6)
    done = train(config, tmp_path / "run")
    assert done.info.status == "ok" and math.isfinite(done.info.losses["eval_loss"])
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    images = (rng.normal(size=(60, 3, 16, 16)) + 3 * labels[:, None, None, None]).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    config = TrainConfig.of("vit-tiny", **{
        "model.hidden_size": 32, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
        "model.intermediate_size": 64, "model.image_size": 16, "model.patch_size": 8, "model.num_labels": 2,
    }, batch=8, accumulate=1, steps=40, warmup=5, lr=3e-3, dtype="float32", eval_every=0, save_every=0, log_every=10,
        val_share=0.2, report_to=())  # fmt: skip
    done = train(config, tmp_path / "run", tmp_path / "images.npz")
    assert done.info.losses["eval_loss"] < 0.2 and done.info.corpus["n_images"] == 60
    assert list(done.training["tokens"])[-1] == 320 and not checkpoints.listed(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="needs images"):
        train(config, tmp_path / "other")


# ------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("step", [2, 5, 8, 11])
def test_resume_is_exact(step: int, whole: Trained, tmp_path: Path) -> None:
    out = interrupted(tmp_path / "run", step=step)
    assert Trained.open(out).info.status == "interrupted"
    resumed = train(small(), out, resume=True)
    same(whole, resumed)
    noted = any("began again" in n for n in resumed.info.notes)
    assert noted == (step == 2)


def test_resume_is_exact_with_dropout_and_odd_intervals(tmp_path: Path) -> None:
    odd = {"model.resid_pdrop": 0.1, "model.attn_pdrop": 0.1, "model.embd_pdrop": 0.1, "log_every": 5, "save_every": 3,
           "eval_every": 4, "monitor_every": 2, "order": "consecutive", "batch": 2, "accumulate": 2}  # fmt: skip
    straight = train(small(**odd), tmp_path / "a")
    out = interrupted(tmp_path / "b", small(**odd), step=8)
    same(straight, train(small(**odd), out, resume=True))


def test_resuming_what_is_finished_gives_it_again(whole: Trained) -> None:
    before = (whole.directory / "train.json").stat().st_mtime_ns
    again = train(small(), whole.directory, resume=True)
    same(whole, again)
    assert (whole.directory / "train.json").stat().st_mtime_ns == before


def test_another_configuration_or_other_data_is_refused(tmp_path: Path) -> None:
    out = interrupted(tmp_path / "run")
    with pytest.raises(UserError, match=r"lr: 0.002 -> 0.001; .*variant: 'softmax' -> 'kv-bias'|variant.*lr"):
        train(small(lr=1e-3, variant="kv-bias"), out, resume=True)
    with pytest.raises(UserError, match="other data"):
        train(small(), out, ["Another text. " * 400], resume=True)
    assert train(small(keep=1, report_to=()), out, resume=True).info.status == "ok"


def test_a_used_directory_is_refused(whole: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a training"):
        train(small(), whole.directory)
    with pytest.raises(UserError, match="no training in"):
        train(small(), tmp_path / "nothing", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(small(), tmp_path / "file")


@pytest.mark.parametrize("how", ["flip", "cut", "lose", "no seal", "broken seal"])
def test_a_corrupt_checkpoint_is_passed_over(how: str, whole: Trained, tmp_path: Path) -> None:
    out = interrupted(tmp_path / "run", step=10)
    broken = out / "checkpoints" / "checkpoint-8"
    file = broken / {"no seal": checkpoints.SEAL, "broken seal": checkpoints.SEAL}.get(how, "optimizer.pt")
    data = bytearray(file.read_bytes())
    if how in ("lose", "no seal"):
        file.unlink()
    else:
        data[len(data) // 2] ^= 1 if how == "flip" else 0
        file.write_bytes(bytes(data) if how == "flip" else bytes(data[: len(data) // 2]))
    resumed = train(small(), out, resume=True)
    same(whole, resumed)
    assert any("checkpoint-8 is damaged" in n for n in resumed.info.notes)
    assert checkpoints.damage(broken) == ""  # step 8 was saved again


def test_all_checkpoints_corrupt_begins_again(whole: Trained, tmp_path: Path) -> None:
    out = interrupted(tmp_path / "run", step=10)
    for folder in checkpoints.listed(out / "checkpoints"):
        shutil.rmtree(folder)
        folder.mkdir()
    resumed = train(small(), out, resume=True)
    same(whole, resumed)
    assert sum("damaged" in n for n in resumed.info.notes) == 2


# ----------------------------------------------------------------------------------------------------- a full disk
def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_full(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("target", "name", "fails"),
    [(checkpoints, "seal", full), (torch, "save", torch_full), (checkpoints.os, "rename", full),
     (MassactTrainer, "_save", full), (MassactTrainer, "save_tables", full)],
)  # fmt: skip
def test_a_full_disk_keeps_the_last_checkpoint(
    target: Any, name: str, fails: Any, whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    class FullAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                monkeypatch.setattr(target, name, fails)

    with pytest.raises(WorkError, match="disk is full") as refused:
        train(small(), out, callbacks=[FullAt()])
    monkeypatch.undo()
    assert "checkpoint-4 is whole" in str(refused.value)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-4"]
    record = Trained.open(out)
    assert record.info.status == "failed" and record.info.error
    same(whole, train(small(), out, resume=True))


def test_a_diverged_training_stops_before_it_saves(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="loss is nan"):
        train(small(lr=1e12, clip=0.0, save_every=1, log_every=12), tmp_path / "run")
    for folder in checkpoints.listed(tmp_path / "run" / "checkpoints"):
        assert all(torch.isfinite(w).all() for w in load_file(folder / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        ({"variant": "kv-bais"}, None, "kv-bias"),
        ({"variant_options": {"sdt": 1}, "variant": "kv-bias"}, None, "std"),
        ({"model.vocab_size": 100}, None, "2048 tokens, the model 100"),
        ({"tokenizer": "no/such/tokenizer"}, None, "cannot be loaded"),
        ({}, "nowhere.txt", "nowhere.txt"),
        ({}, ["short"], "a window takes 17"),
        ({"optimizer": "adamv"}, None, "adamw"),
        ({"optimizer_options": {"beta": 1}}, None, "betas"),
        ({"remedies": {"dty": {}}}, None, "dyt"),
    ],
)
def test_bad_input_is_refused(options: dict, data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train(small(**options), tmp_path / "run", data)
    assert Trained.open(tmp_path / "run").info.status == "failed"


def test_accumulate_is_shared_by_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=each("shared", 3)):
        train(small(), tmp_path / "run")


def test_two_processes_train_what_one_does(whole: Trained, tmp_path: Path) -> None:
    """Gradients, statistics of the monitor and checkpoints over two ranks (gloo), started as torchrun does."""
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from massact.training import train\nfrom tests.training.small import small\n"
        f"train(small(device='cpu', batch=2, accumulate=2), {str(tmp_path / 'run')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python",
         sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    both = Trained.open(tmp_path / "run")
    assert both is not None and both.info.status == "ok"
    np.testing.assert_allclose(both.training["loss"], whole.training["loss"], rtol=1e-5)
    np.testing.assert_allclose(both.monitor["ratio"], whole.monitor["ratio"], rtol=1e-4)
    assert set(both.monitor["n_sequences"]) == {4}  # two of each rank, added once
    assert checkpoints.damage(checkpoints.listed(tmp_path / "run" / "checkpoints")[0]) == ""
