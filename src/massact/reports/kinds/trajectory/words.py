"""A model over its checkpoints, in words: where massive activations appear, and whether they stay."""

from __future__ import annotations

import math

from massact.records.kinds.trajectory import CheckpointRecord, Emergence, Trajectory
from massact.reports.kinds.scan.views import Rule, rule_of
from massact.reports.spelling import counted, listed, noted, number, real, shortened, visible

MOST_NAMES, MOST_DIMS = 6, 6


def trajectory_in_words(t: Trajectory) -> list[str]:
    """Where in a training massive activations emerge, in sentences, the most important first."""
    info, rule = t.info, rule_of(t)
    scanned, failed, waiting = (info.having(s) for s in ("ok", "failed", "waiting"))
    if not scanned:
        said = [f"Nothing was measured: none of {counted(len(info.checkpoints), 'checkpoint')} was scanned "
                f"(status: {visible(info.status)})."]  # fmt: skip
    else:
        said = [_headline(t, rule)]
        several = len(pairs(t)) > 1
        for stack, site in pairs(t):
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
    return said + noted(info.notes)


def _name(checkpoint: str) -> str:
    return shortened(visible(checkpoint), 60) or "''"


def pairs(t: Trajectory) -> list[tuple[str, str]]:
    """Stack and site of what was scanned."""
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
