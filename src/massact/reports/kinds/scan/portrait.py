"""|h| of one prompt over tokens and dims, in three dimensions (Sun 2024, Figs. 1 to 3)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from mpl_toolkits.mplot3d.axes3d import Axes3D

from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.curves import titled
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.lettering import TOP_1, WARNING, lettered, says, token_label
from massact.reports.spelling import counted, number

MOST_PANELS, MOST_TOKENS, MOST_LABELS, MOST_DIM_TICKS, BINS = 3, 48, 14, 3, 160


def draw_magnitudes(result: ScanResult) -> Figure | None:
    """One panel for each layer of the portrait; None for a run without one.

    x: tokens, the massive ones bold; y: dims, with ticks at those of the massive or largest values; z: |h|.
    """
    portrait = result.portrait
    if not {"magnitude", "layers", "tokens"} <= set(portrait) or 0 in portrait["magnitude"].shape:
        return None
    magnitude, rule = portrait["magnitude"].astype(np.float64), rule_of(result)  # (P, T, D)
    layers, tokens = [int(x) for x in portrait["layers"]], [str(t) for t in portrait["tokens"]]
    n_panels = min(len(layers), MOST_PANELS)
    figure = Figure(figsize=(3.5 * n_panels + 0.3, 3.1))
    # One z scale for all panels, so that they can be compared; the largest value of each stands in its title.
    largest = [_largest(magnitude[panel]) for panel in range(n_panels)]
    best = magnitude[int(np.argmax(largest))]
    ticks = _dim_ticks(np.where(np.isfinite(best), best, 0.0), peaks(best, rule))
    by_height = sorted(range(n_panels), key=lambda panel: -largest[panel])
    massive = list(dict.fromkeys(pos for panel in by_height for pos, _ in peaks(magnitude[panel], rule)))
    kept = _kept_tokens(len(tokens), massive)  # the same in all panels
    width = 0.99 / n_panels
    for panel in range(n_panels):
        axes = figure.add_axes((0.01 + panel * width, 0.05, width * 0.9, 0.86), projection="3d", computed_zorder=False)
        assert isinstance(axes, Axes3D)
        _panel(axes, magnitude[panel], [tokens[pos] for pos in kept], kept, rule, max(largest), ticks)
        known = f", max {number(largest[panel])}" if np.isfinite(magnitude[panel]).any() else ""
        axes.set_title(f"Layer {layers[panel]}{known}", loc="center", y=0.95, fontsize=9)
    stack = str(portrait.get("stack", ""))
    part = f"{len(kept)} of {len(tokens):,} tokens" if len(kept) < len(tokens) else ""
    figure.suptitle(
        ", ".join(x for x in (titled(result), lettered(stack, 30), part) if x),
        x=0.02,
        y=0.995,
        ha="left",
        fontsize=10,
    )
    return figure


def _largest(h_TD: np.ndarray) -> float:
    known = h_TD[np.isfinite(h_TD)]
    return float(known.max()) if known.size else 0.0


def _panel(
    axes: Axes3D,
    h_TD: np.ndarray,
    tokens: list[str],
    kept: list[int],
    rule: Rule,
    top: float,
    ticks: list[int],
) -> None:
    """One hidden state: a line along the dims for each token of `kept`, a stem for each massive value."""
    finite_TD = np.where(np.isfinite(h_TD), h_TD, 0.0)
    n_bad = int((~np.isfinite(h_TD)).sum())
    if n_bad == h_TD.size:
        says(axes, "All values are NaN or Inf.")
        return
    spikes = peaks(h_TD, rule)
    n_dims, colour = h_TD.shape[1], TOP_1
    for x, pos in reversed(list(enumerate(kept))):
        dims, heights = outline(finite_TD[pos], BINS)
        axes.plot(np.full(len(dims), x), dims, heights, color=colour, linewidth=0.7, alpha=0.85, clip_on=False)
    for pos, dim in spikes:
        if pos in kept:
            x = kept.index(pos)
            axes.plot([x, x], [dim, dim], [0, finite_TD[pos, dim]], color=colour, linewidth=1.6, clip_on=False)
    _letter(axes, tokens, [kept.index(pos) for pos, _ in spikes if pos in kept])
    axes.set_yticks(ticks, [str(d) for d in ticks], fontsize=7.5)
    axes.set_ylim(0, n_dims)
    axes.set_zlim(0, top * 1.05 if top > 0 else 1.0)
    axes.zaxis.set_major_formatter(FuncFormatter(lambda z, _: number(z)))
    if n_bad:
        axes.text2D(
            0.5,
            0.0,
            f"{counted(n_bad, 'value')} NaN or Inf",
            color=WARNING,
            fontsize=8,
            ha="center",
            transform=axes.transAxes,
        )


def peaks(h_TD: np.ndarray, rule: Rule) -> list[tuple[int, int]]:
    """(pos, dim) of what passes the thresholds in one hidden state, the largest first, 40 at most."""
    if rule.magnitude is None and rule.ratio is None:
        return []
    known = h_TD[np.isfinite(h_TD)]
    median = float(np.median(known)) if known.size else 0.0
    passing = np.isfinite(h_TD)
    if rule.magnitude is not None:
        passing &= h_TD > rule.magnitude
    if rule.ratio is not None:
        passing &= h_TD >= rule.ratio * median
    places = np.argwhere(passing)
    order = np.argsort(-h_TD[passing], kind="stable")[:40]
    return [(int(pos), int(dim)) for pos, dim in places[order]]


def outline(row_D: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """A row of |h| in few points: the largest value of each bin, at its own dim, so that no spike is lost."""
    n_dims = len(row_D)
    if n_dims <= bins:
        return np.arange(n_dims), row_D
    edges = np.linspace(0, n_dims, bins + 1).astype(int)
    dims = np.array([a + int(np.argmax(row_D[a:b])) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    return dims, row_D[dims]


def _kept_tokens(n_tokens: int, massive: list[int]) -> list[int]:
    """All tokens of a short prompt; of a long one the massive ones and others evenly between."""
    if n_tokens <= MOST_TOKENS:
        return list(range(n_tokens))
    kept = {0, *massive[: MOST_TOKENS // 2]}
    for pos in np.linspace(0, n_tokens - 1, MOST_TOKENS - len(kept)).astype(int):
        kept.add(int(pos))
    return sorted(kept)


def _dim_ticks(h_TD: np.ndarray, spikes: list[tuple[int, int]]) -> list[int]:
    """Dims of the massive values, else of the largest one; none so near another that labels touch."""
    candidates = [dim for _, dim in spikes] or [int(d) for d in np.argsort(-h_TD.max(axis=0), kind="stable")[:1]]
    ticks: list[int] = []
    for dim in candidates:
        if len(ticks) < MOST_DIM_TICKS and all(abs(dim - other) > 0.09 * h_TD.shape[1] for other in ticks):
            ticks.append(dim)
    return sorted(ticks)


def _letter(axes: Axes3D, tokens: list[str], massive: list[int]) -> None:
    """Ticks and labels; where tokens are many, the massive ones first, others where there is room."""
    room = len(tokens) / MOST_LABELS
    named: list[int] = []
    for x in (*massive, *range(len(tokens))):
        if all(abs(x - other) >= room for other in named):
            named.append(x)
    named.sort()
    axes.set_xticks(
        named,
        [token_label(tokens[x], 10) for x in named],
        rotation=50,
        ha="right",
        va="center",
        rotation_mode="anchor",
        fontsize=7.5,
    )
    for label, x in zip(axes.get_xticklabels(), named, strict=True):
        label.set_fontweight("bold" if x in massive else "normal")
    axes.set_xlim(-0.3, len(tokens) - 0.7)
    axes.tick_params(axis="x", pad=-4)
    axes.tick_params(axis="y", pad=-3)
    axes.tick_params(axis="z", pad=1, labelsize=7.5)
    axes.view_init(elev=18, azim=-60)
    axes.set_box_aspect((1.35, 1.0, 0.8), zoom=1.12)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1.0, 1.0, 1.0, 0.0))
        axis._axinfo["grid"].update(color="#e3e3e3", linewidth=0.6)  # type: ignore[attr-defined]
