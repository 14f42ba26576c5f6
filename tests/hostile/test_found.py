"""What random damage has found, each once more by itself."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import massact as ma
from massact.records.errors import UserError
from massact.records.kinds.comparison import open_compared
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.lab import Lab
from massact.records.kinds.training import Trained
from massact.records.sidecars import Sidecar, save_beside
from massact.records.tables import frame
from massact.reports import show
from massact.reports.spelling import token_list
from massact.training import apply_variant
from tests.families import build
from tests.hostile.damage import limits

GOLDEN = Path(__file__).parents[1] / "golden"


def copied(kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / kind, tmp_path / "run"))


def changed(file: Path, **values: Any) -> None:
    """Other fields in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values), encoding="utf-8")


@pytest.mark.parametrize(("name", "array", "says"), [
    ("magnitude", np.zeros(3), "magnitude has the shape"), ("layers", np.array(1), "layers has the shape"),
    ("tokens", np.zeros(40), "tokens does not hold words"), ("layers", np.array(["x", "y"]), "does not hold numbers"),
    ("tokens", np.array(["a"]), "tokens has the shape"), ("stack", None, "lacks stack"),
])  # fmt: skip
def test_arrays_that_do_not_fit_each_other(tmp_path: Path, name: str, array: Any, says: str) -> None:
    run = copied("explained_2", tmp_path)
    for file, opened in (("portrait.npz", ma.open_run), ("attention.npz", Explanation.open)):
        with np.load(run / file) as held:
            arrays = {k: v for k, v in held.items() if k != name} | ({} if array is None else {name: array})
        if name == "magnitude" and file == "attention.npz":
            arrays["probs"] = array
            says = "probs has the shape"
        np.savez(run / file, **arrays)
        with pytest.raises(UserError, match=says):
            opened(run)


def test_a_table_with_every_row_twice(tmp_path: Path) -> None:
    """Its index is a part of the file, and says the same number twice."""
    run = copied("lab_1", tmp_path)
    table = pd.read_parquet(run / "lab_effects.parquet")
    pd.concat([table, table]).to_parquet(run / "lab_effects.parquet")
    lab = Lab.open(run)
    assert lab is not None and lab.lab_effects.index.is_unique and len(lab.lab_effects) == 2 * len(table)
    show(lab, Console(file=io.StringIO(), width=80))


def test_records_whose_parts_are_of_another_kind(tmp_path: Path) -> None:
    lab = copied("lab_1", tmp_path)
    changed(lab / "lab.json", variants={"softmax": []})
    with pytest.raises(UserError, match="is damaged"):
        Lab.open(lab)


def test_a_training_whose_losses_and_alarms_are_lost_is_printed(tmp_path: Path) -> None:
    run, out = copied("trained_1", tmp_path), io.StringIO()
    changed(run / "train.json", losses={"step": None, "tokens": 10**400}, alarms=[{}, {"level": "massive"}])
    done = Trained.open(run)
    assert done is not None
    show(done, Console(file=out, width=300))
    assert "nan steps" in out.getvalue() and "Massive activations" in out.getvalue()
    changed(run / "train.json", wall_s=10**400)
    with pytest.raises(UserError, match="is damaged"):
        Trained.open(run)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_more_layers_than_weights_are_refused_at_once(tmp_path: Path, family: str) -> None:
    build(family).save_pretrained(tmp_path)
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    changed(tmp_path / "config.json", **{name: 10**9})
    with limits(20), pytest.raises(UserError, match="1,000,000,000 layers"):
        ma.load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": "gpt2", "n_layer": ' + "9" * 5000 + "}"])
def test_a_configuration_that_breaks_parsers(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        ma.load(tmp_path)


@pytest.mark.parametrize("names", [[1], 1, {}])
def test_an_architecture_that_is_no_name(tmp_path: Path, names: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    changed(tmp_path / "config.json", architectures=names)
    assert ma.load(tmp_path).module.config.model_type == "llama"


@pytest.mark.parametrize("record", [
    3, {"changes": 3}, {"changes": [3]}, {"changes": [{"change": []}]}, {"changes": [{"change": "apply_variant"}]},
    {"changes": [{"change": "apply_variant", "name": []}]},
    {"changes": [{"change": "apply_variant", "name": "kv-bias", "std": -1.0}]},
    {"changes": [{"change": "apply_variant", "name": "kv-bias", "std": ["x"]}]},
])  # fmt: skip
def test_changes_that_cannot_be_made(tmp_path: Path, record: Any) -> None:
    apply_variant(build("llama"), "kv-bias").save_pretrained(tmp_path)
    changed(tmp_path / "config.json", massact=record)
    with pytest.raises(UserError, match="config.json tells of"):
        ma.load(tmp_path)


def test_corpora_that_cannot_be_found_or_read(tmp_path: Path) -> None:
    for name, text in (("a.csv", "path,label\n" + "x" * 200_000 + ",1\n"), ("b.csv", f"path\n{'x' * 5000}.png\n"),
                       ("c.jsonl", json.dumps({"image": "x" * 5000, "text": "a"})),
                       ("d.jsonl", json.dumps({"image": "~nobody-of-this-name/x.png", "text": "a"})),
                       ("e.jsonl", "[" * 100_000)):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError):
            ma.corpus(tmp_path / name)
    with pytest.raises(UserError, match="~nobody-of-this-name/x.txt"):
        ma.corpus("~nobody-of-this-name/x.txt")
    if hasattr(Path, "symlink_to"):
        (tmp_path / "round.txt").symlink_to(tmp_path / "round.txt")
        with pytest.raises(UserError):
            ma.corpus(tmp_path / "round.txt")


def test_what_a_killed_verb_left_is_swept_up(tmp_path: Path) -> None:
    """Only its own files: another verb may be at work in the directory."""
    for name in (".sinks.parquet.4711.tmp", ".effects.parquet.4711.tmp"):
        (tmp_path / name).write_bytes(b"PAR1")
    save_beside(tmp_path, "explain.json", Sidecar(), {"sinks": frame("sinks")})
    assert {p.name for p in tmp_path.iterdir()} == {"sinks.parquet", "explain.json", ".effects.parquet.4711.tmp"}


def test_tokens_of_a_coordinate_that_are_nested_too_deep() -> None:
    assert token_list("[" * 100_000) == ["[" * 100_000]


def test_a_run_to_compare_whose_name_is_too_long() -> None:
    with pytest.raises(UserError, match="run directory"):
        open_compared(["x" * 5000, "y" * 5000])
