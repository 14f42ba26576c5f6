"""Models with massive activations planted at known coordinates. Hand-built: not evidence about real models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Plant:
    """One planted activation: it appears after block `first` and is taken away again by block `last + 1`."""

    first: int
    last: int
    pos: int
    dim: int
    value: float


class _Write(nn.Module):
    """Adds the planted values of one layer: a write to the residual stream, (T, D)."""

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        self.register_buffer("plan", torch.zeros(n_tokens, width))
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        small = self.linear(nn.functional.layer_norm(x, x.shape[-1:]))
        return torch.where(self.plan != 0, self.plan - x * (self.plan.abs() > 1e-6), small * 0.1)


class _Block(nn.Module):
    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        self.mlp = _Write(n_tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Planted(nn.Module):
    """Takes `x` (B, T, D), small noise; after block l exactly the planted values stand at their places.

    A write that plants a value v replaces what was there: h + (v - h) = v up to one rounding.
    """

    def __init__(self, n_layers: int, n_tokens: int, width: int, plants: list[Plant]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(n_tokens, width) for _ in range(n_layers)])
        for plant in plants:
            for layer in range(plant.first, plant.last + 1):
                self.layers[layer - 1].mlp.plan[plant.pos, plant.dim] = plant.value
            if plant.last < n_layers:
                self.layers[plant.last].mlp.plan[plant.pos, plant.dim] = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x
