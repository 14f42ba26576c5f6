"""A Llama-like model looked at with plain hooks, eager attention and its own logits; nothing of massact.

Shapes: B sequences, T tokens, D width, K key-value heads, L blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Change = Callable[[Tensor], None]  # changes a hidden state (B, T, D) in place


@torch.no_grad()
def kept(module: nn.Module, ids: Tensor, names: list[str], inputs: bool = False) -> dict[str, np.ndarray]:
    """What some modules give (or take in) in one forward pass, in float64."""
    found: dict[str, np.ndarray] = {}
    handles = []
    for name in names:

        def keep(m: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            found[name] = (args[0] if inputs else out).double().numpy()

        handles.append(module.get_submodule(name).register_forward_hook(keep))
    module(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def attention_on_first(module: nn.Module, ids: Tensor) -> np.ndarray:
    """(L,) attention on position 0, eager: mean over sequences, heads and queries but the first."""
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    out = eager(input_ids=ids, output_attentions=True)
    return np.array([a[:, :, 1:, 0].double().mean() for a in out.attentions])


def value_norm_ratio(v_BTX: np.ndarray, width: int) -> float:
    """Norm of the value of position 0 over the mean norm of all others, mean over sequences and heads of a width."""
    norm_BTK = np.linalg.norm(v_BTX.reshape(*v_BTX.shape[:2], -1, width), axis=-1)
    return float((norm_BTK[:, 0] / norm_BTK[:, 1:].mean(1)).mean())


@torch.no_grad()
def perplexity(module: nn.Module, ids: Tensor, layer: int = 0, change: Change | None = None) -> float:
    """exp of the mean loss of every next token, where `change` is made to what layer `layer` (1 is the first) gives."""
    handle = None
    if change is not None:

        def edit(m: nn.Module, args: Any, out: Tensor) -> Tensor:
            new = out.clone()
            change(new)
            return new

        handle = module.get_submodule(f"model.layers.{layer - 1}").register_forward_hook(edit)
    logits_BTV = module(input_ids=ids).logits.double()
    if handle is not None:
        handle.remove()
    logp_BTV = logits_BTV[:, :-1].log_softmax(-1)
    return math.exp(-logp_BTV.gather(-1, ids[:, 1:, None]).mean())


def put(values: dict[int, float]) -> Change:
    """dim -> value, at position 0."""

    def change(h_BTD: Tensor) -> None:
        for dim, value in values.items():
            h_BTD[:, 0, dim] = value

    return change


def zero_ordinary(per_sequence: int, not_dims: list[int]) -> Change:
    """So many entries of every sequence set to zero, drawn among those within 10 % of the median magnitude."""

    def change(h_BTD: Tensor) -> None:
        draw = np.random.default_rng(0)
        for h_TD in h_BTD:
            size = h_TD.abs()
            near = (size / size.median() - 1).abs() < 0.1
            near[:, not_dims] = False
            at = near.nonzero()
            for t, d in at[draw.choice(len(at), per_sequence, replace=False)]:
                h_TD[t, d] = 0.0

    return change
