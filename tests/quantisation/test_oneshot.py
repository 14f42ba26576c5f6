"""Exported recipes, run by llm-compressor itself: they do what they say, and cost what was predicted.

They need llm-compressor, which needs other versions than massact is tested with: `make test-quant` installs it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import massact as ma
from massact.quantisation.exports import recipe_of
from massact.quantisation.job import quantise
from massact.quantisation.linears import linears_of as matrices_of
from massact.quantisation.recipes import Group, Recipe, llmcompressor_recipe
from massact.quantisation.schemes import scheme
from massact.scans import scanned_inputs
from tests.quantisation.naive import nll_B, predicted

try:  # it is particular about versions of what it needs
    from datasets import Dataset
    from llmcompressor import oneshot
except Exception as error:
    pytest.skip(f"llm-compressor cannot be used: {error}", allow_module_level=True)

# (weights, activations)
SCHEMES = [("int8-channel", "int8-token"), ("int8-channel", "int8-tensor"), ("int8-channel", "int8-tensor-static"),
           ("int4-group64", ""), ("fp8-tensor", "fp8-tensor-static"), ("fp8-channel", "fp8-token"),
           ("nvfp4", "nvfp4-static"), ("mxfp4", "mxfp4")]  # fmt: skip
# Static ranges that the library measures differ in the last bits. Where one scale serves all tokens, what rounding
# makes of it is chaotic: on SmolLM2 a scale larger by 1e-7 moves the loss of a sequence by up to 0.1 nats.
TOLERANCE_NATS = {False: 1e-5, True: 0.02}


def run(folder: Path, recipe: Recipe, text_BT: Tensor | None, out: Path | None = None) -> nn.Module:
    """The model of a folder after `oneshot`."""
    data: dict[str, Any] = {}
    if text_BT is not None:
        rows = {"input_ids": text_BT.tolist(), "attention_mask": torch.ones_like(text_BT).tolist()}
        data = dict(
            dataset=Dataset.from_dict(rows), num_calibration_samples=len(text_BT), max_seq_length=text_BT.shape[1]
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = llmcompressor_recipe(recipe)
    made = oneshot(model=model, recipe=text, tokenizer=str(folder), output_dir=out and str(out), **data)
    assert recipe.calibrated or text_BT is None
    return made.eval()


def linears_of(model: nn.Module) -> tuple[tuple[str, int], ...]:
    return tuple((name, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear))


def scheme_of(recipe: Recipe) -> QuantizationScheme:
    group = yaml.safe_load(llmcompressor_recipe(recipe))["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    return QuantizationScheme.model_validate(group["config_groups"]["group_0"])


@pytest.fixture(scope="module")
def bare(twin: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(twin: Path) -> tuple[Tensor, Tensor]:
    """(B, T) ids to calibrate on, and others to measure on."""
    text = (resources.files("massact.corpora") / "embedded.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(twin)(text[:20_000])["input_ids"]
    ids_BT = torch.tensor(ids[: 16 * 128]).reshape(16, 128)
    return ids_BT[::2], ids_BT[1::2]


@pytest.mark.parametrize("weights, activations", SCHEMES)
def test_a_recipe_costs_what_was_predicted(
    twin: Path, bare: nn.Module, texts: tuple[Tensor, Tensor], weights: str, activations: str
) -> None:
    linears = linears_of(bare)
    kept = ("transformer.h.1.mlp.c_proj", "lm_head")
    meant = tuple(name for name, _ in linears if name not in kept)
    recipe = Recipe(f"{weights} {activations}", linears, (Group(meant, weights, activations),))
    made = run(twin, recipe, texts[0] if recipe.calibrated else None)
    assert tuple(n for n, m in made.named_modules() if hasattr(m, "quantization_scheme")) == meant
    with predicted(bare, scheme_of(recipe), meant, texts[0]):
        wanted_B = nll_B(bare, texts[1])
    found_B, base_B = nll_B(made, texts[1]), nll_B(bare, texts[1])
    assert (found_B - wanted_B).abs().max() < TOLERANCE_NATS[recipe.calibrated]
    if activations == "int8-tensor-static":  # one scale for massive and other tokens
        assert (found_B - base_B).mean() > 0.1


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, twin: Path) -> Path:
    """Small, random, its embeddings centred (SpinQuant centres them), with one large channel."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, tie_word_embeddings=False, initializer_range=0.2,
    ))  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 50
        model.model.embed_tokens.weight -= model.model.embed_tokens.weight.mean(-1, keepdim=True)
        for block in model.model.layers:
            block.input_layernorm.weight.uniform_(0.5, 2.0)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(twin).save_pretrained(folder)
    return folder


def _of_llama(folder: Path, weights: str = "", activations: str = "", **more: Any) -> tuple[nn.Module, Recipe]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    linears = linears_of(model)
    readers = []
    for i in range(2):
        stem = f"model.layers.{i}"
        readers.append((f"{stem}.input_layernorm", tuple(f"{stem}.self_attn.{x}_proj" for x in "qkv")))
        readers.append((f"{stem}.post_attention_layernorm", tuple(f"{stem}.mlp.{x}_proj" for x in ("gate", "up"))))
    meant = tuple(name for name, _ in linears if name != "lm_head")
    return model, Recipe("x", linears, (Group(meant, weights, activations),), readers=tuple(readers), **more)


@pytest.mark.parametrize(
    "remedy", [dict(smoothing=0.5), dict(rotated=True), dict(rotated=True, smoothing=0.5)], ids=str
)
def test_remedies_alone_change_no_logit(llama: Path, texts: tuple[Tensor, Tensor], remedy: dict[str, Any]) -> None:
    """What they do to the weights cancels; with smoothing behind the rotation the scales stay in the norms."""
    bare, recipe = _of_llama(llama, **remedy)
    made = run(llama, recipe, texts[0] if recipe.calibrated else None)
    with torch.no_grad():
        wanted, found = (model(texts[1]).logits for model in (bare, made))
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    for one, other in zip(bare.model.layers, made.model.layers, strict=True):
        assert not torch.allclose(one.mlp.up_proj.weight, other.mlp.up_proj.weight, rtol=0.01)
        gains = other.input_layernorm.weight
        assert (gains.std() > 1e-3) == ("smoothing" in remedy) and not torch.equal(gains, one.input_layernorm.weight)


@pytest.mark.parametrize("remedy", [dict(smoothing=0.5), dict(rotated=True)], ids=str)
def test_remedies_make_the_error_of_one_scale_smaller(
    llama: Path, texts: tuple[Tensor, Tensor], remedy: dict[str, Any]
) -> None:
    errors = []
    for more in ({}, remedy):
        bare, recipe = _of_llama(llama, "int8-channel", "int8-tensor-static", **more)
        with torch.no_grad():
            wanted, found = (m(texts[1]).logits for m in (bare, run(llama, recipe, texts[0])))
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.8 * errors[0]


def test_keys_and_values_have_the_scale_of_the_greatest(llama: Path, texts: tuple[Tensor, Tensor]) -> None:
    bare, recipe = _of_llama(llama, kv="int8-tensor-static")
    values: list[Tensor] = []
    hook = bare.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, x, y: values.append(y.abs().max()))
    nll_B(bare, texts[0])
    hook.remove()
    made = run(llama, recipe, texts[0])
    torch.testing.assert_close(made.model.layers[1].self_attn.v_scale.flatten()[0], max(values) / 127.5)
    assert 0 < (nll_B(made, texts[1]) - nll_B(bare, texts[1])).abs().max() < 0.1


def test_what_oneshot_saves_is_what_it_made(llama: Path, texts: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    _, recipe = _of_llama(llama, "int8-channel", "int8-token")
    made = run(llama, recipe, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(nll_B(loaded, texts[1]), nll_B(made, texts[1]))


# Every preset and one scheme of each way to share scales, on one model, as `quantise` names them.
PREDICTED = [
    "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4", "MXFP4", "weights:int8-channel/act:int8-tensor",
    "weights:int8-channel/act:int8-tensor-static", "weights:int8-channel/mlp_act:int8-tensor-static",
    "act:int8-tensor-static", "weights:int4-group64",
]  # fmt: skip


def _costs(folder: Path, text: str, names: list[str], seq_len: int, n_sequences: int) -> dict[str, tuple[float, Any]]:
    """Scheme -> (what `oneshot` costs with the exported recipe, the row of `quantise`), on the same targets.

    Scales are of the first half of the sequences in both, losses of the second.
    """
    model = ma.load(str(folder))
    corpus = ma.corpus(text, seq_len=seq_len, n_sequences=n_sequences)
    scan = ma.scan(model, corpus, null=False)
    rows = quantise(model, corpus, scan, schemes=names, guilty="none").quantised.set_index(["scheme", "metric"])
    loaded, ready = scanned_inputs(model, corpus, scan)
    first_BT, held_BT = ready.inputs["input_ids"].chunk(2)
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    linears, base_B = matrices_of(loaded, loaded.anatomy.stacks[-1].name), nll_B(bare, held_BT)
    costs = {}
    for name in names:
        recipe = recipe_of(scheme(name), linears, loaded)
        made = run(folder, recipe, first_BT if recipe.calibrated else None)
        costs[name] = float((nll_B(made, held_BT) - base_B).mean()), rows.loc[name, "nll"]
    return costs


def test_quantise_predicts_what_oneshot_costs(twin: Path) -> None:
    costs = _costs(twin, "embedded", PREDICTED, 128, 16)
    for name, (cost, row) in costs.items():
        assert row["nats_low"] < cost < row["nats_high"], (name, cost, row["delta_nats"])
    assert costs["weights:int8-channel/act:int8-tensor-static"][1]["nats_low"] > 0.1 > costs["W8A8"][1]["nats_high"]


def test_real_smollm2_costs_what_quantise_predicts(smollm2: Path, real_text: Path, tmp_path: Path) -> None:
    """One scale for all tokens costs half a nat or more, one for each token hardly anything; both as predicted."""
    bare = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    bare.hf_quantizer = None  # its weights are plain by now
    del bare.config.quantization_config
    bare.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(tmp_path)
    static = "weights:int8-channel/act:int8-tensor-static"
    costs = _costs(tmp_path, str(real_text / "wikitext2-valid.txt"), ["W8A8", static], 256, 8)
    for cost, row in costs.values():
        assert row["nats_low"] < cost < row["nats_high"]
    assert costs["W8A8"][0] < 0.1 < 0.4 < costs[static][0]
