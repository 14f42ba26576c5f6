"""The scan written out naively: keep every hidden state, sort everything, in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


def hidden_states(module: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Any]) -> list[np.ndarray]:
    """h_0 .. h_L as (B, T, D) float64: the input of the first block and the output of every block."""
    kept: list[torch.Tensor] = []
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda m, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
    ]
    handles += [
        b.register_forward_hook(lambda m, args, out: kept.append((out[0] if isinstance(out, tuple) else out).clone()))
        for b in blocks
    ]
    with torch.no_grad():
        module(**inputs)
    for handle in handles:
        handle.remove()
    return [h.double().numpy() for h in kept]


def layer_rows(states: list[np.ndarray]) -> list[dict[str, float]]:
    """The table `layers`, per layer, with the mean over sequences taken last."""
    rows = []
    for h in states:
        per = []
        for s in h:
            a = np.sort(np.abs(s).reshape(-1))[::-1]
            median = a[::-1][(a.size - 1) // 2]
            centred = s - s.mean()
            per.append(
                {
                    "top1": a[0],
                    "top2": a[1],
                    "top3": a[2],
                    "median": median,
                    "ratio": a[0] / median,
                    "mean": s.mean(),
                    "mean_abs": a.mean(),
                    "std": s.std(),
                    "rms": np.sqrt((s**2).mean()),
                    "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
                }
            )
        row = {k: float(np.mean([p[k] for p in per])) for k in per[0]}
        norms = np.sqrt((h**2).sum(-1))
        row |= {
            "ratio_max": max(p["ratio"] for p in per),
            "max": float(np.abs(h).max()),
            "norm_first": float(norms[:, 0].mean()),
            "norm_rest": float(norms[:, 1:].mean()),
            "norm_max": float(norms.max()),
            "headroom_fp16": 65504 / float(np.abs(h).max()),
            "headroom_fp8_e4m3": 448 / float(np.abs(h).max()),
            "nonfinite": 0,
        }
        rms = np.sqrt((h.reshape(-1, h.shape[-1]) ** 2).mean(0))
        row["rms_kurtosis"] = float((rms**4).mean() / (rms**2).mean() ** 2)
        rows.append(row)
    return rows


def findings(states: list[np.ndarray], magnitude: float, ratio: float) -> set[tuple[int, int, int, int, float]]:
    """(layer, sequence, pos, dim, value) of every |h| > magnitude and >= ratio x median of its hidden state."""
    found = set()
    for layer, h in enumerate(states):
        for i, s in enumerate(h):
            a = np.abs(s)
            median = np.sort(a.reshape(-1))[(a.size - 1) // 2]
            for pos, dim in zip(*np.nonzero((a > magnitude) & (a >= ratio * median)), strict=True):
                found.add((layer, i, int(pos), int(dim), float(s[pos, dim])))
    return found
