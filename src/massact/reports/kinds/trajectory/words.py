"""A model over its checkpoints, in words and in a terminal: where massive activations appear, and whether they stay."""

from __future__ import annotations

import math

from rich.console import Console
from rich.text import Text

from massact.records.kinds.trajectory import CheckpointRecord, Emergence, StackSummary, Trajectory
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.render.terminal import _framed, _Section, _table
from massact.reports.spelling import cell, counted, listed, number, ranges, real, shortened, visible

MOST_ROWS, MOST_NAMES, MOST_DIMS = 60, 6, 6


def trajectory_in_words(t: Trajectory) -> list[str]:
    """Where in a training massive activations emerge, in sentences, the most important first."""
    info, rule = t.info, rule_of(t)
    scanned, failed, waiting = (info.having(s) for s in ("ok", "failed", "waiting"))
    if not scanned:
        said = [f"Nothing was measured: none of {counted(len(info.checkpoints), 'checkpoint')} was scanned "
                f"(status: {visible(info.status)})."]  # fmt: skip
    else:
        said = [_headline(t, rule)]
        several = len(_pairs(t)) > 1
        for stack, site in _pairs(t):
            found = next((e for e in info.emergence if (e.stack, e.site) == (stack, site)), None)
            sentences = [*(_emerged(found, scanned) if found else []), *_peak(t, stack, site), *_curves(t, stack, site)]
            label = f"{visible(stack) or visible(site)}{f' ({visible(site)})' if stack else ''}: " if several else ""
            said += [label + s for s in sentences]
        if not info.has_steps():
            said.append("Not every name says a step, so the checkpoints stand in the order in which they were given.")
    said += [f"{_name(c.name)} could not be scanned: {visible(c.error)}" for c in failed[:MOST_NAMES]]
    if len(failed) > MOST_NAMES:
        said.append(f"{len(failed) - MOST_NAMES:,} more could not be scanned.")
    if waiting and scanned:
        said.append(f"{counted(len(waiting), 'checkpoint')} not scanned yet (status: {visible(info.status)}).")
    return said + [f"Note: {visible(n)}" for n in info.notes]


def _name(checkpoint: str) -> str:
    return shortened(visible(checkpoint), 60) or "''"


def _pairs(t: Trajectory) -> list[tuple[str, str]]:
    return list(dict.fromkeys((s.stack, s.site) for c in t.info.having("ok") for s in c.stacks))


def _headline(t: Trajectory, rule: Rule) -> str:
    scanned = t.info.having("ok")
    having = [c for c in scanned if any(s.n_findings for s in c.stacks)]
    of = f"{len(having):,} of {counted(len(scanned), 'checkpoint')}"
    name = visible(str(t.info.model.get("id") or "")) or "the model"
    if not having:
        return f"No: none of {counted(len(scanned), 'checkpoint')} of {name} has {rule.noun} under {rule.in_words()}."
    return f"Yes: {of} of {name} have {rule.noun} under {rule.in_words()}."


def _emerged(e: Emergence, scanned: list[CheckpointRecord]) -> list[str]:
    order = {c.name: i for i, c in enumerate(scanned)}
    when = f"between {_name(e.before)} and {_name(e.first)}" if e.before is not None else (
        f"at or before {_name(e.first)}, the first checkpoint")  # fmt: skip
    at = f"They appear {when} at layer {e.layer}{_dims(e.dims)}"
    later = len(scanned) - 1 - order.get(e.first, 0)
    if not later:
        return [f"{at}; that is the last checkpoint."]
    if not e.without:
        stay = f"and stay: {'all later checkpoints have' if later > 1 else 'the checkpoint after it has'} them"
    elif e.gone is not None:
        between = len([n for n in e.without if order.get(n, 0) < order.get(e.gone, 0)])
        gaps = f" (with {counted(between, 'gap')} before)" if between else ""
        stay = f"and vanish: from {_name(e.gone)} on there are none{gaps}"
    else:
        names = [_name(n) for n in e.without[:MOST_NAMES]]
        more = len(e.without) - len(names)
        stay = f"and are there at the end, but not at {listed(names + [f'{more:,} more'] * (more > 0))}"
    said = [f"{at}, {stay}."]
    if set(e.dims_last) != set(e.dims):
        said.append(f"At the last checkpoint that has them they are{_dims(e.dims_last, '')}.")
    return said


def _dims(dims: list[int], comma: str = ",") -> str:
    if not dims:
        return ""
    named = [str(d) for d in dims[:MOST_DIMS]]
    more = len(dims) - len(named)
    return f"{comma} in dim{'s' * (len(dims) > 1)} {listed(named + [f'{more:,} or more others'] * (more > 0))}"


def _peak(t: Trajectory, stack: str, site: str) -> list[str]:
    rows = [(c, s) for c in t.info.having("ok") for s in c.stacks if (s.stack, s.site) == (stack, site)]
    known = [(c, s) for c, s in rows if math.isfinite(s.ratio)]
    if not known:
        return ["No finite ratio of the greatest |h| to the median is recorded."]
    c, s = max(known, key=lambda one: one[1].ratio)
    first, last = known[0][1], known[-1][1]
    return [
        f"The greatest ratio of top |h| to median, mean over sequences, is {number(s.ratio)} at {_name(c.name)}, "
        f"layer {s.peak_layer} (top |h| {number(s.top1)}, median {number(s.median)}); it is {number(first.ratio)} at "
        f"{_name(known[0][0].name)} and {number(last.ratio)} at {_name(known[-1][0].name)}."
    ]


def _curves(t: Trajectory, stack: str, site: str) -> list[str]:
    """What the Hidden-Dynamics fit says (2508.03616)."""
    fits = [d for d in t.info.dynamics if (d.get("stack"), d.get("site")) == (stack, site)]
    good = [real(d.get("r2")) for d in fits if math.isfinite(real(d.get("r2")))]
    if not fits:
        return []
    if not good:
        reasons = list(dict.fromkeys(visible(str(d.get("reason") or "unknown")) for d in fits))
        return [f"No Hidden-Dynamics curve is fitted: {'; '.join(reasons[:2])}."]
    return [f"The Hidden-Dynamics curve fits the ratio of {counted(len(good), 'layer')} of {len(fits):,} with R^2 of "
            f"{number(sum(good) / len(good))} in the mean, {number(min(good))} to {number(max(good))}."]  # fmt: skip


def show_trajectory(t: Trajectory, console: Console) -> None:
    """Print what happens over the checkpoints in words, then a table of them, then the fitted curves.

    Args:
        t: fresh, or of a directory.
        console: where to; colours and width are its own.
    """
    name = visible(str(t.info.model.get("id") or ""), console.encoding)
    words = [visible(line, console.encoding) for line in trajectory_in_words(t)]
    console.print(_framed(words, console.encoding, f"{name}: checkpoints" if name else "checkpoints"))
    for stack, site in _pairs(t):
        label = f"{visible(stack, console.encoding)} {visible(site)}".strip() + ": " if len(_pairs(t)) > 1 else ""
        console.print()
        console.print(_rows(t, stack, site, label, console.encoding))
        if (curves := _fitted(t, stack, site, label)) is not None:
            console.print()
            console.print(curves)


def _rows(t: Trajectory, stack: str, site: str, label: str, encoding: str) -> _Section:
    table = _table("checkpoint", "findings", "layers", "dims", "peak\nlayer", "top 1", "median", "ratio",
                   "greatest\nratio", left=("checkpoint", "dims"), folding=("checkpoint", "dims"))  # fmt: skip
    kept = _kept(t)
    for i, c in enumerate(t.info.checkpoints):
        if i not in kept:
            if i - 1 in kept:
                table.add_row("...", *[""] * 8, style="dim")
            continue
        s = next((s for s in c.stacks if (s.stack, s.site) == (stack, site)), None)
        name = Text(shortened(visible(c.name, encoding), 40))
        if s is None:
            table.add_row(name, visible(c.status), *[""] * 7, style="red" if c.status == "failed" else "dim")
        else:
            table.add_row(name, *_cells(s), style="" if s.n_findings else "dim")
    return _Section(f"{label}Checkpoints; top 1, median and ratio of the layer with the greatest ratio", table)


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


def _fitted(t: Trajectory, stack: str, site: str, label: str) -> _Section | None:
    fits = [d for d in t.info.dynamics if (d.get("stack"), d.get("site")) == (stack, site)]
    if not any(math.isfinite(real(d.get("r2"))) for d in fits):
        return None
    table = _table("layer", "R^2", "A", "lambda", "gamma", "t0", "K", "peak at\nstep")
    for d in fits:
        names = ("r2", "A", "lam", "gamma", "t0", "K", "peak_step")
        known = math.isfinite(real(d.get("r2")))
        table.add_row(str(d.get("layer")), *(cell(d.get(n)) if known else "-" for n in names))
    return _Section(f"{label}A exp(-lambda x) log(x) + K, x = gamma t + t0, of the ratio", table)
