"""Layers without a finite value: nothing is known of them, and that is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import massact as ma
from massact.reports.kinds.scan.words import answer_in_words
from tests.facts import tells
from tests.planted import Plant, Planted


def scanned(value: float) -> ma.ScanResult:
    """The MLP of block 2 of 3 writes NaN or Inf everywhere."""
    torch.manual_seed(0)
    module = Planted(3, 10, 12, [Plant(1, 3, 0, 5, 2500.0)])
    x = 0.02 * torch.randn(3, 10, 12)
    model = ma.load(module, inputs={"x": x})
    write = module.get_submodule(model.anatomy.stacks[0].blocks[1].places["mlp_out"].module)
    write.register_forward_hook(lambda m, a, out: torch.full_like(out, value))
    return ma.scan(model, {"x": x}, null=False, bos_contrast=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_without_a_finite_value(value: float) -> None:
    result = scanned(value)
    layers = result.layers.set_index("layer")
    numbers = [c for c in layers.columns if layers[c].dtype == float]
    assert layers.nonfinite.tolist() == [0, 0, 360, 360]
    overflow = [c for c in numbers if c.startswith("headroom") and math.isinf(value)]
    for layer in (2, 3):
        # Inf is beyond every format; what follows from it is NaN
        known = [c for c in numbers if not np.isnan(layers.loc[layer, c])]
        assert known == (overflow if layer == 2 else []) and all(layers.loc[layer, c] == 0 for c in known)
    dims = result.dims[result.dims.layer >= 2]
    assert dims[["max", "mean", "mean_abs", "std", "hit_rate"]].isna().all().all()
    assert not result.dims[result.dims.layer < 2].isna().any().any()
    assert set(result.findings.layer) == {1}
    words = answer_in_words(result)
    assert not tells(words, "holds every layer,")  # unqualified
    assert tells(words, int(layers["nonfinite"].sum()), "NaN or Inf", "layers 2-3")
    assert tells(words, "Layers 2-3", "no value", "finite")


def test_finite_layers_hold_every_layer() -> None:
    torch.manual_seed(0)
    x = 0.02 * torch.randn(3, 10, 12)
    module = Planted(3, 10, 12, [Plant(1, 3, 0, 5, 2500.0)])
    words = answer_in_words(ma.scan(ma.load(module, inputs={"x": x}), {"x": x}, null=False))
    assert tells(words, "bf16 holds every layer,") and not tells(words, "no value", "finite")
