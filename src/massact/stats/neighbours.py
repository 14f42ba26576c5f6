"""How alike the patches of an image are to their neighbours on the grid.

Shapes: N images, T tokens, D dims, Y rows and X columns of patches, Q pairs of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.protocol import Where, check_2d, check_same, stacked


def pair_cosines(patches_YXD: Tensor) -> Tensor:
    """Cosines of all pairs of neighbours: (Y (X - 1) + (Y - 1) X,), side by side first, then one above the other.

    NaN where one of them is zero or not finite. Two batched products; nothing of the size of the patches but their
    normalised copy is made.
    """
    unit_YXD = patches_YXD / patches_YXD.norm(dim=-1, keepdim=True)
    unit_XYD = unit_YXD.transpose(0, 1)
    across, down = (torch.bmm(u, u.transpose(1, 2)).diagonal(1, 1, 2) for u in (unit_YXD, unit_XYD))
    return torch.cat([across.reshape(-1), down.T.reshape(-1)])


def neighbour_means(pairs_NQ: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean cosine of every patch to those above, below, left and right of it, of which there are 2 to 4: (N, Y, X).

    NaN where a patch has no neighbour (a grid of one), or it or all its neighbours are zero.
    """
    n, (rows, columns) = len(pairs_NQ), grid
    cut = rows * (columns - 1)
    sides = (pairs_NQ[:, :cut].reshape(n, rows, columns - 1), pairs_NQ[:, cut:].reshape(n, rows - 1, columns))
    total_NYX, n_NYX = np.zeros((n, rows, columns)), np.zeros((n, rows, columns), int)
    for axis, cosine in enumerate(sides[::-1], start=1):
        length, known = cosine.shape[axis], ~np.isnan(cosine)
        for begin in (0, 1):
            here = (slice(None),) * axis + (slice(begin, begin + length),)
            total_NYX[here] += np.where(known, cosine, 0)
            n_NYX[here] += known
    return np.where(n_NYX > 0, total_NYX / np.maximum(n_NYX, 1), np.nan).astype(np.float32)


class NeighbourCosines:
    """Mean cosine of every patch to its neighbours, of every image.

    Args:
        patches: positions of the patches, row by row.
        grid: rows and columns of patches.
    """

    def __init__(self, patches: Sequence[int], grid: tuple[int, int]) -> None:
        self.patches, self.grid = tuple(patches), grid
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
        self._rows.append((where.sequence, pair_cosines(rows_PD.float().reshape(*self.grid, -1))))

    def merge(self, other: NeighbourCosines) -> None:
        """Add what another one of the same patches has seen."""
        check_same("NeighbourCosines", (self.patches, self.grid), (other.patches, other.grid))
        self._rows.extend(other._rows)

    def result(self) -> np.ndarray:
        """(N, Y, X) float32, images in order of their index."""
        return neighbour_means(self.state()["values"], self.grid)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        rows = sorted(self._rows, key=lambda row: row[0])
        n_pairs = 2 * len(self.patches) - sum(self.grid)
        values = stacked([pairs for _, pairs in rows], n_pairs, np.float32)
        return {
            "patches": np.array(self.patches, np.int64), "grid": np.array(self.grid, np.int64),
            "sequence": np.array([sequence for sequence, _ in rows], np.int64), "values": values,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        rows, columns = (int(x) for x in state["grid"])
        self = cls(state["patches"].tolist(), (rows, columns))
        values = torch.from_numpy(np.array(state["values"]))
        self._rows = list(zip(state["sequence"].tolist(), values, strict=True))
        return self
