"""Modules that users write: odd borders, odd sums, odd layouts. Each is read rightly or refused with a reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from massact.models import load
from massact.records.anatomy import TURNED
from massact.records.errors import ProofError, UserError
from massact.trace import tapped
from tests.facts import each

D = 16
SIGNAL = {"signal": torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(0))}


class Attention(nn.Module):
    def __init__(self, fused: bool = False, tokens_first: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fused, self.tokens_first = fused, tokens_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.transpose(0, 1) if self.tokens_first else x).chunk(3, -1)
        if self.fused:
            y = F.scaled_dot_product_attention(*(t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v)))
            y = y.transpose(1, 2).flatten(2)
        else:
            y = (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v
        return self.proj(y.transpose(0, 1) if self.tokens_first else y)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-LN; `how` says how the two sublayers a and m of x are put together."""

    def __init__(self, how: Callable[..., Any] | None = None, **attention: bool) -> None:
        super().__init__()
        self.n1, self.n2, self.n3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp, self.how = Attention(**attention), MLP(), how
        self.gamma = nn.Parameter(torch.full((D,), 0.3))
        self.dropout = nn.Dropout(0.5)

    def a(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.n1(x))

    def m(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.n2(x))

    def forward(self, x: torch.Tensor) -> Any:
        if self.how is not None:
            return self.how(self, x)
        x = x + self.a(x)
        return x + self.m(x)


class Own(nn.Module):
    def __init__(self, blocks: list[nn.Module], call: Callable[..., Any] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.embed, self.blocks, self.call = nn.Linear(5, D), nn.ModuleList(blocks), call

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        for block in self.blocks:
            x = self.call(block, x)
        return x


def in_place(block: Block, x: torch.Tensor) -> torch.Tensor:
    x += block.a(x)
    x += block.m(x)
    return x


def sums(first: Callable, second: Callable | None = None) -> Callable[..., Any]:
    """A block whose additions are written by the given functions of (block, x, what to add)."""
    second = second or first

    def how(block: Block, x: torch.Tensor) -> torch.Tensor:
        x = first(block, x, block.a(x))
        return second(block, x, block.m(x))

    return how


def plain(block: Block, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


@dataclasses.dataclass(frozen=True)
class Record:
    hidden: torch.Tensor
    aux: object = None


def returns(wrap: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    return lambda block, x: wrap(sums(plain)(block, x))


UNDERSTOOD: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any], float | str]] = {
    "plain": (None, lambda b, x: b(x), 1.0),
    "in place": (in_place, lambda b, x: b(x), 1.0),
    "alpha": (sums(lambda b, x, y: torch.add(x, y, alpha=0.5)), lambda b, x: b(x), 0.5),
    "divided": (sums(lambda b, x, y: x + y / math.sqrt(4)), lambda b, x: b(x), 0.5),
    "subtracted": (sums(lambda b, x, y: x - y), lambda b, x: b(x), -1.0),
    "layer scale": (sums(lambda b, x, y: x + b.gamma * y), lambda b, x: b(x), "gamma"),
    "dropout": (sums(lambda b, x, y: x + b.dropout(y)), lambda b, x: b(x), 1.0),
    "tuple": (returns(lambda x: (None, x)), lambda b, x: b(x)[1], 1.0),
    "dict": (returns(lambda x: {"h": x}), lambda b, x: b(x)["h"], 1.0),
    "dataclass": (returns(Record), lambda b, x: b(x).hidden, 1.0),
    "keywords": (None, lambda b, x: b(x=x), 1.0),
    "checkpoint": (None, lambda b, x: checkpoint(b, x, use_reentrant=False), 1.0),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(name: str) -> None:
    how, call, scale = UNDERSTOOD[name]
    model = load(Own([Block(how) for _ in range(3)], call).train(), inputs=SIGNAL)
    assert [s.n_layers for s in model.anatomy.stacks] == [3]
    places = model.anatomy.stacks[0].blocks[1].places
    wanted = f"blocks.1.{scale}" if isinstance(scale, str) else scale
    assert places["attn_out"].scale == places["mlp_out"].scale == wanted
    assert places["attn_out"].module in ("blocks.1.attn", "blocks.1.dropout")
    assert places["attn_in"].module == "blocks.1.n1" and places["mlp_in"].module == "blocks.1.n2"
    assert places["mlp_act"].module == "blocks.1.mlp.down"
    assert "attn_out_2" not in places and "mlp_out_2" not in places


@pytest.mark.parametrize("name", ["tuple", "dict", "dataclass", "keywords"])
def test_what_is_put_there_is_what_runs_on(name: str) -> None:
    """An edit reaches the tensor inside whatever a block takes or gives, and leaves the rest as it is."""
    how, call, _ = UNDERSTOOD[name]
    module = Own([Block(how) for _ in range(2)], call)
    places = load(module, inputs=SIGNAL).anatomy.stacks[0].blocks[1].places
    for point in ("resid_pre", "resid_post"):
        zeros = torch.zeros(2, 13, D)
        with torch.no_grad(), tapped(module, [(places[point], torch.zeros_like)]) as taps:
            taps.begin()
            out = module(**SIGNAL)
            assert taps.fired == [1]
        with torch.no_grad():
            expected = zeros if point == "resid_post" else module.call(module.blocks[1], zeros)
        assert torch.equal(out, expected)


def test_stream_is_found_among_other_tensors_of_its_shape() -> None:
    """Positions come first, and what attention gave goes out first."""

    class Crowded(Block):
        def forward(self, positions: torch.Tensor, x: torch.Tensor) -> Any:
            return positions * 2, sums(plain)(self, x)

    module = Own([Crowded() for _ in range(2)], lambda b, x: b(torch.ones_like(x), x)[1])
    places = load(module, inputs=SIGNAL, blocks=["blocks", "blocks"]).anatomy.stacks[0].blocks[1].places
    assert (places["resid_pre"].path, places["resid_post"].path) == ((1,), (1,))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "clipped stream": (lambda b, x: sums(plain)(b, x).clamp(-0.05, 0.05), "off by"),
    "no residual": (lambda b, x: b.mlp(b.attn(x)), "cannot be followed"),
    "squared stream": (lambda b, x: x * x + b.m(x), "'mul'"),
    "turned stream": (sums(lambda b, x, y: x.flip(1) + y, plain), "'flip'"),
    "a matrix": (sums(lambda b, x, y: b.attn.proj(x) + y, plain), "no longer"),
    "raw write": (sums(lambda b, x, y: x + y.tanh(), plain), "tanh"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    how, why = REFUSED[name]
    with pytest.raises(ProofError, match=why):
        load(Own([Block(how) for _ in range(2)]), inputs=SIGNAL)


@pytest.mark.parametrize("n_tokens", [D, 2 * D, 3])
def test_as_many_tokens_as_features_is_no_attention(n_tokens: int) -> None:
    """A product over 16 features and one over 16 tokens look the same in the dataflow; the experiment tells."""
    model = load(Own([Block() for _ in range(2)]), inputs={"signal": torch.randn(2, n_tokens, 5)})
    places = model.anatomy.stacks[0].blocks[0].places
    assert (places["attn_out"].module, places["mlp_out"].module) == ("blocks.0.attn", "blocks.0.mlp")


class Recurrence(nn.Module):
    """Mixes tokens by additions only: a running mean of products of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.value, self.out = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.out((self.gate(y) * self.value(y)).cumsum(1))


def test_recurrence_is_token_mixing() -> None:
    places = load(Own([Recurrence() for _ in range(2)]), inputs=SIGNAL).anatomy.stacks[0].blocks[0].places
    assert places["ssm_out"].module == "blocks.0.out" and "mlp_out" not in places


def lone_mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(1, keepdim=True).expand_as(x)


def two_behind(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 2, 0))[:, :-2]


def norms_before(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1, keepdim=True).cumsum(1).expand_as(x)


MIXERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nothing": (lambda x: 0 * x, "mlp"),
    "itself": (lambda x: x.roll(3, -1), "mlp"),
    "1 % of the mean": (lambda x: 0.01 * lone_mean(x), "mixer"),
    "a part in 10,000 of the mean": (lambda x: 1e-4 * lone_mean(x), "mixer"),
    "running sum": (lambda x: 0.01 * x.cumsum(1), "ssm"),
    "what comes behind": (lambda x: 0.01 * x.flip(1).cumsum(1).flip(1), "ssm"),
    "the first token only": (lambda x: 0.01 * x[:, :1].expand_as(x), "mixer"),
    "the last token only": (lambda x: 0.01 * x[:, -1:].expand_as(x), "mixer"),
    "two positions before": (lambda x: 0.01 * two_behind(x), "conv"),
    "norms of tokens": (lambda x: 0.01 * norms_before(x), "ssm"),
}


class Mixer(nn.Module):
    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.mix = MLP(), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.mix(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("name", MIXERS)
def test_any_mixing_is_token_mixing_in_its_own_block(name: str, where: int, dtype: torch.dtype) -> None:
    """One block of three mixes tokens in what looks like an MLP; the others, of the same class, do not."""
    mix, kind = MIXERS[name]
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    for i, block in enumerate(blocks):
        block.mlp = Mixer(mix if i == where else MIXERS["nothing"][0])
    read = load(Own(blocks).to(dtype), inputs={"signal": torch.randn(2, 13, 5)}).anatomy.stacks[0].blocks
    kinds = [f"{kind}_out" if i == where else "mlp_out" for i in range(3)]
    assert [next(n for n, p in b.places.items() if p.module.endswith("mlp") and "_out" in n) for b in read] == kinds
    names = {"mlp": "attention", "mixer": "attention+other"}
    assert [b.mixer for b in read] == [names.get(k := n[:-4], f"attention+{k}") for n in kinds]


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layers(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 4, 32, batch_first=True, norm_first=norm_first)
    model = load(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), inputs={"src": torch.randn(2, 13, D)})
    assert model.anatomy.stacks[0].post_norm is not norm_first
    places = model.anatomy.stacks[0].blocks[2].places
    assert (places["attn_out"].module, places["mlp_out"].module) == ("layers.2.self_attn", "layers.2.linear2")


@pytest.mark.parametrize("n_memory", [11, 13])
def test_torch_decoder_layers(n_memory: int) -> None:
    """Cross-attention is told apart also where the other sequence is just as long."""
    module = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, 32, batch_first=True), 2)
    places = (
        load(module, inputs={"tgt": torch.randn(2, 13, D), "memory": torch.randn(2, n_memory, D)})
        .anatomy.stacks[0]
        .blocks[0]
        .places
    )
    outs = {name: place.module for name, place in places.items() if name.endswith("_out")}
    assert outs == {
        "attn_out": "layers.0.self_attn",
        "cross_attn_out": "layers.0.multihead_attn",
        "mlp_out": "layers.0.linear2",
    }


def test_tokens_first() -> None:
    """Inputs of (tokens, batch, width) are refused, since rows are sequences; blocks between transposes are read."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 32), 2, enable_nested_tensor=False)
    with pytest.raises(ProofError, match="batch_first=True"):
        load(encoder, inputs={"src": torch.randn(13, 2, D)})
    inside = Own([Block(tokens_first=True) for _ in range(2)], lambda b, x: b(x.transpose(0, 1)).transpose(0, 1))
    places = load(inside, inputs=SIGNAL).anatomy.stacks[0].blocks[0].places
    assert all(place.layout == TURNED for name, place in places.items() if "resid" in name or "_out" in name)


def test_shared_tied_and_adapted() -> None:
    """One block run three times; one MLP in two blocks; a low-rank update beside a projection."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 0.5 * self.up(self.down(x))

    shared = load(Own([Block()] * 3), inputs=SIGNAL).anatomy.stacks[0]
    assert [b.places["mlp_out"].call for b in shared.blocks] == [0, 1, 2]
    blocks = [Block(), Block()]
    blocks[1].mlp = blocks[0].mlp
    blocks[0].mlp.down = Adapted(blocks[0].mlp.down)
    tied = load(Own(blocks), inputs=SIGNAL).anatomy.stacks[0].blocks[1].places
    assert (tied["mlp_out"].module, tied["mlp_out"].call) == ("blocks.0.mlp", 1)
    assert tied["mlp_act"].module == "blocks.0.mlp.down.base"


class Pyramid(nn.Module):
    """Stages of blocks: the stages keep the shape of the stream, but the blocks are what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, D)
        self.stages = nn.ModuleList(nn.Sequential(Block(fused=True), Block(fused=True)) for _ in range(2))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        for stage in self.stages:
            x = stage(x)
        return x


class Group(nn.Module):
    """A residual connection around several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList([Block(fused=True), Block(fused=True)]), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + self.out(y)


def test_blocks_inside_stages_and_sequences() -> None:
    assert [(s.path, s.n_layers) for s in load(Pyramid(), inputs=SIGNAL).anatomy.stacks] == [
        ("stages.0", 2),
        ("stages.1", 2),
    ]
    groups = load(Own([Group(), Group()]), inputs=SIGNAL).anatomy.stacks
    assert [(s.path, s.n_layers) for s in groups] == [("blocks.0.layers", 2), ("blocks.1.layers", 2)]
    flat = nn.Sequential(nn.Linear(5, D), Block(), Block(), nn.LayerNorm(D), nn.Linear(D, 3))
    assert load(flat, inputs={"input": torch.randn(2, 13, 5)}).anatomy.stacks[0].n_layers == 2


def test_hooks_of_the_user_are_part_of_the_model() -> None:
    """A hook in front of a block changes what the block takes; one behind it changes what it gives."""
    module = Own([Block() for _ in range(2)])
    module.blocks[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    module.blocks[1].attn.register_forward_hook(lambda m, args, out: out * 1.5)
    load(module, inputs=SIGNAL)
    module.blocks[1].register_forward_hook(lambda m, args, out: out.tanh())
    with pytest.raises(ProofError, match=each("hooks", "own")):
        load(module, inputs=SIGNAL)


BAD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "wrong name": (lambda: Own([Block()]), {"sound": torch.randn(2, 13, 5)}, {}, "unexpected keyword"),
    "wrong shape": (lambda: Own([Block()]), {"signal": torch.randn(2, 13, 6)}, {}, "does not run"),
    "no dictionary": (lambda: Own([Block()]), torch.randn(2, 13, 5), {}, "not a dictionary"),
    "no path": (lambda: Own([Block()]), SIGNAL, {"blocks": 3}, "is no path"),
    "leaf": (lambda: Own([Block()]), SIGNAL, {"blocks": "embed"}, "No child"),
    "unbatched": (lambda: Own([Block()], lambda b, x: b(x[0])[None]), SIGNAL, {}, r"\(13, 16\)"),
    "never called": (lambda: Own([Block()], lambda b, x: b.forward(x)), SIGNAL, {}, "never called as modules"),
    "no values": (lambda: Own([Block()]).to("meta"), SIGNAL, {}, "holds no values"),
    "not known yet": (lambda: nn.Sequential(nn.LazyLinear(4)), {"input": torch.randn(2, 3)}, {}, "holds no values"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    build, inputs, options, why = BAD[name]
    with pytest.raises(UserError, match=why):
        load(build(), inputs=inputs, **options)


def test_mixed_precision_and_packed_weights() -> None:
    """The stream in float32 over sublayers in bfloat16, and a first parameter of integers."""
    how = sums(lambda b, x, y: x + y.float())
    blocks = [Block(how) for _ in range(2)]
    for block in blocks:
        block.a = lambda x, b=block: b.attn(b.n1(x).bfloat16())
        block.m = lambda x, b=block: b.mlp(b.n2(x).bfloat16())
        block.attn.bfloat16(), block.mlp.bfloat16()
    module = Own(blocks)
    module.packed = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model = load(module, inputs=SIGNAL)
    assert model.proof.dtype == "float32" and model.dtype is torch.float32
    assert model.proof.closure < model.proof.tolerance == 4 * torch.finfo(torch.bfloat16).eps


def test_bounds_that_are_infinite_are_no_broken_weights() -> None:
    module = Own([Block()])
    module.register_buffer("bound", torch.tensor(float("inf")))
    load(module, inputs=SIGNAL)
    module.bound.fill_(float("nan"))
    with pytest.raises(UserError, match="bound"):
        load(module, inputs=SIGNAL)


@pytest.mark.parametrize("context", [6, 12, 14])
def test_a_context_shorter_than_the_usual_example_is_proved(context: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=context, n_embd=16, n_layer=2, n_head=2)
    model = load(GPT2LMHeadModel(config))
    assert model.anatomy.stacks[0].n_layers == 2 and model.example["input_ids"].shape[1] <= context


class Pixels(nn.Module):
    """A convolution of an image, with as many in a list as there are blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(D, D, 3, padding=1), nn.BatchNorm2d(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Patched(nn.Module):
    """Convolutions, then blocks on the rows and columns of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.stem = nn.ModuleList(Pixels() for _ in range(3))
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for stage in self.stem:
            image = stage(image)
        x = image.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_list_of_convolutions_does_not_hide_the_blocks_behind_it() -> None:
    stacks = load(Patched().eval(), inputs={"image": torch.randn(2, D, 3, 5)}).anatomy.stacks
    assert [(stack.path, stack.n_layers) for stack in stacks] == [("layers", 3)]
