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
from tests.facts import each

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


def rounded(dtype: torch.dtype, at: int | None = None, between: Callable[..., Any] = lambda net, x: x) -> Any:
    def step(net: Net, i: int, x: torch.Tensor) -> torch.Tensor:
        x = between(net, net.blocks[i](x))
        return x.to(dtype).to(x.dtype) if at in (None, i) else x

    return one_by_one(step)


def step_of(go: Callable[..., Any], layer: int, to: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Greatest difference that `to` makes to what a block gives on the example (as with hooks of our own)."""
    net, seen = Net(go), []
    net.blocks[layer - 1].register_forward_hook(lambda m, x, y: seen.append(y))
    with torch.no_grad():
        net(signal=torch.randn(2, 13, 5))
    return float((to(seen[0]) - seen[0]).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [1, LAYER])
def test_a_stream_that_is_rounded_between_blocks(dtype: torch.dtype, layer: int) -> None:
    """To which dtype, between which blocks, by how much."""
    go = rounded(dtype, layer - 1)
    torch.manual_seed(1)
    wanted = step_of(go, layer, lambda x: x.to(dtype).float())
    torch.manual_seed(1)
    net, signal = Net(go), torch.randn(2, 13, 5)
    with pytest.raises(ProofError, match=rf"\(layer {layer}\) and .*\(layer {layer + 1}\)") as error:
        ma.load(net, inputs={"signal": signal})
    what = error.value.what
    assert f"rounded to {str(dtype).removeprefix('torch.')}" in what
    assert float(what.split("by up to ")[1].split(",")[0]) == pytest.approx(wanted, rel=0.01)


def test_rounded_beside_an_addition_and_cut() -> None:
    """Also the sum with what a module adds there; a clamp is none."""
    torch.manual_seed(0)
    added = rounded(torch.bfloat16, between=lambda net, x: x + net.side(x))
    with pytest.raises(ProofError, match="rounded to bfloat16"):
        ma.load(Net(added), inputs={"signal": torch.randn(2, 13, 5)})
    cut = one_by_one(lambda net, i, x: net.blocks[i](x).clamp(-10, 10))
    with pytest.raises(ProofError, match=each("layer 2", "layer 3", "cut", 10)):
        ma.load(Net(cut), inputs={"signal": torch.randn(2, 13, 5)})


class Wide(Block):
    """Takes the stream in any dtype."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.float())


def test_a_stream_that_is_handed_on_in_16_bits() -> None:
    """What the refusal says to do: `resid_pre` is what the block reads, rounded; `resid_post` what it gives."""
    torch.manual_seed(0)
    net, signal = Net(one_by_one(lambda n, i, x: n.blocks[i](x).to(torch.bfloat16))), torch.randn(2, 13, 5)
    net.blocks, net.out = nn.ModuleList(Wide(lambda mid, new: new) for _ in range(L)), nn.Identity()
    model = ma.load(net, inputs={"signal": signal})
    scan = ma.scan(model, ma.corpus({"signal": signal}), null=False, bos_contrast=False)
    with torch.no_grad():
        x = net.inp(signal)
        for layer, block in enumerate(net.blocks, 1):
            h = block(x)
            assert scan.layers.set_index("layer")["max"][layer] == pytest.approx(float(h.abs().max()), rel=1e-5)
            x = h.to(torch.bfloat16)


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
