"""An adapter folder as MODEL, from scan to report, and models whose own code runs beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.cli.test_cli import run

peft = pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LoRA of the embedded model's kind: a tiny Llama with the embedded tokenizer."""
    import massact as ma

    embedded = ma.load()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=embedded.vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    module = transformers.LlamaForCausalLM(config)
    module.save_pretrained(tmp_path / "base")
    embedded.tokenizer.save_pretrained(tmp_path / "base")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(whole, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_folder_is_a_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    asked = ("--n-sequences", "2", "--seq-len", "32", "--threshold", "magnitude=0.01", "--threshold", "ratio=4")
    assert run(monkeypatch, "scan", str(folder), "--out", str(out), "--quiet", *asked) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["adapters"]["base"] == str(tmp_path / "base")
    assert record["model"]["adapters"]["types"] == {"lora.Linear": 4} and record["model"]["id"] == str(folder)
    assert run(monkeypatch, "explain", str(out), "--quiet") == 0
    assert run(monkeypatch, "show", str(out)) == 0
    assert "adapters" in capsys.readouterr().out
    assert run(monkeypatch, "explain", str(out), str(tmp_path / "base"), "--quiet") == 2
    said = capsys.readouterr().err
    assert "none" in said and "default" in said


def test_a_folder_without_its_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    assert run(monkeypatch, "scan", str(folder), "--quiet") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "base_model_name_or_path" in said and "Traceback" not in said
