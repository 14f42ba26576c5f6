"""The numbers behind the pictures: norms and massive patches on the grid, histograms, how alike neighbours are.

Shapes: N images, L layers, T tokens, D dims, P tokens in front of the patches, Y rows and X columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.models import Model
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats.protocol import Where, check_2d, check_same, to_numpy
from massact.trace import Probe, measure
from massact.vision.layout import Layout, layout_now

TIMES_MEDIAN = 4.0  # a patch whose norm is that many times the median is an outlier, where no threshold is given
QUANTILES = (0.1, 0.5, 0.9)


class PatchStats:
    """Norm and greatest magnitude of every token, and mean cosine of every patch to its neighbours.

    Args:
        layout: of the tokens, added ones among them, which are left out.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._rows: list[tuple[int, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one image."""
        check_2d(h_TD)
        h_TD = h_TD.detach().float()
        patches_YXD = h_TD[list(self.layout.patches)].reshape(*self.layout.grid, -1)
        x_TD = h_TD[list(self.layout.own)]
        row = (x_TD.norm(dim=1), x_TD.abs().amax(1), neighbour_cosine(patches_YXD))
        self._rows.append((where.sequence, *row))

    def merge(self, other: PatchStats) -> None:
        """Add what another one has seen."""
        check_same("PatchStats", (self.layout,), (other.layout,))
        self._rows.extend(other._rows)

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Norms (N, T), greatest magnitudes (N, T), cosines (N, Y, X), images in order of their index."""
        rows = sorted(self._rows, key=lambda row: row[0])
        norms, maxima, cosines = (np.stack([to_numpy(r[i], np.float32) for r in rows]) for i in (1, 2, 3))  # type: ignore[arg-type]
        return norms, maxima, cosines

    def state(self) -> dict[str, np.ndarray]:
        """Maps are not resumed: an interrupted pass begins again."""
        raise NotImplementedError("maps are not resumed half-way")

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """See `state`."""
        raise NotImplementedError("maps are not resumed half-way")


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


@dataclass(frozen=True)
class PatchMaps:
    """Maps of every image at every layer; layer 0 is the input of the first block.

    Args:
        layout: of the tokens.
        layers: which layers the second axis holds.
        norms, maxima: (N, L, T) float32, L2 norm and greatest |h| of every token; before the model's last norm.
        cosines: (N, L, Y, X) mean cosine of every patch to its 4 neighbours.
    """

    layout: Layout
    layers: tuple[int, ...]
    norms: np.ndarray
    maxima: np.ndarray
    cosines: np.ndarray

    def on_grid(self, of_tokens: np.ndarray) -> np.ndarray:
        """(..., T) as (..., Y, X): the patches only."""
        patches = of_tokens[..., list(self.layout.patches)]
        return patches.reshape(*patches.shape[:-1], *self.layout.grid)

    def at(self, layer: int) -> int:
        """Where a layer stands on the second axis.

        Raises:
            UserError: it was not measured.
        """
        if layer not in self.layers:
            raise UserError(f"Layer {layer} was not measured.", do=f"Measured: {self.layers}.")
        return self.layers.index(layer)


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
    make = partial(PatchStats, layout_now(model, corpus, layout))
    measured = measure(model, corpus, [Probe("maps", str(s), make) for s in sites], batch_size=batch_size)
    norms, maxima, cosines = zip(*(measured.result("maps", s) for s in sites), strict=True)
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
    start = maps.layout.n_prefix
    above_NP = norms_NYX.reshape(len(norms_NYX), -1) > limit
    return {n: [start + int(p) for p in np.flatnonzero(row)] for n, row in enumerate(above_NP)}


def massive_patches(findings: pd.DataFrame, layout: Layout, layer: int | None = None) -> dict[int, list[int]]:
    """Image -> positions of the patches with a massive activation, as a scan found them.

    Args:
        findings: the table of a scan of these images.
        layer: None for any layer.
    """
    mine = findings[(findings["stack"] == layout.stack) & findings["pos"].isin(list(layout.patches))]
    mine = mine if layer is None else mine[mine["layer"] == layer]
    return {int(n): sorted({int(p) for p in rows["pos"]}) for n, rows in mine.groupby("sequence")}


def marked(outliers: Mapping[int, Sequence[int]], layout: Layout, n_images: int) -> np.ndarray:
    """Positions as maps: (N, Y, X) bool."""
    maps_NYX = np.zeros((n_images, *layout.grid), bool)
    for image, positions in outliers.items():
        for position in positions:
            maps_NYX[(image, *layout.place(position))] = True
    return maps_NYX


def norm_histograms(maps: PatchMaps, bins: int = 60) -> pd.DataFrame:
    """Histogram of patch norms at every layer, over the same logarithmic bins (Darcet 2023, Fig. 4).

    Returns:
        Columns: layer, low, high (of the bin), count, share (of all patches of that layer). Norms of 0 are in no bin;
        they are missing from the shares' sum.
    """
    norms_NLP = maps.norms[..., list(maps.layout.patches)].astype(np.float64)
    positive = norms_NLP[np.isfinite(norms_NLP) & (norms_NLP > 0)]
    if not len(positive):
        raise UserError("No patch has a norm above zero.")
    low, high = float(positive.min()), float(positive.max())
    edges = np.geomspace(low, high if high > low else 2 * low, bins + 1)
    edges[0], edges[-1] = low, max(high, edges[-1])  # rounding must not put the extremes outside
    rows: list[dict[str, Any]] = []
    for i, layer in enumerate(maps.layers):
        values = norms_NLP[:, i].ravel()
        for j, count in enumerate(np.histogram(values, edges)[0]):
            rows.append({"layer": layer, "low": edges[j], "high": edges[j + 1], "count": int(count),
                         "share": count / len(values)})  # fmt: skip
    return pd.DataFrame(rows)


def neighbour_cosines(maps: PatchMaps, outliers: Mapping[int, Sequence[int]]) -> pd.DataFrame:
    """How alike patches and their neighbours are: those that are massive (at whatever layer) beside all others.

    At layer 0 this says whether they were redundant before they became massive (Darcet 2023, Fig. 5a).

    Returns:
        Columns: layer, group ("massive", "other"), n (patches), mean, p10, p50, p90. A group without patches is
        missing.
    """
    is_massive_NYX = marked(outliers, maps.layout, len(maps.norms))
    rows: list[dict[str, Any]] = []
    for i, layer in enumerate(maps.layers):
        for group, mask in (("massive", is_massive_NYX), ("other", ~is_massive_NYX)):
            values = maps.cosines[:, i][mask].astype(np.float64)
            values = values[~np.isnan(values)]
            if len(values):
                quantiles = np.quantile(values, QUANTILES)
                rows.append({"layer": layer, "group": group, "n": len(values), "mean": values.mean(),
                             "p10": quantiles[0], "p50": quantiles[1], "p90": quantiles[2]})  # fmt: skip
    return pd.DataFrame(rows, columns=["layer", "group", "n", "mean", "p10", "p50", "p90"])
