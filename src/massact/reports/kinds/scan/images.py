"""The section of images: their patches in a run."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.reports import charts
from massact.reports.kinds.scan.patches import chosen_norms
from massact.reports.parts import Chart, Gallery, Part, Picture, Section, Words, parts_of, table_of
from massact.reports.spelling import counted, listed, number, percent, visible

# Group of tokens -> colour, dash, symbol, name.
GROUPS = {
    "class": ("--s2", "solid", "circle", "class token"), "registers": ("--s3", "dash", "square", "registers"),
    "massive": ("--limit", "solid", "diamond", "massive patches"), "added": ("--s4", "dash", "cross", "added tokens"),
    "patches": ("--s6", "dot", "triangle-up", "other patches"),
    "other": ("--s6", "dot", "triangle-up", "other patches"),
    "slot": ("--s5", "dashdot", "x", "slot"),
}  # fmt: skip
MOST_NAMED = 4


def patches(scan: ScanResult) -> Section | None:
    """Massive patches on the pictures, norms and neighbours (Darcet 2023, Figs. 4 and 5a; Sun 2024, Fig. 16)."""
    if not scan.images:
        return None
    bins = scan.patch_norms[scan.patch_norms["count"] > 0]
    return section(
        _said(scan),
        _overlay(scan),
        _share(scan),
        _norm_maps(scan),
        _histograms(scan.patch_norms),
        _neighbours(scan.patch_cosines),
        table_of("patch_cosines", scan.patch_cosines, "Cosine of patches to their neighbours", most=600),
        table_of("patch_norms", bins, "Norms of patches: bins that hold any", most=600),
    )


def attended(e: Explanation) -> Section | None:
    """What class token and patches attend to (Sun 2024, Fig. 13)."""
    table = table_of("patch_attention", e.patch_attention, "Attention between groups of tokens", most=600)
    return section(*_attention(e), table)


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


def _overlay(scan: ScanResult) -> Gallery | None:
    """The kept pictures with their massive patches framed (Sun 2024, Fig. 16)."""
    pictures, massive_KYX = scan.images.get("pictures"), scan.images["massive"]
    if pictures is None or not len(pictures):
        return None
    made = []
    for i, (pixels, mask) in enumerate(zip(pictures, massive_KYX, strict=True)):
        file = io.BytesIO()  # of photographs a JPEG is a tenth of a PNG
        Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "JPEG", quality=90)
        at = [(int(y), int(x)) for y, x in np.argwhere(mask)]
        few = ", ".join(f"({y}, {x})" for y, x in at[:MOST_NAMED])
        where = f": {few}{', ...' if len(at) > MOST_NAMED else ''}" if at else ""
        label = f"Image {i}: {len(at):,} of {mask.size:,}"
        made.append(Picture(file.getvalue(), pixels.shape[:2], mask.shape, at, label, f"{label} patches are massive"
                            f"{where}"))  # fmt: skip
    return Gallery("Massive patches", made, "Framed; all other patches are dimmed. Below: how many of each image. "
                   "Patches are named (row, column), from the top left.")  # fmt: skip


def _map_axes() -> dict[str, Any]:
    """Axes of a map of patches: square, rows downwards."""
    x = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    return {"xaxis": x, "yaxis": {**x, "autorange": "reversed", "scaleanchor": "x"}, "showlegend": False}


def _share(scan: ScanResult) -> Chart | None:
    share, n = np.asarray(scan.images["massive_share"], float), int(scan.images["n_images"])
    if not share.any():
        return None
    rows, columns = share.shape
    text = [[f"patch ({y}, {x}), {round(share[y, x] * n):,} of {counted(n, 'image')}" for x in range(columns)]
            for y in range(rows)]  # fmt: skip
    data = [charts.heat(share, list(range(columns)), list(range(rows)), high=None, what="share", text=text)]
    layout = _map_axes()
    layout["xaxis"] |= {"title": {"text": "Column"}, "dtick": max(1, columns // 7)}
    layout["yaxis"] |= {"title": {"text": "Row"}, "dtick": max(1, rows // 7)}
    return Chart("Where patches are massive", data, layout, f"Share of {counted(n, 'image')}.", 360, width="half")


def _norm_maps(scan: ScanResult) -> Chart | None:
    """The norm maps of one image in one heat map, layer beside layer."""
    chosen = chosen_norms(scan)
    if chosen is None:
        return None
    image, layers, norms_LYX = chosen
    (_, rows, columns), across = norms_LYX.shape, math.ceil(math.sqrt(len(layers)))
    high, wide = rows + max(2, round(0.3 * rows)), columns + max(1, round(0.08 * columns))
    norms = np.full((-(-len(layers) // across) * high, across * wide), np.nan)
    text = [[""] * norms.shape[1] for _ in range(norms.shape[0])]
    names = []
    for i, (layer, norms_YX) in enumerate(zip(layers, norms_LYX, strict=True)):
        y0, x0 = (i // across + 1) * high - rows, i % across * wide
        norms[y0 : y0 + rows, x0 : x0 + columns] = norms_YX
        for y in range(rows):
            text[y0 + y][x0 : x0 + columns] = [
                f"layer {layer}, patch ({y}, {x}): {number(norms_YX[y, x], 4)}" for x in range(columns)
            ]
        names.append({"x": x0 - 0.5, "y": y0 - 0.5, "xanchor": "left", "yanchor": "bottom", "showarrow": False,
                      "text": str(layer), "font": {"size": 11, "color": "--muted"}})  # fmt: skip
    log = np.log10(np.where(np.isfinite(norms) & (norms > 0), norms, np.nan))
    data = [_log_heat(log, list(range(norms.shape[1])), list(range(norms.shape[0])), text)]
    layout = _map_axes() | {"annotations": names}
    for axis in ("xaxis", "yaxis"):
        layout[axis]["visible"] = False
    return Chart("Norm of every patch, layer by layer", data, layout, f"Image {image}; above each map its "
                 "layer, 0 is the embedding; one logarithmic scale.", 360, width="half")  # fmt: skip


def _log_heat(log: np.ndarray, x: list, y: list, text: list[list[str]]) -> dict[str, Any]:
    """A heat map of log10 of something, whose scale bears the numbers themselves; the least is told from nothing."""
    known = log[np.isfinite(log)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    trace = charts.heat(log, x, y, low=low - 0.15 * max(high - low, 1.0), high=high, text=text)
    trace |= {"hovertemplate": "%{text}<extra></extra>"}
    ticks = [k + math.log10(m) for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low <= t <= high]
    ticks = ticks[:: -(-len(ticks) // 8)] if ticks else [low, high]
    bar = {"tickmode": "array", "tickvals": ticks, "ticktext": [number(10**t) for t in ticks]}
    return trace | {"colorbar": trace["colorbar"] | bar}


def _histograms(bins: pd.DataFrame) -> Chart | None:
    """Share of the patches in every bin of norms, layer by layer (Darcet 2023, Fig. 4)."""
    if not len(bins):
        return None
    share = bins.pivot_table(index="layer", columns="low", values="share", sort=True)
    count = bins.pivot_table(index="layer", columns="low", values="count", sort=True)
    edges = [*map(float, share.columns), float(bins["high"].max())]
    values, counts = share.to_numpy(float), count.to_numpy(float)
    spans = [f"norm {number(a)} to {number(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    text = [[f"layer {layer}, {span}: {percent(values[i, j])} ({counts[i, j]:,.0f} patches)"
             for j, span in enumerate(spans)] for i, layer in enumerate(share.index)]  # fmt: skip
    log = np.log10(np.where(values > 0, values, np.nan))
    layers = [int(layer) for layer in share.index]
    data = [_log_heat(log, charts.drawable(edges), layers, text)]
    axis = charts.log_axis(edges)
    layout = {
        "xaxis": {"title": {"text": "Norm of a patch"}, "showgrid": False, **axis,
                  "range": [math.log10(edges[0]), math.log10(edges[-1])]},
        "yaxis": {"title": {"text": "Layer"}, "showgrid": False, "zeroline": False, "dtick": max(1, len(layers) // 8)},
    }  # fmt: skip
    return Chart("Share of patches by norm, layer by layer", data, layout, "As Fig. 4 of Darcet 2023; empty: none.",
                 330, width="half")  # fmt: skip


def _neighbours(cosines: pd.DataFrame) -> Chart | None:
    """Cosine of massive and of other patches to their neighbours at every layer (Darcet 2023, Fig. 5a)."""
    data: list[dict[str, Any]] = []
    for group, rows in cosines.groupby("group", sort=False):
        color, dash, symbol, name = GROUPS.get(str(group), ("--s5", "solid", "circle", visible(group)))
        rows = rows[rows["mean"].notna()].sort_values("layer")
        layer, low, high = (rows[c].tolist() for c in ("layer", "p10", "p90"))
        if layer:
            data += [
                {"type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": color, "opacity": 0.16,
                 "line": {"width": 0}, "x": [*layer, *layer[::-1]], "y": charts.drawable([*low, *high[::-1]]),
                 "hoverinfo": "skip", "showlegend": False},
                charts.line(layer, rows["mean"], name, color, dash=dash, symbol=symbol),
            ]  # fmt: skip
    if not data:
        return None
    layout = charts.layer_layout(int(cosines["layer"].max()), "Cosine")
    return Chart("Cosine of patches to their neighbours", data, layout, "As Fig. 5a of Darcet 2023: mean over the four "
                 "neighbours and over patches; bands: 10 to 90% of the patches.", 330, width="half")  # fmt: skip


def _attention(e: Explanation) -> list[Part]:
    """What class token and patches attend to at every layer (Sun 2024, Fig. 13)."""
    made: list[Part] = []
    for query in ("class", "patches"):
        mine = e.patch_attention[e.patch_attention["query"] == query]
        data = [charts.line(rows["layer"], rows["mass"], name, color, dash=dash, symbol=symbol)
                for key, (color, dash, symbol, name) in GROUPS.items()
                if len(rows := mine[mine["key"] == key].sort_values("layer"))]  # fmt: skip
        if data:
            layout = charts.layer_layout(int(mine["layer"].max()), "Mean probability")
            layout["yaxis"] |= {"range": [-0.03, 1.03]}
            made.append(Chart(f"What the {GROUPS[query][3]} attend{'s' * (query == 'class')} to", data, layout,
                              "As Fig. 13 of Sun 2024: mean over heads, queries and images.", 330,
                              width="half"))  # fmt: skip
    return made
