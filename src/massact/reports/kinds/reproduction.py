"""The experiments of the founding paper on one model: one line for each, and the table of what was published."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.reproduction import (
    AGREES,
    BEYOND,
    CLAIM_VERDICTS,
    DIFFERS,
    HOLDS,
    NOT_RECORDED,
    UNPUBLISHED,
    UNTOLD,
    VERDICTS,
    Reproduction,
)
from massact.reports.panels import Color, Line, Panel, column, log_axis
from massact.reports.parts import Section, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import counted, listed, noted, number, or_dash, shortened, visible

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
    more = sum(map(_beyond, r.info.experiments.values()))
    kinds = [f"{counted(n, 'experiment')} {of}" for n, of in
             ((len(r.info.experiments) - more, "of Sun 2024"), (more, BEYOND)) if n]  # fmt: skip
    return f"{listed(kinds)}: {told}. {which} {_claims(r)}"


def _beyond(e: dict[str, Any]) -> bool:
    """Whether an experiment is none of the paper."""
    return e.get("section") == BEYOND


def _claims(r: Reproduction) -> str:
    """How many of the paper's claims hold, and of those beyond it."""
    said = []
    for beyond, what in ((False, "What the paper claims"), (True, "What is expected beyond it")):
        counts = Counter(claim_of(e) for e in r.info.experiments.values() if _beyond(e) == beyond)
        told = ", ".join(f"{counts[v]} {_of_many(v, counts[v])}" for v in (*CLAIM_VERDICTS, NOT_RECORDED) if counts[v])
        said += [f"{what}, tested here: {told}."] if told else []
    return " ".join(said)


def _of_many(verdict: str, n: int) -> str:
    return verdict if n == 1 else {HOLDS: "hold", "does not hold": "do not hold"}.get(verdict, verdict)


def claim_of(e: dict[str, Any]) -> str:
    """The verdict on the claim of an experiment."""
    return str(e.get("claim") or NOT_RECORDED)


def _line(r: Reproduction, name: str, e: dict[str, Any]) -> str:
    rows = r.reproduced[r.reproduced["experiment"] == name]
    verdict, reason = str(e.get("verdict")), visible(str(e.get("reason") or "")).rstrip(".")
    here = findings_in_words(rows)
    parts = [
        f"{visible(name)}, {visible(e.get('title'))} ({visible(e.get('section'))}).",
        f"{'Expected' if _beyond(e) else 'Paper'}: {visible(e.get('says'))}",
    ]
    if here:
        parts.append(f"Here: {here}.")
    parts.append(f"[{visible(verdict)}{f': {reason}' if reason else ''}]")
    parts.append(f"[claim {claim_in_words(r, name)}]")
    return " ".join(parts)


def claim_in_words(r: Reproduction, name: str) -> str:
    """The verdict on a claim, with the parts that decide it: all where it holds, else those that do not."""
    e = r.info.experiments[name]
    verdict, said_already = claim_of(e), str(e.get("reason") or "")
    rows = r.claims[(r.claims["experiment"] == name) & (r.claims["verdict"] == verdict)]
    rows = rows[(rows["part"] != "") | (rows["reason"] != said_already)]
    told = [x for _, row in rows.head(MOST_SAID).iterrows() if (x := _tested(row))]
    left = len(rows) - min(len(rows), MOST_SAID)
    said = "; ".join(told) + (f"; and {left} more" if left > 0 else "")
    return f"{visible(verdict)}{f': {said}' if said else ''}"


def _tested(row: pd.Series) -> str:
    """One part: the number with its interval, the bound, how many it is over, and why it cannot be told."""
    why = visible(row["reason"]).rstrip(".") if row["verdict"] == UNTOLD else ""
    if pd.isna(row["value"]):
        n = f" ({counted_of(row)})" if row["n"] and not why else ""
        return ": ".join(x for x in (f"{visible(row['part'])}{n}", why) if x)
    unit = "" if row["unit"] in UNSAID else f" {visible(row['unit'])}"
    exact = row["low"] == row["high"] or pd.isna(row["low"])
    around = "" if exact else f"{number(row['low'])} to {number(row['high'])}"
    inside = "; ".join(x for x in (around, visible(row["bound"]), counted_of(row)) if x)
    return f"{visible(row['part'])} {number(row['value'])}{unit} ({inside})" + (f": {why}" if why else "")


def counted_of(row: pd.Series) -> str:
    """'32 sequences'."""
    of = visible(row["of"])
    return f"{row['n']:,} {of if row['n'] != 1 else of.removesuffix('s')}" if row["n"] else ""


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


CLAIMED = ("experiment", "part", "stack", "value", "low", "high", "unit", "bound", "n", "of", "n_needed", "verdict",
           "reason")  # fmt: skip


def section(r: Reproduction) -> Section:
    """The experiments of Sun 2024 on this model, beside what was published of it."""
    columns = ("experiment", "quantity", "stack", "layer", "place", "unit", "ours", "ours_text", "published",
               "published_text", "tag", "source", "verdict", "reason")  # fmt: skip
    return Section("paper", "The founding paper, redone", parts_of(
        Words(reproduction_in_words(r)),
        _beside(r),
        table_of("claims", r.claims, "What the paper claims, tested", CLAIMED, shown_first=True),
        table_of("reproduced", _compared(r), "Beside published values", columns, shown_first=True),
        table_of("reproduced", r.reproduced[r.reproduced["headline"]], "What the lines say", columns, most=400),
    ))  # fmt: skip


def _beside(r: Reproduction) -> Panel | None:
    """What was found over what was published, on the diagonal where both are the same."""
    rows, lines = _compared(r), []
    sizes = {side: np.abs(column(rows, side)) for side in ("published", "ours")}
    drawn = (sizes["published"] > 0) & (sizes["ours"] > 0)
    if not drawn.any():
        return None
    axis = log_axis(np.concatenate([values[drawn] for values in sizes.values()]))
    for verdict, color, symbol in ((AGREES, Color.BLUE, "circle"), (DIFFERS, Color.ORANGE, "square")):
        at = drawn & (rows["verdict"] == verdict).to_numpy()
        said = [f"{e}: {visible(q)}" for e, q in zip(rows["experiment"][at], rows["quantity"][at], strict=True)]
        lines += [Line(sizes["published"][at], sizes["ours"][at], verdict, color, symbol, "", said=said)] * bool(
            at.any()
        )
    ends = axis.limits
    lines.append(Line(ends, ends, "the same", Color.MUTED, "", "dash"))
    caption = "Every value of which one was published, by size; a value of zero has no place here."
    return Panel("Found and published", lines, replace(axis, title="Published"), replace(axis, title="Here"), caption)


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
    tested = [
        [str(row["experiment"]), visible(row["part"]), or_dash(row["value"]),
         "" if pd.isna(row["low"]) else f"{number(row['low'])} to {number(row['high'])}", visible(row["bound"]),
         counted_of(row), visible(row["verdict"])]
        for _, row in r.claims[r.claims["part"] != ""].iterrows()
    ]  # fmt: skip
    claims = grid("What the paper claims, tested", ("<", "<part", ">here", ">95% interval", "<bound", "<of", "<claim"),
                  tested)  # fmt: skip
    return [Section("paper", "", parts_of(grid("Beside published values", heads, rows), claims))]


READING = Reading(reproduction_in_words, (section,), brief)
