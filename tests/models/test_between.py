"""What happens to the stream between blocks is named, said or refused; a planted spike is told at its own layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import massact as ma
from massact.records.errors import ProofError
from massact.records.sites import Site

D, L, LAYER, DIM, SPIKE = 24, 4, 2, 7, 5000.0


class Block(nn.Module):
    """Pre-LN; gives what `gives` makes of the stream before and after its MLP."""

    def __init__(self, gives: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.m, self.n, self.k = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.gives = gives

    def forward(self, x: torch.Tensor) -> Any:
        mid = x + self.a(self.n(x))
        return self.gives(mid, mid + self.m(self.k(mid)))


class Net(nn.Module):
    """Four blocks, put together by `go` (net, x) -> x; the MLP of the second writes a massive value."""

    def __init__(self, go: Callable[..., Any], gives: Callable[..., Any] = lambda mid, new: new) -> None:
        super().__init__()
        self.inp, self.out, self.side = nn.Linear(5, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.blocks, self.go = nn.ModuleList(Block(gives) for _ in range(L)), go
        with torch.no_grad():
            self.blocks[LAYER - 1].m.bias[DIM] += SPIKE

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.go(self, self.inp(signal))


def one_by_one(step: Callable[..., Any]) -> Callable[..., Any]:
    """All blocks in a row; `step` (net, i, x) runs the i-th one."""

    def go(net: Net, x: torch.Tensor) -> torch.Tensor:
        for i in range(L):
            x = step(net, i, x)
        return net.out(x)

    return go


def u_net(net: Net, x: torch.Tensor) -> torch.Tensor:
    first = net.blocks[0](x)
    second = net.blocks[1](first)
    third = net.blocks[2](second)
    return net.out(net.blocks[3](third + first))


def merged(net: Net, i: int, x: torch.Tensor) -> torch.Tensor:
    return net.blocks[i](x if i == 0 else x + net.side(x))


def lambdas(net: Net, x: torch.Tensor) -> torch.Tensor:
    start = x
    for i in range(L):
        x = net.blocks[i](0.9 * x + 0.1 * start)
    return net.out(x)


def normed(net: Net, i: int, x: torch.Tensor) -> torch.Tensor:
    return net.blocks[i](net.out(x) if i else x)


def early_exit(net: Net, x: torch.Tensor) -> torch.Tensor:
    seen = []
    for block in net.blocks:
        x = block(x)
        seen.append(x)
    return net.out(seen[2])


# how the blocks are put together, what they give, sites between_out that there must be (layers), what the notes say
NAMED: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[int], list[str]]] = {
    "plain": (one_by_one(lambda net, i, x: net.blocks[i](x)), lambda mid, new: new, [], []),
    "second of two": (one_by_one(lambda net, i, x: net.blocks[i](x)[1]), lambda mid, new: (mid, new), [], []),
    "first of two": (one_by_one(lambda net, i, x: net.blocks[i](x)[0]), lambda mid, new: (new, mid), [], []),
    "in a view": (one_by_one(lambda net, i, x: net.blocks[i](x)["b"].view(-1, D).view(x.shape)),
                  lambda mid, new: {"a": mid, "b": new}, [], []),
    "u-net": (u_net, lambda mid, new: new, [4], ["3 and 4"]),
    "added": (one_by_one(merged), lambda mid, new: new, [2, 3, 4], ["1 and 2; 2 and 3; 3 and 4"]),
    "lambdas": (lambdas, lambda mid, new: new, [], ["1 and 2; 2 and 3; 3 and 4", "scaled", "added"]),
    "scaled": (one_by_one(lambda net, i, x: net.blocks[i](x) * 0.5), lambda mid, new: new, [],
               ["1 and 2; 2 and 3; 3 and 4", "scaled", "Behind the last layer"]),
    "normed": (one_by_one(normed), lambda mid, new: new, [], ["1 and 2; 2 and 3; 3 and 4", "'out' (LayerNorm)"]),
    "early exit": (early_exit, lambda mid, new: new, [], ["Behind the last layer", "nothing that the model gives"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_planted_spike_is_told_at_its_layer(name: str) -> None:
    go, gives, between, said = NAMED[name]
    torch.manual_seed(0)
    net = Net(go, gives)
    model = ma.load(net, inputs={"signal": torch.randn(2, 13, 5)})
    stack = model.anatomy.stacks[0]
    assert [b.layer for b in stack.blocks if "between_out" in b.places] == between
    signal = torch.randn(2, 20, 5)
    corpus = ma.corpus({"signal": signal})
    result = ma.scan(model, corpus, null=False, bos_contrast=False)

    # the oracle: what each block hands to what comes next, seen by hooks of our own
    truth: list[torch.Tensor] = []
    handles = [b.m.register_forward_hook(lambda m, x, y: truth.append(y)) for b in net.blocks]
    mids: list[torch.Tensor] = []
    handles += [b.k.register_forward_pre_hook(lambda m, x: mids.append(x[0])) for b in net.blocks]
    with torch.no_grad():
        net(signal=signal)
    for handle in handles:
        handle.remove()
    highest = [float((mid + write).abs().max()) for mid, write in zip(mids, truth, strict=True)]
    mine = result.layers[result.layers.layer > 0]["max"].to_numpy()
    assert mine == pytest.approx(highest, rel=1e-5)
    assert (mine[: LAYER - 1] < 100).all() and mine[LAYER - 1] > SPIKE / 2
    found = result.findings
    assert found.layer.min() == LAYER and set(found.dim) == {DIM}
    notes = " ".join(result.info.notes)
    assert all(word in notes for word in said)
    assert ("etween layers" in notes) == bool(said and said[0][0].isdigit())


@pytest.mark.parametrize("name", [n for n in NAMED if n != "early exit"])
def test_the_account_of_writers_closes(name: str) -> None:
    """Embedding + all writes + all that happens between = the value at the end, and the MLP of layer 2 wrote it."""
    go, gives, between, _ = NAMED[name]
    torch.manual_seed(0)
    model = ma.load(Net(go, gives), inputs={"signal": torch.randn(2, 13, 5)})
    corpus = ma.corpus({"signal": torch.randn(2, 20, 5)})
    why = ma.explain(model, corpus, ma.scan(model, corpus, null=False, bos_contrast=False))
    accounts = why.writers[why.writers.dim == DIM].groupby("position_class")
    assert len(accounts) == 2
    for _, mine in accounts:
        assert list(mine[mine.write > SPIKE / 2].layer)[0] == LAYER
        wrote = mine[(mine.layer == LAYER) & (mine.write > SPIKE / 2)]
        assert list(wrote.module) == ["blocks.1.m"]
        assert list(mine[mine.submodule == "between_out"].layer) == between
    assert max(why.info.closure.values()) < 1e-5


def heads(net: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([block(x) for block in net.blocks]).sum(0)


def twice(net: Net, x: torch.Tensor) -> torch.Tensor:
    return one_by_one(lambda n, i, y: n.blocks[i](y))(net, x) + one_by_one(lambda n, i, y: n.blocks[i](y))(net, -x)


def pooled(net: Net, i: int, x: torch.Tensor) -> torch.Tensor:
    return net.blocks[i](x if i != 2 else (x[:, :-1:2] + x[:, 1::2]) / 2)


def behind_the_back(net: Net, i: int, x: torch.Tensor) -> torch.Tensor:
    x = net.blocks[i](x)
    x.view(-1, D)[:, 3] += 1.0  # a view: the tensor itself is not seen to change
    return x


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "heads": (heads, "'blocks.1' takes in is not made from what 'blocks.0' gives"),
    "twice": (twice, "'blocks.0' takes in is not made from what 'blocks.3' gives"),
    "pooled": (one_by_one(pooled), r"'blocks.1' \(layer 2\) and block 'blocks.2' \(layer 3\) .* from \(2, 13, 24\) to"),
    "behind its back": (one_by_one(behind_the_back), r"'blocks.1' \(layer 2\) does not take in what block 'blocks.0'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_lies_between(name: str) -> None:
    go, why = REFUSED[name]
    with pytest.raises(ProofError, match=why):
        ma.load(Net(go), inputs={"signal": torch.randn(2, 13, 5)})


def test_skips_are_known() -> None:
    """Where an early block is read again, no run may start in the middle."""
    for go, skips in ((u_net, True), (NAMED["plain"][0], False), (lambdas, False)):
        model = ma.load(Net(go), inputs={"signal": torch.randn(2, 13, 5)})
        assert model.anatomy.stacks[0].skips is skips


def test_what_is_added_between_is_a_site() -> None:
    model = ma.load(Net(u_net), inputs={"signal": torch.randn(2, 13, 5)})
    place = model.anatomy.sites()[Site("", 4, "between_out")]
    assert (place.module, place.side) == ("blocks.0", "out")
