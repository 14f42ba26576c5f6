"""Streams that are no plain sums: scaled by constants, parameters or gates, normalised first; against sums by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.models import load
from massact.records.errors import ProofError, WorkError
from massact.records.sites import Site
from massact.stats import Keep
from massact.trace import Edit, Probe, measure
from tests.anatomy.test_own_modules import SIGNAL, Block, D, Own, plain, sums
from tests.facts import each, tells
from tests.families import G, build_as


class Gated(Block):
    """A gate for each token that the model computes, as in diffusion transformers and gated cross-attention."""

    def __init__(self, how: Callable[..., Any] | None = None) -> None:
        super().__init__(how)
        self.gate, self.adaptive = nn.Linear(D, 1), nn.Linear(D, 2 * D)


def adaptive(block: Gated, x: Tensor) -> Tensor:
    one, two = block.adaptive(x.mean(1)).unsqueeze(1).chunk(2, dim=-1)
    x = x + one * block.a(x)
    return x + two * block.m(x)


# name -> (how the sublayers are put together, times what the stream goes into its first sum, and what attention adds)
SCALED: dict[str, tuple[Callable[..., Any], Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "half the stream": (sums(lambda b, x, y: 0.5 * x + y, plain), lambda b, x: 0.5, lambda b, x: 1.0),
    "twice": (sums(lambda b, x, y: (x + x) + y, plain), lambda b, x: 2.0, lambda b, x: 1.0),
    "parameters": (sums(lambda b, x, y: b.gamma * x + y), lambda b, x: b.gamma, lambda b, x: 1.0),
    "around the sum": (sums(lambda b, x, y: b.gamma * (x + y)), lambda b, x: b.gamma, lambda b, x: b.gamma),
    "two scales": (sums(lambda b, x, y: x + 0.5 * (b.gamma * y), plain), lambda b, x: 1, lambda b, x: 0.5 * b.gamma),
    "divided": (sums(lambda b, x, y: (x + y) / math.sqrt(2)), lambda b, x: 0.5**0.5, lambda b, x: 0.5**0.5),
    "in place": (lambda b, x: sums(plain, lambda b, x, y: (x + y).mul_(0.7))(b, x), lambda b, x: 1, lambda b, x: 1),
    "tanh of a parameter": (sums(lambda b, x, y: x + b.gamma.tanh() * y), lambda b, x: 1, lambda b, x: b.gamma.tanh()),
    "one call": (sums(lambda b, x, y: torch.addcmul(x, b.gamma, y, value=0.5)), lambda b, x: 1,
                 lambda b, x: 0.5 * b.gamma),
    "between": (sums(lambda b, x, y: torch.lerp(x, y, b.gamma)), lambda b, x: 1 - b.gamma, lambda b, x: b.gamma),
    "what is left": (sums(lambda b, x, y: (1 - b.gamma) * x + y), lambda b, x: 1 - b.gamma, lambda b, x: 1.0),
    "a gate": (sums(lambda b, x, y: x + b.gate(x).sigmoid() * y), lambda b, x: 1, lambda b, x: b.gate(x).sigmoid()),
    "a gate of the stream": (
        sums(lambda b, x, y: b.gate(x).sigmoid() * x + y), lambda b, x: b.gate(x).sigmoid(), lambda b, x: 1.0),
    "adaptive": (adaptive, lambda b, x: 1.0, lambda b, x: b.adaptive(x.mean(1)).unsqueeze(1)[..., :D]),
}  # fmt: skip


def own(how: Callable[..., Any], n: int = 3) -> Own:
    torch.manual_seed(3)
    module = Own([Gated(how) for _ in range(n)]).eval()
    for block in module.blocks:
        block.gamma.data = torch.rand(D) + 0.2
    return module


def seen(model: Any, signal: Tensor, *sites: str) -> list[Tensor]:
    measured = measure(model, ma.corpus({"signal": signal}), [Probe(s, s, Keep) for s in sites], batch_size=2)
    return [torch.from_numpy(np.stack(measured.result(s, measured.sites(s)[0]).values)) for s in sites]


@pytest.mark.parametrize("name", SCALED)
def test_terms_of_the_sum_are_those_by_hand(name: str) -> None:
    """On another batch of another length than the one that they were found on."""
    how, kept, added = SCALED[name]
    module = own(how)
    model = load(module, inputs=SIGNAL)
    signal = torch.randn(3, 21, 5)
    block = module.blocks[1]
    places = model.anatomy.stacks[0].blocks[1].places
    start = "2.resid_scaled" if "resid_scaled" in places and name != "in place" else "2.resid_pre"
    with torch.no_grad():
        x = module.blocks[0](module.embed(signal))
        wanted = kept(block, x) * x, added(block, x) * block.a(x)
    found = seen(model, signal, start, "2.attn_out")
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a.reshape(b.shape).double(), b.double(), rtol=1e-5, atol=1e-6)


def test_a_sum_of_a_scaled_middle() -> None:
    """The factor of the second sum is found as well as that of the first."""
    module = own(SCALED["in place"][0])
    places = load(module, inputs=SIGNAL).anatomy.stacks[0].blocks[0].places
    assert "resid_mid" in places and "resid_scaled" in places
    x, mid, kept, post = seen(load(module, inputs=SIGNAL), torch.randn(1, 9, 5), "1.resid_pre", "1.resid_mid",
                              "1.resid_scaled", "1.resid_post")  # fmt: skip
    assert torch.allclose(kept, 0.7 * mid, rtol=1e-6) and not torch.equal(post, mid + x)


def norm_first(block: Block, x: Tensor) -> Tensor:
    y = block.n1(x)
    y = block.n2(0.8 * y + 1.3 * block.attn(y))
    return 1.5 * y + block.mlp(y)


def test_a_norm_before_anything_is_added() -> None:
    model = load(own(norm_first), inputs=SIGNAL)
    block = model.anatomy.stacks[0].blocks[0]
    order = [(change.start, change.how) for change in block.changes]
    assert order == [
        ("resid_pre", "norm"),
        ("resid_normed", "scale"),
        ("resid_mid_prenorm", "norm"),
        ("resid_mid", "scale"),
    ]
    assert block.places["attn_out"].formula is not None and block.places["mlp_out"].formula is None


@pytest.mark.parametrize("name", ["two scales", "around the sum", "adaptive"])
def test_an_edit_of_a_scaled_write_changes_what_is_added(name: str) -> None:
    """Zero of what attention adds: the block goes on as if attention gave nothing."""
    how = SCALED[name][0]
    module = own(how)
    model = load(module, inputs=SIGNAL)
    signal = torch.randn(2, 11, 5)
    with torch.no_grad(), ma.edited(model, Edit("none", "2.attn_out", lambda h, _: torch.zeros_like(h))):
        edited = module(signal)
    handle = module.blocks[1].attn.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    with torch.no_grad():
        wanted = module(signal)
    handle.remove()
    assert torch.allclose(edited, wanted, atol=1e-6)


def test_an_edit_of_what_goes_on_of_the_stream_is_refused() -> None:
    module = own(SCALED["half the stream"][0])
    model = load(module, inputs=SIGNAL)
    with torch.no_grad(), pytest.raises(WorkError):
        with ma.edited(model, Edit("none", "2.resid_scaled", lambda h, _: torch.zeros_like(h))):
            module(torch.randn(2, 11, 5))


def test_a_stream_that_is_only_multiplied_has_nothing_to_account_for() -> None:
    for how in (lambda b, x, y: x * (1 + y), lambda b, x, y: x + x * y):
        with pytest.raises(ProofError, match=each("times", "adds nothing")) as refused:
            load(own(sums(how)), inputs=SIGNAL)
        assert not tells(refused.value.do, "wrap")


CUTS: dict[str, tuple[Callable[..., Any], str, float]] = {
    "the stream": (lambda b, x: sums(plain)(b, x).clamp(-50, 50), "resid_post", 50),
    "a scaled stream": (lambda b, x: sums(lambda b, x, y: b.gamma * x + y)(b, x).clamp(-60, 60), "resid_post", 60),
    "the middle": (sums(lambda b, x, y: (x + y).clamp(-70, 70), plain), "resid_mid", 70),
    "a write": (sums(plain, lambda b, x, y: x + y.clamp(max=80)), "mlp_out", 80),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_clamp_that_cuts_nothing_in_the_proof_is_told(name: str) -> None:
    """And where it cuts a later sequence; that no equation is looked at there must not pass in silence."""
    how, point, bound = CUTS[name]
    model = load(own(how), inputs=SIGNAL)
    assert [list(block.cuts) for block in model.anatomy.stacks[0].blocks] == [[point]] * 3
    assert all(abs(block.cuts[point][1]) == bound for block in model.anatomy.stacks[0].blocks)
    signal = torch.randn(4, 9, 5)
    quiet = ma.scan(model, ma.corpus({"signal": signal}), null=False)
    assert len(tells(quiet.info.notes, point, "clamp", bound)) == 1 and not tells(quiet.info.notes, "reaches")
    signal[2, 3] *= 1e5
    loud = ma.scan(model, ma.corpus({"signal": signal}), null=False)
    assert len(tells(loud.info.notes, "reaches", bound, "1 sequence", "Layers 1-3")) == (point == "resid_post")


# ---- families of transformers that do so
FACTORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "doge": ("DogeConfig", G, "DogeForCausalLM"),
    "minimax": ("MiniMaxConfig", G | dict(
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, linear_attn_alpha_factor=1.3,
        linear_attn_beta_factor=0.7, full_attn_alpha_factor=1.2, mlp_alpha_factor=1.5, mlp_beta_factor=0.6,
        layer_types=["full_attention", "linear_attention", "full_attention"]), "MiniMaxForCausalLM"),
    "gemma4": ("Gemma4TextConfig", G | dict(
        head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=99, sliding_window=8,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention", "full_attention"]),
        "Gemma4ForCausalLM"),
    "zaya": ("ZayaConfig", G | dict(head_dim=8, num_experts=4), "ZayaForCausalLM"),
}  # fmt: skip


def planted(_: nn.Module, args: tuple, out: Any) -> Any:
    """Something large at the first token of what a module gives."""
    first = (out[0] if isinstance(out, tuple) else out).clone()
    first[:, 0, 5] += 1e5
    return (first, *out[1:]) if isinstance(out, tuple) else first


@pytest.mark.parametrize("name", FACTORS)
def test_families_that_scale_their_stream(name: str) -> None:
    """Factors that a random model has at one are moved away from it; something large is found where it was added."""
    module = build_as(*FACTORS[name], moved=True)
    write = {"gemma4": "post_attention_layernorm", "minimax": "mlp"}.get(name, "self_attn")
    getattr(module.model.layers[1], write).register_forward_hook(planted)
    model = load(module)
    block = model.anatomy.stacks[0].blocks[0]
    assert any(change.how == "scale" for change in block.changes)
    scan = ma.scan(model, ma.corpus(torch.randint(3, 99, (2, 24))), null=False)
    massive = scan.findings[scan.findings["layer"] == 2]
    assert set(massive["dim"]) == {5} and set(massive["pos"]) == {0}


def test_a_spike_that_only_grew_by_a_scale_is_told_from_one_that_was_written() -> None:
    class Adds(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.linear, self.value = nn.Linear(D, D), value
            nn.init.normal_(self.linear.weight, std=1e-3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.linear(x)
            out[:, 0, 5] += self.value
            return out

    class Scaled(nn.Module):
        def __init__(self, scale_D: Tensor, value: float) -> None:
            super().__init__()
            self.scale, self.adds = nn.Parameter(scale_D), Adds(value)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x + self.adds(x)

    up_D = torch.ones(D)
    up_D[5] = 2000.0
    module = Own([Scaled(torch.ones(D) * 1.1, 40.0), Scaled(up_D, 0.0), Scaled(torch.ones(D) * 1.1, 0.0)])
    model = load(module, inputs=SIGNAL)
    corpus = ma.corpus({"signal": torch.randn(4, 16, 5) * 0.1})
    scan = ma.scan(model, corpus, null=False)
    why = ma.explain(model, corpus, scan)
    mine = why.writers[why.writers["dim"] == 5]
    mine = mine[mine["position_class"] == mine["position_class"].iloc[0]].set_index(["layer", "submodule"])
    assert mine.loc[(2, "scale"), "share"] > 0.85 and mine.loc[(2, "scale"), "role"] == "up"
    assert abs(mine.loc[(1, "mlp_out"), "write"] - 40) < 1 and mine.loc[(1, "mlp_out"), "share"] < 0.01
    assert Site("", 2, "resid_scaled") in model.anatomy.sites()
