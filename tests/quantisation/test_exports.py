"""From schemes to recipes: which modules read which site, and that torchao costs what was predicted of it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

import massact as ma
from massact.models import Model
from massact.quantisation.exports import exports_of, recipe_of
from massact.quantisation.job import quantise
from massact.quantisation.linears import linears_of
from massact.quantisation.recipes import Recipe, unsupported
from massact.quantisation.schemes import number_format, scheme
from massact.scans import scanned_inputs
from tests import families
from tests.facts import each, tells
from tests.quantisation.naive import nll_B


def recipe(model: Model, name: str, skipped: tuple[tuple[int, str], ...] = (), **more: Any) -> Recipe:
    stack = model.anatomy.stacks[-1].name
    return recipe_of(scheme(name).without(skipped), linears_of(model, stack), model, **more)


@pytest.fixture(scope="module")
def llama() -> Model:
    return ma.load(families.build("llama"))


@pytest.fixture(scope="module")
def loaded(twin: Path) -> Model:
    return ma.load(str(twin))


LEAVES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def test_a_preset_is_one_group_of_all_matrices_of_the_blocks(llama: Model) -> None:
    made = recipe(llama, "W8A8")
    (group,) = made.groups
    assert sorted(group.modules) == sorted(f"model.layers.{i}.{leaf}" for i in range(3) for leaf in LEAVES)
    assert (group.weights, group.activations, made.preset) == ("int8-channel", "int8-token", "W8A8")
    assert made.kept == ("lm_head",) and not unsupported(made, "llmcompressor")


def test_what_a_scheme_skips_stays_in_full_precision(llama: Model) -> None:
    made = recipe(llama, "W8A8", ((2, "mlp_act"), (3, "mlp_in")))
    kept = ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj", "lm_head")
    assert sorted(made.kept) == sorted(kept)


def test_one_site_is_what_reads_it(llama: Model) -> None:
    made = recipe(llama, "mlp_act:int8-tensor-static")
    assert made.quantised == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    assert (made.groups[0].weights, made.groups[0].activations) == ("", "int8-tensor-static")


def test_norms_and_their_readers_come_from_the_anatomy() -> None:
    """Gemma 2 has a norm behind the attention, too, which no module reads."""
    model = ma.load(families.build("gemma2"))
    made = recipe(model, "W8A8+smooth")
    assert len(made.readers) == 6
    assert made.readers[1][0] == "model.layers.0.pre_feedforward_layernorm"
    assert set(made.readers[1][1]) == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    assert (made.smoothing, made.smooth_all) == (0.5, False)
    assert recipe(model, "W8A8+smooth-all=0.7").smooth_all


@pytest.mark.parametrize(
    "name",
    [
        "int8-token",
        "int4-group32",
        "fp8-tensor-static",
        "fp8-none",
        "nvfp4",
        "mxfp4",
        "weights:int4-channel",
        "int8-channel",
    ],  # fmt: skip
)
def test_formats_are_spelled_as_they_were_given(name: str) -> None:
    (form, *_) = [p.form for p in scheme(name).parts]
    made = form.spelled("channel" if name.startswith("weights") else "token")
    assert made == name.removeprefix("weights:")
    assert number_format(made).static == form.static


@pytest.mark.parametrize(
    "name, fact",
    [
        ("W8A8+exempt", "tokens"),
        ("W8A8+insert", "vector"),
        ("W8A8+slots", "fold"),
        ("weights:int4-group8+super", "largest"),
        ("W8A8/k:int8-tensor/v:int4-token", "int4-token"),
    ],  # fmt: skip
)
def test_remedies_of_ours_are_said(llama: Model, name: str, fact: str) -> None:
    if "/" in name:
        name = name.replace("W8A8", "weights:int8-channel")
    for library in ("llmcompressor", "torchao"):
        assert re.search(each(fact), " ".join(unsupported(recipe(llama, name), library)))


def test_files_are_there_or_it_is_said_why_not(llama: Model) -> None:
    files, notes = exports_of(recipe(llama, "W8A8", prefix=(1, 2)))
    assert set(files) == {"llmcompressor.yaml", "torchao.py", "prefix.md"} and not notes
    files, notes = exports_of(recipe(llama, "int8-tensor"))
    assert set(files) == {"llmcompressor.yaml"} and tells(notes, "torchao.py", "int8-tensor")
    files, notes = exports_of(recipe(ma.load("embedded"), "W8A8"))  # Conv1D
    assert not files and len(tells(notes, "transformer.h.0.attn.c_attn", "Linear")) == 2
    files, notes = exports_of(recipe(llama, "kv:int4-token"))
    assert not files and len(tells(notes, "int4-token")) == 2


# What torchao costs is what `quantise` says of it, on the same text.
PREDICTED = [
    "weights:int8-channel/act:int8-token", "weights:int8-channel/act:int8-tensor", "weights:int4-group64",
    "weights:fp8-channel",
]  # fmt: skip


def test_torchao_costs_what_was_predicted(twin: Path, loaded: Model, tmp_path: Path) -> None:
    corpus = ma.corpus("embedded", seq_len=128, n_sequences=16)
    scan = ma.scan(loaded, corpus, null=False)
    rows = quantise(loaded, corpus, scan, schemes=PREDICTED, guilty="none").quantised.set_index(["scheme", "metric"])
    held_BT = scanned_inputs(loaded, corpus, scan)[1].inputs["input_ids"][8:]
    bare = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    for name in PREDICTED:
        (tmp_path / "made.py").write_text(exports_of(recipe(loaded, name))[0]["torchao.py"])
        model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
        quantize_(model, runpy.run_path(str(tmp_path / "made.py"))["configuration"](), filter_fn=None)
        cost = float((nll_B(model, held_BT) - nll_B(bare, held_BT)).mean())
        row = rows.loc[name, "nll"]
        assert row["nats_low"] < cost < row["nats_high"]
    assert (
        rows.loc["weights:int8-channel/act:int8-tensor", "nll"]["nats_low"]
        > 0.1
        > abs(rows.loc["weights:int8-channel/act:int8-token", "nll"]["delta_nats"])
    )
