"""What a claim of the paper is: declared data, judged by a pure function of the tables of a finished run.

A claim is made of parts, each a number with its 95 % interval over sequences and a bound that it has to keep. It holds
if all parts hold; it does not hold if one does not; else, and below `LEAST` sequences, it cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from massact.records.kinds.reproduction import FAILS, HOLDS, UNTOLD
from massact.records.verdicts import LEAST
from massact.stats.intervals import UNKNOWN, Interval, mean_interval, needed, share_interval

Part = dict[str, Any]
SLACK = 1e-9  # relative: a mean of numbers at a bound is at it


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, as it is tested here.

    Args:
        fails_if: what would falsify it, in one sentence.
        judge: its parts, from what the steps left; raises `massact.reproductions.entries.Nothing`.
    """

    fails_if: str
    judge: Callable[[Any], list[Part]]


def concluded(parts: Iterable[Part]) -> tuple[str, str]:
    """The verdict of a claim, from those of its parts, with the reason where one of them gives it."""
    told = list(parts)
    for verdict in (FAILS, UNTOLD):
        mine = [p for p in told if p["verdict"] == verdict]
        if mine:
            return verdict, next((str(p["reason"]) for p in mine if p["reason"]), "")
    return (HOLDS, "") if told else (UNTOLD, "Nothing was measured.")


def part(name: str, found: Interval = UNKNOWN, verdict: str = UNTOLD, **more: Any) -> Part:
    """One part of a claim: a row of the table `claims` but for the experiment.

    Args:
        more: n (0), of ("sequences"), unit, bound, stack, reason (""), n_needed (NaN).
    """
    unsaid = {"n": 0, "of": "sequences", "unit": "", "bound": "", "stack": "", "reason": "", "n_needed": math.nan}
    assert set(more) <= set(unsaid), more
    value, low, high = (float(x) for x in (found.estimate, found.low, found.high))
    return {"part": name, "value": value, "low": low, "high": high, "verdict": verdict} | unsaid | more


def untold(name: str, reason: str, **more: Any) -> Part:
    """A part that cannot be told, and why."""
    return part(name, reason=reason, **more)


def bounded(
    name: str, found: Interval, n: int, *, least: float | None = None, most: float | None = None,
    n_needed: float = math.nan, **more: Any,
) -> Part:  # fmt: skip
    """A part that holds if its whole interval keeps the bound, and does not if the whole interval breaks it.

    Args:
        found: the number with its interval.
        n: of how many sequences it is.
        least, most: the bound; one of them.
        n_needed: sequences that would settle it; more: of `part`.
    """
    assert (least is None) != (most is None)
    edge = float(least if most is None else most)  # type: ignore[arg-type]
    said = {"bound": f"at {'least' if most is None else 'most'} {edge:.3g}", "n": n, **more}
    low, high = float(found.low), float(found.high)
    if n < LEAST:
        return part(name, found, n_needed=LEAST, reason=too_few(n, str(more.get("of", "sequences"))), **said)
    if math.isnan(low) or math.isnan(high):
        return part(name, found, reason="There is no interval: a value is not finite.", **said)
    slack = SLACK * abs(edge)
    keeps = low >= edge - slack if most is None else high <= edge + slack
    breaks = high < edge - slack if most is None else low > edge + slack
    if keeps or breaks:
        return part(name, found, verdict=HOLDS if keeps else FAILS, **said)
    would = "no number would settle it" if math.isinf(n_needed) else f"about {n_needed:,.0f} would settle it"
    why = "The interval holds the bound" + ("." if math.isnan(n_needed) else f"; {would}.")
    return part(name, found, n_needed=n_needed, reason=why, **said)


def averaged(name: str, values: Iterable[float], *, log: bool = False, **more: Any) -> Part:
    """A mean over sequences, by t with n - 1 degrees of freedom.

    Args:
        values: one of each sequence; NaN where a sequence has none.
        log: the geometric mean of positive values, whose logarithms are averaged.
        more: of `bounded`.
    """
    x = np.asarray(list(values), float)
    x = x[~np.isnan(x)]
    if log:
        with np.errstate(all="ignore"):
            x = np.log(x)
    n = len(x)
    found = mean_interval(x) if n else UNKNOWN
    edge = more["least"] if more.get("least") is not None else more["most"]
    off = float(found.estimate) - (math.log(edge) if log else edge)
    would = needed(off, float(found.se) * math.sqrt(n), 0.0, LEAST) if n > 1 else math.nan
    if log:
        found = Interval(*(np.exp(v) for v in (found.estimate, found.low, found.high)))
    return bounded(name, found, n, n_needed=would, **more)


def shared(name: str, k: int, n: int, *, least: float = 0.5, **more: Any) -> Part:
    """A share of sequences, k of n, by Wilson."""
    found = share_interval(k, n) if n else UNKNOWN
    would = LEAST
    while n and float(share_interval(k * would / n, would).low) < least <= float(
        share_interval(k * would / n, would).high
    ):
        would *= 2
        if would > 10**7:
            break
    return bounded(name, found, n, least=least, unit="share", n_needed=math.inf if would > 10**7 else would, **more)


def counted(name: str, value: float, n: int, *, most: float, **more: Any) -> Part:
    """A count of what all sequences together have: known exactly, so it has no interval."""
    return bounded(name, Interval(value, value, value), n, most=most, unit="count", **more)


def too_few(n: int, of: str) -> str:
    """Why fewer than `LEAST` give no verdict."""
    return f"{n} {of if n != 1 else of.removesuffix('s')} {'are' if n != 1 else 'is'} too few: {LEAST} would do."
