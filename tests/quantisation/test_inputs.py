"""What a quantisation is given: folded slots, rounded checkpoints, an earlier run in the same directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import massact as ma
from massact.quantisation import quantise
from massact.records.errors import UserError
from massact.records.kinds.quantisation import Quantisation
from massact.records.verdicts import HARMLESS, HELPFUL
from massact.reports.kinds.quantisation import READING
from massact.scans.earlier_scan import Reopened
from tests.facts import tells
from tests.families import build
from tests.gguf_files import write_gguf
from tests.quantisation.test_architectures import scanned as scan_of
from tests.quantisation.test_architectures import text
from tests.quantised import preset, quantise_compressed, save_compressed


def test_slots_need_no_exemption(scanned: Reopened) -> None:
    """Against the loss of the folded model itself; keys and values, too. No scale has to care for any token."""
    schemes = ("int8-tensor", "int8-tensor+slots", "kv:int4-token+slots", "int8-tensor-static+hadamard+slots")
    done = scanned.run(quantise, schemes=schemes, prefix=(29,), guilty="none")
    rows = done.quantised[done.quantised["metric"] == "nll"].set_index("scheme")
    assert list(rows.index) == list(schemes)
    assert rows.loc["int8-tensor", "delta_nats"] > 0.1
    for name in schemes[1:]:
        assert abs(rows.loc[name, "delta_nats"]) < 0.05 and rows.loc[name, "n_elements"] > 0, name
    saved = done.remedies.set_index(["scheme", "remedy"]).loc[("int8-tensor", "slots")]
    assert saved["saved_low"] > 0.05 and saved["remedied"] == "int8-tensor+slots"
    assert done.info.schemes["int8-tensor+slots"]["slots"] and not set(schemes[1:]) & set(
        done.quantised_sites["scheme"]
    )


def test_an_unpacked_file_says_that_its_weights_were_rounded(tmp_path: Path) -> None:
    module = build("llama", seed=3)
    write_gguf(tmp_path / "whole.gguf", module)
    write_gguf(tmp_path / "low.gguf", module, types={"attn_q.weight": "Q8_0"})
    for name, rounded in (("whole", False), ("low", True)):
        inputs = scan_of(ma.load(tmp_path / f"{name}.gguf"), text())
        for scheme, weights in (("int8-tensor", False), ("weights:int8-channel", True)):
            notes = quantise(*inputs, schemes=(scheme,), guilty="none").info.notes
            assert bool(tells(notes, "Q8_0")) == (rounded and weights), (name, scheme)


def test_a_model_that_runs_quantised_is_refused(tmp_path: Path) -> None:
    module = build("llama", seed=3)
    quantise_compressed(module, preset("W8A8"), {"input_ids": text()})
    inputs = scan_of(ma.load(save_compressed(module, tmp_path / "low")), text())
    with pytest.raises(UserError) as refused:
        quantise(*inputs, schemes=("int8-tensor",))
    assert "compressed-tensors" in refused.value.what


def test_files_of_an_earlier_run_go_with_it(scanned: Reopened, tmp_path: Path) -> None:
    """Files of the user stay; so does what lies beside the folder, whatever an earlier record calls its files."""
    done = scanned.run(quantise, schemes=("int8-token",), guilty="none")
    first = replace(done, info=replace(done.info, exports={"torchao.py": "a", "prefix.md": "b", "../kept.txt": "c"}))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("mine")
    first.save(tmp_path)
    replace(done, info=replace(done.info, exports={"torchao.py": "d"})).save(tmp_path)
    assert {p.name for p in (tmp_path / "export").iterdir()} == {"mine.txt", "torchao.py"}
    assert (tmp_path / "export" / "torchao.py").read_text() == "d" and (tmp_path / "kept.txt").exists()
    again = Quantisation.open(tmp_path)
    assert again is not None and again.info.exports == {"torchao.py": "d"}
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (elsewhere / "export").write_text("a file where the folder should be")
    with pytest.raises(UserError):
        first.save(elsewhere)
    assert not (elsewhere / "quantise.json").exists()


def test_a_loss_without_end_is_not_hidden() -> None:
    """Logits beyond what float16 holds: no number, and no verdict."""
    module = build("llama", seed=3).half()
    with torch.no_grad():
        module.lm_head.weight.fill_(6e4)
    done = quantise(*scan_of(module, text()), schemes=("int8-tensor",), guilty="none")
    rows = done.quantised
    assert not np.isfinite(rows.loc[rows["metric"] == "nll", "delta_nats"]).any()
    assert not set(rows["verdict"]) & {HARMLESS, HELPFUL} and READING.words(done)
    assert all(np.isnan(x) for x in rows.loc[rows["metric"] == "kl", "delta"])
