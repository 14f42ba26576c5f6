"""The small tables of a trajectory: a row for each checkpoint, and the fitted curves."""

from __future__ import annotations

import math

from massact.records.kinds.trajectory import StackSummary, Trajectory
from massact.reports.kinds.trajectory.words import MOST_DIMS, pairs
from massact.reports.parts import Section, Table, grid, parts_of
from massact.reports.spelling import cell, ranges, real, shortened, visible

MOST_ROWS = 60


def brief(t: Trajectory) -> list[Section]:
    """Checkpoints and curves of each stack and site."""
    made: list[Table | None] = []
    for stack, site in pairs(t):
        label = f"{visible(stack)} {visible(site)}".strip() + ": " if len(pairs(t)) > 1 else ""
        made += [_rows(t, stack, site, label), _fitted(t, stack, site, label)]
    return [Section("checkpoints", "", parts_of(*made))]


def _rows(t: Trajectory, stack: str, site: str, label: str) -> Table | None:
    heads = ("<checkpoint", "findings", "layers", "<dims", "peak\nlayer", "top 1", "median", "ratio", "greatest\nratio")
    kept, rows, looks = _kept(t), [], []
    for i, c in enumerate(t.info.checkpoints):
        if i not in kept and i - 1 not in kept:
            continue
        s = next((s for s in c.stacks if (s.stack, s.site) == (stack, site)), None)
        name = shortened(visible(c.name), 40)
        if i not in kept:
            rows.append(["...", *[""] * 8])
            looks.append("dim")
        elif s is None:
            rows.append([name, visible(c.status), *[""] * 7])
            looks.append("red" if c.status == "failed" else "dim")
        else:
            rows.append([name, *_cells(s)])
            looks.append("" if s.n_findings else "dim")
    title = f"{label}Checkpoints; top 1, median and ratio of the layer with the greatest ratio"
    return grid(title, heads, rows, looks)


def _cells(s: StackSummary) -> list[str]:
    layers = "-" if s.onset is None else ranges({s.onset}) if s.onset == s.offset else f"{s.onset}-{s.offset}"
    dims = ", ".join(str(d) for d in s.dims[:MOST_DIMS]) + (", ..." if len(s.dims) > MOST_DIMS else "")
    peak = "-" if s.peak_layer is None else str(s.peak_layer)
    numbers = (cell(x) for x in (s.top1, s.median, s.ratio, s.ratio_max))
    return [f"{s.n_findings:,}", layers, dims or "-", peak, *numbers]


def _kept(t: Trajectory) -> set[int]:
    """Rows to print: all; of many the ends, those about an emergence and those that failed, while there is room."""
    n, names = len(t.info.checkpoints), [c.name for c in t.info.checkpoints]
    if n <= MOST_ROWS:
        return set(range(n))
    marked = [names.index(x) for e in t.info.emergence for x in (e.before, e.first, e.gone) if x in names]
    order = [*marked, 0, n - 1, *(i for i, c in enumerate(t.info.checkpoints) if c.status == "failed")]
    every = math.ceil(n / (MOST_ROWS // 2))
    return set([*dict.fromkeys([*order[: MOST_ROWS // 2], *range(0, n, every)])][:MOST_ROWS])


def _fitted(t: Trajectory, stack: str, site: str, label: str) -> Table | None:
    fits = [d for d in t.info.dynamics if (d.get("stack"), d.get("site")) == (stack, site)]
    known = [math.isfinite(real(d.get("r2"))) for d in fits]
    names = ("r2", "A", "lam", "gamma", "t0", "K", "peak_step")
    rows = [
        [str(d.get("layer")), *(cell(d.get(n)) if fit else "-" for n in names)]
        for d, fit in zip(fits, known, strict=True)
    ]
    heads = ("layer", "R^2", "A", "lambda", "gamma", "t0", "K", "peak at\nstep")
    title = f"{label}A exp(-lambda x) log(x) + K, x = gamma t + t0, of the ratio"
    return grid(title, heads, rows) if any(known) else None
