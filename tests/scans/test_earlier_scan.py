"""A saved scan again: its weights are hashed and its text is made once, and neither is taken on trust afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import massact as ma
from massact.models import loading
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.reproductions import reproduce
from massact.scans import Reopened, earlier_scan, reopen, scan_first, scanned_inputs
from tests.families import build
from tests.scans.test_layer_columns import PARITY

ASKED = {"seq_len": 32, "n_sequences": 4}
FEW = {"n_sequences": 1, "columns": False}


@pytest.fixture(scope="module")
def scan() -> ScanResult:
    return ma.scan(null=False, bos_contrast=False, rank_sequences=0, **ASKED)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """The name, once for each call of a function from now on."""
    calls, does = [], getattr(module, name)

    def called(*given: Any) -> Any:
        calls.append(name)
        return does(*given)

    monkeypatch.setattr(module, name, called)
    return calls


@pytest.mark.parametrize("opening", [
    lambda scan, _: reopen(scan), lambda scan, file: reopen(scan, corpus=file),
    lambda *_: scan_first(None, None, asked=ASKED),
], ids=["on a run", "on another text", "on a model"])  # fmt: skip
def test_a_verb_hashes_weights_and_makes_its_text_once(
    opening: Callable[[ScanResult, str], Reopened], scan: ScanResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.txt"
    file.write_text("The boat is old. The sea is cold, and the wind is up!\n" * 40)
    hashed = counted(monkeypatch, loading, "weights_hash")
    made = counted(monkeypatch, earlier_scan, "ready_corpus")
    opened = opening(scan, str(file))
    done = opened.run(ma.explain, **FEW)
    assert len(hashed) == len(made) == 1
    alone = ma.explain(opened.model, opened.corpus, opened.scan, **FEW)
    assert len(hashed) == len(made) == 2
    assert done.heads.equals(alone.heads) and done.info.model == alone.info.model


def test_so_do_the_steps_of_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = counted(monkeypatch, loading, "weights_hash")
    options: dict[str, Any] = {"null": False, "bos_contrast": False, **ASKED}
    done = reproduce(ma.load(), out=tmp_path / "run", only=("E11", "E17"), scan_options=options)
    assert {done.info.steps[step]["state"] for step in ("scan", "explain", "intervene")} == {"done"}
    assert len(hashed) == 1


def test_another_text_is_scanned_by_the_rule_of_the_run_and_found_again_by_its_name(tmp_path: Path) -> None:
    rule = {"criterion": "sun2024", "thresholds": {"magnitude": 50.0}}
    earlier = ma.scan(null=False, bos_contrast=False, probes=[PARITY], **rule, **ASKED)  # its columns are no option
    file = tmp_path / "other.txt"
    file.write_text("The boat is old. The sea is cold, and the wind is up!\n" * 40)
    anew = reopen(earlier, corpus=str(file)).scan
    told = {name: anew.info.config[name] for name in ("criterion", "thresholds", "seq_len", "n_sequences")}
    assert told == {name: earlier.info.config[name] for name in told}
    assert (
        anew.info.config["corpus"] == str(file) and anew.info.model["weights_sha256"] == ma.load().info().weights_sha256
    )


def test_what_is_altered_after_a_verb_is_refused_and_so_are_others_within_it(scan: ScanResult) -> None:
    opened = reopen(scan)

    def on_another(model: Any, corpus: Any, result: ScanResult, progress: object) -> None:
        assert scanned_inputs(model, corpus, result) == (opened.model, opened.corpus)
        scanned_inputs(ma.load(build("gpt2")), corpus, result)

    with pytest.raises(UserError, match=scan.info.model["weights_sha256"][:12]):
        opened.run(on_another)
    with torch.no_grad():
        next(opened.model.module.parameters()).data[0] += 1
    with pytest.raises(UserError, match=scan.info.model["weights_sha256"][:12]):
        ma.explain(opened.model, opened.corpus, scan, **FEW)
