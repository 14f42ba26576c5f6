"""Rows that are no sequences and tokens that come and go are refused in the pass where they are seen."""

import numpy as np
import pytest
import torch
from torch import nn

import massact as ma
from massact.models import with_attention
from massact.records.errors import WorkError
from massact.stats.heads import HeadStats, Targets
from tests.facts import each


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.map(self.norm(x))


class _Net(nn.Module):
    """Four blocks; `way` says what happens to a sequence of more than 16 tokens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.embed, self.blocks = way, nn.Linear(5, 24), nn.ModuleList(_Block() for _ in range(4))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        if x.shape[1] > 16 and self.way == "streams":
            x = torch.cat([x, x])
        if x.shape[1] > 16 and self.way == "windows":  # the first axis is now that of windows
            x = x.reshape(-1, x.shape[1] // 2, 24)
        for i, block in enumerate(self.blocks):
            if i == 2 and x.shape[1] > 16 and self.way == "pools":
                x = x[:, ::2]
            x = block(x)
        return x


@pytest.mark.parametrize(("way", "said"), [("windows", "rows"), ("pools", "tokens"), ("streams", "rows")])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_another_path_above_some_length_is_refused(way: str, said: str, batch_size: int) -> None:
    model = ma.load(_Net(way), inputs={"signal": torch.randn(2, 13, 5)})
    ma.scan(model, ma.corpus({"signal": torch.randn(3, 16, 5)}), null=False)
    with pytest.raises(WorkError, match=said) as refusal:
        ma.scan(model, ma.corpus({"signal": torch.randn(3, 20, 5)}), null=False, batch_size=batch_size)
    assert "blocks." in refusal.value.what  # which module


class _Attention(nn.Module):
    """Causal attention; `more` times on a sequence of more than 16 tokens, in calls of the kernel of its own."""

    def __init__(self, more: int, within: bool) -> None:
        super().__init__()
        self.more, self.qkv = more, nn.Linear(24, 72)
        self.within = _Attention(1, False) if within else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for _ in range(self.more if x.shape[1] > 16 else 1):
            q, k, v = self.qkv(out)[:, None].chunk(3, -1)
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return out if self.within is None or x.shape[1] <= 16 else out + self.within(out)


class _Attends(nn.Module):
    def __init__(self, more: int, within: bool) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(more, within), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class _Attending(nn.Module):
    def __init__(self, more: int = 1, within: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, 24), nn.ModuleList(_Attends(more, within) for _ in range(3))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        for block in self.blocks:
            x = block(x)
        return x


def _heads(net: nn.Module, length: int) -> tuple[np.ndarray, torch.Tensor]:
    model = with_attention(ma.load(net, inputs={"signal": torch.randn(2, 13, 5)}))
    signal = torch.randn(3, length, 5)
    probe = ma.Probe("heads", "*.attention", lambda: HeadStats(Targets({}, {}, {})))
    seen = ma.measure(model, ma.corpus({"signal": signal}), [probe])
    return seen.result("heads", seen.sites("heads")[0]).per_head["mass_first"], signal


def test_a_module_that_attends_more_often_than_when_it_was_proved() -> None:
    _heads(_Attending(more=2), 16)
    with pytest.raises(WorkError, match=each("'blocks.0.attn'", "2 times", 1)) as refusal:
        _heads(_Attending(more=2), 20)
    assert "--seq-len" in refusal.value.do


def test_attention_of_a_module_inside_is_its_own() -> None:
    """A module inside attends as well above 16 tokens: the outer one is measured as before."""
    torch.manual_seed(0)
    net = _Attending(within=True)
    mass, signal = _heads(net, 20)
    with torch.no_grad():
        q, k, _ = net.blocks[0].attn.qkv(net.embed(signal)).double().chunk(3, -1)
        p = (q @ k.transpose(1, 2) / 24**0.5).masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).softmax(-1)
    np.testing.assert_allclose(mass[:, 0], p[:, 1:, 0].mean(1), rtol=1e-4)
