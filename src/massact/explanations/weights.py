"""Weights that stand out where massive activations are: norms (Kovaleva 2021) and the unembedding (Cancedda 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.anatomy import norms_of
from massact.anatomy.projections import sizes_of
from massact.models import Model, held, matrix_of
from massact.records.anatomy import Stack
from massact.records.tables import frame

SIGMA = 3.0  # Kovaleva 2021
LAYER_SHARE = 0.5
BOTTOM = 0.05  # of the singular directions, the weakest: Cancedda 2024
WIDEST = 8192  # a wider residual stream is not decomposed


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


def reads_head(model: Model, stack: str) -> bool:
    """Whether the unembedding reads this stack: of several the last one that runs, never the encoder of a decoder."""
    return stack == model.anatomy.stacks[-1].name


def spectrum(model: Model, stack: str, states: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Share of |h|^2 in the weakest directions of the unembedding W_U, for mean states of groups of tokens.

    h is taken as it stands in the residual stream, before the final norm. A random direction has a share of about
    the fraction of directions, 0.05.

    Args:
        stack: whose states they are.
        states: group -> (D,) mean state.

    Returns:
        {"bottom": fraction of the directions, group: share, ...}, or {"unavailable": reason}.
    """
    if not reads_head(model, stack):
        return {"unavailable": "no unembedding reads this stack"}
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    if head is None or not (sizes := sizes_of(head)):
        return {"unavailable": "the model has no unembedding matrix"}
    D = sizes[1]
    if any(len(h) != D for h in states.values()) or not states:
        return {"unavailable": "the unembedding reads another width than that of the residual stream"}
    if D > WIDEST:
        return {"unavailable": f"the residual stream is wider than {WIDEST:,}"}
    weight_VD = matrix_of(head, D)
    gram_DD = (weight_VD.T @ weight_VD).double().cpu()
    _, vectors = torch.linalg.eigh(gram_DD)  # ascending
    weakest_DB = vectors[:, : max(1, round(BOTTOM * D))]
    shares: dict[str, Any] = {"bottom": weakest_DB.shape[1] / D}
    for group, h in states.items():
        h_D = torch.from_numpy(np.asarray(h, np.float64))
        shares[group] = float((weakest_DB.T @ h_D).square().sum() / h_D.square().sum())
    return shares
