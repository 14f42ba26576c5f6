"""Norm collapse against plain PyTorch and closed forms: bounds, one-hot shares, gains, and which norm does what."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import massact as ma
from massact.explanations.collapse import MOST_TOKENS, cosine_bound, least_cosine, norm_between, role_of, spread
from massact.records.kinds.explanation import Explanation
from massact.reports import story_in_words
from tests.facts import tells
from tests.families import build
from tests.real.naive import kept

N, T, DIM = 6, 16, 7
OFF = {"null": False, "bos_contrast": False}


# ------------------------------------------------------------------------------------------------ the bound
@pytest.mark.parametrize("theta", [0.01, 0.3, 1.0])
def test_the_bound_is_tight_for_tokens_at_plus_and_minus_theta(theta: float) -> None:
    """x = cos(theta) u +- sin(theta) v, of any lengths: the cosine of the two is the bound cos(2 theta)."""
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 2)))[0].T
    x = np.stack([90.0 * (np.cos(theta) * u + np.sin(theta) * v), 3.0 * (np.cos(theta) * u - np.sin(theta) * v)])
    assert cosine_bound(x, 5 * u) == pytest.approx(np.cos(2 * theta), abs=1e-12)
    assert least_cosine(x) == pytest.approx(np.cos(2 * theta), abs=1e-12)


def test_no_cosine_is_below_the_bound() -> None:
    draw = np.random.default_rng(1)
    for _ in range(200):
        n, D = int(draw.integers(2, 8)), int(draw.integers(2, 20))
        u = draw.normal(size=D)
        x = draw.uniform(0.1, 50) * u + draw.normal(size=(n, D)) * 10.0 ** draw.uniform(-3, 2)
        assert least_cosine(x) >= cosine_bound(x, u) - 1e-9


def test_a_bound_that_says_nothing_is_minus_one_and_none_is_nan() -> None:
    u = np.eye(3)[0]
    assert cosine_bound(np.array([[-1.0, 0.1, 0], [-1.0, 0, 0.1]]), u) == -1, "the angles add up to more than pi"
    assert np.isnan(cosine_bound(u[None], u)) and np.isnan(cosine_bound(np.eye(3), 0 * u))
    assert np.isnan(least_cosine(u[None])) and np.isnan(least_cosine(np.zeros((2, 3))))


def test_roles_and_tokens_that_are_looked_at() -> None:
    assert [role_of(0.9, 0.8), role_of(0.9, 0.1), role_of(0.9, 0.001), role_of(0.3, 0.9), role_of(np.nan, 0.9)] == [
        "on", "dimmed", "off", "", ""]  # fmt: skip
    tokens = [(s, p) for s in range(20) for p in range(5)]
    chosen = spread(tokens)
    assert len(chosen) == MOST_TOKENS and {s for s, _ in chosen} == set(range(20)), "every sequence first"


# ------------------------------------------------------------------------------------- what a norm is seen to do
class OnePlus(nn.Module):
    """Gemma's: a gain of 1 + weight."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.weight)


class Holder(nn.Module):
    def __init__(self, **norms: nn.Module) -> None:
        super().__init__()
        for name, norm in norms.items():
            self.add_module(name, norm)


class Held:
    """Just enough of a model."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.dtype = module, torch.float32


@pytest.mark.parametrize("D", [8, 9])
@pytest.mark.parametrize("kind", ["rms", "layer", "no bias", "one plus", "plain rms", "plain layer"])
def test_gain_bias_and_mean_are_seen_not_named(kind: str, D: int) -> None:
    torch.manual_seed(D)
    norms = {"rms": nn.RMSNorm(D), "layer": nn.LayerNorm(D), "no bias": nn.LayerNorm(D, bias=False),
             "one plus": OnePlus(D)}  # fmt: skip
    with torch.no_grad():
        for norm in norms.values():
            for name, p in norm.named_parameters():
                p.copy_(torch.randn(D) * (0.1 if kind == "one plus" else 1) + (name == "weight") * 0.3)
    x = torch.randn(5, D) * 30 + 4
    mean_off = "layer" in kind or kind == "no bias"
    if kind.startswith("plain"):
        y = nn.functional.layer_norm(x, (D,)) if mean_off else nn.functional.rms_norm(x, (D,))
        path, gain, bias = "", np.ones(D), np.zeros(D)
    else:
        y, norm, path = norms[kind](x).detach(), norms[kind], kind.replace(" ", "_")
        weight = norm.weight.detach().double().numpy()
        gain = 1 + weight if kind == "one plus" else weight
        bias = norm.bias.detach().numpy() if kind == "layer" else np.zeros(D)
    model = Held(Holder(**{k.replace(" ", "_"): v for k, v in norms.items()}))
    paths = [k.replace(" ", "_") for k in norms]
    found = norm_between(model, paths, x.double().numpy(), y.double().numpy())  # type: ignore[arg-type]
    assert found is not None and found.module == path and found.subtracts_mean == mean_off
    np.testing.assert_allclose(found.gain_D, gain, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.bias_D, bias, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.of(x.double().numpy()), y.double().numpy(), rtol=1e-3, atol=1e-4)


def test_what_no_norm_makes_is_none() -> None:
    model, x = Held(Holder(n=nn.RMSNorm(8))), np.random.default_rng(0).normal(size=(4, 8))
    assert norm_between(model, ["n"], x, x @ np.ones((8, 8))) is None  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ end to end, planted
@cache
def planted(
    name: str, gain: float | None = None, n: int = N, alike: bool = False
) -> tuple[nn.Module, torch.Tensor, Explanation]:
    """A random model whose embeddings of first tokens have one large entry; every norm's gain there is as given.

    Args:
        alike: whether all sequences begin with one token; else each with its own.
    """
    module = build(name, seed=3)
    ids = torch.randint(1, 99, (n, T), generator=torch.Generator().manual_seed(4))
    ids[ids < N] += 20
    ids[:, 0] = 0 if alike else torch.arange(n)
    with torch.no_grad():
        module.get_input_embeddings().weight[:N, DIM] = 900.0
        for path, part in module.named_modules():
            if "norm" in path or "ln_" in path:
                part.weight.copy_(torch.rand(part.weight.shape) * 0.5 + 0.1)
                if gain is not None:
                    part.weight[DIM] = gain
    model, corpus = ma.load(module), ma.corpus(ids)
    return module, ids, ma.explain(model, corpus, ma.scan(model, corpus, **OFF))


FAMILIES = {  # norms of block 2, the gain as they have it, whether the mean is off
    "llama": ("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", 0.0, False),
    "gemma3": ("model.layers.1.input_layernorm", "model.layers.1.pre_feedforward_layernorm", 1.0, False),
    "gpt2": ("transformer.h.1.ln_1", "transformer.h.1.ln_2", 0.0, True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_plain_hooks(family: str) -> None:
    attn, mlp, plus, mean_off = FAMILIES[family]
    module, ids, e = planted(family)
    rows = e.collapse[e.collapse.layer == 2].set_index("norm")
    for norm, path in (("attn_in", attn), ("mlp_in", mlp)):
        row = rows.loc[norm]
        part = module.get_submodule(path)
        x = kept(module, ids, [path], inputs=True)[path][:, 0].astype(float)
        y = kept(module, ids, [path])[path][:, 0].astype(float)
        g = part.weight.detach().double().numpy() + plus
        x = x - x.mean(1, keepdims=True) if mean_off else x
        assert (row.module, row.dim, row.position_class, row.n_tokens) == (path, DIM, "start", N)
        assert row.subtracts_mean == mean_off and row.error < 1e-5
        assert row.gain == pytest.approx(g[DIM]) and row.gain_rank == 1 + (np.abs(g) > abs(g[DIM])).sum()
        assert row.onehot_before == pytest.approx((x[:, DIM] ** 2 / (x**2).sum(1)).mean(), rel=1e-6)
        share = (g * x)[:, DIM] ** 2 / ((g * x) ** 2).sum(1)
        assert row.onehot == pytest.approx(share.mean(), rel=1e-6)
        assert row.onehot_low - 1e-9 <= row.onehot <= row.onehot_high + 1e-9
        fit, held = y[::2] / np.linalg.norm(y[::2], axis=1, keepdims=True), y[1::2]  # halves of the sequences
        unit = held / np.linalg.norm(held, axis=1, keepdims=True)
        cosines = [unit[i] @ unit[j] for i in range(3) for j in range(i)]
        u = fit.mean(0) / np.linalg.norm(fit.mean(0))
        angles = np.sort(np.arccos(np.clip(unit @ u, -1, 1)))
        assert row.n_checked == 3 and row.min_cosine == pytest.approx(min(cosines), abs=1e-6)
        assert (
            row.bound == pytest.approx(np.cos(angles[-1] + angles[-2]), abs=1e-4) and row.bound <= row.min_cosine + 1e-9
        )
        assert row.entry == pytest.approx(np.abs(y[:, DIM]).max(), rel=1e-5) and row.entry <= row.entry_bound * (
            1 + 1e-6
        )
        D, bias = len(g), getattr(part, "bias", None)
        b = 0.0 if bias is None else abs(float(bias.detach()[DIM]))
        assert row.entry_bound == pytest.approx(D**0.5 * abs(g[DIM]) + b, rel=1e-5)
    assert (e.collapse.bound.dropna() <= e.collapse.min_cosine[e.collapse.bound.notna()] + 1e-6).all()
    assert (e.collapse.bound_dim.dropna() <= e.collapse.min_cosine[e.collapse.bound_dim.notna()] + 1e-6).all()
    assert rows.onehot_before.min() > 0.96 > 0.5 > rows.onehot_random.max(), "ordinary tokens have no such dim"


def test_a_gain_of_zero_switches_the_dim_off() -> None:
    """One-hot before and nothing of it behind; e_j is mapped to zero, so it has no direction and no bound."""
    e = planted("llama", gain=0.0)[2]
    rows = e.collapse
    assert set(rows.role) == {"off"} and (rows.onehot == 0).all() and (rows.onehot_before > 0.9).all()
    assert rows.bound_dim.isna().all() and (rows.entry_bound == 0).all() and (rows.gain_rank == 32).all()
    said = tells(story_in_words(e), "switches", "off", f"dim {DIM}")
    assert said and tells(said, "32 of 32")


def test_a_great_gain_lets_it_through() -> None:
    e = planted("llama", gain=1.5)[2]
    assert set(e.collapse.role) == {"on"} and (e.collapse.gain_rank == 1).all()
    assert e.collapse.min_cosine.min() > 0.999 and e.collapse.bound.min() > 0.99
    assert tells(story_in_words(e), "Norm collapse", f"dim {DIM}", "attention", 1)


def test_norms_of_the_stream_itself_are_told() -> None:
    """Post-LN blocks norm the sum: what they give is the site, and the sublayers read it as it is."""
    module = build("bert", seed=3)
    ids = torch.randint(1, 99, (N, T), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    with torch.no_grad():
        for layer in module.bert.encoder.layer:
            layer.output.LayerNorm.weight[DIM] = 4000.0
    model, corpus = ma.load(module), ma.corpus(ids)
    e = ma.explain(model, corpus, ma.scan(model, corpus, **OFF))
    assert set(e.collapse.norm) == {"resid_mid", "resid_post"} and e.collapse.subtracts_mean.all()
    assert (e.collapse.bound.dropna() <= e.collapse.min_cosine[e.collapse.bound.notna()] + 1e-6).all()


# ------------------------------------------------------------------------------------------------ hostile inputs
def test_too_few_sequences_have_no_bound_and_one_sentence() -> None:
    e = planted("llama", n=2)[2]
    assert len(e.collapse) and e.collapse[["bound", "min_cosine", "bound_dim"]].isna().all(axis=None)
    assert e.collapse.onehot.notna().all()
    notes = tells(e.info.notes, "bound", "unavailable", 2)
    assert len(notes) == 1
    assert tells(story_in_words(e), "Norm collapse", "not known")


def test_tokens_that_are_one_vector_already_have_no_bound_and_one_sentence() -> None:
    """Only the first token is massive, the same in every sequence, and sees itself alone: one state."""
    e = planted("llama", alike=True)[2]
    rows = e.collapse
    assert set(rows.n_tokens) == {N} and set(rows.n_checked) == {1}
    assert rows[["bound", "min_cosine", "bound_dim", "min_cosine_before"]].isna().all(axis=None)
    assert rows.onehot.notna().all() and len(tells(e.info.notes, "bound", "one vector")) == 1
    assert tells(story_in_words(e), "Norm collapse", "one vector")


def test_no_findings_have_no_rows_and_no_sentence() -> None:
    model, corpus = ma.load(build("llama", seed=7)), ma.corpus(torch.randint(5, 90, (3, T)))
    e = ma.explain(model, corpus, ma.scan(model, corpus, **OFF))
    assert not len(e.collapse) and not tells(story_in_words(e), "collapse")
    assert not [n for n in e.info.notes if "Collapse" in n]


def test_a_model_without_norms_says_so() -> None:
    from tests.explanations.test_planted import explained

    _, _, e = explained()
    assert not len(e.collapse)
    assert len(tells(e.info.notes, "Collapse", "unavailable", "norm")) == 1


def test_tables_come_back_from_a_file(tmp_path: object) -> None:
    module, ids, e = planted("llama")
    scan = ma.scan(ma.load(module), ma.corpus(ids), **OFF)
    e.save(scan.save(tmp_path))  # type: ignore[arg-type]
    again = Explanation.open(tmp_path)  # type: ignore[arg-type]
    assert again is not None
    for name in ("collapse", "spectrum", "dark_subspace"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(e, name))
