"""Quantised checkpoints: what is loaded runs as its own library runs it, is proved, and is recorded for what it is."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import massact as ma
from massact.interventions import norm_dims
from massact.models import random_twin, unpacked, with_attention
from massact.models.weight_values import weights_hash
from massact.records.errors import UserError
from massact.records.weight_types import packing_in_words, packing_of
from massact.stats.protocol import PerSequence, Where
from massact.trace import Probe, WeightEdit, edited, observing
from tests.facts import tells
from tests.quantised import preset, quantise_compressed, save_compressed, save_torchao
from tests.trace.test_edits import IDS

pytest.importorskip("compressed_tensors")
pytest.importorskip("torchao")

SIZES = dict(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96)  # fmt: skip
N_LINEAR = 3 * 7
# name -> weights (type, bits, strategy, group size), activations (the same, and whether of each pass) or None
PRESETS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...] | None]] = {
    "W8A8": (("int", 8, "channel", None), ("int", 8, "token", True)),
    "W4A16": (("int", 4, "group", 32), None),
    "W8A16": (("int", 8, "group", 32), None),
    "FP8": (("float", 8, "tensor", None), ("float", 8, "tensor", False)),
    "FP8_DYNAMIC": (("float", 8, "channel", None), ("float", 8, "token", True)),
}


def tiny(seed: int = 0) -> Any:
    """A random Llama in which neuron 7 of block 1 makes dim 5 large."""
    torch.manual_seed(seed)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    mlp = module.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[7] *= 30
        mlp.up_proj.weight[7] *= 30
        mlp.down_proj.weight[5, 7] = 3
    return module


def logits(module: Any) -> Tensor:
    with torch.inference_mode():
        return module(IDS).logits.clone()


def _torchao(name: str) -> Any:
    import torchao.quantization as q

    return {
        "int8 weights": lambda: q.Int8WeightOnlyConfig(),
        "int8 weights and activations": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "float8 weights": lambda: q.Float8WeightOnlyConfig(),
        "int4 weights": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
    }[name]()


TORCHAO: dict[str, tuple[tuple[Any, ...], tuple[Any, ...] | None]] = {
    "int8 weights": (("int", 8, "channel", None), None),
    "int8 weights and activations": (("int", 8, "channel", None), ("int", 8, "token", True)),
    "float8 weights": (("float", 8, "channel", None), None),
    "int4 weights": (("int", 4, "group", 32), None),
}
ALL = [*PRESETS, *TORCHAO]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Folder of each checkpoint, with the logits that its library gives; and that of the model in full precision."""
    root = tmp_path_factory.mktemp("quantised")
    plain = tiny()
    plain.save_pretrained(root / "plain")
    found = {"plain": (root / "plain", logits(plain))}
    for name in PRESETS:
        module = tiny()
        quantise_compressed(module, preset(name, 32), {"input_ids": IDS})
        given = logits(module)
        found[name] = save_compressed(module, root / name), given
    for name in TORCHAO:
        folder = save_torchao(root / "plain", _torchao(name), root / name.replace(" ", "_"))
        found[name] = folder, logits(transformers.AutoModelForCausalLM.from_pretrained(folder))
    return found


@pytest.mark.parametrize("name", ALL)
def test_it_runs_as_its_own_library_runs_it_and_is_proved(name: str, folders: dict[str, tuple[Path, Tensor]]) -> None:
    folder, wanted = folders[name]
    model = with_attention(ma.load(folder))
    assert torch.equal(logits(model.module), wanted) and not torch.equal(wanted, folders["plain"][1])
    assert model.proof.closure <= model.proof.tolerance < 1e-5 and model.dtype == torch.float32
    assert len(model.anatomy.attentions) == 3
    for block in model.anatomy.stacks[0].blocks:
        assert {"attn_in", "o_in", "attn_out", "mlp_in", "mlp_act", "mlp_out"} <= set(block.places)
    with untouched_packed(model.module):
        again = logits(model.module)
    assert torch.equal(again, wanted)


class untouched_packed:
    """As `untouched`, for weights that cannot be cloned: their hash."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.before = weights_hash(self.module), list(self.module.state_dict())

    def __exit__(self, *_: Any) -> None:
        assert self.before == (weights_hash(self.module), list(self.module.state_dict()))


@pytest.mark.parametrize("name", ALL)
def test_what_is_recorded_is_the_scheme_that_it_was_made_with(
    name: str, folders: dict[str, tuple[Path, Tensor]]
) -> None:
    model = ma.load(folders[name][0])
    packing = model.quantised
    assert packing is not None and model.info().quantised == packing == packing_of(vars(model.info()))
    weights, activations = (PRESETS | TORCHAO)[name]
    (scheme,) = packing["weights"]
    assert (scheme["type"], scheme["bits"], scheme["strategy"], scheme["group_size"]) == weights
    assert scheme["n_modules"] == N_LINEAR and scheme["symmetric"] and packing["ignored"] == ["lm_head"]
    assert packing["types"] == {f"{weights[0]}{weights[1]}": N_LINEAR} and packing["kv_cache"] is None
    assert packing["method"] == ("torchao" if name in TORCHAO else "compressed-tensors")
    found = [(s["type"], s["bits"], s["strategy"], s["dynamic"]) for s in packing["activations"]]
    assert found == ([] if activations is None else [activations])
    text = " ".join(packing_in_words(packing))
    assert tells(text, f"{weights[0]}{weights[1]}", packing["method"], "lm_head", N_LINEAR)
    assert ("fixed beforehand" in text) == (name == "FP8")


@pytest.mark.parametrize("name", ALL)
def test_hash_and_number_of_weights(name: str, folders: dict[str, tuple[Path, Tensor]]) -> None:
    """Norms are those of the model in full precision, weights are others; scales are no weights of the model."""
    plain, packed = ma.load(folders["plain"][0]).info(), ma.load(folders[name][0]).info()
    assert packed.vectors_sha256 == plain.vectors_sha256 and packed.weights_sha256 != plain.weights_sha256
    assert packed.n_parameters == plain.n_parameters and plain.quantised is None
    assert packed.weights_sha256 == ma.load(folders[name][0]).info().weights_sha256
    other = ma.load(tiny(1)).info()
    assert other.vectors_sha256 == plain.vectors_sha256 or other.weights_sha256 != plain.weights_sha256


def test_the_same_weights_with_other_activations_are_another_model(folders: dict[str, tuple[Path, Tensor]]) -> None:
    for one, other in (("W8A8", "W8A16"), ("int8 weights", "int8 weights and activations")):
        assert len({ma.load(folders[name][0]).info().weights_sha256 for name in (one, other)}) == 2


@pytest.mark.parametrize("name", ["W8A8", "int8 weights and activations"])
def test_the_random_twin_is_in_full_precision(name: str, folders: dict[str, tuple[Path, Tensor]]) -> None:
    model = ma.load(folders[name][0])
    twin = random_twin(model)
    assert not isinstance(twin, str) and twin.quantised is None and model.quantised is not None
    assert all(type(p.data) is Tensor and p.is_floating_point() for p in twin.module.parameters())


class Kept(PerSequence):
    def update(self, h_TD: Tensor, where: Where) -> None:
        self.rows[where.sequence] = h_TD.clone()


def test_inputs_are_seen_before_they_are_quantised_and_outputs_after(folders: dict[str, tuple[Path, Tensor]]) -> None:
    """What W8A8 adds is the written-out product of codes and scales with what is seen at its input."""
    model = ma.load(folders["W8A8"][0])
    with (
        torch.inference_mode(),
        observing(model, [Probe("x", "2.mlp_act", Kept), Probe("y", "2.mlp_out", Kept)]) as seen,
    ):
        model.module(IDS)
    x, y = (list(s.rows.values()) for s in seen.statistics.values())  # type: ignore[attr-defined]
    weight = tiny().model.layers[1].mlp.down_proj.weight.detach()
    scale_D1 = weight.abs().amax(1, keepdim=True) / 127.5
    weight = (weight / scale_D1).round().clamp(-128, 127) * scale_D1
    for x_TF, y_TD in zip(x, y, strict=True):
        step_T1 = x_TF.abs().amax(1, keepdim=True) / 127.5
        codes_TF = (x_TF / step_T1).round()
        assert (x_TF / step_T1 - codes_TF).abs().max() > 0.1, "what is seen is not quantised yet"
        torch.testing.assert_close(y_TD, (codes_TF.clamp(-128, 127) * step_T1) @ weight.T, rtol=0, atol=2e-7)


def test_keys_and_values_that_are_quantised_are_told(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    module = tiny()
    cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    quantise_compressed(module, preset("W4A16", 32), {"input_ids": IDS}, kv_cache_scheme=cache)
    wanted = logits(module)
    model = ma.load(save_compressed(module, tmp_path / "cache"))
    assert torch.equal(logits(model.module), wanted)
    assert model.quantised is not None and model.quantised["kv_cache"]["strategy"] == "tensor"
    assert tells(" ".join(packing_in_words(model.quantised)), "Keys and values", "float8")


def test_a_gguf_file_counts_where_any_of_its_tensors_is_quantised() -> None:
    for types, quantised in (({"Q4_1": 3, "F32": 2}, True), ({"BF16": 3, "F32": 2}, False)):
        found = packing_of({"gguf": {"types": types}})
        assert (found is not None) == quantised
        assert found is None or (found["method"], found["types"], found["dequantised"]) == ("gguf", types, True)
    assert packing_of({}) is None


def test_a_scan_says_it_and_keeps_it(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    for name in ("W8A8", "int4 weights"):
        scan = ma.scan(ma.load(folders[name][0]), IDS, null="none")
        scan.save(tmp_path / name)
        kept = json.loads((tmp_path / name / "run.json").read_text())
        assert kept["model"]["quantised"]["types"] == scan.info.model["quantised"]["types"]
        assert any("quantised" in note and "int" in note for note in kept["notes"])


@pytest.mark.parametrize("name", ["W8A8", "FP8", "int8 weights and activations", "int4 weights"])
def test_explain_and_intervene_read_it(name: str, folders: dict[str, tuple[Path, Tensor]]) -> None:
    """The weight of the neuron that an explanation names is the unpacked one."""
    model, corpus = ma.load(folders[name][0]), ma.corpus(IDS)
    scan = ma.scan(model, corpus, null="none", thresholds={"magnitude": 0.05, "ratio": 4.0})
    neurons = ma.explain(model, corpus, scan).neurons
    first = neurons.iloc[0]
    assert (first["module"], first["neuron"]) == ("model.layers.0.mlp.down_proj", 7)
    weight = unpacked(model.module.get_submodule(first["module"]).weight)
    plain = tiny().get_submodule(first["module"]).weight
    assert first["weight"] == pytest.approx(float(weight[int(first["dim"]), int(first["neuron"])]))
    assert 0 < (weight - plain).abs().max() < 0.1 * plain.abs().max()
    assert len(ma.intervene(model, corpus, scan, sets=("zero",)).effects)


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("name", "package"), [("W8A8", "compressed_tensors"), ("int8 weights", "torchao")])
def test_a_missing_library_is_named_with_what_installs_it(
    name: str, package: str, folders: dict[str, tuple[Path, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else plain(n, *a))
    with pytest.raises(UserError) as refused:
        ma.load(folders[name][0])
    assert "massact[quant]" in refused.value.do and package.replace("_", "-") in refused.value.why


def test_another_dtype_than_that_of_packed_weights_is_refused(folders: dict[str, tuple[Path, Tensor]]) -> None:
    with pytest.raises(UserError, match="dtype"):
        ma.load(folders["int8 weights"][0], dtype="bfloat16")
    assert ma.load(folders["W4A16"][0], dtype="bfloat16").dtype == torch.bfloat16


def test_scales_that_are_no_numbers_are_refused(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    for name in ("W4A16", "int8 weights"):
        copied = tmp_path / name
        copied.mkdir()
        for file in folders[name][0].iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        weights = load_file(copied / "model.safetensors")
        first = next(n for n in weights if n.endswith("scale") and "down_proj" in n)
        weights[first].view(-1)[0] = torch.nan
        save_file(weights, copied / "model.safetensors", _metadata(copied))
        with pytest.raises(UserError, match="NaN") as refused:
            ma.load(copied)
        assert "down_proj" in refused.value.what


def _metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def test_a_packed_weight_cannot_be_edited(folders: dict[str, tuple[Path, Tensor]]) -> None:
    model, name = ma.load(folders["int8 weights"][0]), "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(UserError, match="packed"), edited(model, WeightEdit("double", name, lambda w: w * 2)):
        raise AssertionError("the body must not run")
    with edited(model, norm_dims("model.norm.weight", [3])) as fired:
        logits(model.module)
    assert fired[0].n_elements == 1
    unpacked = ma.load(folders["W4A16"][0])
    with untouched_packed(unpacked.module), edited(unpacked, WeightEdit("double", name, partial(torch.mul, 2))):
        assert not torch.equal(logits(unpacked.module), folders["W4A16"][1])
    assert torch.equal(logits(unpacked.module), folders["W4A16"][1])
