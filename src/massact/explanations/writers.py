"""Who writes a massive activation: exact accounting over the residual stream, then over the neurons of the writer.

value after block L = embedding + sum of every write, those between blocks included (+ what a norm changes in post-LN
blocks, what a scale or the mixing with other streams changes, and what else happens between blocks), entry by entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from massact.records.anatomy import Block, Stack
from massact.records.clusters import KEYS, passing
from massact.records.sites import Site, runs_of
from massact.records.tables import frame
from massact.stats.groups import Gather
from massact.trace import Measurements, Probe

STEP = 0.25  # of the value at the peak layer: a write of that size is a step up or down
MOST_COORDINATES = 16  # of one stack, the largest clusters
Values = Mapping[tuple[int, int], np.ndarray]  # (sequence, position) -> values at the coordinates' dims


@dataclass(frozen=True)
class Coordinate:
    """One massive coordinate of a stack.

    Args:
        stack, site: which residual stream, and the point of it that has the findings.
        dim, position_class: which.
        layer: the peak layer of its cluster, where its value is `peak`.
        tokens: (sequence, position) of its findings at that layer.
    """

    stack: str
    site: str
    dim: int
    position_class: str
    layer: int
    tokens: tuple[tuple[int, int], ...]


def coordinates_of(findings: pd.DataFrame, clusters: pd.DataFrame, n_sequences: int) -> list[Coordinate]:
    """The largest clusters of each stack that pass, each at its own peak layer.

    One that is massive at two points of a block (before and after a norm) is told once, at the greater one; one that
    passes again in a hump is told once, as what is larger.
    """
    found: dict[tuple[str, int, str], Coordinate] = {}
    known = findings[(findings.sequence >= 0) & (findings.sequence < n_sequences)]
    mine = passing(clusters[clusters["dim"] >= 0])
    sizes = mine.groupby(["stack", "site"]).max().sort_values("max", ascending=False, kind="stable")["max"]
    for place in sizes.index:
        for c in mine[(mine["stack"] == place[0]) & (mine["site"] == place[1])].itertuples():
            here = known[(known[KEYS] == [c.stack, c.site, c.dim, c.position_class]).all(axis=1)]
            # The first sequences may have it at another layer only: of these the nearest one.
            layers = here["layer"].to_numpy()
            if not len(layers):
                continue
            layer = int(layers[np.abs(layers - c.peak_layer).argmin()])
            rows = here.loc[here["layer"] == layer, ["sequence", "pos"]].drop_duplicates()
            tokens = tuple((int(s), int(p)) for s, p in rows.to_numpy())
            one = Coordinate(str(c.stack), str(c.site), int(c.dim), str(c.position_class), layer, tokens)
            if sum(k.stack == one.stack for k in found.values()) < MOST_COORDINATES:
                found.setdefault((one.stack, one.dim, one.position_class), one)
    return sorted(found.values(), key=lambda c: c.stack)


def chosen_tokens(coordinates: Sequence[Coordinate]) -> dict[int, list[int]]:
    """sequence -> positions of some coordinates."""
    chosen: dict[int, set[int]] = {}
    for c in coordinates:
        for sequence, pos in c.tokens:
            chosen.setdefault(sequence, set()).add(pos)
    return {s: sorted(p) for s, p in chosen.items()}


def write_probes(stack: Stack, coordinates: Sequence[Coordinate]) -> list[Probe]:
    """Probes that keep the coordinates' entries at every site of the account."""
    dims, chosen = sorted({c.dim for c in coordinates}), chosen_tokens(coordinates)
    points = {name for block in stack.blocks for s in block.sums for name in (s.start, *s.writes, s.end)}
    points |= {name for block in stack.blocks for name in block.between}
    points |= {name for block in stack.blocks for change in block.changes for name in (change.start, change.end)}
    head = f"{stack.name}/" if stack.name else ""
    return [Probe("writes", f"{head}[0-9]*.{point}", lambda: Gather(chosen, dims)) for point in sorted(points)]


@dataclass(frozen=True)
class Step:
    """One term of the account: the site before it, the site after it, and what it adds."""

    layer: int
    submodule: str
    module: str
    before: str
    after: str
    writes: str  # the site of the write; "" where something else changes the stream: after - before
    back: int = 0  # how many layers before this one the site before it is


def steps_of(block: Block) -> list[Step]:
    """Every term of a block's account, in the order in which it happens, from what the block before gave."""
    steps = [
        Step(block.layer, name, block.places[name].module, "resid_post", "resid_pre", name, 1) for name in block.between
    ]
    if block.changed:
        steps.append(Step(block.layer, "between", block.module, "resid_post", "resid_pre", "", 1))
    point, changes, sums = "resid_pre", {c.start: c for c in block.changes}, {s.start: s for s in block.sums}
    while point in changes or point in sums:
        if point in changes:
            change = changes[point]
            steps.append(Step(block.layer, change.how, block.places[change.end].module, point, change.end, ""))
            point = change.end
            continue
        end = sums[point].end
        for name in sums[point].writes:
            steps.append(Step(block.layer, name, block.places[name].module, point, end, name))
        point = end
    return steps


def writers_table(
    stacks: Mapping[str, Stack], coordinates: Sequence[Coordinate], measured: Measurements, tolerance: float
) -> tuple[pd.DataFrame, dict[str, float], list[str]]:
    """The account of every coordinate, and what it misses.

    Every sum of a block rounds: it may be off by `tolerance` of the magnitudes of its terms, as in the proof, so the
    account up to a layer may be off by the sum of these. A coordinate whose account misses more is left out.

    Args:
        stacks, coordinates, measured: by name; what to account for; with the probes of `write_probes`.
        tolerance: of one sum, from the proof of the model.

    Returns:
        The table, for each stack the greatest error over the value at the peak, and one sentence for each coordinate
        that is left out.
    """
    rows: list[dict[str, object]] = []
    closure: dict[str, float] = {}
    notes: list[str] = []
    kept: dict[Site, Values] = {site: measured.result("writes", site) for site in measured.sites("writes")}
    for c in coordinates:
        if stacks[c.stack].streams:
            reads = ", ".join(runs_of(stacks[c.stack].streams))
            notes.append(
                f"Nothing is added to stack {c.stack!r}, which is read from {reads}: their writers stand there."
            )
            continue
        dims = sorted({k.dim for k in coordinates if k.stack == c.stack})
        mine, missed, refused = _account(stacks[c.stack], c, dims.index(c.dim), kept, tolerance)
        if refused:
            where = f" in {c.stack}" * bool(c.stack)
            notes.append(f"Who writes dim {c.dim} ({c.position_class}){where} is unavailable: {refused}.")
            continue
        rows += mine
        closure[c.stack] = max(closure.get(c.stack, 0.0), missed)
    return frame("writers", rows), closure, list(dict.fromkeys(notes))


def _account(
    stack: Stack, c: Coordinate, at: int, kept: Mapping[Site, Values], tolerance: float
) -> tuple[list[dict[str, object]], float, str]:
    """Of one coordinate the rows, the error behind the last block over the peak, and why it is refused, if it is."""

    def values(layer: int, point: str) -> np.ndarray:
        held = kept[Site(c.stack, layer, point)]
        return np.array([held[token][at] for token in c.tokens])

    peak = values(c.layer, c.site)
    running = values(1, "resid_pre")
    common = {"stack": c.stack, "dim": c.dim, "position_class": c.position_class, "n_tokens": len(c.tokens)}
    embedding = f"input of {stack.blocks[0].module}"
    rows = [common | _row(0, "embedding", embedding, running, np.zeros_like(running), peak)]
    terms, missed = np.abs(running), np.zeros_like(running)
    for block in stack.blocks:
        for step in steps_of(block):
            write = (
                values(step.layer, step.writes)
                if step.writes
                else values(step.layer, step.after) - values(step.layer - step.back, step.before)
            )
            rows.append(common | _row(step.layer, step.submodule, step.module, write, running, peak))
            # Start, write and end of the sum; what is read off two sites is the difference of two rounded values.
            terms = terms + np.abs(running) + np.abs(write) + np.abs(running + write)
            running = running + write
        missed = np.abs(running - values(block.layer, "resid_post"))
        worst = int(np.argmax(missed - tolerance * terms))
        if not missed[worst] <= tolerance * terms[worst]:
            return [], 0.0, (
                f"the writes up to layer {block.layer} ({block.module}) miss the measured value by "
                f"{missed[worst]:.3g}, {missed[worst] / np.abs(peak[worst]):.1%} of it at its peak (rounding: "
                f"{tolerance * terms[worst]:.1g}); the model runs another way here than when it was proved"
            )  # fmt: skip
    return rows, float((missed / np.abs(peak)).max()), ""


def _row(
    layer: int, submodule: str, module: str, write: np.ndarray, before: np.ndarray, peak: np.ndarray
) -> dict[str, object]:
    share = float(write.mean() / peak.mean())
    return {
        "layer": layer, "submodule": submodule, "module": module, "write": write.mean(), "write_std": write.std(),
        "share": share, "before": before.mean(), "after": (before + write).mean(),
        "role": "up" if share >= STEP else "down" if share <= -STEP else "",
    }  # fmt: skip
