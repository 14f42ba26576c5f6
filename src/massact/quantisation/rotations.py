"""Rotations: random Hadamard matrices, as two small factors, so that a width of thousands costs what a hundred do.

H = A (x) B is a Hadamard matrix where A and B are; x H is then A^T X B with x as a matrix X (A, B).

Shapes: F features, F = A B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from massact.quantisation.number_formats import quant_module

HADAMARD = "compressed_tensors.transform.utils.hadamard"


@dataclass(frozen=True)
class Rotation:
    """x H and back, H = A (x) B, H H^T = 1.

    Args:
        a_AA, b_BB: its factors, orthogonal. block: entries that it mixes: F, or B where A is the identity.
    """

    a_AA: Tensor
    b_BB: Tensor
    block: int

    def __call__(self, x: Tensor) -> Tensor:
        """Rotated, (..., F)."""
        return self._turned(x, self.a_AA, self.b_BB)

    def back(self, x: Tensor) -> Tensor:
        """Rotated back, (..., F)."""
        return self._turned(x, self.a_AA.T, self.b_BB.T)

    def _turned(self, x: Tensor, a_AA: Tensor, b_BB: Tensor) -> Tensor:
        made = torch.matmul(x.reshape(*x.shape[:-1], len(a_AA), len(b_BB)), b_BB)
        return torch.matmul(a_AA.T, made).reshape(x.shape)


def rotation(width: int, seed: int, device: torch.device | str = "cpu") -> Rotation:
    """A random Hadamard rotation of a width, of compressed-tensors' matrices.

    Where there is none of that size: in blocks of the greatest power of two that divides it.
    """
    powers = [1 << k for k in range(width.bit_length()) if width % (1 << k) == 0]
    draw = torch.Generator().manual_seed(seed)
    for b in sorted(powers, key=lambda b: b + width // b):  # the cheapest pair first
        a_AA = _drawn(width // b, draw)
        if a_AA is not None:
            block = width
            break
    else:
        block = b = powers[-1]
        a_AA = torch.eye(width // b)
    b_BB = _drawn(b, draw)
    assert a_AA is not None and b_BB is not None  # there is one of every power of two
    return Rotation(a_AA.to(device), b_BB.to(device), block)


def _drawn(size: int, draw: torch.Generator) -> Tensor | None:
    """A random orthogonal Hadamard matrix; None where none of that size is known."""
    try:
        made: Tensor = quant_module(HADAMARD).random_hadamard_matrix(size, dtype=torch.float32, gen=draw)
    except ValueError:
        return None
    return made / size**0.5
