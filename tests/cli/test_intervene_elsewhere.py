"""`massact intervene --evaluate-on`: effects on another text, by the labels of its rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import massact as ma
from massact.records.kinds.intervention import Intervention
from tests.cli.runs import copied_run, scanned_run
from tests.cli.test_cli import run
from tests.cli.test_explain import files, refused

FAST = ["--n-sequences", "4", "--seq-len", "32", "--no-null", "--no-bos-contrast",
        "--threshold", "ratio=200", "--threshold", "magnitude=10"]  # fmt: skip


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scanned_run(tmp_path_factory, *FAST)


@pytest.fixture
def copied(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_run(scanned, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six texts of two kinds, of different lengths."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"text": f"The boat of number {i} is old. The sea is cold, and the wind is up!" if i % 3 else
             f"She was {i} years of age.", "kind": "sea" if i % 3 else "home"} for i in range(6)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def opened(path: Path) -> Intervention:
    e = Intervention.open(path)
    assert e is not None
    return e


def test_effects_of_the_rows_of_a_file_by_their_labels(
    copied: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scanned anew: the means are those of the run. Each row stands alone."""
    options = ["--evaluate-on", str(labelled), "--group", "kind", "--set", "zero", "--quiet"]
    assert run(monkeypatch, "intervene", str(copied), *options) == 0
    e = opened(copied)
    counts = e.effects[e.effects.metric == "nll"].set_index("group").n_sequences.to_dict()
    assert counts == {"all": 6, "kind=home": 2, "kind=sea": 4}
    assert e.info.estimated_on.startswith("sequences 0 to 3 of ") and e.info.evaluated_on.startswith("sequences 0 to 5")
    assert not any("scanned anew" in note for note in e.info.notes)
    model, alone = ma.load(), []
    for row in map(json.loads, labelled.read_text().splitlines()):
        ids = ma.corpus([row["text"]], tokenizer=model.tokenizer).inputs["input_ids"]
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(model.module(input_ids=ids).logits[0, :-1], ids[0, 1:])
        alone.append({"kind": row["kind"], "nll": float(nll)})
    wanted = pd.DataFrame(alone).groupby("kind").nll.mean()
    told = e.effects[e.effects.metric == "nll"].set_index("group").baseline
    for kind in ("sea", "home"):
        assert told[f"kind={kind}"] == pytest.approx(wanted[kind], rel=1e-5)


def test_effects_of_another_text(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows as the scan had them; the target is that of all scanned sequences."""
    file = tmp_path / "other.txt"
    file.write_text("The boat is old. The sea is cold, and the wind is up!\n" * 200)
    assert run(monkeypatch, "intervene", str(copied), "--quiet", "--no-hold-out", "--set", "mean") == 0
    here = opened(copied)
    assert run(monkeypatch, "intervene", str(copied), "--quiet", "--evaluate-on", str(file), "--set", "mean") == 0
    e = opened(copied)
    assert e.info.target == here.info.target
    assert e.info.evaluated_on.startswith("sequences 0 to 3 of ") and "other.txt" in e.info.evaluated_on
    assert e.info.estimated_on.startswith("sequences 0 to 3 of ") and "other" not in e.info.estimated_on
    assert e.info.corpus["sha256"] != here.info.corpus["sha256"]
    model = ma.load()
    corpus = ma.corpus(str(file), tokenizer=model.tokenizer, seq_len=32, n_sequences=4)
    ids = corpus.inputs["input_ids"]
    assert corpus.sha256 == e.info.corpus["sha256"]
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model.module(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:])
    told = e.effects[e.effects.metric == "nll"].baseline.iloc[0]
    assert told == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--evaluate-on", "ROWS", "--group", "kinds"], ["kinds", "kind"]),
    (["--evaluate-on", "./no-such.jsonl", "--group", "kind"], ["no-such.jsonl"]),
    (["--evaluate-on", "./no-such.txt"], ["no-such.txt"]),
])  # fmt: skip
def test_what_cannot_be_evaluated_on(
    arguments: list[str], says: list[str], copied: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = files(copied)
    given = [str(labelled) if a == "ROWS" else a for a in arguments]
    message = refused(monkeypatch, capsys, "intervene", str(copied), *given)
    assert all(word in message for word in says) and files(copied) == before
