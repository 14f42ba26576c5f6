"""Steps: which are run, that they are kept, that one that fails costs no other, and images with registers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import massact as ma
from massact.corpora import Corpus
from massact.interventions import CONTROLS, collect_registers
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.records.kinds.reproduction import Reproduction
from massact.reproductions import reproduce, verb_steps
from massact.verbs.scan import ScanConfig
from tests.golden.make import golden_text_scan
from tests.interventions.test_registers import classifier

QUICK: Any = {"null": False}
SCAN = {"run.json", "layers.parquet", "findings.parquet", "near_misses.parquet", "coordinates.parquet", "dims.parquet",
        "ranks.parquet", "clusters.parquet", "criteria.parquet", "portrait.npz", "strip.npz"}  # fmt: skip
OURS = {"reproduce.json", "reproduced.parquet", "claims.parquet"}


@pytest.fixture(scope="module")
def text() -> tuple[Model, Corpus]:
    model, corpus, _ = golden_text_scan()
    return model, corpus


def done_in(text: tuple[Model, Corpus], out: Path, **options: Any) -> Reproduction:
    return reproduce(text[0], out=out, corpus=text[1], scan_options=QUICK, **options)


def states(r: Reproduction) -> dict[str, str]:
    return {name: str(step["state"]) for name, step in r.info.steps.items()}


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_only_the_steps_that_are_needed(text: Any, tmp_path: Path) -> None:
    done = done_in(text, tmp_path / "a", only=("e4", "E5"))
    assert states(done) == {"scan": "done"} and files(tmp_path / "a") == SCAN | OURS
    assert list(done.info.experiments) == ["E4", "E5"] and set(done.reproduced["experiment"]) == {"E4", "E5"}
    done = done_in(text, tmp_path / "a", only=("E17",))
    assert states(done) == {"scan": "kept", "explain": "done"}
    assert list(done.info.experiments) == ["E17"]
    both = Reproduction.open(tmp_path / "a")  # what was there before is kept beside it
    assert both is not None and list(both.info.experiments) == ["E4", "E5", "E17"]
    assert list(dict.fromkeys(both.reproduced["experiment"])) == ["E4", "E5", "E17"]


def test_a_scan_with_fewer_sorted_sequences_is_kept_and_more_are_sorted_of_a_new_one(text: Any, tmp_path: Path) -> None:
    """Directories of earlier versions go on as they are."""
    options: Any = {"out": tmp_path / "old", "corpus": text[1], "only": ("E8",)}
    reproduce(text[0], scan_options=QUICK | {"rank_sequences": 1}, **options)
    again = reproduce(text[0], scan_options=QUICK, **options)
    assert states(again)["scan"] == "kept" and ma.open_run(tmp_path / "old").info.config["rank_sequences"] == 1
    done_in(text, tmp_path / "new", only=("E8",))
    n = ma.open_run(tmp_path / "new").ranks.set_index(["source", "rank"]).loc[("corpus", "median"), "n_sequences"]
    assert n == text[1].n_sequences


def test_a_second_time_nothing_is_run(text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = done_in(text, tmp_path / "run")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name not in OURS}
    for verb in ("explain", "intervene", "classics", "evaluate"):
        monkeypatch.setattr(verb_steps, verb, lambda *_, **__: pytest.fail("it was run again"))
    second = done_in(text, tmp_path / "run")
    assert times == {p: p.stat().st_mtime_ns for p in times}
    assert set(states(second).values()) <= {"kept", "not run", "not applicable"}
    assert states(second)["scan"] == states(second)["intervene"] == "kept"
    assert second.reproduced.equals(first.reproduced) and second.info.experiments == first.info.experiments
    run = reproduce(tmp_path / "run", only=("E4", "E11"))  # and from the directory no model is even loaded
    assert set(states(run).values()) == {"kept"}


def test_killed_between_steps_it_goes_on(text: Any, tmp_path: Path) -> None:
    whole = done_in(text, tmp_path / "whole")

    def kill(result: Any, folder: Path) -> None:
        if (folder / "explain.json").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done_in(text, tmp_path / "run", watch=(lambda *_: None, kill))
    assert not (tmp_path / "run" / "reproduce.json").exists()
    rest = done_in(text, tmp_path / "run")
    assert states(rest)["scan"] == states(rest)["explain"] == "kept" and states(rest)["intervene"] == "done"
    assert rest.reproduced.equals(whole.reproduced)


def test_a_step_that_fails_is_reported_and_costs_no_other(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise WorkError("Out of memory.")

    monkeypatch.setattr(verb_steps, "intervene", fails)
    done = done_in(text, tmp_path / "run")
    assert done.info.having("failed") == ["intervene"]
    verdicts = {name: e["verdict"] for name, e in done.info.experiments.items()}
    assert verdicts["E10"] == verdicts["E11"] == verdicts["E12"] == "failed"
    assert verdicts["E17"] == verdicts["E7"] == "no published value"
    assert "Out of memory" in done.info.experiments["E11"]["reason"]
    monkeypatch.undo()
    assert states(done_in(text, tmp_path / "run"))["intervene"] == "done"  # the next time it is tried again


def test_what_cannot_be_shown_says_why(text: Any, tmp_path: Path) -> None:
    done = done_in(text, tmp_path / "run")
    e = done.info.experiments
    assert e["E12"]["verdict"] == "not run" and "--tasks" in e["E12"]["reason"]
    assert e["E18"]["verdict"] == "not run" and "massact train" in e["E18"]["reason"]
    assert e["E25"]["verdict"] == "not run" and "--tuned" in e["E25"]["reason"]
    assert e["E21"]["verdict"] == "not applicable" and "images" in e["E21"]["reason"]
    assert e["E24"]["verdict"] == "nothing to show"
    empty = done.reproduced[done.reproduced["quantity"] == ""]
    assert set(empty["experiment"]) >= {"E12", "E18", "E21", "E25"} and empty["ours"].isna().all()
    assert (empty["reason"] != "").all()


def test_a_model_without_massive_activations(tmp_path: Path) -> None:
    module = ma.load(_quiet())
    ids = torch.randint(1, 99, (2, 24), generator=torch.Generator().manual_seed(0))
    done = reproduce(module, out=tmp_path / "run", corpus=ma.corpus(ids), scan_options=QUICK)
    verdicts = {name: e["verdict"] for name, e in done.info.experiments.items()}
    for name in ("E3", "E5", "E6", "E8", "E9", "E10", "E11", "E14", "E16", "E17"):
        assert verdicts[name] == "nothing to show", name
        assert done.info.experiments[name]["reason"]
    assert verdicts["E4"] == verdicts["E2"] == verdicts["E7"] == "no published value"
    count = done.reproduced[(done.reproduced["experiment"] == "E3") & (done.reproduced["unit"] == "count")]
    assert (count["ours"] == 0).any() and done.info.having("failed") == []


def _quiet() -> torch.nn.Module:
    from tests.families import build

    return build("gpt2", seed=1)


def test_a_tuned_model_on_the_same_text(text: Any, tmp_path: Path) -> None:
    other, _, _ = golden_text_scan()
    with torch.no_grad():
        other.module.get_input_embeddings().weight[0, 9] = -700.0
    other.module.save_pretrained(tmp_path / "tuned")
    done = done_in(text, tmp_path / "run", only=("E25",), tuned=str(tmp_path / "tuned"))
    rows = done.reproduced.set_index(["quantity", "place"])
    assert rows.loc[("dims", "base"), "ours_text"] == "7"
    assert rows.loc[("dims", "tuned (tuned)"), "ours_text"] == "7, 9"
    assert rows.loc[("dims in both", ""), "ours"] == 1 and rows.loc[("dims in one only", ""), "ours_text"] == "9"
    assert states(done_in(text, tmp_path / "run", only=("E25",), tuned=str(tmp_path / "tuned")))["tuned"] == "kept"


def test_recordings_that_are_opened_already_are_taken_as_they_are(tmp_path: Path) -> None:
    sound = ma.corpus([(np.zeros(16_000, np.float32), 16_000)])
    assert verb_steps.Work(tmp_path, None, corpus=sound).source() is sound


def test_other_texts_have_folders_of_their_own(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "x" / "a.txt"
    b.parent.mkdir()
    a.write_text("one")
    b.write_text("two")
    names = {verb_steps.folder_of(name) for name in (str(a), str(b), "wikitext-2", "a/b:c")}
    assert len(names) == 4 and "wikitext-2" in names and all("/" not in n and ":" not in n for n in names)


# ---- images
@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reproduction, Path, Corpus]:
    """A classifier with three registers, one of them made massive by hand, on noise."""
    model = classifier()
    with torch.no_grad():
        tokens = model.module.dinov2_with_registers.embeddings.register_tokens
        before = tokens.clone()
        tokens[0, 1, 5] = 4000.0
    x = torch.rand(8, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    corpus = ma.corpus({"pixel_values": x})
    out = tmp_path_factory.mktemp("pictured") / "run"
    done = reproduce(ma.load(model.module), out=out, corpus=corpus, scan_options=QUICK)
    means = collect_registers(ma.load(model.module), corpus.head(4)).mean
    np.save(out.parent / "means.npy", means)
    with torch.no_grad():
        tokens.copy_(before)
    return done, out, corpus


def test_registers_where_there_are_some(pictured: Any) -> None:
    done, out, _ = pictured
    assert done.info.steps["registers"]["state"] == "done" and done.info.having("failed") == []
    means = np.load(out.parent / "means.npy")  # of the first half of the images, with the values planted
    rows = done.reproduced[done.reproduced["experiment"] == "E21"].set_index("layer")
    for key, mean_RD in enumerate(means):
        register, dim = np.unravel_index(np.abs(mean_RD).argmax(), mean_RD.shape)
        assert rows.loc[key, "ours"] == pytest.approx(mean_RD[register, dim], rel=1e-5)
        assert rows.loc[key, "ours_text"] == f"reg{register + 1}, dim {dim}"
    assert rows.loc[0, "ours_text"] == "reg2, dim 5"
    fixed = done.reproduced[done.reproduced["experiment"] == "E22"]
    names = set(fixed["quantity"])
    controls = {name.removeprefix("KL, ") for name in names if name.startswith("KL, ")}
    assert {"original", "Fix-Reg-Mean", "zero"} <= {"original", *controls} <= names
    assert len(controls) == len(CONTROLS) == 4 and "no labels" in fixed["reason"].iloc[0]
    assert fixed.set_index("quantity").loc["original", "ours"] == 100


def test_what_is_of_text_does_not_apply_to_images(pictured: Any) -> None:
    done = pictured[0]
    verdicts = {name: e["verdict"] for name, e in done.info.experiments.items()}
    for name in ("E1", "E2", "E4", "E11", "E12", "E13", "E15", "E18", "E24", "E25"):
        assert verdicts[name] == "not applicable"
    for name in ("E3", "E5", "E7", "E10", "E17", "E19", "E21", "E22"):
        assert verdicts[name] == "no published value", name
    assert verdicts["E20"] == "not run" and "--labels" in done.info.experiments["E20"]["reason"]
    curve = done.reproduced[(done.reproduced["experiment"] == "E19") & (done.reproduced["quantity"] == "top 1")]
    assert len(curve) == 4 and curve["ours"].max() > 1000


def test_the_record_is_plain_json(pictured: Any) -> None:
    done, out, _ = pictured
    record = json.loads((out / "reproduce.json").read_text())
    assert record["experiments"]["E22"]["title"] == "Fix-Reg-Mean" and record["published"]["unavailable"]
    again = Reproduction.open(out)
    assert again is not None and again.reproduced.equals(done.reproduced)
    assert json.loads(json.dumps(done.as_dict(), allow_nan=False))["reproduced"]
    assert math.isfinite(record["wall_s"])


def test_without_a_head_the_means_are_there_all_the_same(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    bare = ma.load(classifier().module.dinov2_with_registers)
    done = reproduce(bare, out=tmp_path / "run", corpus=ma.corpus({"pixel_values": x}), only=("E21", "E22"),
                     scan_options=QUICK)  # fmt: skip
    assert done.info.experiments["E21"]["verdict"] == "no published value"
    assert done.info.steps["registers"]["state"] == "done"
    fixed = done.info.experiments["E22"]
    assert fixed["verdict"] == "not run" and "--head" in fixed["reason"] and done.info.having("failed") == []


# ---- refused
def test_bad_options_are_refused_before_any_work(text: Any, tmp_path: Path) -> None:
    for options, said in (({"only": ("E26",)}, "no experiment 'E26'"), ({"onyl": ()}, "no option 'onyl'")):
        with pytest.raises(UserError, match=said):
            done_in(text, tmp_path / "run", **options)
    with pytest.raises(UserError, match="directory"):
        reproduce(text[0], corpus=text[1])
    assert not (tmp_path / "run").exists()
    done_in(text, tmp_path / "run", only=("E4",))
    with pytest.raises(UserError, match="not for a run"):
        reproduce(tmp_path / "run", out=tmp_path / "other")
    with pytest.raises(UserError, match="no published model"):
        reproduce(tmp_path / "run", published_as="GPT-5")


def test_another_model_in_the_same_directory_is_refused(text: Any, tmp_path: Path) -> None:
    done_in(text, tmp_path / "run", only=("E4",))
    with pytest.raises(UserError, match="another model"):
        reproduce(ma.load(_quiet()), out=tmp_path / "run", corpus=text[1], scan_options=QUICK)


def test_a_head_for_images_without_one(tmp_path: Path) -> None:
    """A linear head whose rows are drawn: top-1 of E22 without an edit is that of the head on [CLS], by hand."""
    from PIL import Image

    module = classifier().module.dinov2_with_registers
    draw = np.random.default_rng(0)
    weight = torch.tensor(draw.standard_normal((3, 32)), dtype=torch.float32)
    torch.save({"weight": weight}, tmp_path / "head.pth")
    folder = tmp_path / "images"
    folder.mkdir()
    rows = ["path,label"]
    for i in range(8):
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{i % 3}")
    (folder / "list.csv").write_text("\n".join(rows))
    given = {"resize": "20", "crop": "20", "mean": "0.5", "std": "0.5"}
    corpus = ma.corpus(folder / "list.csv", preprocess=given)
    done = reproduce(ma.load(module), out=tmp_path / "run", corpus=corpus, only=("E22",), scan_options=QUICK,
                     labels="auto", head=tmp_path / "head.pth")  # fmt: skip
    assert done.info.having("failed") == []
    with torch.no_grad():
        x = ma.positions.ready_corpus(ma.load(module), corpus, ScanConfig()).inputs["pixel_values"]
        guess = (module(pixel_values=x).last_hidden_state[4:, 0] @ weight.T).argmax(1)
    right = (guess == torch.tensor([i % 3 for i in range(4, 8)])).float().mean()
    told = done.reproduced.set_index("quantity").loc["original"]
    assert told["ours"] == pytest.approx(100 * float(right)) and told["unit"] == "% top-1"
