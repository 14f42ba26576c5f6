"""Attention that a user writes out, by products or by einsum, is seen and proved; what is no attention is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.models import with_attention
from massact.stats import Where
from massact.stats.attention_call import Attended

HEADS, WIDTH = 4, 16


class _Attention(nn.Module):
    """Attention over (batch, tokens, heads, width), in one of several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.qkv, self.out, self.spelling = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), spelling

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, HEADS, WIDTH // HEADS).unbind(2)
        p = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        if self.spelling == "einsum":
            out = torch.einsum("b h i j, b j h d -> b i h d", p, v)
        elif self.spelling == "matmul":
            out = (p @ v.transpose(1, 2)).transpose(1, 2)
        else:  # one head's probabilities for all: no attention of several heads
            out = torch.einsum("bij,bjhd->bihd", p[:, 0].clone(), v)
        return self.out(out.reshape(B, T, WIDTH))


class _Block(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.attention, self.norm_1, self.norm_2 = _Attention(spelling), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class _Model(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(spelling) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Last:
    """Keeps the last call it saw."""

    def __init__(self) -> None:
        self.seen: list[Attended] = []

    def update(self, a: Attended, where: Where) -> None:
        self.seen.append(a)

    def merge(self, other: _Last) -> None:
        self.seen += other.seen


@pytest.mark.parametrize("spelling", ["einsum", "matmul"])
def test_written_out_attention_is_seen(spelling: str) -> None:
    """The probabilities are those of q and k, the values and the output those of the product."""
    torch.manual_seed(0)
    module, x = _Model(spelling).eval(), torch.randn(2, 13, WIDTH)
    model = with_attention(ma.load(module, inputs={"x": x}))
    assert [str(s) for s in model.anatomy.attentions] == ["1.attention", "2.attention"]
    seen = ma.measure(model, ma.corpus({"x": x}), [ma.Probe("calls", "1.attention", _Last)])
    calls = next(iter(seen.statistics.values())).seen  # type: ignore[attr-defined]
    with torch.no_grad():
        qkv = module.layers[0].attention.qkv(module.layers[0].norm_1(x)).view(2, 13, 3, HEADS, 4)
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))
        wanted = (q @ k.transpose(-1, -2)).softmax(-1)
    for b, a in enumerate(calls):
        torch.testing.assert_close(a.dense()[1], wanted[b])
        torch.testing.assert_close(a.out_HTF, wanted[b] @ v[b])
        torch.testing.assert_close(a.columns()[0], wanted[b].sum(1))


def test_another_contraction_is_unavailable() -> None:
    """What is not probabilities of every head times values is not taken for attention."""
    torch.manual_seed(0)
    model = with_attention(ma.load(_Model("shared").eval(), inputs={"x": torch.randn(2, 13, WIDTH)}))
    assert not model.anatomy.attentions and len(model.anatomy.no_attention) == 2
