"""Rogue dims: every number against explicit loops over Hugging Face's hidden states, and planted truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import massact as ma
from massact.classics import classics, rogue_dims
from massact.classics.rogue_dims import all_but_the_top, geometry
from massact.models import weights_hash
from massact.records.kinds.classics import Classics
from tests.facts import tells
from tests.families import build

OFF: dict[str, Any] = {"null": False, "bos_contrast": False}


def tokens(n: int = 3, length: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def rogue(model: Any, data: Any, **options: Any) -> Classics:
    scan = ma.scan(model, data, **OFF)
    return classics(model, data, scan, which=("rogue-dims",), **options)


def value(c: Classics, metric: str, **where: Any) -> float:
    t = c.classics
    for column, wanted in (where | {"metric": metric}).items():
        t = t[t[column] == wanted]
    assert len(t) == 1, f"{len(t)} rows of {metric} {where}"
    return float(t.value.iloc[0])


def cos(x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(x * y) / (sum(x * x) ** 0.5 * sum(y * y) ** 0.5))


def naive_r2(a: list[float], b: list[float]) -> float:
    ma_, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - ma_) * (y - mb) for x, y in zip(a, b, strict=True))
    return top**2 / (sum((x - ma_) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def naive_ranks(x: np.ndarray) -> np.ndarray:
    return np.array([sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_every_number_is_that_of_explicit_loops(name: str) -> None:
    """24 tokens: all 276 pairs. The last hidden state of GPT-2 is the one after its final norm: left out."""
    module, ids = build(name), tokens()
    with torch.no_grad():
        emb = module.get_input_embeddings().weight
        emb[:, 3] += 0.05
        states = module(ids, output_hidden_states=True).hidden_states
    c = rogue(ma.load(module), ids)
    for layer in range(3 if name == "gpt2" else 4):
        x = states[layer].double().reshape(-1, 32).numpy()
        pairs = [(i, j) for i in range(24) for j in range(i + 1, 24)]
        cosines = [cos(x[i], x[j]) for i, j in pairs]
        adds = np.mean([x[i] * x[j] / (sum(x[i] ** 2) * sum(x[j] ** 2)) ** 0.5 for i, j in pairs], axis=0)
        top = np.argsort(-adds)
        assert value(c, "anisotropy", layer=layer, subject="") == pytest.approx(np.mean(cosines), abs=1e-6)
        for rank in range(1, 6):
            dim = int(top[rank - 1])
            at: dict[str, Any] = {"layer": layer, "dim": dim, "subject": f"rank {rank}"}
            assert value(c, "contribution", **at) == pytest.approx(adds[dim], abs=1e-6)
            if np.mean(cosines) > 0.01:
                assert value(c, "share", **at) == pytest.approx(adds[dim] / np.mean(cosines), rel=1e-3)
        for k in (1, 3, 5):
            rest = np.delete(x, top[:k], axis=1)
            r2 = naive_r2(cosines, [cos(rest[i], rest[j]) for i, j in pairs])
            assert value(c, "r2", layer=layer, subject=f"without top {k}") == pytest.approx(r2, abs=1e-5)
        z = (x - x.mean(0)) / x.std(0)
        left = np.mean([cos(z[i], z[j]) for i, j in pairs])
        assert value(c, "anisotropy", layer=layer, subject="standardised") == pytest.approx(left, abs=1e-4)
        u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
        y = (u[:, 1:] * s[1:]) @ vt[1:]  # D / 100 rounds to none: one component
        left = np.mean([cos(y[i], y[j]) for i, j in pairs])
        assert value(c, "anisotropy", layer=layer, subject="all but the top") == pytest.approx(left, abs=1e-5)
        q = [naive_ranks(row) - 16.5 for row in x]
        left = np.mean([cos(q[i], q[j]) for i, j in pairs])
        assert value(c, "anisotropy", layer=layer, subject="spearman") == pytest.approx(left, abs=1e-4)


def test_a_planted_dim_makes_all_tokens_alike() -> None:
    """500 in dim 7 of every position: A and its share near 1, nothing of the rest in the cosines, z-scores undo it."""
    module = build("gpt2", seed=2)
    with torch.no_grad():
        # Lengths differ much from token to token, so that beside the planted dim they decide the cosine.
        module.transformer.wte.weight *= torch.linspace(0, 3, 99).exp()[:, None] * 5
        module.transformer.wpe.weight[:, 7] += 500.0
    c = rogue(ma.load(module), tokens(6, 16))
    numbers = c.info.outcomes["rogue-dims"][""]
    assert numbers["mean_anisotropy"] > 0.98 and numbers["rogue_dims"][0] == 7
    assert 0.99 < numbers["shares"][0] < 1.01
    for layer in range(4):
        assert value(c, "contribution", layer=layer, dim=7, subject="rank 1") > 0.95
        assert value(c, "r2", layer=layer, subject="without top 1") < 0.2
        assert abs(value(c, "anisotropy", layer=layer, subject="standardised")) < 0.1
        assert abs(value(c, "anisotropy", layer=layer, subject="spearman")) < 0.2
    plain = rogue(ma.load(build("gpt2", seed=2)), tokens(6, 16)).info.outcomes["rogue-dims"][""]
    assert plain["mean_anisotropy"] < 0.3 and plain["shares"][0] < 0.9


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_kl_of_a_dim_is_that_of_a_hand_written_hook(name: str) -> None:
    """Every tested dim of every tested layer; and the weights stay as they were, bit for bit."""
    module, ids = build(name), tokens()
    model = ma.load(module)
    before = weights_hash(module)
    c = rogue(model, ids)
    assert weights_hash(module) == before
    blocks = module.transformer.h if name == "gpt2" else module.bert.encoder.layer
    t = c.classics[c.classics.metric == "kl"]
    assert set(t.layer) == {1, 2, 3} and set(t.subject) == {"rogue", "random"}
    assert len(t) == 3 * 6 and not t.duplicated(["layer", "dim"]).any()
    counted = slice(None, -1) if name == "gpt2" else slice(None)  # the last token has no next one
    for r in t.itertuples():

        def zero(m: Any, args: Any, out: Any, dim: int = r.dim) -> Any:
            h = (out if isinstance(out, Tensor) else out[0]).clone()
            h[..., dim] = 0
            return h if isinstance(out, Tensor) else (h, *out[1:])

        with torch.no_grad():
            p = module(ids).logits.double().log_softmax(-1)[:, counted]
            handle = blocks[r.layer - 1].register_forward_hook(zero)
            q = module(ids).logits.double().log_softmax(-1)[:, counted]
            handle.remove()
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert r.value == pytest.approx(kl, rel=1e-2, abs=2e-6) and r.n == 3
    numbers = c.info.outcomes["rogue-dims"][""]
    assert numbers["kl"]["rogue"] == pytest.approx(t[t.subject == "rogue"].value.mean())
    assert numbers["kl"]["random"] == pytest.approx(t[t.subject == "random"].value.mean())
    assert numbers["kl"]["massive"] is None and numbers["massive_dims"] == []
    assert len(c.classic_effects) and set(c.classic_effects.layer) == {1, 2, 3}


def test_massive_dims_are_tested_and_compared() -> None:
    """A spike at the first token alone is massive; the dim that is large everywhere is rogue."""
    module, ids = build("gpt2", seed=3), tokens(6, 16)
    ids[:, 0] = 0
    with torch.no_grad():
        module.transformer.wte.weight[0, 7] = 900.0
        module.transformer.wpe.weight[:, 20] += 2.0
    c = rogue(ma.load(module), ids)
    numbers = c.info.outcomes["rogue-dims"][""]
    assert numbers["massive_dims"] == [7] and numbers["rogue_dims"][0] == 20
    assert numbers["layers_led_by_massive"] == 0 and numbers["n_layers"] == 4
    t = c.classics[(c.classics.metric == "kl")]
    assert set(t[t.subject == "massive"].dim) == {7} and not set(t[t.subject == "random"].dim) & {7, 20}
    assert numbers["kl"]["massive"] == pytest.approx(t[t.subject == "massive"].value.mean())
    unique = t.drop_duplicates(["layer", "dim"])
    assert numbers["n_kl"] == len(unique) and -1 <= numbers["kl_correlation"] <= 1


def test_without_predictions_the_measurements_stay() -> None:
    images = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    c = rogue(ma.load(build("dinov2")), {"pixel_values": images})
    numbers = c.info.outcomes["rogue-dims"][""]
    assert "gives no logits" in numbers["kl"]["unavailable"] and any("gives no logits" in n for n in c.info.notes)
    assert numbers["n_tokens"] == 4 * 26 and -1 <= numbers["anisotropy"] <= 1
    assert not (c.classics.metric == "kl").any() and not len(c.classic_effects)
    two = rogue(ma.load(build("clip")), {"pixel_values": images}).info
    assert tells([two.outcomes["rogue-dims"]["vision_model"]["kl"]["unavailable"]], "no logits", "images")
    classifier = rogue(ma.load(build("vit")), {"pixel_values": images})
    assert (classifier.classics.metric == "kl").sum() == 3 * 6


def test_every_stack_has_its_own_tokens_and_padding_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    mask[1, 5:] = 0
    c = rogue(ma.load(build("gpt2")), {"input_ids": ids, "attention_mask": mask})
    assert c.info.outcomes["rogue-dims"][""]["n_tokens"] == 41
    monkeypatch.setattr(rogue_dims, "N_TOKENS", 20)
    monkeypatch.setattr(rogue_dims, "N_PAIRS", 100)
    monkeypatch.setattr(rogue_dims, "LAST_LAYERS", 1)
    model = ma.load(build("t5"))
    scan = ma.scan(model, ids, **OFF)
    few = [classics(model, ids, scan, which=("rogue-dims",), seed=s) for s in (0, 0, 1)]
    numbers = few[0].info.outcomes["rogue-dims"]
    assert list(numbers) == ["encoder", "decoder"]
    assert {(n["n_tokens"], n["n_pairs"]) for n in numbers.values()} == {(20, 100)}
    a, b, other = (f.classics.value.to_numpy() for f in few)
    np.testing.assert_array_equal(a, b)
    assert len(a) != len(other) or (a != other).any()


@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(2, 30))
@settings(max_examples=40)
def test_invariants(seed: int, n: int, d: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, d)) * np.exp(draw.normal(size=(n, 1)) * 3) + draw.normal(size=d)
    pairs = np.stack(np.triu_indices(n, 1), 1)
    g = geometry(x, pairs)
    assert g.contributions.sum() == pytest.approx(g.anisotropy, abs=1e-9) and abs(g.anisotropy) <= 1 + 1e-12
    assert all(np.isnan(v) or -1e-12 <= v <= 1 + 1e-9 for v in g.r2.values())
    assert set(g.r2) == {k for k in (1, 3, 5) if k < d}
    assert all(abs(v) <= 1 + 1e-9 for v in g.fixed.values() if not np.isnan(v))
    assert (np.diff(g.contributions[g.order]) <= 0).all() and sorted(g.order) == list(range(d))
    turned = geometry(x * 7, pairs)  # cosines know no length
    np.testing.assert_allclose(turned.contributions, g.contributions, atol=1e-12)
    with_bad = geometry(np.vstack([np.zeros((1, d)), x, np.full((1, d), np.nan)]),
                        np.vstack([pairs + 1, [[0, 1]], [[1, n + 1]]]))  # fmt: skip
    assert with_bad.n_pairs == len(pairs) and with_bad.anisotropy == pytest.approx(g.anisotropy, abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 250), (250, 150)])
def test_all_but_the_top_is_that_of_an_svd(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 5, shape[1]) + 3
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(all_but_the_top(x), (u[:, 2:] * s[2:]) @ vt[2:], atol=1e-9)


def test_no_cosine_is_told() -> None:
    g = geometry(np.zeros((3, 4)), np.array([[0, 1], [1, 2]]))
    assert g.n_pairs == 0 and np.isnan(g.anisotropy)
    constant = geometry(np.ones((3, 4)) * np.float64(0.1), np.array([[0, 1], [1, 2]]))
    assert constant.anisotropy == pytest.approx(1) and np.isnan(constant.fixed["standardised"])
