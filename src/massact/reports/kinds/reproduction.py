"""The experiments of the founding paper on one model: one line for each, and the table of what was published."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from massact.records.kinds.reproduction import AGREES, DIFFERS, UNPUBLISHED, VERDICTS, Reproduction
from massact.reports.parts import Section, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import counted, noted, number, shortened, visible

MOST_SAID, LONGEST = 5, 64
UNSAID = ("", "count", "layer", "perplexity", "h", "|h|", "share", "logit")  # units that the quantity tells


def reproduction_in_words(r: Reproduction) -> list[str]:
    """A summary, then one line for each experiment: what the paper says, what is found here, the verdict.

    Args:
        r: fresh, or read from a run directory.
    """
    return [_summary(r), *(_line(r, name, e) for name, e in r.info.experiments.items()), *noted(r.info.notes)]


def _summary(r: Reproduction) -> str:
    counts = Counter(str(e.get("verdict")) for e in r.info.experiments.values())
    told = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
    known = r.info.published
    name = known.get("name")
    which = (f"Published values of {visible(name)} count, by {visible(known.get('by'))}." if name else
             f"No published values count: {visible(known.get('unavailable', 'none are known'))}.")  # fmt: skip
    return f"{counted(len(r.info.experiments), 'experiment')} of Sun 2024: {told}. {which}"


def _line(r: Reproduction, name: str, e: dict[str, Any]) -> str:
    rows = r.reproduced[r.reproduced["experiment"] == name]
    verdict, reason = str(e.get("verdict")), visible(str(e.get("reason") or "")).rstrip(".")
    here = findings_in_words(rows)
    parts = [
        f"{visible(name)}, {visible(e.get('title'))} ({visible(e.get('section'))}).",
        f"Paper: {visible(e.get('says'))}",
    ]
    if here:
        parts.append(f"Here: {here}.")
    parts.append(f"[{visible(verdict)}{f': {reason}' if reason else ''}]")
    return " ".join(parts)


def findings_in_words(rows: pd.DataFrame) -> str:
    """What the headline rows of an experiment say, those with a published value first."""
    told = rows[rows["headline"] & (rows["ours"].notna() | (rows["ours_text"] != "") | (rows["verdict"] == DIFFERS))]
    first = told["verdict"].isin((AGREES, DIFFERS))
    told = pd.concat([told[first], told[~first]])
    some = [_said(row) for _, row in told.head(MOST_SAID).iterrows()]
    left = len(told) - len(some)
    return "; ".join(some) + (f"; and {left} more" if left > 0 else "")


def _said(row: pd.Series) -> str:
    beside = "" if row["verdict"] == UNPUBLISHED else f" (published {published(row) or 'none'})"
    return f"{where(row)} {ours(row)}{beside}"


def where(row: pd.Series) -> str:
    """The quantity and its place."""
    layer = "" if row["layer"] < 0 else f"layer {int(row['layer'])}"
    at = ", ".join(visible(str(x)) for x in (row["stack"], layer, row["place"]) if x)
    return f"{visible(row['quantity'])}{f' ({at})' if at else ''}"


def ours(row: pd.Series) -> str:
    """What was found: a number with its unit, a text, or both where the text is short."""
    text = shortened(visible(row["ours_text"]), LONGEST)
    if pd.isna(row["ours"]):
        return text or "none"
    unit = "" if row["unit"] in UNSAID else f" {visible(row['unit'])}"
    return f"{number(row['ours'])}{unit}"


def published(row: pd.Series) -> str:
    """What was published; empty where nothing was."""
    text = visible(row["published_text"])
    if pd.isna(row["published"]):
        return text
    return text if text.startswith("at least") else ", ".join(x for x in (number(row["published"]), text) if x)


def section(r: Reproduction) -> Section:
    """The experiments of Sun 2024 on this model, beside what was published of it."""
    columns = ("experiment", "quantity", "stack", "layer", "place", "unit", "ours", "ours_text", "published",
               "published_text", "tag", "source", "verdict", "reason")  # fmt: skip
    return Section("paper", "The founding paper, redone", parts_of(
        Words(reproduction_in_words(r)),
        table_of("reproduced", _compared(r), "Beside published values", columns, shown_first=True),
        table_of("reproduced", r.reproduced[r.reproduced["headline"]], "What the lines say", columns, most=400),
    ))  # fmt: skip


def _compared(r: Reproduction) -> pd.DataFrame:
    """The rows of which a value was published."""
    return r.reproduced[r.reproduced["verdict"].isin((AGREES, DIFFERS))]


def brief(r: Reproduction) -> list[Section]:
    """Every value of which one was published."""
    heads = ("<", "<quantity", ">here", ">published", "<tag", "<verdict")
    rows = [
        [str(x) for x in (row["experiment"], where(row), ours(row), published(row), row["tag"], row["verdict"])]
        for _, row in _compared(r).iterrows()
    ]
    return [Section("paper", "", parts_of(grid("Beside published values", heads, rows)))]


READING = Reading(reproduction_in_words, (section,), brief)
