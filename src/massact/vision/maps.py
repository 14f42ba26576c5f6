"""Maps of every image at every layer, and which patches are massive by their norm.

Shapes: N images, L layers, T tokens, D dims, Y rows and X columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.models import Model
from massact.positions import Layout, layout_now
from massact.records.sites import Site
from massact.scans.maps import PatchMaps
from massact.stats.neighbours import NeighbourCosines
from massact.stats.protocol import Where, check_2d, check_same, to_numpy
from massact.trace import Probe, measure

TIMES_MEDIAN = 4.0  # a patch whose norm is that many times the median is an outlier, where no threshold is given


class TokenSizes:
    """Norm and greatest magnitude of every token.

    Args:
        layout: of the tokens, added ones among them, which are left out.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._rows: list[tuple[int, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one image."""
        check_2d(h_TD)
        x_TD = h_TD.detach().float()[list(self.layout.own)]
        self._rows.append((where.sequence, x_TD.norm(dim=1), x_TD.abs().amax(1)))

    def merge(self, other: TokenSizes) -> None:
        """Add what another one has seen."""
        check_same("TokenSizes", (self.layout,), (other.layout,))
        self._rows.extend(other._rows)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Norms (N, T) and greatest magnitudes (N, T), images in order of their index."""
        rows = sorted(self._rows, key=lambda row: row[0])
        norms, maxima = (np.stack([to_numpy(r[i], np.float32) for r in rows]) for i in (1, 2))  # type: ignore[arg-type]
        return norms, maxima

    def state(self) -> dict[str, np.ndarray]:
        """Maps are not resumed: an interrupted pass begins again."""
        raise NotImplementedError("maps are not resumed half-way")

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """See `state`."""
        raise NotImplementedError("maps are not resumed half-way")


def patch_maps(
    model: Model,
    corpus: Corpus,
    layout: Layout,
    layers: Sequence[int] | None = None,
    *,
    batch_size: int | str = "auto",
) -> PatchMaps:
    """Norms, greatest magnitudes and neighbour cosines of every image at every layer.

    Inside `test_time_registers` the added tokens are left out: the maps are of the tokens of `layout`.

    Args:
        layout: as read without edits.
        layers: None for all, from 0 (the input of the first block) on.
    """
    n_layers = model.anatomy.stack(layout.stack).n_layers
    wanted = tuple(range(n_layers + 1) if layers is None else layers)
    sites = [Site(layout.stack, layer, "resid_post") for layer in wanted]
    now = layout_now(model, corpus, layout)
    kinds = {"maps": partial(TokenSizes, now), "neighbours": partial(NeighbourCosines, now.patches, now.grid)}
    probes = [Probe(name, str(s), make) for name, make in kinds.items() for s in sites]
    measured = measure(model, corpus, probes, batch_size=batch_size)
    norms, maxima = zip(*(measured.result("maps", s) for s in sites), strict=True)
    cosines = [measured.result("neighbours", s) for s in sites]
    return PatchMaps(layout, wanted, np.stack(norms, 1), np.stack(maxima, 1), np.stack(cosines, 1))


def outlier_patches(
    maps: PatchMaps, threshold: float | None = None, layer: int | None = None
) -> dict[int, list[int]]:
    """Image -> positions of the patches whose norm at a layer is above a threshold (Darcet 2023).

    Args:
        threshold: Darcet's was read off a histogram (150 for DINOv2-g), Jiang's is 30. None: four times the median norm
            of all patches of all images there, which is ours: a rule without a unit.
        layer: None for the last one that was measured.
    """
    norms_NYX = maps.on_grid(maps.norms[:, maps.at(maps.layers[-1] if layer is None else layer)])
    limit = TIMES_MEDIAN * float(np.median(norms_NYX)) if threshold is None else threshold
    above_NP = norms_NYX.reshape(len(norms_NYX), -1) > limit
    return {n: [maps.layout.patches[p] for p in np.flatnonzero(row)] for n, row in enumerate(above_NP)}
