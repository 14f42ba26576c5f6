"""Weights of norms that stand out where massive activations are (Kovaleva 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from massact.anatomy import norms_of
from massact.models import Model, held
from massact.records.anatomy import Stack
from massact.records.tables import frame

SIGMA = 3.0  # Kovaleva 2021
LAYER_SHARE = 0.5


def norm_weights_table(model: Model, dims: Mapping[str, set[int]]) -> pd.DataFrame:
    """Scale and bias of every norm at the dims of the findings, and at dims that pass Kovaleva's rule.

    |w_j - mean w| > 3 std of that norm, for scale and bias both (the scale alone where there is no bias), in at least
    half of the layers.
    """
    rows: list[dict[str, object]] = []
    for stack in model.anatomy.stacks:
        rows += _stack_rows(model, stack, dims.get(stack.name, set()))
    return frame("norm_weights", rows)


def _stack_rows(model: Model, stack: Stack, dims: set[int]) -> list[dict[str, object]]:
    norms = scored_norms(model, stack)
    if not norms:
        return []
    outlier = layers_beyond(norms, stack.d_model) >= LAYER_SHARE * stack.n_layers
    shown = sorted(dims | set(np.flatnonzero(outlier).tolist()))
    return [
        {
            "stack": stack.name, "layer": n.layer, "module": n.module, "dim": j, "weight": n.weight_D[j],
            "weight_z": n.weight_z_D[j], "bias": n.bias_D[j], "bias_z": n.bias_z_D[j], "beyond": beyond_D[j],
            "outlier": outlier[j], "finding": j in dims,
        }
        for n in norms
        for beyond_D in (n.beyond(),)
        for j in shown
    ]  # fmt: skip


@dataclass(frozen=True)
class ScoredNorm:
    """Scale and bias of one norm of a block, and how many standard deviations each value is from their mean.

    Args:
        layer: of the block.
        module: dotted path of the norm.
        weight_D, weight_z_D, bias_D, bias_z_D: (D,) float64; NaN for the bias where there is none.
    """

    layer: int
    module: str
    weight_D: np.ndarray
    weight_z_D: np.ndarray
    bias_D: np.ndarray
    bias_z_D: np.ndarray

    def beyond(self, sigma: float = SIGMA) -> np.ndarray:
        """Dims at which scale and bias both (the scale alone where there is no bias) pass: (D,) bool."""
        return (np.abs(self.weight_z_D) > sigma) & (np.isnan(self.bias_z_D) | (np.abs(self.bias_z_D) > sigma))


def scored_norms(model: Model, stack: Stack) -> list[ScoredNorm]:
    """Every norm of a stack's blocks with a scale of the width of the residual stream, in the order they are held."""
    found = []
    for layer, path in norms_of(model.module, stack):
        norm = model.module.get_submodule(path)
        bias = getattr(norm, "bias", None)
        scored = _scored(held(norm, "bias")) if isinstance(bias, Tensor) else (np.full(stack.d_model, np.nan),) * 2
        found.append(ScoredNorm(layer, path, *_scored(held(norm)), *scored))
    return found


def layers_beyond(norms: Sequence[ScoredNorm], d_model: int, sigma: float = SIGMA) -> np.ndarray:
    """In how many layers any norm passes, for every dim: (D,) int; Kovaleva's rule asks for half of the layers."""
    layers_D = np.zeros(d_model, int)
    for layer in {n.layer for n in norms}:
        layers_D += np.any([n.beyond(sigma) for n in norms if n.layer == layer], axis=0)
    return layers_D


def _scored(x_D: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values, and how many standard deviations each is from their mean."""
    x = x_D.detach().double().cpu().numpy()
    std = x.std()
    return x, (x - x.mean()) / std if std > 0 else np.zeros_like(x)
