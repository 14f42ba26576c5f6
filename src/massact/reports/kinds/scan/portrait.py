"""|h| of one sequence over positions and dims, in three dimensions (Sun 2024, Figs. 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.curves import named
from massact.reports.kinds.scan.nouns import Nouns, nouns_of
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.panels import Scene, Scenes, Sheet, quoted_label, token_label
from massact.reports.spelling import counted, listed, number, visible

MOST_PANELS, MOST_TOKENS, MOST_DIM_TICKS, BINS = 3, 48, 3, 160
MOST_NAMED = 3  # spikes with their dim and token


def draw_magnitudes(result: ScanResult) -> Sheet | None:
    """The layers of the portrait, the peak large; None for a run without one."""
    made = portrait(result)
    if made is None:
        return None
    stack = visible(str(result.portrait.get("stack", "")))
    return Sheet([made], ", ".join(x for x in (named(result), stack) if x))


def nouns(scan: ScanResult) -> Nouns:
    """What the inputs of a scan are called."""
    return nouns_of(scan.info.corpus, scan.portrait.get("tokens", ()))


def has_portrait(scan: ScanResult | None) -> bool:
    """Whether |h| of a prompt was kept."""
    kept = scan.portrait if scan is not None else {}
    return {"magnitude", "layers", "tokens"} <= set(kept) and 0 not in kept["magnitude"].shape


def portrait(scan: ScanResult) -> Scenes | None:
    """The first layers that are kept of one sequence, with the same positions and one scale; the greatest is large."""
    if not has_portrait(scan):
        return None
    h_PTD, rule = scan.portrait["magnitude"].astype(np.float64)[:MOST_PANELS], rule_of(scan)
    tokens = [str(t) for t in scan.portrait["tokens"]]
    tops = [largest(h_TD) for h_TD in h_PTD]
    by_height = sorted(range(len(h_PTD)), key=lambda panel: -tops[panel])
    kept = kept_tokens(len(tokens), [pos for panel in by_height for pos, _ in peaks(h_PTD[panel], rule)])
    best = h_PTD[int(np.argmax(tops))]
    ticks = dim_ticks(best, peaks(best, rule))
    words = nouns(scan)
    made = [
        scene_of(h_TD, f"Layer {float(layer):.0f}", tokens, kept, rule, max(tops), ticks, words.title())
        for h_TD, layer in zip(h_PTD, scan.portrait["layers"], strict=False)
    ]
    drawn, empty = [scene for scene in made if scene], [scene.title for scene in made if not scene]
    note = f"All values are NaN or Inf at {listed(empty)}" if empty else ""
    sees = f"Each line is one {words.position} of one {words.sequence}, its height the size |h| "
    sees += "of every number in its hidden state. Nearly all are flat; a massive activation is a spike far above them."
    few = f" {counted(len(kept), words.position)} of {len(tokens):,} are drawn." if len(kept) < len(tokens) else ""
    caption = f"As Figs. 1 to 3 of Sun 2024, one scale for all layers.{few}"
    shown = max(range(len(drawn)), key=lambda i: largest_of(drawn[i]), default=0)
    return Scenes(f"|h| of one {words.sequence}", drawn, shown, caption, note, sees)


def largest_of(scene: Scene) -> float:
    """The greatest height in a scene."""
    return max(float(heights.max()) for *_, heights in scene.curves)


def scene_of(
    h_TD: np.ndarray,
    title: str,
    tokens: Sequence[str],
    kept: Sequence[int],
    rule: Rule,
    top: float,
    ticks: Sequence[int],
    along: str = "Token",
) -> Scene:
    """One hidden state: a line along the dims for each position of `kept`, a stem for each massive value."""
    finite_TD, n_bad = np.where(np.isfinite(h_TD), h_TD, 0.0), int((~np.isfinite(h_TD)).sum())
    if n_bad == h_TD.size:
        return Scene(title)
    curves = [(token_label(tokens[pos], 10), pos, *outline(finite_TD[pos], BINS)) for pos in kept]
    spikes = [(kept.index(pos), dim, float(h_TD[pos, dim])) for pos, dim in peaks(h_TD, rule) if pos in kept]
    some = f"; {counted(len(kept), along.lower())} of {len(tokens):,}" if len(kept) < len(tokens) else ""
    said = f"max |h| {number(largest(h_TD))}{some}"
    bad = f"{counted(n_bad, 'value')} NaN or Inf, drawn as 0" if n_bad else ""
    labels = named_spikes(spikes, [quoted_label(tokens[pos], 14) for pos in kept], h_TD.shape[1])
    return Scene(title, curves, h_TD.shape[1], spikes, ticks, top, said, bad, named=labels, sides=(along, "Dim", "|h|"))


def named_spikes(spikes: Sequence[tuple[int, int, float]], tokens: Sequence[str], n_dims: int) -> list[tuple[int, str]]:
    """Which spikes have their dim, token and size written at them: the largest, and others that stand apart."""
    chosen: list[int] = []
    for i, (place, dim, _) in enumerate(spikes):
        others = [spikes[j] for j in chosen]
        apart = all(abs(place - p) > len(tokens) / 6 or abs(dim - d) > n_dims / 6 for p, d, _ in others)
        if apart and len(chosen) < MOST_NAMED:
            chosen.append(i)
    return [(i, f"dim {spikes[i][1]}, {tokens[spikes[i][0]]}: {number(spikes[i][2])}") for i in chosen]


def largest(h_TD: np.ndarray) -> float:
    """The greatest finite |h|; 0 where there is none."""
    known = h_TD[np.isfinite(h_TD)]
    return float(known.max()) if known.size else 0.0


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


def kept_tokens(n_tokens: int, massive: Sequence[int]) -> list[int]:
    """All tokens of a short prompt; of a long one the massive ones and others evenly between."""
    if n_tokens <= MOST_TOKENS:
        return list(range(n_tokens))
    kept = {0, *list(dict.fromkeys(massive))[: MOST_TOKENS // 2]}
    for pos in np.linspace(0, n_tokens - 1, MOST_TOKENS - len(kept)).astype(int):
        kept.add(int(pos))
    return sorted(kept)


def dim_ticks(h_TD: np.ndarray, spikes: Sequence[tuple[int, int]]) -> list[int]:
    """Dims of the massive values, else of the largest one; none so near another that labels touch."""
    height_D = np.where(np.isfinite(h_TD), h_TD, 0.0).max(axis=0)
    candidates = [dim for _, dim in spikes] or [int(d) for d in np.argsort(-height_D, kind="stable")[:1]]
    ticks: list[int] = []
    for dim in candidates:
        if len(ticks) < MOST_DIM_TICKS and all(abs(dim - other) > 0.09 * h_TD.shape[1] for other in ticks):
            ticks.append(dim)
    return sorted(ticks)
