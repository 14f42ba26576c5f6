"""Recipes as texts: which modules they name, in the words of the libraries, and that torchao's script runs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quant_api import fqn_matches_fqn_config
from transformers import AutoModelForCausalLM

from massact.quantisation.module_patterns import patterns_of
from massact.quantisation.recipes import (
    Group,
    Recipe,
    llmcompressor_recipe,
    prefix_guide,
    torchao_script,
    unsupported,
)
from massact.quantisation.schemes import number_format
from massact.records.errors import UserError
from tests.facts import each, tells

LLAMA = {"self_attn.q_proj": 576, "self_attn.k_proj": 576, "self_attn.v_proj": 576, "self_attn.o_proj": 576,
         "mlp.gate_proj": 576, "mlp.up_proj": 576, "mlp.down_proj": 1536}  # fmt: skip
LINEARS = (*((f"model.layers.{i}.{n}", w) for i in range(12) for n, w in LLAMA.items()), ("lm_head", 576))
NAMES = tuple(name for name, _ in LINEARS)
BLOCKS = NAMES[:-1]
GUILTY = ("model.layers.2.mlp.down_proj", "model.layers.11.mlp.down_proj")
READERS = tuple(
    pair
    for i in range(12)
    for pair in (
        (f"model.layers.{i}.input_layernorm", tuple(f"model.layers.{i}.self_attn.{x}_proj" for x in "qkv")),
        (f"model.layers.{i}.post_attention_layernorm", tuple(f"model.layers.{i}.mlp.{x}_proj" for x in ("gate", "up"))),
    )
)


def recipe(
    weights: str = "int8-channel", activations: str = "int8-token", kept: tuple[str, ...] = (), **more: Any
) -> Recipe:
    meant = tuple(name for name in BLOCKS if name not in kept)
    return Recipe(more.pop("name", "made-up"), LINEARS, (Group(meant, weights, activations),), **more)


def modifiers(text: str) -> dict[str, Any]:
    stage = yaml.safe_load(text)
    assert list(stage) == ["quant_stage"]
    return stage["quant_stage"]["quant_modifiers"]


# ---- which modules
EXPERTS = tuple(f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (1, 11) for e in (0, 10, 1))
MIXED = (*BLOCKS[:21], *EXPERTS, "lm_head", "layers.1.mlp.up_proj", "vision.model.layers.1.mlp.up_proj",
         "model.layers.1.mlp.up_proj_b", "0.proj", "proj.2")  # fmt: skip


@given(st.sets(st.sampled_from(MIXED)))
def test_patterns_match_what_is_meant_and_nothing_else(meant: set[str]) -> None:
    """In the words of both libraries: compressed-tensors matches from the first letter on, torchao the whole name."""
    chosen = [name for name in MIXED if name in meant]
    patterns = patterns_of(chosen, MIXED)
    assert {name for name in MIXED if any(match_name(name, p) for p in patterns)} == meant
    assert len(patterns) <= len(chosen)
    whole = FqnToConfig(OrderedDict((p[:-1], None) for p in patterns_of(chosen, MIXED, always_regex=True)))
    assert {name for name in MIXED if fqn_matches_fqn_config(name, whole)} == meant


def test_all_of_a_kind_is_one_pattern() -> None:
    assert patterns_of(GUILTY, NAMES) == [r"re:model\.layers\.(2|11)\.mlp\.down_proj$"]
    assert patterns_of(NAMES, NAMES) == [*(rf"re:model\.layers\.\d+\.{re.escape(n)}$" for n in LLAMA), "lm_head"]
    assert patterns_of(GUILTY[:1], NAMES) == [GUILTY[0]]
    most = [n for n in NAMES if n.endswith("down_proj") and n not in GUILTY]
    assert patterns_of(most, NAMES) == [r"re:model\.layers\.(?!(?:2|11)\.)\d+\.mlp\.down_proj$"]


# ---- llm-compressor
def test_the_ignore_list_is_what_stays() -> None:
    made = modifiers(llmcompressor_recipe(recipe(kept=GUILTY)))["QuantizationModifier"]
    assert {n for n in NAMES if any(match_name(n, p) for p in made["ignore"])} == {*GUILTY, "lm_head"}
    assert made["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_modifiers_stand_in_the_order_in_which_they_must_run() -> None:
    made = modifiers(llmcompressor_recipe(recipe(rotated=True, smoothing=0.5, readers=READERS)))
    assert list(made) == ["SpinQuantModifier", "SmoothQuantModifier", "QuantizationModifier"]
    assert made["SpinQuantModifier"]["rotations"] == ["R1", "R2", "R4"]


def test_smoothing_names_the_readers_of_each_norm() -> None:
    """Every mapping matches one norm of a block, and what reads it."""
    (attention, mlp) = modifiers(llmcompressor_recipe(recipe(smoothing=0.7, readers=READERS)))["SmoothQuantModifier"][
        "mappings"
    ]
    for (read, norm), (one, names) in zip((attention, mlp), READERS[6:8], strict=True):
        assert match_name(one, norm)
        assert {n for n in NAMES if n.startswith("model.layers.3.") and any(match_name(n, p) for p in read)} == set(
            names
        )


PRESETS = {
    "W8A8": ("int8-channel", "int8-token"), "W4A16": ("int4-group128", ""), "W8A16": ("int8-group128", ""),
    "W4A8": ("int4-group128", "int8-token"), "FP8": ("fp8-tensor", "fp8-tensor-static"),
    "FP8_DYNAMIC": ("fp8-channel", "fp8-token"), "NVFP4": ("nvfp4", "nvfp4-static"), "NVFP4A16": ("nvfp4", ""),
    "MXFP4": ("mxfp4", "mxfp4"), "MXFP4A16": ("mxfp4", ""),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_formats_are_those_of_the_presets(preset: str) -> None:
    """What is written out is what compressed-tensors makes of the preset."""
    weights, activations = PRESETS[preset]
    wide = tuple((name, 512) for name in BLOCKS)
    text = llmcompressor_recipe(Recipe("x", wide, (Group(BLOCKS, weights, activations),)))
    group = modifiers(text)["QuantizationModifier"]["config_groups"]["group_0"]
    made, wanted = QuantizationScheme.model_validate(group), preset_name_to_scheme(preset, ["Linear"])
    for role in ("weights", "input_activations"):
        ours, theirs = getattr(made, role), getattr(wanted, role)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.model_dump(exclude={"observer"}) == theirs.model_dump(exclude={"observer"})
    text = llmcompressor_recipe(Recipe(preset, wide, (Group(BLOCKS, weights, activations),), preset=preset))
    assert modifiers(text)["QuantizationModifier"]["scheme"] == preset


def test_static_scales_are_the_greatest_of_all_sequences() -> None:
    """The library's default is a moving average."""
    made = modifiers(llmcompressor_recipe(recipe(activations="int8-tensor-static", kv="int8-tensor")))[
        "QuantizationModifier"
    ]
    inputs, cache = made["config_groups"]["group_0"]["input_activations"], made["kv_cache_scheme"]
    for found in (inputs, cache):
        assert (found["dynamic"], found["strategy"], found["observer"]) == (False, "tensor", "static_minmax")
        QuantizationArgs.model_validate(found)
    assert "dataset" in llmcompressor_recipe(recipe(activations="int8-tensor-static"))
    assert "dataset" not in llmcompressor_recipe(recipe())


def test_sites_in_formats_of_their_own() -> None:
    down = tuple(n for n in BLOCKS if n.endswith("down_proj"))
    rest = tuple(n for n in BLOCKS if n not in down)
    both = Recipe("x", LINEARS, (Group(rest, "int8-channel", "int8-token"), Group(down, "int8-channel", "fp8-token")))
    made = modifiers(llmcompressor_recipe(both))["QuantizationModifier"]
    for group, meant in zip(made["config_groups"].values(), (rest, down), strict=True):
        assert {n for n in NAMES if any(match_name(n, p) for p in group["targets"])} == set(meant)
    assert made["ignore"] == ["lm_head"]


# ---- what they cannot say, and what would not run
CANNOT = [
    (dict(exempt=True), ("tokens",), ("tokens",)),
    (dict(prefix=(0, 17)), ("17",), ("17",)),
    (dict(others=("h.0.c_attn", "h.1.c_attn")), ("h.0.c_attn",), ("h.0.c_attn",)),
    (dict(kv="int4-token"), ("int4-token",), ("int4-token",)),
    (dict(kv="int8-tensor-static"), (), ("int8-tensor-static",)),
    (dict(rotated=True, readers=READERS), ("RMSNorm",), ("rotated",)),
    (dict(rotated=True), ("rotated", "norm"), ("rotated",)),
    (dict(smoothing=0.5), ("smoothed", "norm"), ("smoothed",)),
    (dict(smoothing=0.5, readers=READERS, smooth_all=True), ("down_proj",), ("smoothed",)),
    (dict(activations="int8-channel"), ("int8-channel",), ("int8-channel",)),
    (dict(activations="int8-tensor-static"), (), ("static",)),
    (dict(weights="fp8-channel", activations="fp8-token"), (), ("GPU",)),
    (dict(weights="int4-group32", activations="int8-token"), (), ("zero",)),
    (dict(weights="nvfp4", activations=""), (), ("bias",)),
    (dict(weights="nvfp4", activations="nvfp4"), ("global",), ("GPU",)),
]  # fmt: skip


@pytest.mark.parametrize("what, llmcompressor, torchao", CANNOT, ids=[str(next(iter(c[0]))) for c in CANNOT])
def test_what_is_left_out_is_said(
    what: dict[str, Any], llmcompressor: tuple[str, ...], torchao: tuple[str, ...]
) -> None:
    made = recipe(**what)
    for library, text, facts in (("llmcompressor", llmcompressor_recipe(made), llmcompressor),
                                 ("torchao", torchao_script(made), torchao)):  # fmt: skip
        told = unsupported(made, library)
        head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("# *"))
        assert bool(told) == bool(facts) == bool(head)
        assert not facts or re.search(each(*facts), " ".join(told))
        assert all(sentence in head for sentence in told)


def test_a_plain_recipe_leaves_nothing_out() -> None:
    assert not unsupported(recipe(), "llmcompressor") and not unsupported(recipe(), "torchao")


def test_spinquant_is_left_out_where_names_are_not_those_of_llama() -> None:
    """Gemma's norm before the MLP is called otherwise, and the one of that name is behind the attention."""
    others = tuple((norm.replace("post_attention", "pre_feedforward"), read) for norm, read in READERS)
    made = recipe(rotated=True, readers=others)
    assert list(modifiers(llmcompressor_recipe(made))) == ["QuantizationModifier"]
    assert tells(unsupported(made, "llmcompressor"), "model.layers.0.pre_feedforward_layernorm")


REFUSED = [
    (lambda: llmcompressor_recipe(recipe("int4-group128", "")), ("int4-group128", 128, 576, BLOCKS[0])),
    (lambda: torchao_script(recipe("int4-group128", "")), ("int4-group128", 128, 576)),
    (lambda: llmcompressor_recipe(recipe("nvfp4", "", kept=("model.layers.3.mlp.gate_proj",))),
     ("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj")),
    (lambda: llmcompressor_recipe(Recipe("x", LINEARS, (Group(("model.layers.3.mlp.gate",), "int8-channel"),))),
     ("model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj")),
    (lambda: llmcompressor_recipe(Recipe("x", (("lm_head", 8),), (), others=("h.0.c_attn",))), ("h.0.c_attn",)),
    (lambda: torchao_script(recipe("", "int8-token")), ("weights",)),
    (lambda: unsupported(recipe(), "torcha"), ("torcha", "torchao")),
    (lambda: number_format("int9-tokens"), ("int9-tokens",)),
    (lambda: prefix_guide(recipe()), ("fold",)),
]  # fmt: skip


@pytest.mark.parametrize("make, facts", REFUSED)
def test_what_would_not_run_is_refused(make: Any, facts: tuple[Any, ...]) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert re.search(each(*facts), str(error.value))


def test_the_guide_to_a_prefix_has_its_ids() -> None:
    made = recipe(prefix=(1, 198), activations="int8-tensor-static")
    assert tells(prefix_guide(made, ["<s>", "\n"]), "[1, 198]", "'<s>'", "BOS")
    assert tells(prefix_guide(made), "static") and not tells(prefix_guide(recipe(prefix=(1,))), "static")


# ---- torchao
PAIRS = [("int8-channel", ""), ("int8-tensor", ""), ("int8-group32", ""), ("int4-group32", ""), ("int4-channel", ""),
         ("fp8-tensor", ""), ("fp8-channel", ""), ("int8-channel", "int8-token"), ("int8-channel", "int8-tensor"),
         ("int8-tensor", "int8-tensor"), ("int8-group32", "int8-token"), ("int4-group32", "int8-token"),
         ("nvfp4", "")]  # fmt: skip
ELSEWHERE = [("fp8-channel", "fp8-token"), ("fp8-tensor", "fp8-tensor"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4")]


def _script(folder: Path, made: Recipe) -> dict[str, Any]:
    (folder / "made.py").write_text(torchao_script(made))
    return runpy.run_path(str(folder / "made.py"))


@pytest.mark.parametrize("weights, activations", [*PAIRS, *ELSEWHERE])
def test_torchao_takes_every_configuration(tmp_path: Path, weights: str, activations: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    made = Recipe("x", (("0", 64), ("1", 32), ("2", 64)), (Group(("0", "2"), weights, activations),))
    config = _script(tmp_path, made)["configuration"]()
    if (weights, activations) in ELSEWHERE:  # kernels of GPUs
        return
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    before = model(x)
    quantize_(model, config, filter_fn=None)
    assert [type(m.weight.data) is not torch.Tensor for m in model] == [True, False, True]
    assert 0 < (model(x) - before).abs().max() < before.abs().max()


def test_the_script_quantises_saves_and_what_it_saves_loads(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name of the package itself; what it gives is what `quantize_` gives."""
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    linears = tuple((n, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    kept = ("transformer.h.1.mlp.c_proj", "lm_head")
    meant = tuple(n for n, _ in linears if n not in kept)
    made = Recipe("W8A8", linears, (Group(meant, "int8-channel", "int8-token"),))
    script = tmp_path / "torchao.py"
    script.write_text(torchao_script(made))
    run = subprocess.run([sys.executable, script, twin, tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert tells(run.stdout, len(meant))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, name: name in meant)
    ids_BT = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)
    (tmp_path / "other.py").write_text(script.read_text().replace(f"!= {len(meant)}:", f"!= {len(meant) + 1}:"))
    monkeypatch.setattr(sys, "argv", ["other.py", str(twin), str(tmp_path / "no")])
    with pytest.raises(SystemExit, match=each(len(meant))):
        runpy.run_path(str(tmp_path / "other.py"), run_name="__main__")
    assert not (tmp_path / "no").exists()
