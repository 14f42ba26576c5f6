"""Every promised family: found, proved, every site fires, outputs bit-identical with taps on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from massact.anatomy import discover, example_inputs, prove
from massact.models import Model, load
from massact.records.errors import ProofError
from massact.records.sites import Site
from massact.trace import tapped, tensors_in
from tests.families import FAMILIES, N_LAYERS, STACKS, build

MOE = {"mixtral", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3"}
MIXERS = {"lfm2": "conv", "qwen3_next": "linear_attn"}  # of all layers but the second
PARALLEL = {"cohere", "phi", "gpt_neox", "falcon", "falcon_new", "gptj"}
POST_NORM = {"bert", "roberta", "distilbert", "electra", "albert", "opt_post_norm", "bart", "longformer", "wav2vec2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_proved(name: str) -> None:
    model = load(build(name))
    stacks = model.anatomy.stacks
    assert [s.name for s in stacks] in ([""], STACKS.get(name), STACKS.get(name, [])[::-1])
    wanted = dict(zip(STACKS.get(name, [""]), N_LAYERS.get(name, [3]), strict=True))
    assert {s.name: s.n_layers for s in stacks} == wanted
    assert 0 <= model.proof.closure <= model.proof.tolerance < 1e-5
    assert model.proof.outputs_identical
    assert model.proof.n_sites == len(model.anatomy.sites())
    for stack in stacks:
        assert stack.post_norm == (name in POST_NORM)
        for block in stack.blocks:
            kind = MIXERS[name] if name in MIXERS and block.layer != 2 else "attn"
            expected = {"resid_pre", f"{kind}_in", f"{kind}_out", "mlp_in", "mlp_out", "resid_post"}
            expected |= set() if name in PARALLEL else {"resid_mid"}
            first_dense = name == "deepseek_v3" and block.layer == 1  # its first layers are not experts
            expected |= set() if name in MOE and not first_dense else {"mlp_act"}
            hidden = kind != "attn" or name == "swin"
            expected |= set() if hidden else {"o_in"}  # see test_projections
            expected |= {"resid_mid_prenorm", "resid_post_prenorm"} if name in POST_NORM else set()
            if stack.name == "decoder" and name in ("t5", "longt5", "bart", "whisper"):
                expected |= {"cross_attn_in", "cross_o_in", "cross_attn_out", "resid_cross"}
                expected |= {"resid_cross_prenorm"} if name in POST_NORM else set()
            assert set(block.places) == expected
            assert not expected & set(block.unavailable)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "gpt_neox"])
def test_sites_equal_hidden_states(name: str) -> None:
    """resid_post of layer l is hidden_states[l] of transformers, but for the last, which they give after the norm."""
    module = build(name)
    model = load(module)
    inputs = example_inputs(module, seed=5)
    seen: dict[Site, torch.Tensor] = {}
    places = model.anatomy.select("*.resid_post")
    with (
        torch.no_grad(),
        tapped(
            module, [(place, lambda h, s=site: seen.__setitem__(s, h.clone())) for site, place in places.items()]
        ) as taps,
    ):
        taps.begin()
        hidden = module(**inputs, output_hidden_states=True).hidden_states
    last = model.anatomy.stacks[0].n_layers
    for layer in range(last + (name == "bert")):  # BERT has no norm after its last block
        assert torch.equal(seen[Site("", layer, "resid_post")], hidden[layer])


def everything_seen(model: Model) -> dict[Site, torch.Tensor]:
    """What passes every site of a model in one forward pass."""
    seen: dict[Site, torch.Tensor] = {}
    taps = [(place, lambda h, s=site: seen.__setitem__(s, h.clone())) for site, place in model.anatomy.sites().items()]
    with torch.no_grad(), tapped(model.module, taps) as state:
        state.begin()
        model.module(**example_inputs(model.module, seed=5))
    return seen


def test_attn_out_and_mlp_out_are_what_is_added() -> None:
    """GPT-2 written out by hand: h + attn(ln_1(h)), then + mlp(ln_2(.))."""
    module = build("gpt2")
    model = load(module)
    seen = everything_seen(model)
    with torch.no_grad():
        block = module.transformer.h[1]
        h = seen[Site("", 1, "resid_post")]
        attn = block.attn(block.ln_1(h))[0]
        mid = h + attn
        mlp_in = block.ln_2(mid)
        act = block.mlp.act(block.mlp.c_fc(mlp_in))

    def at(point: str) -> torch.Tensor:
        return seen[Site("", 2, point)]

    # Equal but for the causal mask, which this call of attn does not get: compare what does not depend on it.
    assert torch.equal(at("attn_in"), block.ln_1(h))
    assert torch.allclose(at("resid_mid"), at("resid_pre") + at("attn_out"), atol=1e-7)
    assert torch.allclose(at("mlp_in"), block.ln_2(at("resid_mid")), atol=1e-6)
    assert torch.allclose(at("mlp_act"), block.mlp.act(block.mlp.c_fc(at("mlp_in"))), atol=1e-6)
    assert torch.allclose(at("mlp_out"), block.mlp.c_proj(at("mlp_act")), atol=1e-6)
    assert at("mlp_act").shape[-1] == act.shape[-1] == 128


def test_post_norm_sum_is_a_site_of_its_own() -> None:
    module = build("bert")
    model = load(module)
    seen = everything_seen(model)
    with torch.no_grad():
        norm = module.bert.encoder.layer[1].output.LayerNorm
        assert torch.equal(norm(seen[Site("", 2, "resid_post_prenorm")]), seen[Site("", 2, "resid_post")])


class OwnBlock(nn.Module):
    """A user's block: pre-LN, attention written out, no transformers."""

    def __init__(self, width: int, hide_write: bool = False) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.hide_write = hide_write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        x = x + self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)
        y = self.down(torch.relu(self.up(self.ln_2(x))))
        return x + (y.tanh() if self.hide_write else y)


class Own(nn.Module):
    def __init__(self, hide_write: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList([OwnBlock(16, hide_write) for _ in range(3)])})
        self.head = nn.Linear(16, 7)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        for block in self.trunk["layers"]:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("blocks", [None, "trunk.layers"])
def test_own_module(blocks: str | None) -> None:
    model = load(Own(), blocks=blocks, inputs={"signal": torch.randn(2, 13, 5)})
    stack = model.anatomy.stacks[0]
    assert (stack.path, stack.n_layers, stack.d_model) == ("trunk.layers", 3, 16)
    places = stack.blocks[1].places
    assert places["attn_out"].module == "trunk.layers.1.proj"
    assert places["mlp_out"].module == "trunk.layers.1.down"
    assert places["mlp_act"].module == "trunk.layers.1.down"


def test_own_module_without_example_says_what_to_do() -> None:
    with pytest.raises(Exception, match="inputs="):
        load(Own())


def test_wrong_path_lists_the_right_ones() -> None:
    with pytest.raises(ProofError, match=r"trunk\.layers"):
        load(Own(), blocks="trunk.layer", inputs={"signal": torch.randn(2, 13, 5)})


def test_write_that_no_module_makes_is_refused() -> None:
    """The MLP's write passes a tanh outside any module: refused, with the block and what to do."""
    with pytest.raises(ProofError) as caught:
        load(Own(hide_write=True), inputs={"signal": torch.randn(2, 13, 5)})
    assert "trunk.layers.0" in str(caught.value) and "tanh" in str(caught.value)
    assert "nn.Identity" in str(caught.value)


def test_wrong_anatomy_fails_the_proof_with_block_and_size() -> None:
    """The proof does not trust the search: swap one place for a wrong one and it must object."""
    from dataclasses import replace

    module = build("llama")
    inputs = example_inputs(module, 0)
    anatomy = discover(module, inputs)
    stack = anatomy.stacks[0]
    wrong = replace(stack.blocks[1], places=stack.blocks[1].places | {"mlp_out": stack.blocks[1].places["mlp_in"]})
    broken = replace(anatomy, stacks=(replace(stack, blocks=(stack.blocks[0], wrong, stack.blocks[2])),))
    with pytest.raises(ProofError, match=r"model\.layers\.1.*off by") as caught:
        prove(module, broken, inputs, lambda given: module(**given))
    assert "Nothing was measured" in str(caught.value)
    prove(module, anatomy, inputs, lambda given: module(**given))


def test_random_model_is_refused() -> None:
    """A model whose output is not a function of its input cannot be compared with itself."""
    module = build("gpt2")
    module.transformer.h[1].register_forward_hook(lambda m, args, out: out + 1e-3 * torch.rand_like(out))
    with pytest.raises(ProofError):
        load(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma2", "phi", "opt", "t5"])
def test_half_precision_is_proved(name: str, dtype: torch.dtype) -> None:
    model = load(build(name).to(dtype))
    assert model.proof.closure <= model.proof.tolerance
    assert model.proof.dtype == str(dtype).removeprefix("torch.")


def test_no_hook_is_left_behind() -> None:
    module = build("llama")
    load(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    with (
        pytest.raises(RuntimeError, match="stop"),
        tapped(module, [(place, _stop) for place in load(module).anatomy.sites().values()]),
    ):
        module(**example_inputs(module))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert list(tensors_in(module(**example_inputs(module))))


def _stop(h: torch.Tensor) -> None:
    raise RuntimeError("stop")
