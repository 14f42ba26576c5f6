"""SmolLM2 and its quantised forms: the massive activation keeps dim, onset and token, and is somewhat smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import massact as ma
from massact.records.kinds.comparison import open_compared
from massact.reports import compare
from massact.reports.kinds.comparison.survival import pairs
from tests.quantised import preset, quantise_compressed, save_compressed

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.minutes
TEXT = "The river rose in the night. By morning the bridge was gone, and the town, cut in two, began to argue. " * 8


def test_real_massive_activations_survive_int8_and_int4(smollm2: Path, tmp_path: Path) -> None:
    full: Any = ma.load(smollm2)
    ids = full.tokenizer(TEXT, return_tensors="pt").input_ids[:, :160].view(2, 80)
    folders = [tmp_path / name for name in ("full", "w8a8", "w4a16")]
    full.module.save_pretrained(folders[0])
    for folder, name, size in zip(folders[1:], ("W8A8", "W4A16"), (None, 64), strict=True):
        module = transformers.AutoModelForCausalLM.from_pretrained(folders[0]).eval()
        quantise_compressed(module, preset(name, size), {"input_ids": ids})
        save_compressed(module, folder)
    for folder in folders:
        ma.scan(ma.load(folder), ids, null="none").save(tmp_path / "runs" / folder.name)
    c = compare(open_compared([tmp_path / "runs" / folder.name for folder in folders]))
    assert [(p.quantised.label, p.same) for p in pairs(c.runs)] == [("w8a8", True), ("w4a16", True)]
    main = c.survival[(c.survival["dim"] == 507) & (c.survival["position_class"] == "start")]
    assert list(main["quantised"]) == ["w8a8", "w4a16"] and set(main["verdict"]) <= {"kept", "weaker"}
    assert (main["onset_quantised"] == main["onset"]).all() and (main["share_quantised"] == 1).all()
    assert (main["value"] > 15_000).all()
    assert ((main["value_quantised"] / main["value"]).between(0.6, 1.1)).all()
