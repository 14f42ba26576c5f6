"""Images in a run: where massive patches are, norms of patches, neighbours, attention between groups; their section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

import numpy as np

from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.reports.panels import Panel, Sheet, parts_in
from massact.reports.parts import Part, Section, Words, parts_of, table_of
from massact.reports.pictures import (
    draw_attention_shares,
    draw_dim_maps,
    draw_massive_share,
    draw_neighbour_cosines,
    draw_norm_histograms,
    draw_norm_maps,
    draw_overlay,
)
from massact.reports.spelling import counted, listed, percent, visible

MOST_NAMED = 4
MOST_LAYERS = 13  # of the norm maps


def draw_scan_overlay(result: ScanResult) -> Sheet | None:
    """The kept pictures with their massive patches framed."""
    return overlay(result) if result.images.get("massive", np.zeros(1)).any() else None


def overlay(result: ScanResult) -> Sheet | None:
    """The kept pictures, whether or not any patch is massive."""
    pictures, massive = result.images.get("pictures", np.zeros(0)), result.images["massive"]
    if not len(pictures):
        return None
    names = names_of(result, len(pictures))
    titles = [f"{int(mask.sum()):,} of {mask.size:,}: {name}" for name, mask in zip(names, massive, strict=True)]
    return draw_overlay(pictures / 255, massive, titles)


def names_of(result: ScanResult, n: int) -> list[str]:
    """Names of the first n images: those of their files where they are recorded."""
    source = (result.info.corpus or {}).get("source")
    files = source.get("files") if isinstance(source, dict) else None
    named = [str(name) for name in files] if isinstance(files, list) else []
    return [PurePath(named[i]).name if i < len(named) else f"Image {i}" for i in range(n)]


def draw_scan_dim(result: ScanResult) -> Sheet | None:
    """|h| of the patches of the kept images at the dim and layer of the largest finding on a patch."""
    sizes = result.images.get("dim_size")
    if sizes is None or not (np.isfinite(sizes) & (sizes > 0)).any():
        return None
    layer, dim = (int(x) for x in result.images["dim_at"])
    return draw_dim_maps(sizes, layer, dim, names_of(result, len(sizes)))


def draw_scan_share(result: ScanResult) -> Sheet | None:
    """Share of all images with a finding on each patch."""
    share = result.images.get("massive_share")
    return None if share is None or not share.any() else draw_massive_share(share, int(result.images["n_images"]))


def draw_scan_norms(result: ScanResult) -> Sheet | None:
    """Norm maps of the first kept image with massive patches, else of the first one."""
    chosen = chosen_norms(result)
    if chosen is None:
        return None
    first, layers, norms_LYX = chosen
    picture = result.images["pictures"][first] / 255 if "pictures" in result.images else None
    return draw_norm_maps(norms_LYX, layers, picture, result.images["massive"][first], first)


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


def draw_scan_histograms(result: ScanResult) -> Sheet | None:
    """Norms of the patches of all images at every layer."""
    drawable = np.isfinite(result.patch_norms[["low", "high"]]).all(axis=1)
    return draw_norm_histograms(result.patch_norms) if drawable.any() else None


def draw_scan_neighbours(result: ScanResult) -> Sheet | None:
    """How alike massive and other patches are to their neighbours."""
    return draw_neighbour_cosines(result.patch_cosines) if result.patch_cosines["mean"].notna().any() else None


def draw_patch_attention(explanation: Explanation) -> Sheet | None:
    """What class token and patches attend to at every layer."""
    shares, axes = explanation.patch_attention, explanation.axes
    shares = shares[shares["query"].isin(["class", "patches"])]
    if not len(shares):
        return None
    after = axes.loc[axes["after_onset"] & (axes["stack"] == shares["stack"].iloc[0]), "layer"]
    return draw_attention_shares(shares, onset=int(after.min()) - 1 if len(after) else None)


PATCH_FIGURES: dict[str, Callable[[ScanResult], Sheet | None]] = {
    "patches_overlay": draw_scan_overlay,
    "patches_dim": draw_scan_dim,
    "patches_share": draw_scan_share,
    "patches_norms": draw_scan_norms,
    "patches_histograms": draw_scan_histograms,
    "patches_neighbours": draw_scan_neighbours,
}


def patches(scan: ScanResult) -> Section | None:
    """Massive patches on the pictures, norms and neighbours (Darcet 2023, Figs. 4 and 5a; Sun 2024, Fig. 16)."""
    if not scan.images:
        return None
    bins = scan.patch_norms[scan.patch_norms["count"] > 0]
    sheets = [overlay(scan), *(draw(scan) for draw in list(PATCH_FIGURES.values())[1:])]
    drawn: list[Part] = []
    for sheet in filter(None, sheets):  # of the norms without their picture, which the overlay has
        drawn += [one for one in sheet.parts if len(sheet.parts) == 1 or isinstance(one, Panel)]
    return section(
        _said(scan),
        *drawn,
        table_of("patch_cosines", scan.patch_cosines, "Cosine of patches to their neighbours", most=600),
        table_of("patch_norms", bins, "Norms of patches: bins that hold any", most=600),
    )


def attended(e: Explanation) -> Section | None:
    """What class token and patches attend to (Sun 2024, Fig. 13)."""
    table = table_of("patch_attention", e.patch_attention, "Attention between groups of tokens", most=600)
    return section(*parts_in(draw_patch_attention(e)), table)


def section(*parts: Part | None) -> Section | None:
    """The section of images, to which scan and explanation each give their parts."""
    made = parts_of(*parts)
    return Section("patches", "Patches of the images", made) if made else None


def _said(scan: ScanResult) -> Words:
    """How many images and patches there are, which patches are massive most often, and whether pictures are kept."""
    share, n = np.asarray(scan.images["massive_share"], float), int(scan.images["n_images"])
    rows, columns = share.shape
    stack, added = visible(str(scan.images["stack"])), np.size(scan.images["registers"])
    more = f" and {counted(added, 'register')}" if added else ""
    each = f"{counted(n, 'image')} of {rows} x {columns} patches{more}{f', {stack}' if stack else ''}."
    if not share.any():
        said = [f"{each} No patch has a finding."]
    else:
        said = [f"{each} A patch is massive here if any layer has a finding on it; that happens at "
                f"{int((share > 0).sum()):,} of the {share.size:,} places."]  # fmt: skip
        order = np.argsort(-share, axis=None, kind="stable")[:MOST_NAMED]
        named = [(divmod(int(i), columns), share.ravel()[i]) for i in order if share.ravel()[i] > 0]
        said.append("Most often: " + listed([f"patch ({y}, {x}) in {percent(s)} of the images"
                                             for (y, x), s in named]) + ".")  # fmt: skip
    if "pictures" not in scan.images:
        said.append("This run keeps no pictures, only the norms of the patches of the first images.")
    return Words(said)
