"""Weights that accelerate keeps elsewhere, and weights that are there as codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import massact as ma
from massact.interventions import norm_dims
from massact.models import matrix_of, projection_of, with_attention
from massact.models.weight_values import n_parameters
from massact.records.errors import ProofError, UserError
from massact.trace import edited
from tests.facts import tells
from tests.wrapped import IDS, RULE, everything, logits, same, tiny

accelerate = pytest.importorskip("accelerate")
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
         "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip

OFFLOADED: dict[str, Callable[[Path], nn.Module]] = {
    "cpu": lambda path: accelerate.cpu_offload(tiny(), execution_device="cpu"),
    "disk": lambda path: accelerate.disk_offload(tiny(), path, execution_device="cpu"),
    "hooks alone": lambda path: accelerate.dispatch_model(tiny(), {"": "cpu"}, force_hooks=True),
    "some on disk": lambda path: accelerate.dispatch_model(
        tiny(), MIXED, main_device="cpu", offload_dir=path, force_hooks=True
    ),
}  # fmt: skip


def even() -> Any:
    """With widths that blocks of 64 codes divide: bitsandbytes runs no others on some processors."""
    return tiny(intermediate_size=128)


@pytest.fixture(scope="module")
def bare() -> dict[str, Any]:
    return everything(tiny())


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_weights_give_the_numbers_of_the_plain_model(name: str, bare: dict[str, Any], tmp_path: Path) -> None:
    module = OFFLOADED[name](tmp_path)
    before = {n: p.is_meta for n, p in module.named_parameters()}
    same(everything(module), bare)
    assert {n: p.is_meta for n, p in module.named_parameters()} == before
    model, plain = ma.load(module), ma.load(tiny())
    for info in ("weights_sha256", "vectors_sha256", "n_parameters"):
        assert getattr(model.info(), info) == getattr(plain.info(), info)
    n = sum(before.values())
    assert bool(n) == (name != "hooks alone") and bool(tells(" ".join(model.around), "offloaded", n)) == bool(n)


class LayerScaled(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A block that scales what it adds, and the stream, by parameters of its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept, self.added = nn.Parameter(torch.rand(64) + 0.5), nn.Parameter(torch.rand(64) + 0.5)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = self.kept * hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return h + self.added * self.mlp(self.post_attention_layernorm(h))


def scaled() -> nn.Module:
    module = tiny()
    for i in range(3):
        torch.manual_seed(i)
        layer = LayerScaled(module.config, i).eval()
        layer.load_state_dict(module.model.layers[i].state_dict(), strict=False)
        module.model.layers[i] = layer
    return module


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_parameters_that_scale_the_stream(where: str, tmp_path: Path) -> None:
    """They are other tensors in every call: known by the module that holds them then."""
    plain = ma.load(scaled())
    assert "resid_scaled" in plain.anatomy.stacks[0].blocks[0].places
    away = accelerate.cpu_offload(scaled(), execution_device="cpu") if where == "cpu" else accelerate.disk_offload(
        scaled(), tmp_path, execution_device="cpu")  # fmt: skip
    assert ma.load(away).anatomy == plain.anatomy
    same(everything(away), everything(scaled()))


def test_a_folder_read_onto_the_disk(bare: dict[str, Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    options = {"device_map": MIXED, "offload_folder": str(tmp_path / "away")}
    same(everything(tmp_path / "model", options=options), bare)


def test_an_offloaded_weight_is_not_edited(tmp_path: Path) -> None:
    model = ma.load(OFFLOADED["disk"](tmp_path))
    with (
        pytest.raises(UserError, match="cannot be changed") as refused,
        edited(model, norm_dims("model.norm.weight", [3])),
    ):
        raise AssertionError("the body must not run")
    assert "without offloading" in refused.value.do


def test_offloaded_weights_are_not_rounded(tmp_path: Path) -> None:
    from massact.quantisation import quantise

    model = ma.load(OFFLOADED["disk"](tmp_path))
    with pytest.raises(UserError, match="offloaded") as refused:
        quantise(model, ma.corpus(IDS), ma.scan(model, IDS, null=False, **RULE))
    assert "without offloading" in refused.value.do


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        module = tiny()
    with pytest.raises(UserError, match="holds no values"):
        ma.load(module)


# ---------------------------------------------------------------------------------------------------- codes
class Codes(nn.Module):
    """A linear map as GPTQ and AWQ keep it: codes of 4 bits, eight in an integer, and scales; no weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale_O1 = plain.weight.detach().abs().amax(1, keepdim=True) / 7
        codes_OI = (plain.weight.detach() / scale_O1).round().clamp(-8, 7).to(torch.int32) + 8
        eighths = codes_OI.view(self.out_features, -1, 8)
        self.register_buffer("qweight", sum(eighths[..., i] << (4 * i) for i in range(8)).to(torch.int32))
        self.register_buffer("scales", scale_O1)

    def plain(self) -> Tensor:
        codes = torch.stack([(self.qweight >> (4 * i)) & 15 for i in range(8)], -1).flatten(1)
        return (codes.float() - 8) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.plain().to(x.dtype).T


def _replaced(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear) and name != "lm_head":
            module.set_submodule(name, make(part))
    return module


def _bits8(plain: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def _bits4(plain: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False)
    made.support_avx512bf16_for_cpu = False  # else the first pass packs the weights anew, on some CPUs
    return made.to("cpu")


def _torchao(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        q = pytest.importorskip("torchao.quantization")
        module = even()
        config = {"int8": q.Int8WeightOnlyConfig, "int8 inputs": q.Int8DynamicActivationInt8WeightConfig}[name]
        q.quantize_(module, config())
        return module

    return build


# name -> model, package that the record names, type, whether inputs are quantised (None: nobody knows)
PACKED: dict[str, tuple[Callable[[], nn.Module], str, str, bool | None]] = {
    "codes": (lambda: _replaced(even(), Codes), "tests", "int4", None),
    "bitsandbytes 8": (lambda: _replaced(even(), _bits8), "bitsandbytes", "int8", True),
    "bitsandbytes 4": (lambda: _replaced(even(), _bits4), "bitsandbytes", "int4", False),
    "torchao 8": (_torchao("int8"), "torchao", "int8", False),
    "torchao 8, inputs too": (_torchao("int8 inputs"), "torchao", "int8", True),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_seen_named_and_multiplied_out(name: str) -> None:
    make, package, kind, inputs = PACKED[name]
    module = make()
    wanted = logits(module)
    model = with_attention(ma.load(module))
    assert torch.equal(logits(model.module), wanted) and not torch.equal(wanted, logits(even()))
    packing = model.quantised
    assert packing is not None and packing["method"] == package and set(packing["types"]) == {kind}
    assert (None if packing["activations"] is None else bool(packing["activations"])) is inputs
    assert n_parameters(module) == n_parameters(even())
    down, plain = model.module.get_submodule("model.layers.0.mlp.down_proj"), even().model.layers[0].mlp.down_proj
    error = (matrix_of(down, 128) - plain.weight.detach()).abs().amax(1) / plain.weight.detach().abs().amax(1)
    assert 0 < error.median() < (0.2 if kind == "int4" else 0.02)
    x_RI = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for place in model.anatomy.attentions.values():
        project = projection_of(model, place)
        assert project is not None and place.projection is not None
        matrix = matrix_of(model.module.get_submodule(place.projection.module), 64)
        assert (project(x_RI) - x_RI @ matrix.T).norm() < 0.05 * project(x_RI).norm()
    tables = everything(module)
    first = tables["neurons"].iloc[0]
    assert (first["module"], first["neuron"]) == ("model.layers.0.mlp.down_proj", 7)
    assert first["share"] == pytest.approx(1, abs=0.1) and first["gate"] == first["gate"]


def test_the_matrix_is_that_of_the_codes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    plain = even().model.layers[0].mlp.down_proj
    codes, packed = Codes(plain), _bits4(plain)
    torch.testing.assert_close(matrix_of(codes, 128), codes.plain(), rtol=0, atol=1e-7)
    wanted = functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    torch.testing.assert_close(matrix_of(packed, 128), wanted, rtol=0, atol=1e-6)
    assert matrix_of(plain, 128).equal(plain.weight.detach())


def test_codes_give_the_numbers_of_the_weights_that_they_stand_for() -> None:
    packed, plain = _replaced(even(), Codes), even()
    with torch.no_grad():
        for name, part in packed.named_modules():
            if isinstance(part, Codes):
                plain.get_submodule(name).weight.copy_(part.plain())
    same(everything(packed), everything(plain), check_exact=False, rtol=1e-3, atol=1e-4)


def test_a_saved_checkpoint_of_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    even().save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    live.save_pretrained(tmp_path / "packed")
    model, same_one = ma.load(tmp_path / "packed"), ma.load(live)
    assert torch.equal(logits(model.module), logits(live)) and model.quantised["method"] == "bitsandbytes"
    assert model.info().weights_sha256 == same_one.info().weights_sha256
    scan = ma.scan(model, IDS, **RULE)
    assert ma.explain(model, IDS, scan).neurons.iloc[0]["neuron"] == 7


def test_weights_that_were_packed_for_a_cpu_are_refused() -> None:
    """On CPUs with bfloat16 instructions the first pass packs 4-bit weights, and reading these changes them."""
    bnb = pytest.importorskip("bitsandbytes")
    module = _replaced(even(), _bits4)
    parts = [part for part in module.modules() if isinstance(part, bnb.nn.Linear4bit)]
    for part in parts:
        part.support_avx512bf16_for_cpu = True
    assert "bitsandbytes" in " ".join(ma.load(module).around)
    assert not any(part.support_avx512bf16_for_cpu for part in parts)
    parts[0].support_avx512bf16_for_cpu = True
    parts[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError):
        ma.load(module)
    parts[0].weight.quant_state.packing_format_for_cpu = False


def test_an_adapter_on_packed_weights(tmp_path: Path) -> None:
    """QLoRA: the matrix is that of the codes and of the adapter beside them."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    module = peft.get_peft_model(_replaced(even(), _bits4), config)
    model = ma.load(module)
    down = model.module.get_submodule("model.layers.0.mlp.down_proj")
    codes = matrix_of(down.base_layer, 128)
    beside = down.lora_B["default"].weight @ down.lora_A["default"].weight * down.scaling["default"]
    torch.testing.assert_close(matrix_of(down, 128), codes + beside.detach(), atol=1e-5, rtol=1e-4)
    tables = everything(module)
    assert tables["neurons"].iloc[0]["module"] == "model.layers.0.mlp.down_proj"
    assert model.quantised["method"] == "bitsandbytes" and n_parameters(model.module) > n_parameters(even())


def test_inputs_quantised_with_one_step_for_the_batch_are_refused() -> None:
    module = torch.ao.quantization.quantize_dynamic(tiny(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ProofError, match="other sequences") as refused:
        ma.load(module)
    assert "quantised" in refused.value.why
