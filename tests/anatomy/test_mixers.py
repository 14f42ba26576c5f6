"""What mixes the tokens of each layer is told by how, for every family and for modules that nobody has seen before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from massact.models import load, with_attention
from massact.records.sites import MIXERS, Site, mixes
from tests.anatomy.test_own_modules import SIGNAL, Block, D, Own
from tests.hybrids import HYBRIDS, hybrid

KINDS = {label: kind for kind, label in MIXERS.items()}


@pytest.mark.parametrize("name", HYBRIDS)
def test_each_layer_says_what_mixes_its_tokens(name: str) -> None:
    model = with_attention(load(hybrid(name)))
    assert model.proof.outputs_identical and model.proof.closure <= model.proof.tolerance < 1e-5
    blocks = model.anatomy.stacks[0].blocks
    assert [b.mixer for b in blocks] == HYBRIDS[name][3]
    for block in blocks:
        kinds = {KINDS[label] for label in block.mixer.split("+") if label != "none"}
        named = {point.partition("_out")[0] for point in block.places if mixes(point)}
        # In Zamba 2 a scan reads what attention gives, and their block adds one tensor.
        assert named == kinds or (name.startswith("zamba") and named == kinds - {"attn"})
        assert {f"{kind}_in" for kind in named} <= set(block.places)
        site = Site("", block.layer, "attention")
        assert (site in model.anatomy.attentions) == ("attn" in kinds)
        assert ("attn_out" in block.unavailable) == ("attn_out" not in block.places)


# ------------------------------------------------------------------------------------------------ own modules
class Mixed(nn.Module):
    """Queries, keys, values and a positive step of each token, mixed by a function of them."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.step, self.proj, self.mix = nn.Linear(D, 3 * D), nn.Linear(D, 1), nn.Linear(D, D), mix
        self.conv, self.tokens = nn.Conv1d(D, D, 4, padding=3), nn.Parameter(torch.randn(13, 13))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.mix(self, q, k, v, F.softplus(self.step(x))))


def weigh(weights: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda m, q, k, v, s: weights(q @ k.transpose(-2, -1) / 4).tril() @ v


def scan(write: Callable[..., Tensor], keep: Callable[..., Tensor | float]) -> Callable[..., Tensor]:
    """One token after the other: S = keep S + k v, out = q S."""

    def mix(m: Mixed, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        state, out = torch.zeros(len(q), D, D), []
        for t in range(q.shape[1]):
            kept = torch.as_tensor(keep(s[:, t]))
            state = (kept[..., None] if kept.ndim else kept) * state + k[:, t, :, None] * write(v, s)[:, t, None]
            out.append((state * q[:, t, :, None]).sum(1))
        return torch.stack(out, 1)

    return mix


def decay(m: Mixed, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """One entry for each channel, kept in a tensor that is written token by token."""
    out, state = torch.zeros_like(v), torch.zeros_like(v[:, 0])
    for t in range(v.shape[1]):
        state = torch.exp(-s[:, t]) * state + v[:, t]
        out[:, t] = state
    return out


def convolved(m: Mixed, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return q * m.conv((k * v).transpose(1, 2))[..., :13].transpose(1, 2)


def doubled(m: Mixed, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Attention, and beside it linear attention, in one write."""
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v + scores.tril() @ v


def in_a_row(m: Mixed, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    v = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return (q @ k.transpose(-2, -1)).tril() @ v


OWN: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "softmax": (weigh(lambda s_BTS: s_BTS.softmax(-1)), "attn", "attention"),
    "softmax with a cap": (weigh(lambda s_BTS: (5 * torch.tanh(s_BTS / 5)).softmax(-1)), "attn", "attention"),
    "sigmoid of scores": (weigh(torch.sigmoid), "attn", "attention"),
    "squared scores": (weigh(lambda s_BTS: F.relu(s_BTS).square()), "attn", "attention"),
    "kernel": (lambda m, q, k, v, s: F.scaled_dot_product_attention(q, k, v), "attn", "attention"),
    "convolved keys": (
        lambda m, q, k, v, s: (q @ m.conv(k.transpose(1, 2))[..., :13]).softmax(-1) @ v, "attn", "attention"),
    "scores": (weigh(lambda s_BTS: s_BTS), "linear_attn", "linear_attn"),
    "features of keys": (
        lambda m, q, k, v, s: F.elu(q) @ (F.elu(k).transpose(-2, -1) @ v), "linear_attn", "linear_attn"),
    "softmax of features": (
        lambda m, q, k, v, s: q.softmax(-1) @ (k.softmax(1).transpose(-2, -1) @ v), "linear_attn", "linear_attn"),
    "state": (scan(lambda v, s: v, lambda s: 0.9), "linear_attn", "linear_attn"),
    "gated state": (scan(lambda v, s: v, lambda s: torch.exp(-s)), "linear_attn", "linear_attn"),
    "stepped state": (scan(lambda v, s: v * s, lambda s: torch.exp(-s)), "ssm", "ssm"),
    "a state for each channel": (decay, "ssm", "ssm"),
    "convolution": (convolved, "conv", "conv"),
    "a shift": (lambda m, q, k, v, s: q * F.pad(v, (0, 0, 1, 0))[:, :-1], "conv", "conv"),
    "weights over tokens": (lambda m, q, k, v, s: m.tokens @ v, "mixer", "other"),
    "a transform": (lambda m, q, k, v, s: torch.fft.fft(v, dim=1).real, "mixer", "other"),
    "both at once": (doubled, "mixer", "attention+linear_attn"),
    "one behind the other": (in_a_row, "linear_attn", "attention+linear_attn"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_own_mixers(name: str) -> None:
    mix, kind, label = OWN[name]
    torch.manual_seed(0)
    blocks = [Block(), Block()]
    blocks[1].attn = Mixed(mix)
    one, two = load(Own(blocks).eval(), inputs=SIGNAL).anatomy.stacks[0].blocks
    assert (one.mixer, two.mixer) == ("attention", label)
    assert [point for point in two.places if mixes(point)] == [f"{kind}_out"]
    assert two.places[f"{kind}_in"].module == "blocks.1.n1"
