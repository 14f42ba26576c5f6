"""Verdicts on effects: their words, the rule, and what a row of effects says by it, once for every room.

A verdict is about harm: how much worse a metric is with an edit, in nats of the log-perplexity or as a share of
answers. Its interval is compared with a margin within which nothing has happened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

HARMFUL, HARMLESS, HELPFUL, OPEN, UNTESTED = "harmful", "harmless", "helpful", "not settled", "not tested"
VERDICTS = (HARMFUL, HARMLESS, HELPFUL, OPEN, UNTESTED)
NOT_JUDGED = "not judged"  # a metric that is neither a loss nor a share of right answers

MARGIN = 0.01  # nats of the log-perplexity, about 1 % of the perplexity; or a share of answers
LEAST = 4  # sequences, below which there is no verdict
ROUNDING = 1e-6  # relative change of an entry up to which an edit has changed nothing
ZERO, CONTROL = "zero", "random"  # the edits that others are compared with

NATS = ("perplexity", "perplexity_windowed", "nll")
ANSWERS = ("accuracy", "top1_agreement")
_TASKS = ("acc", "exact_match")  # how lm-eval's shares of right answers are called
ONE_SIDED = ("kl", "top1_agreement")  # no edit leaves them at 0 and at 1: they move one way only


def unit_of(metric: str) -> str:
    """What harm is measured in: "nats", "share" of answers, or "" of a metric that is not judged."""
    name = metric.rpartition("/")[2]
    if name in NATS and name == metric:
        return "nats"
    return "share" if metric in ANSWERS or (metric != name and name.startswith(_TASKS)) else ""


def judged(
    low: float, high: float, n: float, margin: float = MARGIN, change: float = math.nan, finite: bool = True
) -> str:
    """The verdict on an edit.

    not tested: it changed no entry by more than `ROUNDING`. harmful: what it gives is not finite, or low > margin.
    helpful: high < -margin. harmless: -margin < low and high < margin, two one-sided tests of 2.5 % each. Else, and
    with fewer than `LEAST` sequences, not settled: less data never gives a stronger claim.

    Args:
        low, high: 95 % interval of the harm; more is worse.
        n: sequences, or answers.
        change: greatest relative change of an entry; NaN: unknown.
        finite: whether the metric is finite with the edit. One sequence that it breaks is no estimate.
    """
    if change <= ROUNDING:
        return UNTESTED
    if not finite:
        return HARMFUL
    if not n >= LEAST or math.isnan(low) or math.isnan(high):
        return OPEN
    if low > margin:
        return HARMFUL
    if high < -margin:
        return HELPFUL
    return HARMLESS if low > -margin and high < margin else OPEN


def with_change(verdict: str, change: float) -> str:
    """The same verdict; `UNTESTED` where one was due and the edit changed no entry by more than `ROUNDING`."""
    return UNTESTED if change <= ROUNDING and verdict != NOT_JUDGED else verdict


def verdict_of(row: Mapping[str, Any], margin: float = MARGIN) -> str:
    """The verdict of a row of effects: as it was recorded, or, of a run without it, by the same rule.

    A classifier that is never right, and a loss that is not finite without the edit, show nothing.

    Args:
        row: of the table `effects`, or a part of it.
        margin: by which the run was judged.
    """
    told, metric = str(row.get("verdict") or ""), str(row["metric"])
    if told:
        return told
    unit = unit_of(metric)
    if not unit:
        return NOT_JUDGED
    low, high = harm_interval(row)
    edited, baseline, n = (_real(row.get(c)) for c in ("edited", "baseline", "n_sequences"))
    change = _real(row.get("change"))
    if not shows(metric, baseline):
        return UNTESTED if change <= ROUNDING else OPEN
    return judged(low, high, n, margin, change, math.isfinite(edited) or unit != "nats")


def shows(metric: str, baseline: float) -> bool:
    """Whether a metric can show harm: its value without an edit is finite, and of a share not zero."""
    return math.isfinite(baseline) and (unit_of(metric) != "share" or baseline > 0)


def harm_interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Interval of the harm of a row of effects: nats of the log-perplexity, or share of answers lost.

    Of a run that has no nats they follow from the perplexity: log(1 + delta / baseline).
    """
    low, high, metric = _real(row.get("ci_low")), _real(row.get("ci_high")), str(row["metric"])
    if unit_of(metric) == "share":
        return -high, -low
    known = [_real(row.get(c)) for c in ("nats_low", "nats_high")]
    if not any(map(math.isnan, known)):
        return known[0], known[1]
    if metric == "nll":
        return low, high
    baseline = _real(row["baseline"])
    return _log_ratio(low, baseline), _log_ratio(high, baseline)


def starred(row: Mapping[str, Any]) -> bool | None:
    """Whether a change stands out: its interval leaves out zero; None: that cannot be told.

    A quantity that moves one way only stands out where it moves further than with the control: the interval of the
    paired difference to it lies beyond zero. Below `LEAST` sequences nothing does.
    """
    metric = str(row["metric"])
    one_sided = metric in ONE_SIDED
    low, high = (_real(row.get(c)) for c in (("random_low", "random_high") if one_sided else ("ci_low", "ci_high")))
    if math.isnan(low) or math.isnan(high):
        return None
    up, down = low > 0 and metric != "top1_agreement", high < 0 and metric != "kl"  # these fall, and rise, only
    return _real(row.get("n_sequences", LEAST)) >= LEAST and (up or down)


def _log_ratio(delta: float, baseline: float) -> float:
    ratio = 1 + delta / baseline if baseline > 0 else math.nan
    return math.log(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan


def _real(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
