"""Figures of a run on images: where massive patches are, norms of patches, neighbours, attention between groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.reports.pictures import (
    draw_attention_shares,
    draw_massive_share,
    draw_neighbour_cosines,
    draw_norm_histograms,
    draw_norm_maps,
    draw_overlay,
)

MOST_LAYERS = 13  # of the norm maps: with the picture two full rows


def draw_scan_overlay(result: ScanResult) -> Figure | None:
    """The kept pictures with their massive patches framed."""
    images = result.images
    if "pictures" not in images or not images["massive"].any():
        return None
    return draw_overlay(images["pictures"] / 255, images["massive"])


def draw_scan_share(result: ScanResult) -> Figure | None:
    """Share of all images with a finding on each patch."""
    share = result.images.get("massive_share")
    return None if share is None or not share.any() else draw_massive_share(share, int(result.images["n_images"]))


def draw_scan_norms(result: ScanResult) -> Figure | None:
    """Norm maps of the first kept image with massive patches, else of the first one."""
    chosen = chosen_norms(result)
    if chosen is None:
        return None
    first, layers, norms_LYX = chosen
    picture = result.images["pictures"][first] / 255 if "pictures" in result.images else None
    return draw_norm_maps(norms_LYX, layers, picture, result.images["massive"][first])


def chosen_norms(result: ScanResult) -> tuple[int, list[int], np.ndarray] | None:
    """Which norm maps are shown: (place of the image, layers, norms (layers, rows, columns)).

    The image is the first kept one with massive patches, else the first; None where no norm of it is above zero.
    """
    norms = result.images.get("norms")
    if norms is None or not len(norms):
        return None
    first = int(result.images["massive"].any((1, 2)).argmax())
    if not (np.isfinite(norms[first]) & (norms[first] > 0)).any():
        return None
    layers = result.images["layers"]
    found = result.findings.loc[result.findings["stack"] == str(result.images["stack"]), "layer"]
    shown = _some([int(x) for x in layers], int(found.min()) if len(found) else None)
    at = [int(np.flatnonzero(layers == layer)[0]) for layer in shown]
    return first, shown, norms[first][at]


def _some(layers: list[int], onset: int | None) -> list[int]:
    """At most `MOST_LAYERS`: the first and the last, the onset and the one before it, and others evenly between."""
    if len(layers) <= MOST_LAYERS:
        return layers
    chosen = {layers[0], layers[-1], *([onset - 1, onset] if onset is not None else [])} & set(layers)
    for i in np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int):
        if len(chosen) < MOST_LAYERS:
            chosen.add(layers[i])
    return sorted(chosen)


def draw_scan_histograms(result: ScanResult) -> Figure | None:
    """Norms of the patches of all images at every layer."""
    drawable = np.isfinite(result.patch_norms[["low", "high"]]).all(axis=1)
    return draw_norm_histograms(result.patch_norms) if drawable.any() else None


def draw_scan_neighbours(result: ScanResult) -> Figure | None:
    """How alike massive and other patches are to their neighbours."""
    return draw_neighbour_cosines(result.patch_cosines) if len(result.patch_cosines) else None


def draw_patch_attention(explanation: Explanation) -> Figure | None:
    """What class token and patches attend to at every layer."""
    shares, axes = explanation.patch_attention, explanation.axes
    shares = shares[shares["query"].isin(["class", "patches"])]
    if not len(shares):
        return None
    after = axes.loc[axes["after_onset"] & (axes["stack"] == shares["stack"].iloc[0]), "layer"]
    return draw_attention_shares(shares, onset=int(after.min()) - 1 if len(after) else None)


PATCH_FIGURES: dict[str, Callable[[ScanResult], Figure | None]] = {
    "patches_overlay": draw_scan_overlay,
    "patches_share": draw_scan_share,
    "patches_norms": draw_scan_norms,
    "patches_histograms": draw_scan_histograms,
    "patches_neighbours": draw_scan_neighbours,
}
