"""Terms of a stream: of any length and number of sequences, entry by entry, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import massact as ma
from massact.models import load
from massact.records.errors import ProofError, WorkError
from massact.stats import Keep
from massact.trace import Probe, measure
from tests.anatomy.test_own_modules import MLP, SIGNAL, Attention, Block, D, Own, plain, sums


def own(how: Callable[..., Any]) -> Own:
    torch.manual_seed(3)
    module = Own([Block(sums(how, plain)) for _ in range(2)]).eval()
    for block in module.blocks:
        block.gamma.data = torch.rand(D) + 0.2
        block.register_parameter("places", nn.Parameter(torch.rand(40, 1) + 0.2))
    return module


def kept(model: Any, signal: Tensor, site: str) -> Tensor:
    measured = measure(model, ma.corpus({"signal": signal}), [Probe("h", site, Keep)], batch_size=len(signal))
    return torch.from_numpy(np.stack(measured.result("h", measured.sites("h")[0]).values))


MOVED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "the sum of all tokens": lambda b, x, y: x + x.sum(1, keepdim=True) + y,
    "less the mean of its dims": lambda b, x, y: x - x.mean(-1, keepdim=True) + y,
    "the token before": lambda b, x, y: x + torch.cat([x[:, :1], x[:, :-1]], 1) + y,
    "halves of the dims change places": lambda b, x, y: torch.cat([x[..., D // 2 :], x[..., : D // 2]], -1) + y,
    "a write to the next token": lambda b, x, y: x + torch.cat([y[:, :1], y[:, :-1]], 1),
    "a write to other dims": lambda b, x, y: x + torch.cat([y[..., D // 2 :], y[..., : D // 2]], -1),
    "the mean of a write over tokens": lambda b, x, y: x + y.mean(1, keepdim=True),
    "what is written at the first token": lambda b, x, y: x + y[:, :1],
    "a write that gates itself": lambda b, x, y: x + y.sigmoid() * y,
    "a write over its own norm": lambda b, x, y: x + y / y.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_does_not_stay_at_its_token_and_dim_is_refused(name: str) -> None:
    """The sums of all of these hold; an edit of such a term would be made at another token or dim."""
    with pytest.raises(ProofError, match="blocks.0"):
        load(own(MOVED[name]), inputs=SIGNAL)


OF_LENGTH: dict[str, Callable[[Any, Tensor], Any]] = {
    "one over the position": lambda b, y: 1 / (1 + torch.arange(y.shape[1])[:, None]),
    "between two numbers": lambda b, y: torch.linspace(0.1, 1, y.shape[1])[:, None],
    "parameters of positions": lambda b, y: b.places[: y.shape[1]],
    "of a size": lambda b, y: torch.full((len(y), y.shape[1], 1), 0.5),
    "of the size of the stream": lambda b, y: 2 * torch.ones_like(y),
    "as many parameters as sequences": lambda b, y: b.gamma[:2].view(2, 1, 1, 1).sum(0),
}


@pytest.mark.parametrize("name", OF_LENGTH)
@pytest.mark.parametrize("n, T", [(1, 9), (5, 32)])
def test_factors_that_are_as_long_as_the_input(name: str, n: int, T: int) -> None:
    factor = OF_LENGTH[name]
    module = own(lambda b, x, y: x + factor(b, y) * y)
    model, signal = load(module, inputs=SIGNAL), torch.randn(n, T, 5)
    with torch.no_grad():
        y = module.blocks[0].a(module.embed(signal))
        assert torch.allclose(kept(model, signal, "1.attn_out"), factor(module.blocks[0], y) * y, atol=1e-6)


def test_a_length_that_is_not_told_is_an_error_and_no_traceback() -> None:
    model = load(own(lambda b, x, y: x + torch.arange(1.0, x.shape[1] + 1)[:, None] * y), inputs=SIGNAL)
    with pytest.raises(WorkError, match="13"):
        ma.scan(model, ma.corpus({"signal": torch.randn(1, 9, 5)}), null=False)


def test_what_attention_adds_twice_is_attention() -> None:
    places = load(own(lambda b, x, y: x + y + 0.3 * y), inputs=SIGNAL).anatomy.stacks[0].blocks[0].places
    assert [n for n in places if n.startswith("mlp_out")] == ["mlp_out"] and "attn_out_2" in places


# ---- several streams
class Mixed(nn.Module):
    """Reads n streams by one vector, mixes them by a matrix, and writes to them by another vector."""

    def __init__(self, n: int, how: str) -> None:
        super().__init__()
        self.how, self.n = how, n
        self.norms, self.layers = nn.ModuleList(nn.LayerNorm(D) for _ in "ab"), nn.ModuleList([Attention(), MLP()])
        self.read, self.write = nn.Parameter(torch.rand(2, n)), nn.Parameter(torch.rand(2, n))
        self.mix = nn.Parameter(torch.rand(2, n, n))

    def forward(self, h_BTnD: Tensor) -> Tensor:
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            y_BTD = layer(norm(torch.einsum("btnd,n->btd", h_BTnD, self.read[i])))
            if self.how == "einsum":
                h_BTnD = torch.einsum("btnd,nm->btmd", h_BTnD, self.mix[i]) + torch.einsum(
                    "btd,n->btnd", y_BTD, self.write[i]
                )
            elif self.how == "matmul":
                h_BTnD = self.mix[i].T @ h_BTnD + self.write[i].view(1, 1, -1, 1) * y_BTD.unsqueeze(2)
            else:
                h_BTnD = h_BTnD * self.mix[i, 0].view(1, 1, self.n, 1) + y_BTD[:, :, None] * self.write[i][:, None]
        return h_BTnD


class Streams(nn.Module):
    def __init__(self, n: int, how: str) -> None:
        super().__init__()
        self.enter, self.n, self.head = nn.Linear(5, D), n, nn.Linear(D, 3)
        self.blocks = nn.ModuleList(Mixed(n, how) for _ in range(2))

    def forward(self, signal: Tensor) -> Tensor:
        h_BTnD = torch.stack([(i + 1) * self.enter(signal) for i in range(self.n)], 2)
        for block in self.blocks:
            h_BTnD = block(h_BTnD)
        return self.head(F.layer_norm(h_BTnD.mean(2), (D,)))


@pytest.mark.parametrize(
    "how, n, example", [("einsum", 4, (2, 13)), ("einsum", 2, (2, 13)), ("matmul", 2, (2, 13)), ("scale", 2, (2, 2)),
                        ("scale", 4, (1, 13)), ("scale", 13, (2, 13))],
)  # fmt: skip
def test_streams_of_lengths_that_could_be_others(how: str, n: int, example: tuple[int, int]) -> None:
    """As many streams as sequences or tokens: what the second sublayer adds is right of other lengths, too."""
    torch.manual_seed(0)
    module = Streams(n, how).eval()
    model = load(module, inputs={"signal": torch.randn(*example, 5)}, blocks="blocks")
    block, held = module.blocks[0], list[Tensor]()
    for shape in ((1, 9), (5, 20)):
        signal = torch.randn(*shape, 5)
        handle = block.layers[1].register_forward_hook(lambda m, args, out: held.append(out))
        with torch.no_grad():
            module(signal)
        handle.remove()
        for k in (0, n - 1):
            found = kept(model, signal, f"stream_{k}/1.mlp_out")
            assert torch.allclose(found, held[-1] * block.write[1, k].detach(), rtol=1e-5, atol=1e-6)
        ma.scan(model, ma.corpus({"signal": signal}), null=False)
