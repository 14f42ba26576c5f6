"""Figures of images: massive patches on the picture, norm maps, histograms of norms, attention, neighbours.

Every function takes plain arrays and tables and gives a figure; `write_pictures` writes them.

Shapes: N images, L layers, H x W pixels, Y x X patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from massact.records.errors import UserError
from massact.reports.lettering import LIMIT, MEDIAN, PLAIN, TOP_1, TOP_2, TOP_3, layer_axis, lettered
from massact.reports.render.figures import write_figures
from massact.reports.spelling import number

# Groups of tokens -> colour and name.
GROUPS = {
    "class": (TOP_2, "class token"),
    "registers": (TOP_3, "registers"),
    "massive": (LIMIT, "massive patches"),
    "added": (TOP_1, "added token(s)"),
    "patches": (MEDIAN, "other patches"),
    "other": (MEDIAN, "other patches"),
    "slot": (PLAIN, "slot"),
}
MOST_IN_A_ROW = 7


def write_pictures(figures: Mapping[str, Callable[[], Figure]], directory: Path) -> list[Path]:
    """Write figures as PNG and SVG into `figures/` of a directory.

    Args:
        figures: name -> a function without arguments that draws it, called under our style.

    Raises:
        UserError: the directory cannot be written.
    """

    def one(make: Callable[[], Figure]) -> Callable[[Any], Figure | None]:
        return lambda _: make()

    return write_figures(None, {name: one(make) for name, make in figures.items()}, directory)


def draw_overlay(
    pictures: np.ndarray, massive: np.ndarray, titles: Sequence[str] = (), *, what: str = "Massive patches"
) -> Figure:
    """Where on the pictures the massive patches are: each framed, and all others dimmed.

    Args:
        pictures: (N, H, W, 3) or (N, H, W), from 0 to 1.
        massive: (N, Y, X) bool.
        titles: of every picture; none: the number of its patches.

    Raises:
        UserError: the shapes do not fit.
    """
    _check(pictures, massive)
    figure, axes = _panels(len(pictures), titles_of=what)
    for i, (ax, picture, mask) in enumerate(zip(axes, pictures, massive, strict=True)):
        shown = np.clip(picture, 0, 1)
        shade = np.zeros((*mask.shape, 4))
        shade[..., :3], shade[..., 3] = 1, 0.45 * ~np.asarray(mask, bool)
        _picture(ax, shown)
        height, width = shown.shape[:2]
        ax.imshow(shade, extent=(0, width, height, 0), interpolation="nearest")
        _frames(ax, mask, (height, width))
        ax.set_title(lettered(titles[i], 22) if titles else f"{int(mask.sum())} of {mask.size}")
    return figure


def draw_massive_share(share: np.ndarray, n_images: int) -> Figure:
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
    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axes = figure.subplots()
    top = max(float(share.max()), 1 / max(n_images, 1))
    image = axes.imshow(share, cmap="YlGnBu", vmin=0, vmax=top, interpolation="nearest")
    axes.set_xlabel("column of patches")
    axes.set_ylabel("row of patches")
    axes.set_title("Where patches are massive")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(image, ax=axes, label=f"share of {n_images:,} image{'s' * (n_images != 1)}")
    return figure


def draw_norm_maps(
    norms: np.ndarray, layers: Sequence[int], picture: np.ndarray | None = None, massive: np.ndarray | None = None
) -> Figure:
    """Norms of the patches of one image at several layers, on one logarithmic scale.

    Args:
        norms: (L, Y, X).
        layers: what each is called; 0 is the input of the first block.
        picture: (H, W, 3) or (H, W), from 0 to 1, shown first.
        massive: (Y, X) bool, framed on the picture.

    Raises:
        UserError: the shapes do not fit, or no norm is above zero.
    """
    norms = np.asarray(norms, float)
    if norms.ndim != 3 or len(norms) != len(layers):
        raise UserError(f"Norms of shape {norms.shape} are not ({len(layers)} layers, rows, columns).")
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if not len(positive):
        raise UserError("No norm is above zero, so there is nothing to draw.")
    low, high = float(positive.min()), float(positive.max())
    figure, axes = _panels(len(norms) + (picture is not None), titles_of="Norm of every patch")
    if picture is not None:
        _picture(axes[0], np.clip(picture, 0, 1))
        axes[0].set_title("picture")
        if massive is not None:
            _frames(axes[0], massive, picture.shape[:2])
        axes = axes[1:]
    image = None
    for ax, map_YX, layer in zip(axes, norms, layers, strict=True):
        scale = LogNorm(low, high if high > low else 2 * low)
        image = ax.imshow(map_YX, norm=scale, cmap="viridis", interpolation="nearest")
        ax.set_title(f"layer {layer}" if layer else "embedding")
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, label="norm")  # type: ignore[arg-type]
    bar.ax.yaxis.set_major_formatter(lambda x, _: number(x))
    bar.ax.yaxis.set_minor_formatter(lambda x, _: "")
    return figure


def draw_norm_histograms(histograms: pd.DataFrame, layers: Sequence[int] | None = None) -> Figure:
    """How norms are distributed at every layer: one row each, the share of patches on a logarithmic scale (Darcet).

    Args:
        histograms: columns layer, low, high, share.
        layers: only these; None for all.

    Raises:
        UserError: there is nothing to draw.
    """
    mine = histograms if layers is None else histograms[histograms["layer"].isin(list(layers))]
    mine = mine[np.isfinite(mine[["low", "high"]]).all(axis=1)]
    shown = sorted(mine["layer"].unique())
    if not shown:
        raise UserError("There are no histograms of these layers.")
    grid = mine.pivot_table(index="layer", columns="low", values="share", sort=True)
    edges = np.append(grid.columns.to_numpy(float), float(mine["high"].max()))
    share = grid.to_numpy(float)
    figure = Figure(figsize=(6.4, max(2.2, 0.28 * len(shown) + 1.2)), layout="constrained")
    axes = figure.subplots()
    least = float(share[share > 0].min()) if (share > 0).any() else 1e-3
    image = axes.pcolormesh(
        edges, np.arange(len(shown) + 1) - 0.5, np.where(share > 0, share, np.nan), cmap="viridis",
        norm=LogNorm(least, max(float(np.nanmax(share)), 2 * least)),
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: number(x))
    narrow = edges[-1] < 10 * edges[0]  # else powers of ten alone have a label, and there may be none
    if narrow:
        axes.xaxis.set_minor_locator(MaxNLocator(5))
    axes.xaxis.set_minor_formatter(lambda x, _: number(x) if narrow else "")
    axes.set_yticks(np.arange(len(shown)), [str(x) for x in shown])
    axes.set_xlabel("norm of a patch")
    axes.set_ylabel("layer (0: embedding)")
    axes.set_title("Norms of patches; white: none")
    bar = figure.colorbar(image, ax=axes, label="share of patches")
    bar.ax.yaxis.set_major_formatter(lambda x, _: number(x))
    return figure


def draw_attention_shares(
    shares: pd.DataFrame, queries: Sequence[str] = ("class", "patches"), onset: int | None = None
) -> Figure:
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
    figure = Figure(figsize=(4.2 * len(having) + 1.4, 3.0), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(having), sharey=True))
    for ax, query in zip(panels, having, strict=True):
        mine = shares[shares["query"] == query]
        for key, (color, label) in GROUPS.items():
            rows = mine[mine["key"] == key].sort_values("layer")
            if len(rows):
                ax.plot(rows["layer"], rows["mass"], color=color, marker="o", label=label)
        layer_axis(ax, int(shares["layer"].max()))
        if onset is not None:
            ax.axvline(onset + 0.5, color=PLAIN, linewidth=0.8, linestyle=":")
        ax.set_ylim(-0.02, 1.02)
        ax.set_title(f"attention of {GROUPS.get(query, (PLAIN, query))[1]} to")
        ax.set_xlabel("layer")
    panels[0].set_ylabel("mean probability")
    figure.legend(*_handles(panels), loc="outside right upper")
    return figure


def draw_neighbour_cosines(cosines: pd.DataFrame) -> Figure:
    """How alike patches and their neighbours are at every layer: massive ones beside others (Darcet 2023, Fig. 5a).

    Args:
        cosines: columns layer, group, mean, p10, p90.

    Raises:
        UserError: the table is empty.
    """
    if not len(cosines):
        raise UserError("There are no cosines to draw.")
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for group, mine in cosines.groupby("group", sort=False):
        color, label = GROUPS.get(str(group), (PLAIN, lettered(group)))
        rows = mine.sort_values("layer")
        axes.fill_between(rows["layer"], rows["p10"], rows["p90"], color=color, alpha=0.15, linewidth=0)
        axes.plot(rows["layer"], rows["mean"], color=color, marker="o", label=label)
    axes.set_xlabel("layer (0: embedding)")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel("cosine to the 4 neighbours")
    axes.set_title("Mean; bands: 10 to 90 %")
    axes.legend()
    return figure


def _check(pictures: np.ndarray, massive: np.ndarray) -> None:
    if pictures.ndim not in (3, 4) or massive.ndim != 3 or len(pictures) != len(massive) or not len(pictures):
        raise UserError(f"Pictures {pictures.shape} and maps {massive.shape} are not (N, H, W, 3) and (N, rows, "
                        "columns).")  # fmt: skip


def _panels(n: int, titles_of: str) -> tuple[Figure, Any]:
    down = -(-n // MOST_IN_A_ROW)
    across = -(-n // down)
    figure = Figure(figsize=(1.75 * across + 0.6, 1.95 * down + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    for ax in axes[n:]:
        ax.set_axis_off()
    figure.suptitle(titles_of, x=0.01, ha="left", fontsize=10)
    return figure, axes[:n]


def _picture(ax: Axes, picture: np.ndarray) -> None:
    height, width = picture.shape[:2]
    ax.imshow(picture, cmap="gray" if picture.ndim == 2 else None, extent=(0, width, height, 0), vmin=0, vmax=1)
    ax.set_axis_off()


def _frames(ax: Axes, mask: np.ndarray, size: Sequence[int]) -> None:
    """A frame around every patch that is marked."""
    high, wide = size[0] / mask.shape[0], size[1] / mask.shape[1]
    for y, x in np.argwhere(mask):
        ax.add_patch(Rectangle((x * wide, y * high), wide, high, fill=False, edgecolor="#c1272d", linewidth=1.2))


def _handles(panels: Any) -> tuple[list[Any], list[str]]:
    """One entry for each line that any panel has."""
    found: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
