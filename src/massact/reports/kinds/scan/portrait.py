"""|h| of one prompt over tokens and dims, in three dimensions (Sun 2024, Figs. 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.curves import named
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.panels import Scene, Sheet, token_label
from massact.reports.spelling import counted, number, visible

MOST_PANELS, MOST_TOKENS, MOST_DIM_TICKS, BINS = 3, 48, 3, 160


def draw_magnitudes(result: ScanResult) -> Sheet | None:
    """One scene for each layer of the portrait; None for a run without one."""
    scenes = portrait(result)
    if not scenes:
        return None
    stack = visible(str(result.portrait.get("stack", "")))
    return Sheet(scenes, ", ".join(x for x in (named(result), stack) if x))


def has_portrait(scan: ScanResult | None) -> bool:
    """Whether |h| of a prompt was kept."""
    kept = scan.portrait if scan is not None else {}
    return {"magnitude", "layers", "tokens"} <= set(kept) and 0 not in kept["magnitude"].shape


def portrait(scan: ScanResult) -> list[Scene]:
    """Scenes of the first layers that are kept of the prompt: the same tokens and one z scale in all of them."""
    if not has_portrait(scan):
        return []
    h_PTD, rule = scan.portrait["magnitude"].astype(np.float64)[:MOST_PANELS], rule_of(scan)
    tokens = [str(t) for t in scan.portrait["tokens"]]
    tops = [largest(h_TD) for h_TD in h_PTD]
    by_height = sorted(range(len(h_PTD)), key=lambda panel: -tops[panel])
    kept = kept_tokens(len(tokens), [pos for panel in by_height for pos, _ in peaks(h_PTD[panel], rule)])
    best = h_PTD[int(np.argmax(tops))]
    ticks = dim_ticks(best, peaks(best, rule))
    return [
        scene_of(h_TD, f"Layer {float(layer):.0f}", tokens, kept, rule, max(tops), ticks)
        for h_TD, layer in zip(h_PTD, scan.portrait["layers"], strict=False)
    ]


def scene_of(
    h_TD: np.ndarray,
    title: str,
    tokens: Sequence[str],
    kept: Sequence[int],
    rule: Rule,
    top: float,
    ticks: Sequence[int],
) -> Scene:
    """One hidden state: a line along the dims for each token of `kept`, a stem for each massive value."""
    finite_TD, n_bad = np.where(np.isfinite(h_TD), h_TD, 0.0), int((~np.isfinite(h_TD)).sum())
    if n_bad == h_TD.size:
        return Scene(title)
    curves = [(token_label(tokens[pos], 10), pos, *outline(finite_TD[pos], BINS)) for pos in kept]
    spikes = [(kept.index(pos), dim, float(h_TD[pos, dim])) for pos, dim in peaks(h_TD, rule) if pos in kept]
    some = f"; {counted(len(kept), 'token')} of {len(tokens):,}" if len(kept) < len(tokens) else ""
    said = f"max |h| {number(largest(h_TD))}{some}"
    bad = f"{counted(n_bad, 'value')} NaN or Inf, drawn as 0" if n_bad else ""
    return Scene(title, curves, h_TD.shape[1], spikes, ticks, top, said, bad)


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
