"""o_in: what attention's output projection reads, by the dataflow, beside what `with_attention` finds by values."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from massact.anatomy import example_inputs
from massact.models import Model, load, with_attention
from massact.records.sites import Site
from massact.stats.protocol import PerSequence, Where
from massact.trace import Edit, Probe, observing
from massact.variants.application import apply_variant
from tests.anatomy.test_own_modules import SIGNAL, Attention, Block, D, Own
from tests.families import FAMILIES, build

NO_ATTENTION = {("lfm2", 1), ("lfm2", 3), ("qwen3_next", 1), ("qwen3_next", 3)}  # a convolution, a recurrence
WINDOWS = {"swin"}  # rows of its projection are those of windows, not tokens
CHUNKS = {"longformer", "longt5"}  # its attention cannot be seen as one call


class Kept(PerSequence):
    def update(self, h_TD: Tensor, where: Where) -> None:
        self.rows[where.sequence] = h_TD.clone()


@cache
def read(name: str) -> Model:
    return with_attention(load(build(name)))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_is_found_by_the_values_of_the_heads(name: str) -> None:
    anatomy = read(name).anatomy
    for stack in anatomy.stacks:
        for block in stack.blocks:
            hidden = (name, block.layer) in NO_ATTENTION or name in WINDOWS
            assert ("o_in" in block.places) != ("o_in" in block.unavailable) == hidden
            assert ("cross_o_in" in block.places) == ("cross_attn_out" in block.places)
            for point, attention in (("o_in", "attention"), ("cross_o_in", "cross_attention")):
                place = anatomy.attentions.get(Site(stack.name, block.layer, attention))
                if place is None:
                    assert hidden or name in CHUNKS or point not in block.places
                elif name in WINDOWS:
                    assert place.projection is not None and place.projection.module.endswith("o_proj")
                elif place.projection is None:  # a gate lies between
                    assert name == "qwen3_next" and block.places[point].module.endswith("o_proj")
                else:
                    assert block.places[point] == place.projection


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_adds_what_is_made_of_it_alone(name: str) -> None:
    """Zero there leaves the projection's bias, the same for every token (where no norm of them all lies behind)."""
    model = read(name)
    inputs = example_inputs(model.module, seed=3)
    for stack in model.anatomy.stacks:
        block = stack.blocks[-1]
        if "o_in" not in block.places:
            continue
        site = f"{stack.name}/{block.layer}." if stack.name else f"{block.layer}."
        zero = Edit("zero", f"{site}o_in", lambda h, b: torch.zeros_like(h))
        spread = []
        for edits in ([], [zero]):
            with torch.no_grad(), observing(model, [Probe("out", f"{site}attn_out", Kept)], edits) as seen:
                model.module(**inputs)
            (kept,) = seen.statistics.values()
            spread += [max(float(h_TD.std(0).max()) for h_TD in kept.rows.values())]  # type: ignore[attr-defined]
        assert spread[1] < 1e-6 < spread[0]


# ------------------------------------------------------------------------------------------------ own modules
class Projected(Attention):
    """Attention with something else in place of its last projection."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.gate, self.other = how, nn.Linear(D, D), nn.Linear(D, D)
        self.norm, self.scale = nn.LayerNorm(D), nn.Parameter(torch.full((D,), 0.4))
        if how == "one module":
            self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v
        match self.how:
            case "one module":
                return F.linear(y, self.weight)
            case "gate":
                return self.proj(y * self.gate(x).sigmoid())
            case "norm behind":
                return self.norm(self.proj(y))
            case "two":
                left, right = (F.pad(part, (0, D // 2)) for part in y.chunk(2, -1))
                return self.norm(self.proj(left) + self.other(right))
            case "low rank":
                return self.norm(self.proj(y) + 0.5 * self.other(self.gate(y)))
            case "no softmax":
                return self.proj(q @ k.transpose(-2, -1) @ v)
        return self.norm(y)  # nothing projects


PLACES = {"gate": "attn.proj", "norm behind": "attn.proj", "low rank": "attn.proj",
          "one module": None, "two": None, "none": None}  # fmt: skip


@pytest.mark.parametrize("how", PLACES)
def test_only_what_reads_the_heads_is_called_so(how: str) -> None:
    blocks = [Block(), Block()]
    for block in blocks:
        block.attn = Projected(how)
    for block in load(Own(blocks).eval(), inputs=SIGNAL).anatomy.stacks[0].blocks:
        assert "attn_out" in block.places
        if PLACES[how] is None:
            assert "o_in" not in block.places and "projections" in block.unavailable["o_in"]
        else:
            assert block.places["o_in"].module == f"{block.module}.{PLACES[how]}"


def test_attention_without_a_softmax_is_linear() -> None:
    blocks = [Block(), Block()]
    blocks[1].attn = Projected("no softmax")
    one, two = load(Own(blocks).eval(), inputs=SIGNAL).anatomy.stacks[0].blocks
    assert (one.mixer, two.mixer) == ("attention", "linear_attn")
    assert two.places["linear_attn_out"].module == "blocks.1.attn" and "linear attention" in two.unavailable["o_in"]


def test_a_scale_or_dropout_behind_it_and_sublayers_in_parallel() -> None:
    for how in (
        lambda b, x: (y := x + b.gamma * b.a(x)) + b.m(y),
        lambda b, x: (y := x + b.dropout(b.a(x))) + b.m(y),
        lambda b, x: x + b.a(x) + b.m(x),
        lambda b, x: x + 0.5 * (b.a(x) + b.m(x)),
    ):
        anatomy = load(Own([Block(how), Block(how)]).eval(), inputs=SIGNAL).anatomy
        assert [str(b.places["o_in"]) for b in anatomy.stacks[0].blocks] == [
            f"blocks.{i}.attn.proj input[0]" for i in (0, 1)
        ]


def test_a_convolution_and_a_block_without_attention_have_none() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(D, D, 3, padding=1), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x.transpose(1, 2)).transpose(1, 2))

    blocks = [Block(), Block(), Block(lambda b, x: x + b.m(x))]
    blocks[1].attn = Convolution()
    one, two, three = load(Own(blocks).eval(), inputs=SIGNAL, blocks=["blocks"]).anatomy.stacks[0].blocks
    assert "o_in" in one.places
    assert "convolution" in two.unavailable["o_in"] and "no such sublayer" in three.unavailable["o_in"]


@pytest.mark.parametrize("variant", ["kv-bias", "sigmoid", "softmax-off-by-one", "gated-headwise"])
def test_attention_variants_have_it(variant: str) -> None:
    for block in load(apply_variant(build("llama"), variant)).anatomy.stacks[0].blocks:
        assert block.places["o_in"].module == f"{block.module}.self_attn.o_proj"
