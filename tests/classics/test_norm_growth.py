"""Growth of norms: an exact exponential, too few layers, naive NumPy with position 0 apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.classics import classics
from massact.classics.norm_growth import growth
from tests.families import build

OFF = {"null": False, "bos_contrast": False}


@pytest.mark.parametrize("factor", [1.045, 0.8, 3.0])
def test_an_exact_exponential(factor: float) -> None:
    """Layer 0 is left out: whatever it is, it changes nothing."""
    found = growth({0: 1e6} | {layer: 7 * factor**layer for layer in range(1, 9)})
    assert found == (pytest.approx(factor, rel=1e-12), pytest.approx(1, abs=1e-12), 8)


def test_missing_layers_and_zero_norms_are_left_out() -> None:
    assert growth({5: 2.0**5, 1: 2.0, 9: 2.0**9, 3: 0.0}) == (pytest.approx(2), pytest.approx(1), 3)


def test_noise_is_seen() -> None:
    x, y = np.arange(1, 7), np.array([0.0, 1, 0, 1, 0, 1])
    factor, r2, n = growth(dict(zip(x.tolist(), np.exp(y).tolist(), strict=True)))
    slope = np.cov(x, y, ddof=0)[0, 1] / x.var()
    assert (factor, n) == (pytest.approx(np.exp(slope)), 6)
    assert r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.parametrize("norms", [{}, {0: 1.0, 1: 2.0, 2: 4.0}, {1: 1.0, 2: 0.0, 3: 2.0}])
def test_fewer_than_three_layers_have_no_growth(norms: dict[int, float]) -> None:
    factor, r2, n = growth(norms)
    assert np.isnan(factor) and np.isnan(r2) and n < 3


def test_equal_norms_do_not_grow() -> None:
    factor, r2, n = growth({1: 2.0, 2: 2.0, 3: 2.0})
    assert factor == pytest.approx(1) and np.isnan(r2) and n == 3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("padded", [False, True])
def test_norms_are_those_of_the_hidden_states(name: str, padded: bool) -> None:
    """Position 0 apart; of prompts that are padded on the left it is the first that counts."""
    module, lengths = build(name), [20, 11, 15] if padded else [20, 20, 20]
    ids = torch.randint(1, 90, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(20) >= 20 - torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        module.get_input_embeddings().weight[0] *= 100
    for s, n in enumerate(lengths):
        ids[s, 20 - n] = 0
    inputs: dict[str, Tensor] = {"input_ids": ids} | ({"attention_mask": mask} if padded else {})
    model = ma.load(module)
    result = classics(model, inputs, ma.scan(model, inputs, **OFF), which=("norm-growth",))
    if padded and name == "gpt2":  # which counts positions from the mask in generation only
        inputs["position_ids"] = torch.arange(20).expand(3, -1)
    states: dict[int, Tensor] = {}
    blocks = module.transformer.h if name == "gpt2" else module.model.layers
    handles = [block.register_forward_hook(lambda m, a, out, i=i: states.__setitem__(
        i + 1, out if isinstance(out, Tensor) else out[0])) for i, block in enumerate(blocks)]  # fmt: skip
    with torch.no_grad():
        states[0] = module(**inputs, output_hidden_states=True).hidden_states[0]
    for handle in handles:
        handle.remove()
    means: dict[str, dict[int, float]] = {"first": {}, "rest": {}}
    for layer, h in states.items():
        norms = h.double().norm(dim=-1).numpy()
        means["first"][layer] = np.mean([norms[s, 20 - n] for s, n in enumerate(lengths)])
        means["rest"][layer] = np.concatenate([norms[s, 20 - n + 1 :] for s, n in enumerate(lengths)]).mean()
    rows = result.classics[(result.classics.site == "resid_post") & (result.classics.metric == "norm")]
    got = rows.set_index(["subject", "layer"])
    for subject, by_layer in means.items():
        for layer, value in by_layer.items():
            assert got.value[subject, layer] == pytest.approx(value, rel=1e-5), (subject, layer)
            assert got.n[subject, layer] == (3 if subject == "first" else sum(lengths) - 3)
    numbers = result.info.outcomes["norm-growth"][""]
    factor, r2, n = growth(means["rest"])
    assert (numbers["factor"], numbers["r2"], numbers["layers"]) == pytest.approx((factor, r2, n), rel=1e-4)
    peak = max(means["first"][layer] / means["rest"][layer] for layer in means["rest"])
    assert numbers["first_over_rest"] == pytest.approx(peak, rel=1e-4) and peak > 5
    fits = result.classics[(result.classics.metric == "growth_factor")].set_index(["site", "subject"]).value
    assert fits["resid_post", "first"] == pytest.approx(growth(means["first"])[0], rel=1e-4)
    assert {"attn_out", "mlp_out"} <= set(fits.index.get_level_values("site"))
