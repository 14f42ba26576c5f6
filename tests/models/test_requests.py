"""`load` as people who come from transformers call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import massact as ma
from massact.records.errors import UserError
from tests.families import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("habits") / "acme-tiny"
    build("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "given",
    [{"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"},
     {"dtype": "torch.bfloat16"}, {"options": {"torch_dtype": torch.bfloat16}},
     {"dtype": torch.bfloat16, "torch_dtype": "bf16"}],
    ids=str,
)  # fmt: skip
def test_a_dtype_is_given_as_torch_or_transformers_spell_it(folder: Path, given: dict[str, Any]) -> None:
    assert ma.load(folder, **given).dtype == torch.bfloat16
    assert ma.load(folder).dtype == torch.float32


@pytest.mark.parametrize("given", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_map_of_devices_gives_the_same_numbers(folder: Path, given: Any) -> None:
    ids = torch.arange(3, 51).reshape(4, 12)
    one, other = (ma.scan(ma.load(folder, **how), ids, null=False) for how in ({}, {"device_map": given}))
    assert one.layers.equals(other.layers)


def test_a_device_of_torch_is_one(folder: Path) -> None:
    assert ma.load(folder, device=torch.device("cpu")).device == torch.device("cpu")


def test_a_live_model_is_called_as_it_was_loaded(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(folder)
    assert ma.load(live).name == str(folder)
    result = ma.scan(live, torch.arange(3, 51).reshape(4, 12), null=False)
    assert "acme-tiny has" in str(result)
    assert ma.load(build("llama")).name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "given",
    [{"device": "cpu"}, {"dtype": torch.float16}, {"torch_dtype": "float16"}, {"revision": "main"},
     {"device_map": "auto"}, {"options": {"trust_remote_code": True}}],
    ids=str,
)  # fmt: skip
def test_what_would_change_a_live_model_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="live module"):
        ma.load(build("llama"), **given)


@pytest.mark.parametrize(
    "given, told",
    [({"tokeniser": 1}, "tokenizer"), ({"torch_dtyp": "float16"}, "torch_dtype"), ({"dtype": torch.int8}, "int8"),
     ({"dtype": "float16", "torch_dtype": torch.bfloat16}, "one of them"),
     ({"device": "cpu", "device_map": "auto"}, "one of them"), ({"dtype": 16}, "Known: auto")],
    ids=str,
)  # fmt: skip
def test_a_wrong_word_is_told(folder: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ma.load(folder, **given)
