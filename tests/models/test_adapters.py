"""Adapters: measured as they are, known by their state, refused in another one; and folders that hold one alone."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import massact as ma
from massact.models import matrix_of, random_twin
from massact.models.adapters import adapter_record
from massact.records.adapter_states import in_words
from massact.records.errors import UserError
from tests.facts import tells
from tests.wrapped import IDS, RULE, everything, logits, same, tiny

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def lora(module: Any = None, seed: int = 1, **settings: Any) -> Any:
    """A tiny model with LoRA at random, so that it changes what the model gives."""
    module = tiny() if module is None else module
    torch.manual_seed(seed)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False,
                                 "lora_dropout": 0.1} | settings))  # fmt: skip
    return peft.get_peft_model(module, config)


def ia3() -> Any:
    targets = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False)
    return peft.get_peft_model(tiny(), config)


def added() -> Any:
    """By transformers, without a wrapper around the model."""
    module = tiny()
    torch.manual_seed(1)
    module.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))
    return module


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lora, "DoRA": lambda: lora(use_dora=True), "IA3": ia3, "added by transformers": added,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_of_the_merged_weights(name: str) -> None:
    """Merged into plain weights by PEFT itself, the model gives the same up to rounding, neurons included."""
    module = KINDS[name]()
    merged = lora().merge_and_unload() if name == "added by transformers" else copy.deepcopy(module).merge_and_unload()
    model = ma.load(module)
    wanted = logits(module.eval())
    assert torch.equal(logits(model.module), wanted) and not torch.equal(wanted, logits(tiny()))
    same(everything(module), everything(merged), check_exact=False, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_matrix_of_an_adapted_map_is_what_it_multiplies_by(name: str) -> None:
    module = KINDS[name]()
    merged = lora().merge_and_unload() if name == "added by transformers" else copy.deepcopy(module).merge_and_unload()
    model = ma.load(module)
    for path, n in (("model.layers.1.mlp.down_proj", 96), ("model.layers.0.self_attn.v_proj", 64)):
        torch.testing.assert_close(
            matrix_of(model.module.get_submodule(path), n),
            merged.get_submodule(path).weight.detach(),
            atol=1e-5,
            rtol=1e-4,
        )
    assert not isinstance(random_twin(model), str)


def test_every_state_is_another_model_and_told_in_words() -> None:
    module = lora().eval()
    module.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False))

    def now() -> tuple[str, str]:
        model = ma.load(module)
        return model.info().weights_sha256, " ".join(model.around)

    states = {"as it is": now()}
    with module.disable_adapter():
        states["disabled"] = now()
    module.set_adapter("second")
    states["second"] = now()
    module.set_adapter("default")
    module.base_model.model.model.layers[0].mlp.down_proj.scaling["default"] = 5.0
    states["scaled"] = now()
    module.base_model.model.model.layers[0].mlp.down_proj.scaling["default"] = 2.0
    assert now() == states["as it is"]
    module.merge_adapter()
    states["merged"] = now()
    assert len({sha for sha, _ in states.values()}) == len(states)
    assert tells(states["as it is"][1], "default (scale 2) active", "lora.Linear")
    assert tells(states["disabled"][1], "none active") and tells(states["second"][1], "second (scale 1) active")
    assert tells(states["scaled"][1], "default (scale 5)", "in 1 modules") and tells(states["merged"][1], "merged")
    assert adapter_record(tiny()) is None and in_words(None) == []


def test_a_scan_is_explained_in_its_own_state_alone(tmp_path: Path) -> None:
    module, corpus = lora().eval(), ma.corpus(IDS)
    model = ma.load(module)
    scan = ma.scan(model, corpus, null=False, **RULE)
    scan.save(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["model"]["adapters"]["states"] == [
        {"active": ["default"], "disabled": False, "merged": [], "scaling": {"default": 2.0}, "n_modules": 15}
    ]
    assert tells(kept["notes"], "default", 15) and tells(kept["notes"], "LoraModel")
    with module.disable_adapter():
        for verb in (ma.explain, ma.intervene):
            with pytest.raises(UserError, match="state") as refused:
                verb(model, corpus, scan)
            assert "none active" in refused.value.why and "default (scale 2) active" in refused.value.why
    assert len(ma.explain(model, corpus, scan).heads)
    module.merge_adapter()
    with pytest.raises(UserError, match="state"):
        ma.explain(model, corpus, scan)


def test_disabled_it_gives_the_numbers_of_the_bare_model() -> None:
    module = lora()
    with module.disable_adapter():
        same(everything(module), everything(tiny()))


def test_verbs_that_change_weights_want_it_merged() -> None:
    from massact.prefixes import check_foldable
    from massact.quantisation import quantise

    model, corpus = ma.load(lora()), ma.corpus(IDS)
    scan = ma.scan(model, corpus, null=False, **RULE)
    for verb in (lambda: quantise(model, corpus, scan), lambda: check_foldable(model, corpus)):
        with pytest.raises(UserError, match="Adapters") as refused:
            verb()
        assert "merge_and_unload" in refused.value.do


@pytest.mark.parametrize("config", [
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
])  # fmt: skip
def test_tokens_and_keys_learned_in_front_of_the_text_are_refused(config: Any) -> None:
    module = peft.get_peft_model(tiny(), config)
    with pytest.raises(UserError, match="LlamaForCausalLM") as refused:
        ma.load(module)
    assert "'base_model'" in refused.value.do and "inputs=" in refused.value.do
    assert config.peft_type.value.lower().replace("_", " ") in refused.value.why
    assert ma.load(module.get_submodule("base_model")).anatomy.stacks[0].n_layers == 3


# ---------------------------------------------------------------------------------------------------- folders
@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and an adapter of it."""
    tiny().save_pretrained(tmp_path / "base")
    import transformers

    module = lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    module.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def test_a_folder_is_the_model_with_the_adapter_in_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = folders
    model, live = ma.load(folder), lora()
    assert torch.equal(logits(model.module), logits(live.eval()))
    assert model.info().weights_sha256 == ma.load(live).info().weights_sha256
    assert model.name == str(folder) and model.info().adapters["base"] == str(base)
    assert tells(" ".join(model.around), str(base))
    assert ma.load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_an_adapter_of_the_hub(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As it lies in a cache, without a network; its model by the name that the adapter gives."""
    kept = tmp_path / "cache" / "models--someone--adapter"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folders[1], kept / "snapshots" / ("a" * 40))
    model = ma.load("someone/adapter", options={"cache_dir": str(tmp_path / "cache")})
    assert model.name == "someone/adapter" and torch.equal(logits(model.module), logits(lora().eval()))
    with pytest.raises(UserError, match="someone/other"):
        ma.load("someone/other", options={"cache_dir": str(tmp_path / "cache")})


def test_damaged_folders_are_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = folders
    config = json.loads((folder / "adapter_config.json").read_text())

    def refused(**changes: Any) -> UserError:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as error:
            ma.load(folder)
        return error.value

    assert "base_model_name_or_path" in refused(base_model_name_or_path=None).do
    moved = refused(base_model_name_or_path=str(base) + "-moved")
    assert "-moved" in moved.what and "adapter_config.json" in moved.do
    assert "size mismatch" in refused(r=16).why
    weights = load_file(folder / "adapter_model.safetensors")
    first = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != first}, folder / "adapter_model.safetensors")
    assert "1 missing" in refused().what and first in refused().what
    (folder / "adapter_model.safetensors").unlink()
    assert "--allow-pickle" in refused().do
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        ma.load(folder)


def test_without_peft_the_package_is_named(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "peft" else plain(n, *a))
    with pytest.raises(UserError) as refused:
        ma.load(folders[1])
    assert "massact[peft]" in refused.value.do


def test_a_whole_model_beside_an_adapter_has_it_and_says_so(folders: tuple[Path, Path]) -> None:
    """transformers itself puts an adapter that lies in a model folder into the model."""
    base, folder = folders
    for file in folder.iterdir():
        shutil.copy(file, base)
    model = ma.load(base)
    assert torch.equal(logits(model.module), logits(lora().eval()))
    assert tells(" ".join(model.around), "default (scale 2)", 15)
