"""The claims of E10 to E12, E20 and E22: what happens without massive activations, and with registers overwritten."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from massact.records.kinds.intervention import Intervention
from massact.records.verdicts import (
    CONTROL,
    HARMFUL,
    HARMLESS,
    LEAST,
    MARGIN,
    NOT_JUDGED,
    UNTESTED,
    ZERO,
    harm_interval,
    shows,
    unit_of,
    verdict_of,
)
from massact.reproductions.claims import FAILS, HOLDS, Claim, Part, bounded, part, too_few, untold
from massact.reproductions.entries import ASK, Finished, Nothing, at
from massact.stats.intervals import Interval

BREAKS = math.log(2)  # nats: the perplexity is at least doubled
LOST = 0.5  # of the accuracy above chance
CHANCE = {"boolq": 0.5, "piqa": 0.5, "winogrande": 0.5, "arc_easy": 0.25, "arc_challenge": 0.25, "hellaswag": 0.25,
          "openbookqa": 0.25}  # fmt: skip
MAIN = ("perplexity", "accuracy", "top1_agreement")  # the metric of E10, the first that there is
NEVER = "It was not edited so."
SAME = "The edit changes nothing: what it sets is the value itself."


def _whole(done: Intervention | None, metric: str) -> pd.DataFrame:
    if done is None:
        raise Nothing("Nothing was edited.")
    return at(done.effects, metric=metric, group="all")


def _found(r: Any) -> tuple[Interval, int]:
    """The harm of a row of effects with its interval, and the sequences that it is over."""
    low, high = harm_interval(r)
    known = r["delta_nats"] if unit_of(str(r["metric"])) == "nats" else -r["delta"]
    value = known if not math.isnan(known) else (low + high) / 2
    return Interval(value, low, high), int(r["n_sequences"])


def judged_so(name: str, rows: pd.DataFrame, edit: str, wanted: str, of: str = "sequences") -> Part:
    """Whether an edit is as the paper says, harmful or harmless, by the one rule of verdicts."""
    mine = rows[rows["edit"] == edit]
    if not len(mine):
        return untold(name, NEVER)
    r = mine.iloc[0].to_dict()
    found, n = _found(r)
    said = verdict_of(r)
    sign = f"at {'least' if wanted == HARMFUL else 'most'} {MARGIN:g}"
    line: dict[str, Any] = {
        "n": n,
        "of": of,
        "unit": unit_of(str(r["metric"])),
        "bound": sign,
        "stack": str(r["stack"]),
    }
    if said == UNTESTED:
        return part(name, found, reason=SAME, **line)
    if n < LEAST:
        return part(name, found, reason=too_few(n, of), n_needed=LEAST, **line)
    if said == HARMFUL:
        return part(name, found, verdict=HOLDS if wanted == HARMFUL else FAILS, **line)
    if said != NOT_JUDGED and shows(str(r["metric"]), float(r["baseline"])) and found.high < MARGIN:  # or helpful
        return part(name, found, verdict=HOLDS if wanted == HARMLESS else FAILS, **line)
    return part(name, found, reason=_open(r), n_needed=float(r["n_needed"]), **line)


def _open(r: dict[str, Any]) -> str:
    if not shows(str(r["metric"]), float(r["baseline"])):
        return "The metric shows no harm: it is not finite, or never right, without an edit."
    would = float(r["n_needed"])
    more = (
        "" if math.isnan(would) else "; no number would settle it" if math.isinf(would) else f"; {would:,.0f} would do"
    )
    return f"The interval holds the margin{more}."


def decisive(f: Finished) -> list[Part]:
    """E10: zero is harmful, as many values near the median are not."""
    done = f.intervention
    metric = next((m for m in MAIN if done is not None and len(_whole(done, m))), MAIN[0])
    rows = _whole(done, metric)
    named = metric.replace("_", " ")
    return [judged_so(f"harm of zero to {named}", rows, ZERO, HARMFUL),
            judged_so(f"harm of as many near the median to {named}", rows, CONTROL, HARMLESS)]  # fmt: skip


def breaking(f: Finished) -> list[Part]:
    """E11: on every text zero at least doubles the perplexity, and the mean is harmless."""
    told: list[Part] = []
    for done in (f.intervention, *f.texts.values()):
        rows = _whole(done, "perplexity")
        text = str(done.info.corpus.get("name")) if done is not None else ""
        if len(rows):
            told += [
                _broken(f"harm of zero, {text}", rows),
                judged_so(f"harm of the mean, {text}", rows, "mean", HARMLESS),
            ]
    if not told:
        raise Nothing("The model predicts no next tokens: it has no perplexity.")
    return told


def _broken(name: str, rows: pd.DataFrame) -> Part:
    mine = rows[rows["edit"] == ZERO]
    if not len(mine):
        return untold(name, NEVER)
    r = mine.iloc[0].to_dict()
    found, n = _found(r)
    line: dict[str, Any] = {"n": n, "unit": "nats", "stack": str(r["stack"])}
    if verdict_of(r) == UNTESTED:
        return part(name, found, reason=SAME, **line)
    if not math.isfinite(r["edited"]) and math.isfinite(r["baseline"]) and n >= LEAST:
        return part(name, found, verdict=HOLDS, bound=f"at least {BREAKS:.3g}", **line)
    return bounded(name, found, least=BREAKS, **line)


def falling(f: Finished) -> list[Part]:
    """E12: on every task zero costs most of what is above chance, and the mean nothing."""
    effects = f.intervention.effects if f.intervention is not None else pd.DataFrame({"metric": []})
    tasks = [m for m in dict.fromkeys(effects["metric"]) if "/" in str(m) and unit_of(str(m)) == "share"]
    if not tasks:
        raise Nothing(f"It needs {ASK['tasks']}.")
    told: list[Part] = []
    for metric in tasks:
        rows = _whole(f.intervention, metric)
        told += [_to_chance(metric, rows),
                 judged_so(f"harm of the mean, {metric}", rows, "mean", HARMLESS, "questions")]  # fmt: skip
    return told


def _to_chance(metric: str, rows: pd.DataFrame) -> Part:
    name = f"accuracy above chance that zero costs, {metric}"
    mine = rows[rows["edit"] == ZERO]
    if not len(mine):
        return untold(name, NEVER, of="questions")
    r = mine.iloc[0].to_dict()
    found, n = _found(r)
    above = r["baseline"] - CHANCE.get(metric.partition("/")[0], 0.0)
    line: dict[str, Any] = {"n": n, "of": "questions", "unit": "share", "stack": str(r["stack"])}
    if verdict_of(r) == UNTESTED:
        return untold(name, SAME, **line)
    if above <= 1.96 * math.sqrt(r["baseline"] * (1 - r["baseline"]) / max(n, 1)):
        return untold(name, "Without an edit it is no better than chance.", **line)
    share = Interval(*(float(x) / above for x in (found.estimate, found.low, found.high)))
    return bounded(name, share, least=LOST, **line)


def dropping(f: Finished) -> list[Part]:
    """E20: zero costs accuracy, the mean does not."""
    rows = _whole(f.intervention, "accuracy")
    if not len(rows):
        raise Nothing(f"It needs {ASK['labels']}.")
    return [judged_so("accuracy that zero costs", rows, ZERO, HARMFUL, "images"),
            judged_so("accuracy that the mean costs", rows, "mean", HARMLESS, "images")]  # fmt: skip


def fixed(f: Finished) -> list[Part]:
    """E22: overwriting registers by their means costs nothing, where overwriting them by zero does."""
    metric = next((m for m in MAIN[1:] if len(_whole(f.registers, m))), MAIN[-1])
    rows = _whole(f.registers, metric)
    rows = rows.assign(edit=rows["edit"].str.removeprefix("registers "))
    named = "accuracy" if metric == "accuracy" else "agreement with the model as it is"
    told = [judged_so(f"{named} that the mean costs", rows, "mean", HARMLESS, "images")]
    zero = judged_so(f"{named} that zero costs", rows, ZERO, HARMFUL, "images")
    if zero["verdict"] == FAILS:
        zero |= {"verdict": part("")["verdict"], "reason": "Zero costs nothing either: nothing reads the registers."}
    return [*told, zero]


DECISIVE = Claim(f"Zero costs less than {MARGIN:g}, or as many values near the median cost more.", decisive)
BREAKING = Claim(f"Zero less than doubles the perplexity, or the mean costs more than {MARGIN:g} nats.", breaking)
FALLING = Claim(f"Zero costs less than half of the accuracy above chance, or the mean more than {MARGIN:g}.", falling)
DROPPING = Claim(f"Zero costs less than {MARGIN:g} of the accuracy, or the mean more.", dropping)
FIXED = Claim(f"The means cost more than {MARGIN:g}.", fixed)
