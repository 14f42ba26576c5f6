"""The numbers behind pictures of images: norms and massive patches on the grid, histograms, how alike neighbours are.

A scan measures them in its own pass; `patch_maps` in one for themselves, under whatever edits are in force.

Shapes: N images, L layers, T tokens, Y rows and X columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from massact.corpora import Corpus
from massact.models import Model
from massact.positions import Layout, layout_now, layout_of
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats import HiddenStats
from massact.stats.neighbours import NeighbourCosines
from massact.stats.patch_columns import PatchColumns
from massact.trace import Measurements, Probe, measure

QUANTILES = (0.1, 0.5, 0.9)
TIMES_MEDIAN = 4.0  # a patch whose norm is that many times the median is an outlier, where no threshold is given


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


def scanned_layout(model: Model, corpus: Corpus, stacks: list[str]) -> Layout | None:
    """The layout of the first of the stacks that has patches; None where none has."""
    return next((found for name in stacks if (found := layout_of(model, corpus, name)) is not None), None)


def neighbours_probe(layout: Layout, sites: str = "*.resid_post") -> Probe:
    """What a scan measures of patches beside what it measures of all tokens."""
    head = f"{layout.stack}/" if layout.stack else ""
    return Probe("neighbours", f"{head}{sites}", partial(NeighbourCosines, layout.patches, layout.grid))


def columns_probe(layout: Layout, images: int) -> Probe:
    """|h| of the patches of the first images at their largest dims."""
    head = f"{layout.stack}/" if layout.stack else ""
    return Probe("columns", f"{head}*.resid_post", partial(PatchColumns, layout.patches, images))


def dim_maps(measured: Measurements, findings: pd.DataFrame, layout: Layout) -> tuple[int, int, np.ndarray] | None:
    """|h| of every patch of the first images at the dim and layer of the largest finding on a patch.

    Returns:
        (layer, dim, (K, Y, X) float32), NaN for an image whose largest dims do not hold that one. None where no patch
        has a finding of one dim.
    """
    mine = findings[(findings["stack"] == layout.stack) & findings["pos"].isin(list(layout.patches))]
    mine = mine[(mine["dim"] >= 0) & mine["magnitude"].notna() & (mine["site"] == "resid_post")]
    if not len(mine):
        return None
    best = mine.loc[mine["magnitude"].idxmax()]
    layer, dim = int(best["layer"]), int(best["dim"])
    site = next((site for site in measured.sites("columns") if site.layer == layer), None)
    found: dict[int, dict[int, np.ndarray]] = {} if site is None else measured.result("columns", site)
    if not found:
        return None
    none = np.full(len(layout.patches), np.nan, np.float32)
    maps = [found.get(n, {}).get(dim, none).reshape(layout.grid) for n in range(max(found) + 1)]
    return layer, dim, np.stack(maps).astype(np.float32)


def scanned_maps(measured: Measurements, layout: Layout, now: Layout | None = None) -> PatchMaps:
    """Norms, greatest magnitudes and neighbour cosines of all images, from the probes "hidden" and "neighbours".

    Args:
        layout: of the maps.
        now: of the pass, with the tokens that an edit had added, which are left out; None for the same.

    Raises:
        UserError: an image had other tokens than the layout.
    """
    now = layout if now is None else now
    sites = sorted(measured.sites("neighbours"), key=lambda site: site.layer)
    hidden = [measured.result("hidden", site) for site in sites]
    if any((h.n_tokens != now.n_tokens).any() for h in hidden):
        raise UserError(f"Not every image has the {now.n_tokens} tokens of the first one.")

    def of_own(values: Sequence[np.ndarray]) -> np.ndarray:
        rows = [v.reshape(-1, now.n_tokens)[:, list(now.own)].astype(np.float32) for v in values]
        return np.stack(rows, 1)

    norms, maxima = of_own([h.token_norm for h in hidden]), of_own([h.token_max for h in hidden])
    cosines = np.stack([measured.result("neighbours", site) for site in sites], 1)
    return PatchMaps(layout, tuple(site.layer for site in sites), norms, maxima, cosines)


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
    now = layout_now(model, corpus, layout)
    probes = []
    for layer in range(n_layers + 1) if layers is None else layers:
        site = str(Site(layout.stack, layer, "resid_post"))
        probes += [Probe("hidden", site, partial(HiddenStats, top_k=1)), neighbours_probe(now, f"{layer}.resid_post")]
    return scanned_maps(measure(model, corpus, probes, batch_size=batch_size), layout, now)


def massive_patches(findings: pd.DataFrame, layout: Layout, layer: int | None = None) -> dict[int, list[int]]:
    """Image -> positions of the patches with a massive activation, as a scan found them.

    Args:
        findings: the table of a scan of these images.
        layer: None for any layer.
    """
    mine = findings[(findings["stack"] == layout.stack) & findings["pos"].isin(list(layout.patches))]
    mine = mine if layer is None else mine[mine["layer"] == layer]
    return {int(n): sorted({int(p) for p in rows["pos"]}) for n, rows in mine.groupby("sequence")}


def outlier_patches(maps: PatchMaps, threshold: float | None = None, layer: int | None = None) -> dict[int, list[int]]:
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
        The table `patch_norms`: stack, layer, low, high (of the bin), count, share (of all patches of that layer).
        Norms of 0 are in no bin; they are missing from the shares' sum.

    Raises:
        UserError: no patch has a norm above zero.
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
            rows.append({"stack": maps.layout.stack, "layer": layer, "low": edges[j], "high": edges[j + 1],
                         "count": int(count), "share": count / len(values)})  # fmt: skip
    return frame("patch_norms", rows)


def neighbour_cosines(maps: PatchMaps, outliers: Mapping[int, Sequence[int]]) -> pd.DataFrame:
    """How alike patches and their neighbours are: those that are massive (at whatever layer) beside all others.

    At layer 0 this says whether they were redundant before they became massive (Darcet 2023, Fig. 5a).

    Returns:
        The table `patch_cosines`: stack, layer, group ("massive", "other"), n (patches), mean, p10, p50, p90. A group
        without patches is missing.
    """
    is_massive_NYX = marked(outliers, maps.layout, len(maps.norms))
    rows: list[dict[str, Any]] = []
    for i, layer in enumerate(maps.layers):
        for group, mask in (("massive", is_massive_NYX), ("other", ~is_massive_NYX)):
            values = maps.cosines[:, i][mask].astype(np.float64)
            values = values[~np.isnan(values)]
            if len(values):
                quantiles = np.quantile(values, QUANTILES)
                rows.append({"stack": maps.layout.stack, "layer": layer, "group": group, "n": len(values),
                             "mean": values.mean(), "p10": quantiles[0], "p50": quantiles[1],
                             "p90": quantiles[2]})  # fmt: skip
    return frame("patch_cosines", rows)
