"""Several checkpoints of one training: their order, the table, where findings emerge, and what may go wrong."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import massact as ma
from massact.models import transformers_models
from massact.records.errors import UserError
from massact.records.kinds.trajectory import Trajectory
from massact.scans import Checkpoint, checkpoints_in, revisions, revisions_of, scan_checkpoints, step_of
from massact.scans.emergence import dynamics
from massact.stats import fit_dynamics
from tests import stepped
from tests.facts import tells

FAST = {"seq_len": 16, "n_sequences": 3}
HEIGHTS = {"step9": 0.0, "step10": 50.0, "step11": 99.0, "step100": 101.0, "step1000": 400.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stepped.write_all(tmp_path_factory.mktemp("models") / "growing", HEIGHTS)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return scan_checkpoints(checkpoints_in(folder), out=tmp_path_factory.mktemp("out") / "whole", **FAST)


# ------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(("name", "step"), [
    ("step1000", 1000), ("step_1000", 1000), ("checkpoint-500", 500), ("global_step9", 9), ("iter_0001000", 1000),
    ("stage1-step140000-tokens294B", 140_000), ("checkpoint-3-step-1500", 1500), ("step10k", 10_000), ("2000", 2000),
    ("main", None), ("gpt2-final", None), ("epoch_3", None), ("step10b2", None), ("stepless", None), ("", None),
])  # fmt: skip
def test_steps_are_read_from_names(name: str, step: int | None) -> None:
    assert math.isnan(step_of(name)) if step is None else step_of(name) == step


def test_revisions_and_ranges() -> None:
    def names(text: str) -> list[str]:
        return [c.name for c in revisions_of("org/name", text)]

    assert names("step10, step9,step10") == ["step9", "step10"]
    assert names("step1000:step3000:1000,step0") == ["step0", "step1000", "step2000", "step3000"]
    assert names("step008:step010:1") == ["step008", "step009", "step010"]
    assert names("main,step3,step1") == ["main", "step3", "step1"]  # whose order is not ours to guess
    assert revisions_of("org/name", "v1")[0] == Checkpoint("v1", "org/name", "v1")
    for bad in ("", " , ", "step1:step9", "step9:step1:1", "step1:ckpt9:1", "step1:step9:0", "step0:step99999999:1"):
        with pytest.raises(UserError):
            revisions_of("org/name", bad)


def test_revisions_of_what_has_none(folder: Path) -> None:
    """A folder takes any revision and gives the same weights for each."""
    for model in (None, str(folder)):
        with pytest.raises(UserError, match="needs a Hub model"):
            revisions_of(model, "step1,step2")


def test_folders_that_are_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "final", ".saving", "logs"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    for name in ("checkpoint-9", "final", ".saving"):
        (tmp_path / "run" / "checkpoints" / name / "config.json").touch()
    for root in (tmp_path / "run" / "checkpoints", tmp_path / "run"):
        assert [c.name for c in checkpoints_in(root)] == ["checkpoint-9", "checkpoint-10", "final"]
    for bad in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            checkpoints_in(bad)


def test_no_name_leads_out_of_the_directory_or_into_anothers() -> None:
    names = ["..", ".", "-x", "a/b", "a%2Fb", "a b", "refs/pr/1", "figures", "Figures", "trajectory.json", "\n", "é",
             "\udcff", "x" * 400, "x" * 401, "~", "step1"]  # fmt: skip
    folders = [Checkpoint(n, "m").folder for n in names]
    assert len(set(folders)) == len(names) and folders[-1] == "step1"
    for f in folders:
        assert f == os.path.basename(f) and not f.startswith((".", "-", "~")) and len(f) <= 120
        assert f.lower() not in ("figures", "trajectory.json") and f.isascii() and f.isprintable()


# ------------------------------------------------------------------------------------------------------- the truth
def test_the_step_at_which_it_was_planted_is_found(whole: Trajectory) -> None:
    assert [c.name for c in whole.info.checkpoints] == list(HEIGHTS)
    assert [c.status for c in whole.info.checkpoints] == ["ok"] * 5 and whole.info.status == "ok"
    [e] = whole.info.emergence
    assert (e.before, e.first, e.layer, e.dims) == ("step11", "step100", stepped.ONSET, [stepped.DIM])
    assert (e.without, e.gone, e.dims_last) == ([], None, [stepped.DIM])
    t = whole.revisions
    assert len(t) == 5 * (stepped.LAYERS + 1)
    at = t[t["layer"] == stepped.ONSET].set_index("revision")
    for name, height in HEIGHTS.items():
        assert at.loc[name, "top1"] == pytest.approx(height, abs=0.15)
        assert at.loc[name, "step"] == step_of(name)
        assert bool(at.loc[name, "found"]) == (height > 100) and at.loc[name, "share"] == float(height > 100)
    assert not t.loc[t["layer"] < stepped.ONSET, "found"].any()


def test_each_checkpoint_is_a_run_like_any_other(whole: Trajectory, folder: Path) -> None:
    alone = ma.scan(str(folder / "step100"), null=False, bos_contrast=False, **FAST)
    run = ma.open_run(whole.directory / "step100")
    for table in ("layers", "findings", "dims", "coordinates"):
        pd.testing.assert_frame_equal(getattr(run, table), getattr(alone, table))
    assert run.info.config == alone.info.config and run.info.corpus == alone.info.corpus
    mine = whole.revisions[whole.revisions["revision"] == "step100"].reset_index(drop=True)
    for column in ("top1", "median", "ratio", "ratio_max", "n_findings", "norm_first"):
        np.testing.assert_array_equal(mine[column], alone.layers[column])


def test_what_is_saved_is_what_is_opened(whole: Trajectory) -> None:
    again = Trajectory.open(whole.directory)
    assert again.as_dict() == whole.as_dict()
    assert again.info.checkpoints == whole.info.checkpoints and again.info.emergence == whole.info.emergence
    with pytest.raises(UserError, match="damaged"):
        (whole.directory / "x").mkdir()
        (whole.directory / "x" / "trajectory.json").write_text('{"schema_version": 1, "checkpoints": [{}]}')
        Trajectory.open(whole.directory / "x")


@pytest.mark.parametrize(("heights", "gone", "without"), [
    ([200, 200, 0], "step3", ["step3"]),
    ([200, 0, 200], None, ["step2"]),
    ([0, 0, 200], None, []),
])  # fmt: skip
def test_what_vanishes_and_comes_back(heights: list[float], gone: str | None, without: list[str],
                                      tmp_path: Path) -> None:  # fmt: skip
    stepped.write_all(tmp_path / "m", {f"step{i + 1}": h for i, h in enumerate(heights)})
    [e] = scan_checkpoints(checkpoints_in(tmp_path / "m"), out=tmp_path / "out", **FAST).info.emergence
    assert (e.gone, e.without) == (gone, without)
    assert e.before == (None if heights[0] else "step2")


def test_curves_are_fitted_where_there_are_enough_steps(whole: Trajectory) -> None:
    assert [d["reason"][:8] for d in whole.info.dynamics] == ["5 points"] * (stepped.LAYERS + 1)
    steps = np.arange(0.0, 2000, 100)
    y = 500 * np.exp(-0.05 * (1e-3 * steps + 1.2)) * np.log(1e-3 * steps + 1.2) + 30
    table = pd.DataFrame({"stack": "", "site": "resid_post", "layer": 1, "step": steps, "ratio": y})
    [found] = dynamics(table)
    assert found["layer"] == 1 and found["r2"] == fit_dynamics(steps, y).r2 > 0.9999
    table["step"] = np.nan  # names without a number
    assert dynamics(table)[0]["reason"].startswith("0 points")


def test_controls_are_of_the_last(folder: Path, tmp_path: Path) -> None:
    two = checkpoints_in(folder)[:2]
    scan_checkpoints(two, out=tmp_path, null=True, bos_contrast=True, **FAST)
    first, last = (ma.open_run(tmp_path / c.name).info.answer for c in two)
    assert first["null"] == first["bos"] == {"unavailable": "not asked for"}
    assert "n_findings" in last["null"] and last["bos"] != {"unavailable": "not asked for"}


def test_one_model_in_memory_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    load = revisions.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not [r for r in alive if r() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(revisions, "load", watched)
    scan_checkpoints(checkpoints_in(folder), out=tmp_path / "out", **FAST)
    gc.collect()
    assert len(alive) == 5 and not [r for r in alive if r() is not None]


# ------------------------------------------------------------------------------------------------------- resumed
@pytest.mark.parametrize(("at", "error"), [(3, KeyboardInterrupt), (1, KeyboardInterrupt), (3, OSError)])
def test_resumed_after_an_end_in_the_middle(at: int, error: type[BaseException], folder: Path, whole: Trajectory,
                                            tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    seen: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "scan":
            seen.append(stage)
            if len(seen) == at:
                raise error

    out = tmp_path / "out"
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            scan_checkpoints(checkpoints_in(folder), out=out, progress=stop, **FAST)
        before = Trajectory.open(out)
        assert before.info.status == "interrupted" and len(before.info.having("ok")) == at - 1
    else:  # a failure costs one checkpoint only
        failed = scan_checkpoints(checkpoints_in(folder), out=out, progress=stop, **FAST)
        assert [c.status for c in failed.info.checkpoints] == ["ok", "ok", "failed", "ok", "ok"]
        assert len(failed.revisions) == 4 * (stepped.LAYERS + 1)
    loaded: list[str] = []
    load = revisions.load
    monkeypatch.setattr(revisions, "load", lambda spec, **k: loaded.append(Path(spec).name) or load(spec, **k))
    again = scan_checkpoints(checkpoints_in(folder), out=out, resume=True, **FAST)
    assert loaded == (list(HEIGHTS)[at - 1 :] if error is KeyboardInterrupt else ["step11"])
    pd.testing.assert_frame_equal(again.revisions, whole.revisions)
    for what in ("checkpoints", "emergence", "corpus", "notes", "status"):
        assert getattr(again.info, what) == getattr(whole.info, what), what
    loaded.clear()
    scan_checkpoints(checkpoints_in(folder), out=out, resume=True, **FAST)
    assert loaded == []


def test_a_training_that_went_on(folder: Path, whole: Trajectory, tmp_path: Path) -> None:
    scan_checkpoints(checkpoints_in(folder)[:2], out=tmp_path / "o", null=True, **FAST)
    again = scan_checkpoints(checkpoints_in(folder), out=tmp_path / "o", null=True, resume=True, **FAST)
    pd.testing.assert_frame_equal(again.revisions, whole.revisions)


def test_other_options_are_not_gone_on_with(folder: Path, whole: Trajectory) -> None:
    with pytest.raises(UserError, match="already holds a trajectory"):
        scan_checkpoints(checkpoints_in(folder), out=whole.directory, **FAST)
    for more in ({"seed": 3}, {"corpus": "other.txt"}, {"thresholds": {"ratio": 5.0}}, {"criterion": "dettmers2022"}):
        with pytest.raises(UserError, match=r"has another|ile|unknown|criterion"):
            scan_checkpoints(checkpoints_in(folder), out=whole.directory, resume=True, **(FAST | more))


def test_a_directory_of_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        scan_checkpoints(checkpoints_in(folder), out=tmp_path, **FAST)
    with pytest.raises(UserError, match="is a file"):
        scan_checkpoints(checkpoints_in(folder), out=tmp_path / "mine.txt", **FAST)
    with pytest.raises(UserError, match="no checkpoints"):
        scan_checkpoints([], out=tmp_path / "new")


# ------------------------------------------------------------------------------------------------------- failures
def test_all_that_fail_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "m" / "step1").mkdir(parents=True)
    (tmp_path / "m" / "step2").mkdir()
    with pytest.raises(UserError, match="None of the 2"):
        scan_checkpoints(checkpoints_in(tmp_path / "m"), out=tmp_path / "a" / "b", **FAST)
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_that_makes_other_tokens(tmp_path: Path) -> None:
    """Numbers on another text would not be those of another step."""
    root = stepped.write_all(tmp_path / "m", {"step1": 0.0, "step2": 200.0, "step3": 200.0})
    file = root / "step2" / "tokenizer.json"
    record = json.loads(file.read_text(encoding="utf-8")) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(record), encoding="utf-8")
    done = scan_checkpoints(checkpoints_in(root), out=tmp_path / "out", **FAST)
    assert [c.status for c in done.info.checkpoints] == ["ok", "failed", "ok"]
    assert "reads other tokens" in done.info.checkpoints[1].error and not (tmp_path / "out" / "step2").exists()
    assert done.info.emergence[0].before == "step1"
    again = scan_checkpoints(checkpoints_in(root), out=tmp_path / "out", resume=True, **FAST)
    assert [c.status for c in again.info.checkpoints] == ["ok", "failed", "ok"]


def test_checkpoints_without_a_tokenizer_read_with_that_of_another(tmp_path: Path) -> None:
    for name, height, own in (("step1", 0.0, False), ("step2", 200.0, True), ("step3", 200.0, False)):
        stepped.write(tmp_path / "m" / name, height, tokenizer=own)
    done = scan_checkpoints(checkpoints_in(tmp_path / "m"), out=tmp_path / "out", **FAST)
    assert [c.status for c in done.info.checkpoints] == ["ok"] * 3
    assert tells(done.info.notes, "tokenizer", "step2")
    shutil.rmtree(tmp_path / "m" / "step2")
    with pytest.raises(UserError, match="without a tokenizer"):
        scan_checkpoints(checkpoints_in(tmp_path / "m"), out=tmp_path / "out2", **FAST)


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    for i, height in enumerate((0.0, 200.0)):
        stepped.write(tmp_path / "m" / f"checkpoint-{i}", height, tokenizer=False)
    ids = np.arange(48).reshape(3, 16)
    done = scan_checkpoints(checkpoints_in(tmp_path / "m"), ids, out=tmp_path / "out")
    assert done.info.emergence[0].first == "checkpoint-1"


def test_the_same_weights_twice_are_told(tmp_path: Path) -> None:
    stepped.write_all(tmp_path / "m", {"step1": 200.0, "step2": 200.0})
    done = scan_checkpoints(checkpoints_in(tmp_path / "m"), out=tmp_path / "out", **FAST)
    assert tells(done.info.notes, "step1", "step2", "same weights")


# ------------------------------------------------------------------------------------------------------- the Hub
@pytest.mark.usefixtures("hub_there")
def test_revisions_of_a_hub_model(folder: Path, whole: Trajectory, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    read, asked = transformers_models.read_pretrained, []

    def from_folder(spec: str, dtype: Any, revision: str, options: dict[str, Any]) -> Any:
        asked.append((spec, revision))
        if revision == "step50":
            raise UserError(f"Model {spec!r} has no such revision.")
        return read(str(folder / revision), dtype, None, options)

    monkeypatch.setattr(transformers_models, "read_pretrained", from_folder)
    found = revisions_of("org/name", "step9:step11:1,step1000,step50,step100")
    done = scan_checkpoints(found, out=tmp_path / "out", **FAST)
    names = ["step9", "step10", "step11", "step50", "step100", "step1000"]
    assert asked == [("org/name", name) for name in names] and done.info.model == {"id": "org/name"}
    assert [c.status for c in done.info.checkpoints] == ["ok"] * 3 + ["failed"] + ["ok"] * 2
    pd.testing.assert_frame_equal(done.revisions, whole.revisions)
    info = ma.open_run(tmp_path / "out" / "step10").info
    assert (info.model["id"], info.model["revision"]) == ("org/name", "step10")


def test_names_of_any_kind(tmp_path: Path) -> None:
    names = ["a b", "[red]x", "$x$", "schritt-ü", "--out"]
    stepped.write_all(tmp_path / "m", dict.fromkeys(names, 200.0))
    try:
        stepped.write(tmp_path / "plain", 0.0)
        os.rename(tmp_path / "plain", os.fsencode(tmp_path / "m") + b"/c\xff")
    except OSError:
        pass  # this file system takes Unicode names only
    done = scan_checkpoints(checkpoints_in(tmp_path / "m"), out=tmp_path / "out", **FAST)
    # safetensors itself reads no path that is not Unicode: told, and the others go on
    assert {c.name for c in done.info.having("failed")} <= {"c\\udcff"} and not done.info.has_steps()
    assert set(names) <= set(done.revisions["revision"]) and done.revisions["step"].isna().all()
    assert Trajectory.open(tmp_path / "out").as_dict() == done.as_dict()
