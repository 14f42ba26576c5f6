"""|h| of the patches of the first images at the dims where it is largest: what a map of one dim is made of.

Shapes: T tokens, D dims, P patches, C kept dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.protocol import Where, check_2d, check_same, to_numpy


class PatchColumns:
    """Of each of the first images the dims with the greatest |h| on any patch, and |h| of every patch there.

    Args:
        patches: positions of the patches, row by row.
        images: how many images are looked at, the first ones.
        dims: C, how many dims of each are kept.
    """

    def __init__(self, patches: Sequence[int], images: int = 8, dims: int = 8) -> None:
        self.patches, self.images, self.dims = tuple(patches), images, dims
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one image; one that lacks patches, or is not among the first, is left out."""
        check_2d(h_TD)
        if where.sequence >= self.images or max(self.patches) >= len(h_TD):
            return
        size_PD = h_TD.detach()[list(self.patches)].float().abs()
        greatest_D = size_PD.nan_to_num(0.0, posinf=0.0).amax(0)
        dims_C = greatest_D.topk(min(self.dims, len(greatest_D))).indices
        self._rows[where.sequence] = dims_C, size_PD[:, dims_C].T

    def merge(self, other: PatchColumns) -> None:
        """Add what another one of the same options has seen."""
        ours, theirs = ((x.patches, x.images, x.dims) for x in (self, other))
        check_same("PatchColumns", ours, theirs)
        self._rows |= other._rows

    def result(self) -> dict[int, dict[int, np.ndarray]]:
        """Image -> dim -> |h| (P,) float32."""
        found = {n: (to_numpy(d, np.int64), to_numpy(v, np.float32)) for n, (d, v) in sorted(self._rows.items())}
        return {n: dict(zip(dims.tolist(), values, strict=True)) for n, (dims, values) in found.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        kept, n_patches = sorted(self._rows.items()), len(self.patches)
        dims = [to_numpy(d, np.int64) for _, (d, _) in kept]
        values = [to_numpy(v, np.float32) for _, (_, v) in kept]
        return {
            "patches": np.array(self.patches, np.int64), "options": np.array([self.images, self.dims], np.int64),
            "sequence": np.array([n for n, _ in kept], np.int64),
            "kept": np.stack(dims) if dims else np.zeros((0, 0), np.int64),
            "values": np.stack(values) if values else np.zeros((0, 0, n_patches), np.float32),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        self = cls(state["patches"].tolist(), *(int(x) for x in state["options"]))
        each = zip(state["sequence"].tolist(), state["kept"], state["values"], strict=True)
        self._rows = {n: (torch.from_numpy(np.array(d)), torch.from_numpy(np.array(v))) for n, d, v in each}
        return self
