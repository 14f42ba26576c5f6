"""Attention with scores of about 1,000: what rounding explains is taken, what it does not explain is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from massact.explanations.job import _check_parts
from massact.models import attention_proof, load, with_attention
from massact.records.anatomy import AttentionPlace
from massact.records.errors import WorkError
from massact.records.sites import Site
from massact.stats import Where
from massact.stats.attention_call import rounding_allowed
from massact.stats.heads import HeadOptions, HeadStats, Targets
from tests.facts import each

SMALL: dict[str, Any] = dict(
    vocab_size=120, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def sharp(how: str, dtype: torch.dtype, size: float, family: str = "llama") -> torch.nn.Module:
    """A tiny model whose queries and keys are so large that its greatest scores are about 3 size^2."""
    torch.manual_seed(0)
    if family == "gpt_oss":
        more = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=64)
        net: Any = GptOssForCausalLM(GptOssConfig(**SMALL, **more, attn_implementation=how))
    else:
        net = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=how))
    with torch.no_grad():
        for layer in net.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.normal_(std=0.125 * size)
            layer.self_attn.v_proj.weight.normal_(std=0.125)
            if family == "gpt_oss":
                layer.self_attn.sinks.normal_(std=20 * size**2)
    return net.eval().to(dtype)


def events(net: torch.nn.Module) -> list[Any]:
    found, _, reason = attention_proof._events(load(net))
    assert len(found) == 2, reason
    return found


def place_of(event: Any) -> AttentionPlace | str:
    """The place of a call; of one that is not in windows the model is not asked."""
    return attention_proof._place(event, torch.nn.Module())


def greatest(event: Any) -> float:
    call = event.call
    guess = AttentionPlace(*event.key, call.via, call.shape[1], 2, False, True, False, None)
    s, p = call.of(0, guess).dense()
    return float(s[p > 0].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_large_scores_are_only_rounding(how: str, dtype: torch.dtype) -> None:
    net = sharp(how, dtype, size=16.0)
    assert max(map(greatest, events(net))) > 700
    anatomy = with_attention(load(net)).anatomy
    assert not anatomy.no_attention and len(anatomy.attentions) == 2


@pytest.mark.parametrize("how", ["eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learned_sinks_beside_large_scores(how: str, dtype: torch.dtype) -> None:
    anatomy = with_attention(load(sharp(how, dtype, 4.0, "gpt_oss"))).anatomy
    assert not anatomy.no_attention and len(anatomy.attentions) == 2


def mutants(event: Any) -> dict[str, Any]:
    call = event.call
    T = call.shape[2]
    some = torch.zeros(1, 1, T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).tril().logical_not(), -torch.inf)
    some[..., 3:, 1] = -torch.inf  # one key hidden from most
    biased = torch.where(some.isinf(), some, torch.arange(T).float() * 2.0)
    seen = {
        "no scale": replace(call, scale=1.0),
        "scale off by a tenth": replace(call, scale=call.scale * 1.1),
        "no mask": replace(call, mask=None, causal=False),
        "another mask": replace(call, mask=some, causal=False),
        "a bias that is not there": replace(call, mask=biased, causal=False),
    }
    seen = {k: replace(c, lse_BHT=None) for k, c in seen.items()}
    if call.sink_H is not None:
        seen["no sink"] = replace(call, sink_H=None)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("size", [1.0, 7.0])
def test_what_is_wrong_is_refused_however_large_the_scores_are(size: float, family: str) -> None:
    """In one layer at least: where every row is at one key alone, the output does not tell one scale from another."""
    found = events(sharp("eager", torch.float32, size, family))
    assert all(isinstance(place_of(event), AttentionPlace) for event in found)
    wrong = [{name: place_of(replace(e, call=call)) for name, call in mutants(e).items()} for e in found]
    for name in wrong[0]:
        assert any(isinstance(layer[name], str) for layer in wrong), name


def test_what_half_precision_sees() -> None:
    """16 eps of bfloat16 are 12.5 % of the output: a gross mistake is refused, a scale off by a tenth is not seen.

    In eager attention the softmax's input itself is seen: only what is beside it (a sink) can be read wrongly.
    """
    for event in events(sharp("sdpa", torch.bfloat16, 1.0)):
        right = place_of(event)
        assert isinstance(right, AttentionPlace) and right.error < 0.005 and right.allowed == 0.125
        read = {name: place_of(replace(event, call=call)) for name, call in mutants(event).items()}
        near = read.pop("scale off by a tenth")
        assert isinstance(near, AttentionPlace) and near.error > 5 * right.error
        assert all(isinstance(one, str) for one in read.values()), read
    for event in events(sharp("eager", torch.bfloat16, 1.0, "gpt_oss")):
        assert isinstance(place_of(replace(event, call=mutants(event)["no sink"])), str)


def test_the_allowance_grows_with_the_scores_alone() -> None:
    """16 eps of float32 for each unit of score; of 16 bits 16 eps of their own until the scores outgrow it."""
    eps = torch.finfo(torch.float32).eps
    assert rounding_allowed([torch.float32], 0.5) == 16 * eps
    assert rounding_allowed([torch.float32], 877.0) == pytest.approx(16 * 877 * eps)
    assert rounding_allowed([torch.bfloat16, torch.float32], 877.0) == 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("size", [1.0, 16.0, 60.0])
def test_parts_of_large_scores(size: float) -> None:
    """What the tokens with findings add, and the rest: off by rounding alone, by more than 1e-4 of it at last."""
    net = sharp("sdpa", torch.float32, size)
    event = events(net)[0]
    call = event.call
    stats = HeadStats(Targets({0: [0]}, {}, {}), HeadOptions())
    guess = AttentionPlace(*event.key, call.via, call.shape[1], 2, True, True, False, None)
    stats.update(call.of(0, guess), Where(0))
    r = stats.result()
    assert r.score_size[0] > (500 if size > 10 else 0)
    assert (r.residual[0] > 1e-4) == (size > 50)
    site, allowed = Site("", 1, "attention"), rounding_allowed([torch.float32], float(r.score_size[0]))
    _check_parts({site: r}, load(net))
    with pytest.raises(WorkError, match=each("not the sum")):
        _check_parts({site: replace(r, off=np.array([max(2e-4, 2 * allowed)]))}, load(net))
