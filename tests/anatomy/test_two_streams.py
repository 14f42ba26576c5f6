"""Blocks that hand on two streams: what a sublayer reads is the one it reads, and the stream left out is told."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import massact as ma
from massact.records.sites import Site
from massact.stats import Keep
from massact.trace import Probe, measure


class Sums(nn.Module):
    """Sums over the tokens so far, through a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD.cumsum(1))


class Block(nn.Module):
    """Reversible: the first stream gets what the mixer makes of the second, the second what the MLP makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(24), Sums(), nn.Linear(24, 24)

    def forward(self, one_BTD: Tensor, two_BTD: Tensor) -> tuple[Tensor, Tensor]:
        one_BTD = one_BTD + self.mixer(self.norm(two_BTD))
        return one_BTD, two_BTD + self.mlp(one_BTD)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.blocks = nn.Linear(5, 24), nn.ModuleList(Block() for _ in range(3))

    def forward(self, signal: Tensor) -> Tensor:
        one_BTD = two_BTD = self.enter(signal)
        for block in self.blocks:
            one_BTD, two_BTD = block(one_BTD, two_BTD)
        return one_BTD + two_BTD


def test_a_mixer_reads_the_stream_that_it_reads() -> None:
    net, signal = Net().eval(), torch.randn(2, 17, 5)
    model = ma.load(net, inputs={"signal": torch.randn(2, 13, 5)})
    read: list[Tensor] = []
    handles = [block.norm.register_forward_hook(lambda m, a, out: read.append(out)) for block in net.blocks]
    with torch.no_grad():
        net(signal)
    for handle in handles:
        handle.remove()
    corpus = ma.corpus({"signal": signal})
    seen = measure(model, corpus, [Probe("reads", "*.ssm_in", Keep)])
    assert len(seen.sites("reads")) == 3
    for layer, want in enumerate(read, 1):
        found = seen.result("reads", Site("", layer, "ssm_in")).values
        assert all(torch.equal(torch.as_tensor(x), y) for x, y in zip(found, want, strict=True))


def test_a_stream_that_is_not_measured_is_told() -> None:
    model = ma.load(Net().eval(), inputs={"signal": torch.randn(2, 13, 5)})
    assert model.anatomy.stacks[0].others == 1
    assert model.anatomy.stacks[0].others == 1 and any("2 streams" in note for note in model.anatomy.notes)
    assert ma.load().anatomy.stacks[0].others == 0
