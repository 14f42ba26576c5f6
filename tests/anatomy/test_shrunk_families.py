"""Families that need something of their own, built tiny by the rules of `recipes/families`: proved, and searched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.interventions import massive, zero
from massact.models import Model
from massact.records.anatomy import TURNED, Block, Place
from massact.trace import unchanged
from massact.trace.watch import follow, replaced
from recipes.families.sweep import built, classes_of

OFF: dict[str, Any] = {"null": False, "bos_contrast": False}
POS, DIM, SIZE = 5, 7, 1e5


def _built(family: str, kind: str) -> nn.Module:
    return built(family, kind, classes_of(family)[kind], 0)


def _write_of(block: Block) -> Place:
    """Where what stands in the stream behind a block can be planted: its last write, or its last norm."""
    if "resid_post_prenorm" in block.places:
        return block.places["resid_post"]
    return next(block.places[w] for w in block.sums[-1].writes[::-1] if block.places[w].formula is None)


def _planted(module: nn.Module, place: Place, row: int) -> None:
    """A module that adds `SIZE` to one entry of what it gives; without anything of massact's."""

    def add(_: nn.Module, args: tuple, output: Any) -> Any:
        h = follow(output, place.path).clone()
        batch_first = h.transpose(0, 1) if place.layout == TURNED else h
        batch_first[row % len(batch_first), POS, DIM] += SIZE
        return replaced(output, place.path, h)

    module.get_submodule(place.module).register_forward_hook(add)


# family, kind, stacks by path, how blocks lay out their tensors
CASES = [
    ("fsmt", "encoder-decoder", ["model.encoder.layers", "model.decoder.layers"], True),
    ("xlnet", "causal", ["transformer.layer"], True),
    ("longcat_flash", "causal", ["model.layers"], False),
    ("rwkv", "causal", ["rwkv.blocks"], False),
    ("gpt_neox_japanese", "causal", ["gpt_neox_japanese.layers"], False),  # adds a bias that no module adds
]


@pytest.mark.parametrize("family, kind, paths, turned", CASES)
def test_proved_and_a_planted_activation_is_found(family: str, kind: str, paths: list[str], turned: bool) -> None:
    module = _built(family, kind)
    model = ma.load(module)
    assert sorted(s.path for s in model.anatomy.stacks) == sorted(paths)
    assert model.proof.closure <= model.proof.tolerance < 1e-5 and model.proof.outputs_identical
    assert {p.layout == TURNED for b in _blocks(model) for n, p in b.places.items() if n.startswith("resid")} == {
        turned
    }
    place = _write_of(model.anatomy.stacks[0].blocks[1])
    _planted(module, place, 1)
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    found = ma.scan(ma.load(module), {"input_ids": ids}, **OFF).findings
    stack = model.anatomy.stacks[0].name
    mine = found[(found["stack"] == stack) & (found.layer == 2)]
    assert set(zip(mine["sequence"], mine.pos, mine.dim, strict=True)) == {(1, POS, DIM)}
    assert mine.value.abs().min() > SIZE / 10


def _blocks(model: Model) -> list[Block]:
    return [block for stack in model.anatomy.stacks for block in stack.blocks]


class _Turned(nn.Module):
    """Takes (batch, tokens, width), and runs torch's own encoder layers as (tokens, batch, width)."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, norm_first=True, batch_first=batch_first)
            for _ in range(3)
        )
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x if self.batch_first else x.transpose(0, 1)


def test_turned_blocks_have_the_numbers_of_those_that_are_not() -> None:
    """The same weights in both layouts: one scan, edits at the same entries give the same effect."""
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(0))
    models = []
    for batch_first in (True, False):
        module = _Turned(batch_first).eval()
        models.append(ma.load(module, inputs={"x": x}))
    assert models[1].module.load_state_dict(models[0].module.state_dict())
    thresholds = {"magnitude": 0.0, "ratio": 3.0}
    plain, turned = (ma.scan(m, {"x": x}, thresholds=thresholds, **OFF) for m in models)
    columns = ["layer", "sequence", "pos", "dim"]
    assert len(plain.findings) and plain.findings[columns].equals(turned.findings[columns])
    assert torch.allclose(torch.tensor(plain.findings.value), torch.tensor(turned.findings.value), atol=1e-5)
    outs = []
    for model, scan in zip(models, (plain, turned), strict=True):
        with torch.no_grad(), unchanged(model.module), ma.edited(model, zero(massive(scan.findings, layer=1))):
            outs.append(model.module(x))
    assert torch.allclose(outs[0], outs[1], atol=1e-5)
    assert not torch.allclose(outs[0], models[0].module(x), atol=1e-2)


def test_a_model_that_writes_its_own_weights_is_run_as_it_would_be() -> None:
    """RWKV divides weights when it runs in evaluation mode for the first time: once, however many passes there are."""
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = _built("rwkv", "causal")(input_ids=ids, use_cache=False).logits
    module = _built("rwkv", "causal").train()
    for _ in range(3):
        with torch.no_grad(), unchanged(module, values=True):
            given = module(input_ids=ids, use_cache=False).logits
    assert torch.equal(given, wanted) and module.training and module.rwkv.layers_are_rescaled


@pytest.mark.parametrize("family", ["glm_image_vision", "qwen2_5_vl_vision"])
def test_a_tower_of_packed_patches_runs_alone(family: str) -> None:
    """What takes rows of patches of all images and their grid, whatever it calls them."""
    stacks = ma.load(_built(family, "other")).anatomy.stacks
    assert [stack.path for stack in stacks] == ["blocks"] and stacks[0].n_layers >= 2
