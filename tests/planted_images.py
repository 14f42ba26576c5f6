"""A tiny image model with planted truth: a known neuron writes a huge value at known patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, NEURONS, HEADS, GRID = 16, 24, 2, 3
FLAG, DIM = 0, 7  # dim that says that a patch is bright, dim that becomes massive
LAYER, NEURON, SIZE = 2, 5, 900.0
BRIGHT = 5.0


class Block(nn.Module):
    """Without norms; the planted neuron reads the flag and writes the massive dim."""

    def __init__(self, planted: bool) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        with torch.no_grad():
            for linear in (self.qkv, self.o, self.up, self.down):
                linear.weight.mul_(0.3)
                linear.bias.zero_()
            self.o.weight[FLAG] = 0
            self.down.weight[FLAG] = 0
            self.down.weight[DIM] = 0
            self.o.weight[DIM] = 0
            self.up.weight[:, DIM] = 0  # else neurons of the next block, which has no norm, would be as large
            if planted:
                self.up.weight[NEURON] = 0
                self.up.weight[NEURON, FLAG], self.up.bias[NEURON] = 10.0, -10.0  # silent below a flag of 1
                self.down.weight[:, NEURON] = 0
                self.down.weight[DIM, NEURON] = SIZE / (10 * BRIGHT - 10)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x / 3).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, WIDTH))
        return x + self.down(F.relu(self.up(x)))


class Planted(nn.Module):
    """3 x 3 patches of 2 x 2 pixels behind a class token; bright patches are flagged. Class logits read the patches."""

    def __init__(self, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Conv2d(1, WIDTH, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.3)
        self.blocks = nn.ModuleList(Block(i + 1 == LAYER) for i in range(layers))
        self.head = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            self.embed.weight[FLAG], self.embed.bias[FLAG] = 0.25, 0.0
            self.embed.weight[DIM] = 0
            self.cls[..., FLAG] = 0
            self.head.weight[:, DIM] = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 1:].mean(1))


def images(n: int = 6, seed: int = 0) -> tuple[Tensor, dict[int, list[int]]]:
    """Images (N, 1, 6, 6), of which some patches are bright, and which these are: positions behind the class token."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 2 * GRID, 2 * GRID, generator=draw) * 0.2
    bright: dict[int, list[int]] = {}
    for i in range(n):
        for patch in torch.randperm(GRID * GRID, generator=draw)[: 1 + i % 2].tolist():
            y, z = divmod(patch, GRID)
            x[i, 0, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2] = BRIGHT
            bright.setdefault(i, []).append(1 + patch)
    return x, {i: sorted(p) for i, p in bright.items()}
