"""The equations of the proof hold on the corpus that is measured, or the scan is refused: planted paths at length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import massact as ma
from massact.records.errors import MassactError, ProofError, WorkError
from massact.records.sites import Site
from massact.trace import tapped
from tests.families import build

D, L, SWITCH = 24, 4, 16


class Block(nn.Module):
    """Pre-LN; `way` says what the block does to a sequence of more than 16 tokens, with the same shapes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.m, self.n, self.k = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long = x.shape[1] > SWITCH
        mid = x + self.a(self.n(x))
        if long and self.way == "adds outside a module":
            mid = mid + 0.1 * torch.tanh(mid)
        if long and self.way == "cuts":
            return mid + torch.cat([self.m(part) for part in self.k(mid).split(SWITCH, 1)], 1)
        if long and self.way == "repeats the MLP":
            for _ in range(x.shape[1] // SWITCH):
                mid = mid + self.m(self.k(mid))
        return mid + self.m(self.k(mid))


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Linear(5, D), nn.LayerNorm(D)
        self.way, self.blocks = way, nn.ModuleList(Block(way if i == 2 else "") for i in range(L))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x, long = self.inp(signal), signal.shape[1] > SWITCH
        for i, block in enumerate(self.blocks):
            x = block(x)
            if long and self.way == "scales between" and i == 2:
                x = 0.5 * x
        if long and self.way == "loops over the blocks":
            for block in self.blocks:
                x = block(x)
        return self.out(x)


def signal(n: int, length: int) -> torch.Tensor:
    return torch.randn(n, length, 5, generator=torch.Generator().manual_seed(1))


def scanned(model: Any, corpus: Any, **options: Any) -> Any:
    return ma.scan(model, ma.corpus(corpus), null=False, **options)


PATHS = {
    "adds outside a module": (ProofError, "blocks.2.*layer 3.*at 20 tokens"),
    "scales between": (ProofError, "blocks.3.*layer 4.*blocks.2.*at 20 tokens"),
    "cuts": (ProofError, "blocks.2.*layer 3.*4, 24|16, 24"),
    "repeats the MLP": (MassactError, "blocks.2"),
    "loops over the blocks": (WorkError, "blocks.*ran 2 times in one pass, 1"),
}


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_another_path_of_the_same_shapes_is_refused_where_it_begins(way: str, batch_size: int) -> None:
    model = ma.load(Net(way), inputs={"signal": signal(2, 13)})
    scanned(model, {"signal": signal(3, SWITCH)})  # the path that was proved
    kind, said = PATHS[way]
    with pytest.raises(kind, match=said):
        scanned(model, {"signal": signal(3, 20)}, batch_size=batch_size)


def test_a_longer_batch_behind_a_short_one_is_looked_at() -> None:
    """Padding is cut off: the first batch runs 12 tokens, the second 20."""
    model = ma.load(build("llama"))
    ids, mask = torch.randint(3, 90, (4, 20)), torch.ones(4, 20, dtype=torch.long)
    mask[:2, 12:] = 0
    at = scanned(model, {"input_ids": ids, "attention_mask": mask}, batch_size=2).info.model["proof"]["at_length"]
    assert at["n_tokens"] == {"": 20}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma2", "falcon"])
def test_numbers_at_length_are_those_of_naive_float64_sums(name: str) -> None:
    model = ma.load(build(name))
    ids = torch.randint(3, 90, (3, 30), generator=torch.Generator().manual_seed(2))
    corpus = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    at = scanned(model, corpus, batch_size=2).info.model["proof"]["at_length"]
    kept: dict[Site, torch.Tensor] = {}
    places = model.anatomy.sites()
    taps = [(place, lambda h, s=site: kept.update({s: h.clone()})) for site, place in places.items()]
    with torch.inference_mode(), tapped(model.module, taps) as state:
        state.begin()
        model.run({k: v[:2] for k, v in corpus.items()}, places=places.values())
    worst, n_sums = 0.0, 0
    for stack in model.anatomy.stacks:
        n_sums += stack.n_layers - 1
        for block in stack.blocks:
            for s in block.sums:
                first = [kept[Site(stack.name, block.layer, p)][0].double() for p in (s.start, *s.writes, s.end)]
                off = (sum(first[:-1]) - first[-1]).abs() / sum(x.abs() for x in first)
                worst, n_sums = max(worst, float(off.nan_to_num().max())), n_sums + 1
    assert at["closure"] == pytest.approx(worst, rel=1e-9) and 0 < worst <= at["tolerance"] == model.proof.tolerance
    assert at["n_sums"] == n_sums and at["n_skipped"] == 0
    assert at["n_tokens"] == {s.name: 30 for s in model.anatomy.stacks}
    assert at["worst"].split(":")[0] in {b.module for s in model.anatomy.stacks for b in s.blocks}


def test_values_beyond_the_dtype_are_counted_not_refused() -> None:
    """A stream in fp16 that overflows adds up wherever it can be looked at; where not, the run says so."""
    net = Net("").half()
    with torch.no_grad():
        net.blocks[1].m.bias[3] += 60_000.0
        net.blocks[2].m.bias[3] += 60_000.0
    model = ma.load(Net("").half(), inputs={"signal": signal(2, 13)})
    model.module.load_state_dict(net.state_dict())
    info = scanned(model, {"signal": signal(2, 20)}).info
    assert info.model["proof"]["at_length"]["n_skipped"] > 0
    assert any("NaN or Inf" in note and "not checked" in note for note in info.notes)
