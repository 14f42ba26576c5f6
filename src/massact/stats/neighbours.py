"""How alike the patches of an image are to their neighbours on the grid.

Shapes: N images, T tokens, D dims, Y rows and X columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.protocol import Where, check_2d, check_same, stacked


def neighbour_cosine(patches_YXD: Tensor) -> Tensor:
    """Mean cosine of every patch to those above, below, left and right of it, of which there are 2 to 4: (Y, X).

    NaN where a patch has no neighbour (a grid of one), or it or all its neighbours are zero.
    """
    norm_YX = patches_YXD.norm(dim=-1)
    unit_YXD = patches_YXD / norm_YX.clamp(min=torch.finfo(patches_YXD.dtype).tiny)[..., None]
    total_YX, n_YX = torch.zeros_like(norm_YX), torch.zeros_like(norm_YX)
    real_YX = norm_YX > 0
    for dim in (0, 1):
        length = patches_YXD.shape[dim] - 1
        first, second = slice(0, length), slice(1, length + 1)
        one, other = ((first,), (second,)) if dim == 0 else ((slice(None), first), (slice(None), second))
        both = (real_YX[one] & real_YX[other]).to(norm_YX.dtype)
        cosine = (unit_YXD[one] * unit_YXD[other]).sum(-1)
        for here in (one, other):
            total_YX[here] += cosine * both
            n_YX[here] += both
    return torch.where(n_YX > 0, total_YX / n_YX.clamp(min=1), float("nan"))


class NeighbourCosines:
    """Mean cosine of every patch to its neighbours, of every image.

    Args:
        patches: positions of the patches, row by row.
        grid: rows and columns of patches.
    """

    def __init__(self, patches: Sequence[int], grid: tuple[int, int]) -> None:
        self.patches, self.grid = tuple(patches), tuple(grid)
        self._rows: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one image; one that lacks patches is left out."""
        check_2d(h_TD)
        if max(self.patches) >= len(h_TD):
            return
        begin, n = self.patches[0], len(self.patches)
        whole = self.patches == tuple(range(begin, begin + n))
        rows_PD = h_TD.detach()[begin : begin + n] if whole else h_TD.detach()[list(self.patches)]
        self._rows.append((where.sequence, neighbour_cosine(rows_PD.float().reshape(*self.grid, -1))))

    def merge(self, other: NeighbourCosines) -> None:
        """Add what another one of the same patches has seen."""
        check_same("NeighbourCosines", (self.patches, self.grid), (other.patches, other.grid))
        self._rows.extend(other._rows)

    def result(self) -> np.ndarray:
        """(N, Y, X) float32, images in order of their index."""
        return self.state()["values"].reshape(-1, *self.grid)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        rows = sorted(self._rows, key=lambda row: row[0])
        values = stacked([cosine.reshape(-1) for _, cosine in rows], len(self.patches), np.float32)
        return {
            "patches": np.array(self.patches, np.int64), "grid": np.array(self.grid, np.int64),
            "sequence": np.array([sequence for sequence, _ in rows], np.int64), "values": values,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        rows, columns = (int(x) for x in state["grid"])
        self = cls(state["patches"].tolist(), (rows, columns))
        values = torch.from_numpy(np.array(state["values"])).reshape(-1, rows, columns)
        self._rows = list(zip(state["sequence"].tolist(), values, strict=True))
        return self
