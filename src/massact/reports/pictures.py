"""Figures of images: massive patches on the picture, norm maps, histograms of norms, attention, neighbours.

Every function takes plain arrays and tables and gives a sheet of what is to be drawn; `write_pictures` writes them,
a page takes their parts.

Shapes: N images, L layers, H x W pixels, Y x X patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from massact.records.errors import UserError
from massact.reports import panels
from massact.reports.panels import Axis, Color, Gallery, Heat, Limit, Line, Note, Panel, Picture, Sheet
from massact.reports.spelling import counted, listed, number, percent, shortened, visible

# Group of tokens -> colour, symbol, dash, name.
GROUPS = {
    "class": (Color.ORANGE, "circle", "solid", "class token"),
    "registers": (Color.GREEN, "square", "dash", "registers"),
    "massive": (Color.LIMIT, "diamond", "solid", "massive patches"),
    "added": (Color.PURPLE, "cross", "dash", "added tokens"),
    "patches": (Color.GREY, "triangle-up", "dot", "other patches"),
    "other": (Color.GREY, "triangle-up", "dot", "other patches"),
    "slot": (Color.SLATE, "x", "dashdot", "slot"),
}
MOST_NAMED = 4


def write_pictures(figures: Mapping[str, Callable[[], Sheet]], directory: Path) -> list[Path]:
    """Write figures as PNG into `figures/` of a directory.

    Args:
        figures: name -> a function without arguments that gives its sheet.

    Raises:
        UserError: the directory cannot be written.
    """
    from massact.reports.render.figures import write_figures

    def one(make: Callable[[], Sheet]) -> Callable[[Any], Sheet | None]:
        return lambda _: make()

    return write_figures(None, {name: one(make) for name, make in figures.items()}, directory, ("png",))


def draw_overlay(
    pictures: np.ndarray, massive: np.ndarray, titles: Sequence[str] = (), *, what: str = "Massive patches"
) -> Sheet:
    """Where on the pictures the massive patches are: each framed, and all others dimmed (Sun 2024, Fig. 16).

    Args:
        pictures: (N, H, W, 3) or (N, H, W), from 0 to 1.
        massive: (N, Y, X) bool.
        titles: of every picture; none: its number and that of its patches.

    Raises:
        UserError: the shapes do not fit.
    """
    if pictures.ndim not in (3, 4) or massive.ndim != 3 or len(pictures) != len(massive) or not len(pictures):
        raise UserError(
            f"Pictures {pictures.shape} and maps {massive.shape} are not (N, H, W, 3) and (N, rows, columns)."
        )
    made = []
    for i, (picture, mask) in enumerate(zip(pictures, massive, strict=True)):
        at = [(int(y), int(x)) for y, x in np.argwhere(mask)]
        few = ", ".join(f"({y}, {x})" for y, x in at[:MOST_NAMED])
        where = f": {few}{', ...' if len(at) > MOST_NAMED else ''}" if at else ""
        label = visible(titles[i]) if titles else f"Image {i}: {len(at):,} of {mask.size:,}"
        made.append(_picture(picture, mask.shape, at, label, f"{label} patches are massive{where}"))
    caption = "Framed; all other patches are dimmed. Below: how many of each image. Patches are named (row, column), "
    sees = "Which parts of a picture carry massive activations: as a rule plain background, not what is shown."
    return Sheet([Gallery(what, made, f"{caption}from the top left.", sees=sees)], what)


def _picture(
    picture: np.ndarray, grid: tuple[int, ...], framed: Sequence[tuple[int, int]], label: str, described: str = ""
) -> Picture:
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return Picture(pixels, (grid[0], grid[1]), framed, label, described or label)


def _map_axes(rows: int, columns: int, titles: tuple[str, str] = ("", "")) -> tuple[Axis, Axis]:
    """Axes of a map of patches, rows downwards; without titles they are not shown."""
    ticks = [[(float(i), str(i)) for i in range(0, n, max(1, n // 7))] for n in (columns, rows)]
    x = Axis(titles[0], limits=(-0.5, columns - 0.5), ticks=ticks[0], grid=False, hidden=not titles[0])
    return x, Axis(titles[1], limits=(rows - 0.5, -0.5), ticks=ticks[1], grid=False, hidden=not titles[1])


def draw_massive_share(share: np.ndarray, n_images: int) -> Sheet:
    """On which share of the images each patch is massive: whether they sit at fixed places.

    Args:
        share: (Y, X), from 0 to 1.
        n_images: over how many images.

    Raises:
        UserError: it is no map.
    """
    share = np.asarray(share, float)
    if share.ndim != 2:
        raise UserError(f"Shares of shape {share.shape} are not (rows, columns).")
    (rows, columns), of = share.shape, counted(n_images, "image")
    said = [
        [f"patch ({y}, {x}), {round(share[y, x] * n_images):,} of {of}" for x in range(columns)] for y in range(rows)
    ]
    top = max(float(np.nan_to_num(share).max()), 1 / max(n_images, 1))
    heat = Heat(share, range(columns), range(rows), f"share of {of}", low=0.0, high=top, said=said)
    x, y = _map_axes(rows, columns, ("Column of patches", "Row of patches"))
    sees = "How often each place of the picture is massive: a few dark places mean that they are always the same."
    return Sheet(
        [Panel("Where patches are massive", [heat], x, y, f"Share of {of}.", sees=sees, height=360, square=True)]
    )


def draw_norm_maps(
    norms: np.ndarray,
    layers: Sequence[int],
    picture: np.ndarray | None = None,
    massive: np.ndarray | None = None,
    image: int | None = None,
) -> Sheet:
    """Norms of the patches of one image at several layers, layer beside layer, on one logarithmic scale.

    Args:
        norms: (L, Y, X).
        layers: what each is called; 0 is the input of the first block.
        picture: (H, W, 3) or (H, W), from 0 to 1, shown first.
        massive: (Y, X) bool, framed on the picture.
        image: its number, where it is one of several.

    Raises:
        UserError: the shapes do not fit, or no norm is above zero.
    """
    norms = np.asarray(norms, float)
    if norms.ndim != 3 or len(norms) != len(layers):
        raise UserError(f"Norms of shape {norms.shape} are not ({len(layers)} layers, rows, columns).")
    if not (np.isfinite(norms) & (norms > 0)).any():
        raise UserError("No norm is above zero, so there is nothing to draw.")
    names, (rows, columns) = [f"layer {layer}" for layer in layers], norms.shape[1:]
    heat, notes = _mosaic(norms, names, [str(layer) for layer in layers], "norm")
    where = f"Image {image}; above" if image is not None else "Above"
    caption = f"{where} each map its layer, 0 is the embedding; one logarithmic scale."
    title, axes = "Norm of every patch, layer by layer", _map_axes(*heat.values.shape)
    sees = "How long the hidden state of each patch is, from layer to layer: a few patches light up at one and stay so."
    panel = Panel(title, [heat], *axes, caption, notes=notes, sees=sees, height=360, square=True)
    if picture is None:
        return Sheet([panel])
    marked = np.zeros((rows, columns), bool) if massive is None else massive
    framed = [(int(y), int(x)) for y, x in np.argwhere(marked)]
    shown = _picture(picture, marked.shape, framed, "picture" if image is None else f"Image {image}")
    sees = "The image that the maps are of, with its massive patches framed."
    return Sheet([Gallery("Picture", [shown], sees=sees), panel])


def _mosaic(
    maps_NYX: np.ndarray, names: Sequence[str], above: Sequence[str], what: str, least: int = 2
) -> tuple[Heat, list[Note]]:
    """Maps side by side in one, on one logarithmic scale, and what stands above each.

    Args:
        names: of each map, where its values are told. above: what stands above it. least: rows of patches for that.
    """
    (n, rows, columns), across = maps_NYX.shape, math.ceil(math.sqrt(len(maps_NYX)))
    high, wide = rows + max(least, round(0.3 * rows)), columns + max(1, round(0.08 * columns))
    one = np.full((-(-n // across) * high, across * wide), np.nan)
    said, notes = [[""] * one.shape[1] for _ in range(one.shape[0])], []
    for i, (name, over, map_YX) in enumerate(zip(names, above, maps_NYX, strict=True)):
        y0, x0 = (i // across + 1) * high - rows, i % across * wide
        one[y0 : y0 + rows, x0 : x0 + columns] = map_YX
        for y in range(rows):
            told = (f"{name}, patch ({y}, {x}): {number(map_YX[y, x], 4)}" for x in range(columns))
            said[y0 + y][x0 : x0 + columns] = told
        notes.append(Note(x0 - 0.5, over, y0 - 0.5))
    return Heat(one, range(one.shape[1]), range(one.shape[0]), what, log=True, said=said), notes


def draw_dim_maps(sizes: np.ndarray, layer: int, dim: int, names: Sequence[str]) -> Sheet:
    """|h| of every patch of several images at one dim and layer, image beside image, on one logarithmic scale.

    Args:
        sizes: (N, Y, X); an image of NaN alone is left out, and named.
        names: of the images.

    Raises:
        UserError: the shapes do not fit, or no value is above zero.
    """
    sizes = np.asarray(sizes, float)
    if sizes.ndim != 3 or len(sizes) != len(names):
        raise UserError(f"Values of shape {sizes.shape} are not ({len(names)} images, rows, columns).")
    known = (np.isfinite(sizes) & (sizes > 0)).any((1, 2))
    if not known.any():
        raise UserError("No value is above zero, so there is nothing to draw.")
    shown = [visible(name) for name, here in zip(names, known, strict=True) if here]
    missing = [visible(name) for name, here in zip(names, known, strict=True) if not here]
    heat, notes = _mosaic(sizes[known], shown, [shortened(name, 22) for name in shown], f"|h| at dim {dim}", 3)
    note = f"Not among the largest dims of {listed(missing)}, which are not drawn" if missing else ""
    sees = f"How large the one massive dim ({dim}) is on each patch of each image: a few bright patches tower over all "
    sees += "others, which a logarithmic scale is needed to show at all."
    title, x, y = f"|h| of every patch at dim {dim}, layer {layer}", *_map_axes(*heat.values.shape)
    caption = f"Above each map its image; one logarithmic scale. Layer {layer}: where it is largest on a patch."
    given = (title, [heat], x, y, caption, note)
    return Sheet([Panel(*given, notes=notes, sees=sees, height=400, width="full", square=True)])


def draw_norm_histograms(histograms: pd.DataFrame, layers: Sequence[int] | None = None) -> Sheet:
    """How norms are distributed at every layer: one row each, the share of patches on a logarithmic scale (Darcet).

    Args:
        histograms: columns layer, low, high, share, and count if it is known.
        layers: only these; None for all.

    Raises:
        UserError: there is nothing to draw.
    """
    mine = histograms if layers is None else histograms[histograms["layer"].isin(list(layers))]
    mine = mine[np.isfinite(mine[["low", "high"]]).all(axis=1)]
    if not len(mine):
        raise UserError("There are no histograms of these layers.")
    share = mine.pivot_table(index="layer", columns="low", values="share", sort=True)
    counts = mine.pivot_table(index="layer", columns="low", values="count") if "count" in mine else None
    edges, rows = [*map(float, share.columns), float(mine["high"].max())], [int(layer) for layer in share.index]

    def told(layer: int, i: int, j: int) -> str:
        many = f" ({counts.iat[i, j]:,.0f} patches)" if counts is not None else ""
        return f"layer {layer}, norm {number(edges[j])} to {number(edges[j + 1])}: {percent(share.iat[i, j])}{many}"

    said = [[told(layer, i, j) for j in range(len(edges) - 1)] for i, layer in enumerate(rows)]
    heat = Heat(share.to_numpy(float), edges, rows, "share of patches", log=True, said=said)
    ends = (edges[0], edges[-1]) if 0 < edges[0] < edges[-1] else None
    x = Axis("Norm of a patch", "log", ends, panels.log_axis(edges).ticks, grid=False)
    if edges[-1] < 10 * edges[0]:  # powers of ten alone have a label, and there may be none
        x = Axis(x.title, "log", ends, [(e, number(e)) for e in edges[:: max(1, len(edges) // 5)]], grid=False)
    y = panels.cell_axis("Layer (0: embedding)", rows)
    title, said_of = "Share of patches by norm, layer by layer", "As Fig. 4 of Darcet 2023; empty: none."
    sees = "How many patches are how long: a second group far to the right of the others are the massive ones."
    return Sheet([Panel(title, [heat], x, y, said_of, sees=sees)])


def draw_attention_shares(
    shares: pd.DataFrame, queries: Sequence[str] = ("class", "patches"), onset: int | None = None
) -> Sheet:
    """What class token and patches attend to at every layer (Sun 2024, Fig. 13).

    Args:
        shares: columns layer, query, key, mass.
        queries: one panel for each.
        onset: layer after which patches are massive, marked.

    Raises:
        UserError: none of the queries is in the table.
    """
    having = [q for q in queries if (shares["query"] == q).any()]
    if not having:
        raise UserError(f"The table has no rows of {', '.join(queries)}.")
    limits = [Limit(onset + 0.5, upright=True, color=Color.MUTED)] if onset is not None else []
    after = f" Upright line: layer {onset} has the first massive patches." if onset is not None else ""
    x, y, made = panels.layer_axis(int(shares["layer"].max())), panels.share_axis("Mean probability"), []
    for query in having:
        mine = shares[shares["query"] == query]
        lines = [
            Line(rows["layer"], rows["mass"], name, color, symbol, dash)
            for key, (color, symbol, dash, name) in GROUPS.items()
            if len(rows := mine[mine["key"] == key].sort_values("layer"))
        ]
        name = GROUPS[query][3] if query in GROUPS else visible(query)
        title = f"What the {name} attend{'s' * (query == 'class')} to"
        said = f"As Fig. 13 of Sun 2024: mean over heads, queries and images.{after}"
        sees = f"Where the attention of the {name} goes: massive patches draw much of it, though they are few."
        made.append(Panel(title, lines, x, y, said, limits=limits, sees=sees))
    return Sheet(made)


def draw_neighbour_cosines(cosines: pd.DataFrame) -> Sheet:
    """How alike patches and their neighbours are at every layer: massive ones beside others (Darcet 2023, Fig. 5a).

    Args:
        cosines: columns layer, group, mean, p10, p90.

    Raises:
        UserError: there is nothing to draw.
    """
    lines = []
    for group, mine in cosines.groupby("group", sort=False) if len(cosines) else ():
        color, symbol, dash, name = GROUPS.get(str(group), (Color.SLATE, "circle", "solid", visible(group)))
        rows = mine[mine["mean"].notna()].sort_values("layer")
        if len(rows):
            lines.append(Line(rows["layer"], rows["mean"], name, color, symbol, dash, rows["p10"], rows["p90"]))
    if not lines:
        raise UserError("There are no cosines to draw.")
    said = "As Fig. 5a of Darcet 2023: mean over the four neighbours and over patches; bands: 10 to 90% of the patches."
    x, title = panels.layer_axis(int(cosines["layer"].max())), "Cosine of patches to their neighbours"
    sees = "How much patches resemble those beside them: massive ones stand where the picture repeats itself."
    return Sheet([Panel(title, lines, x, Axis("Cosine"), said, sees=sees)])
