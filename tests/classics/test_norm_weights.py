"""Norm weights: the rule against loops, edits against models changed by hand, zeros that are zeros in every norm."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import massact as ma
from massact.classics import classics
from massact.explanations.weights import layers_beyond, scored_norms
from massact.interventions.norm_scales import parameters_of, silenced, zero_of
from massact.models import weights_hash
from massact.records.kinds.classics import Classics
from massact.trace import edited
from tests.facts import tells
from tests.families import build
from tests.planted import Plant, Planted

OFF: dict[str, Any] = {"null": False, "bos_contrast": False}
TOLD = ("perplexity", "nll", "kl", "top1_agreement")


def tokens(n: int = 4, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(5, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def found(model: Any, data: Any) -> Classics:
    return classics(model, data, ma.scan(model, data, **OFF), which=("norm-weights",))


def one(c: Classics, metric: str, kind: str) -> Any:
    t = c.classic_effects
    t = t[(t.metric == metric) & t.edit.str.contains(kind)]
    assert len(t) == 1
    return t.iloc[0]


def gpt2(n_layer: int = 4) -> nn.Module:
    """Four layers; scale and bias of every norm near 1 and 0, none beyond 1.8 standard deviations."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=n_layer, n_head=4, n_positions=32)
    module = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        module.lm_head.weight = nn.Parameter(module.lm_head.weight.clone() * 20)
        for block in module.transformer.h:
            for norm in (block.ln_1, block.ln_2):
                norm.weight.copy_(1 + 0.1 * torch.rand(64))
                norm.bias.copy_(0.1 * torch.rand(64) - 0.05)
    return module


def raised(norm: nn.Module, dim: int, sigmas: float) -> None:
    """Scale and bias some of their own standard deviations away."""
    with torch.no_grad():
        for p in (norm.weight, norm.bias):
            p[dim] = p.mean() + sigmas * p.std()


def planted() -> nn.Module:
    """Dim 5 far out in exactly half of the layers, dim 9 in fewer, dim 11 a little (once the others are there)."""
    module = gpt2()
    for i, block in enumerate(module.transformer.h):
        if i in (1, 2):
            raised(block.ln_2, 5, 10)
        if i == 3:
            raised(block.ln_1, 9, 10)
    for block in module.transformer.h[2:]:
        raised(block.ln_1 if block is module.transformer.h[2] else block.ln_2, 11, 2.5)
    return module


def test_the_rule_finds_planted_dims_and_no_others() -> None:
    module = planted()
    c = found(ma.load(module), tokens())
    numbers = c.info.outcomes["norm-weights"][""]
    assert numbers["outlier_dims"] == [5] and numbers["relaxed_dims"] == [5, 11]
    assert numbers["subject"] == "outlier" and numbers["dims"] == [5]
    assert (numbers["n_norms"], numbers["n_parameters"], numbers["n_scalars"]) == (8, 16, 16)
    assert numbers["massive_dims"] == numbers["outlier_and_massive"] == []
    t = c.classics[(c.classics.metric == "layers_beyond") & (c.classics.dim == 5)]
    assert t.value.tolist() == [2, 2] and t.n.tolist() == [4, 4]
    scales = np.mean([np.abs(n.weight.detach().double().numpy()) for b in module.transformer.h
                      for n in (b.ln_1, b.ln_2)], axis=0)  # fmt: skip
    scales[5] = -1
    assert numbers["largest_dims"] == [int(scales.argmax())]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_layers_beyond_are_those_of_loops(name: str, sigma: float) -> None:
    module = build(name)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter))
    model = ma.load(module)
    stack = model.anatomy.stacks[0]
    counts = [0] * 32
    for block in stack.blocks:
        for j in range(32):
            hits = 0
            for m in module.get_submodule(block.module).modules():
                w, b = getattr(m, "weight", None), getattr(m, "bias", None)
                if w is None or w.shape != (32,):
                    continue
                both = [p.detach().double() for p in (w, b) if p is not None]
                hits += all(abs(float(p[j] - p.mean())) > sigma * float(p.std(correction=0)) for p in both)
            counts[j] += hits > 0
    assert layers_beyond(scored_norms(model, stack), 32, sigma).tolist() == counts and sum(counts) > 0


def losses(module: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return module(ids).logits.double().log_softmax(-1)


def test_effects_are_those_of_a_model_changed_by_hand() -> None:
    """nll, perplexity, KL and agreement; the weights stay as they were, bit for bit."""
    module, ids = planted(), tokens()
    before = weights_hash(module)
    c = found(ma.load(module), ids)
    assert weights_hash(module) == before
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for block in changed.transformer.h:
            for norm in (block.ln_1, block.ln_2):
                norm.weight[5] = norm.bias[5] = 0
    p, q = losses(module, ids)[:, :-1], losses(changed, ids)[:, :-1]
    nll = [float(-x.gather(2, ids[:, 1:, None]).mean()) for x in (p, q)]
    kl, same = float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).double().mean())
    row = one(c, "nll", "outlier dims 5")
    assert (row.baseline, row.edited) == (pytest.approx(nll[0], rel=1e-5), pytest.approx(nll[1], rel=1e-5))
    assert one(c, "kl", "outlier").edited == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    assert one(c, "top1_agreement", "outlier").edited == pytest.approx(same)
    assert one(c, "perplexity", "outlier").edited == pytest.approx(np.exp(nll[1]), rel=1e-5)
    assert set(c.classic_effects.metric) == set(TOLD)
    draws = c.classic_effects[(c.classic_effects.metric == "kl") & c.classic_effects.edit.str.contains("random")]
    harm = c.info.outcomes["norm-weights"][""]["harm"]
    assert len(draws) == 5 and not draws.edit.str.contains(r"dims 5$").any()
    assert harm["kl"]["random"] == pytest.approx(draws.delta.mean())
    assert harm["kl"]["random_worst"] == draws.delta.max() and harm["kl"]["subject"] == pytest.approx(kl, rel=1e-3)
    assert harm["nll"]["largest"] == one(c, "nll", "largest").delta


def test_a_masked_model_is_asked_for_hidden_tokens() -> None:
    """BERT with a mask token: its loss is that of 15 % hidden tokens of each sequence, and of no special ones."""
    module = build("bert", seed=5)
    with torch.no_grad():
        module.cls.predictions.decoder.bias.copy_(torch.randn(99))
        for layer in module.bert.encoder.layer:
            layer.output.LayerNorm.weight[5], layer.output.LayerNorm.bias[5] = 9.0, -7.0
    ids = tokens(3, 20)
    ids[:, 0], ids[:, -1] = 2, 3
    model, corpus = ma.load(module), ma.corpus(ids)
    scan = ma.scan(model, corpus, **OFF)
    stub = SimpleNamespace(mask_token_id=4, all_special_ids=[2, 3, 4])
    c = classics(replace(model, tokenizer=stub), corpus, scan, which=("norm-weights",))
    shown = ids.clone()
    hidden = [np.random.default_rng((0, s)).choice(list(range(1, 19)), 3, replace=False) for s in range(3)]
    for s, at in enumerate(hidden):
        shown[s, at] = 4
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for layer in changed.bert.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight[5] = norm.bias[5] = 0
    row = one(c, "nll", "outlier dims 5")
    for now, m in ((row.baseline, module), (row.edited, changed)):
        p = losses(m, shown)
        nll = np.mean([[-float(p[s, i, ids[s, i]]) for i in at] for s, at in enumerate(hidden)])
        assert now == pytest.approx(nll, rel=1e-5)
    assert c.info.outcomes["norm-weights"][""]["harm"]["nll"]["subject"] == pytest.approx(row.delta)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5", "gemma2", "gemma3", "qwen3_next", "olmo2", "albert"])
def test_a_silenced_dim_is_zero_in_what_every_norm_gives(name: str) -> None:
    module = build(name)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(0.3)
    model = ma.load(module)
    stack, before = model.anatomy.stacks[0], weights_hash(module)
    norms = scored_norms(model, stack)
    parameters, unsure = parameters_of(model, [n.module for n in norms])
    assert not unsure and len({p.name for p in parameters}) == len(parameters)
    assert {p.zero for p in parameters if p.scale} == ({-1.0} if name in ("gemma2", "gemma3", "qwen3_next") else {0.0})
    x = torch.randn(2, 5, 32)
    with edited(model, silenced("silent", parameters, [3, 8])) as fired, torch.no_grad():
        for n in norms:
            out = module.get_submodule(n.module)(x)
            assert (out[..., [3, 8]] == 0).all() and (out[..., [2, 9]] != 0).all()
    assert fired[0].n_elements == 2 * len(parameters) and weights_hash(module) == before


def test_a_norm_that_wants_more_than_a_vector_is_not_guessed_at() -> None:
    class Gated(nn.LayerNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    assert zero_of(Gated(8)) is None and zero_of(nn.LayerNorm(8)) == 0


def test_massive_dims_stand_in_where_no_dim_passes() -> None:
    module, ids = gpt2(2), tokens(6, 16)
    ids[:, 0] = 0
    with torch.no_grad():
        module.transformer.wte.weight[0, 7] = 900.0
    c = found(ma.load(module), ids)
    numbers = c.info.outcomes["norm-weights"][""]
    assert (numbers["subject"], numbers["dims"], numbers["outlier_dims"]) == ("massive", [7], [])
    assert tells(c.info.notes, "massive", "zero", "instead")
    assert one(c, "kl", "massive dims 7").n_elements > 0
    relaxed = gpt2(2)
    raised(relaxed.transformer.h[0].ln_1, 11, 2.5)
    told = found(ma.load(relaxed), tokens())
    assert told.info.outcomes["norm-weights"][""]["subject"] == "relaxed"
    assert tells(told.info.notes, "beyond 2", "zero", "instead")


def test_what_is_unavailable_is_said() -> None:
    plain = found(ma.load(build("gpt2")), tokens())
    assert "no massive dims" in plain.info.outcomes["norm-weights"][""]["harm"]["unavailable"]
    assert not len(plain.classic_effects)
    bare = Planted(3, 6, 16, [Plant(1, 2, 0, 3, 500.0)])
    data = {"x": torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0)) * 0.1}
    none = found(ma.load(bare, inputs={"x": data["x"][:2]}), data)
    assert tells([none.info.outcomes["norm-weights"]["unavailable"]], "No norm", "blocks")
    silent = build("dinov2")
    with torch.no_grad():
        for layer in silent.dinov2.encoder.layer if hasattr(silent, "dinov2") else silent.encoder.layer:
            layer.norm1.weight[5], layer.norm1.bias[5] = 9.0, -7.0
    c = found(ma.load(silent), {"pixel_values": torch.randn(3, 3, 20, 20)})
    numbers = c.info.outcomes["norm-weights"][""]
    assert numbers["outlier_dims"] == [5] and "gives no logits" in numbers["harm"]["unavailable"]
