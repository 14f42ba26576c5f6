"""Weights that stand out where massive activations are: norms (Kovaleva 2021) and the unembedding (Cancedda 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.models import Model
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
    z: dict[tuple[int, str], tuple[np.ndarray, ...]] = {}
    for block in stack.blocks:
        for name, module in model.module.get_submodule(block.module).named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1 and len(weight) == stack.d_model:
                bias = getattr(module, "bias", None)
                z[block.layer, f"{block.module}.{name}"] = (
                    *_scored(weight),
                    *(_scored(bias) if isinstance(bias, Tensor) else (np.full(len(weight), np.nan),) * 2),
                )
    if not z:
        return []
    beyond = {
        key: (np.abs(weight_z) > SIGMA) & (np.isnan(bias_z) | (np.abs(bias_z) > SIGMA))
        for key, (_, weight_z, _, bias_z) in z.items()
    }
    layers = np.zeros(stack.d_model, int)
    for layer in {layer for layer, _ in beyond}:
        layers += np.any([b for (at, _), b in beyond.items() if at == layer], axis=0)
    outlier = layers >= LAYER_SHARE * stack.n_layers
    shown = sorted(dims | set(np.flatnonzero(outlier).tolist()))
    return [
        {
            "stack": stack.name, "layer": layer, "module": name, "dim": j, "weight": weight[j], "weight_z": weight_z[j],
            "bias": bias[j], "bias_z": bias_z[j], "beyond": beyond[layer, name][j], "outlier": outlier[j],
            "finding": j in dims,
        }
        for (layer, name), (weight, weight_z, bias, bias_z) in z.items()
        for j in shown
    ]  # fmt: skip


def _scored(x_D: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values, and how many standard deviations each is from their mean."""
    x = x_D.detach().double().cpu().numpy()
    std = x.std()
    return x, (x - x.mean()) / std if std > 0 else np.zeros_like(x)


def spectrum(model: Model, states: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Share of |h|^2 in the weakest directions of the unembedding W_U, for mean states of groups of tokens.

    h is taken as it stands in the residual stream, before the final norm. A random direction has a share of about
    the fraction of directions, 0.05.

    Args:
        states: group -> (D,) mean state.

    Returns:
        {"bottom": fraction of the directions, group: share, ...}, or {"unavailable": reason}.
    """
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return {"unavailable": "the model has no unembedding matrix"}
    D = weight.shape[1]
    if any(len(h) != D for h in states.values()) or not states:
        return {"unavailable": "the unembedding reads another width than that of the residual stream"}
    if D > WIDEST:
        return {"unavailable": f"the residual stream is wider than {WIDEST:,}"}
    weight_VD = weight.detach().float()
    gram_DD = (weight_VD.T @ weight_VD).double().cpu()
    _, vectors = torch.linalg.eigh(gram_DD)  # ascending
    weakest_DB = vectors[:, : max(1, round(BOTTOM * D))]
    shares: dict[str, Any] = {"bottom": weakest_DB.shape[1] / D}
    for group, h in states.items():
        h_D = torch.from_numpy(np.asarray(h, np.float64))
        shares[group] = float((weakest_DB.T @ h_D).square().sum() / h_D.square().sum())
    return shares
