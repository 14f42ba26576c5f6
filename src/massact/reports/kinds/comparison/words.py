"""A comparison of runs in words, and how a number of a run is spelled."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.kinds.comparison import Comparison
from massact.reports.kinds.comparison.survival import survival_in_words
from massact.reports.kinds.comparison.table import EXPLAINED, SCANNED, TRAINED, differing
from massact.reports.spelling import cell, listed, number, percent, visible

_HAS = {**dict.fromkeys(TRAINED, "trained"), **dict.fromkeys(SCANNED, "scanned"),
        **dict.fromkeys(EXPLAINED, "explained")}  # fmt: skip


def comparison_in_words(c: Comparison) -> list[str]:
    """A sentence or two on each run, then what differs between them."""
    rows = c.compare[c.compare["row"] == "run"]
    known = rows[rows["scanned"]]
    with_, without = (list(known.loc[known["massive"] == x, "label"]) for x in (1.0, 0.0))
    words = [_verdict(with_, without)]
    words += [_sentence(row) for _, row in rows.iterrows()]
    for name in c.groups:
        words.append(_group_sentence(name, c.compare[c.compare["label"] == name].set_index("row")))
    words += survival_in_words(c.runs, c.survival)
    differs = differing(c.runs)
    if differs:
        words.append(f"The trainings differ in {listed(differs)}.")
    elif sum(run.training is not None for run in c.runs) > 1:
        words.append("The trainings have the same configuration.")
    return words


def told(c: Comparison) -> list[str]:
    """What differs, and what a reader must know before taking a difference for an effect."""
    return [*comparison_in_words(c), *(f"Note: {note}" for note in c.notes)]


def _verdict(with_: list[str], without: list[str]) -> str:
    names = {True: listed([visible(x) for x in with_]), False: listed([visible(x) for x in without])}
    if with_ and without:
        return f"Massive activations in {names[True]}; none in {names[False]}."
    if with_:
        return "Massive activations in all runs that were scanned."
    return "No massive activations in any run that was scanned." if without else "None of the runs was scanned."


def _sentence(row: pd.Series) -> str:
    name, parts = visible(row["label"]), []
    if row["trained"]:
        parts.append(f"attention {visible(row['variant']) or 'unknown'}, held-out loss {shown(row, 'eval_loss')} nats "
                     f"after {shown(row, 'steps')} steps")  # fmt: skip
    if not row["scanned"]:
        parts.append("not scanned")
    else:
        onset = f", first at layer {int(row['onset'])}" if not math.isnan(row["onset"]) else ""
        what = f"{visible(row['cluster'])}{onset}" if row["cluster"] else "nothing massive"
        parts.append(f"{what}, {_sizes(row)}")
    if row["explained"] and math.isnan(row["mass_first"]):
        parts.append("its attention was not seen")
    elif row["explained"]:
        slot = "" if math.isnan(row["slot_mass"]) else f" and {percent(row['slot_mass'])} on a learned slot"
        parts.append(f"heads put {percent(row['mass_first'])} of their attention on position 0{slot}")
    return f"{name}: {'; '.join(parts)}."


def _sizes(row: pd.Series) -> str:
    return f"max |h| {number(row['max'])}, largest ratio |h| / median {number(row['ratio'])}"


def _group_sentence(name: str, rows: pd.DataFrame) -> str:
    mean, low, high = rows.loc["mean"], rows.loc["min"], rows.loc["max"]
    text = f"{visible(name)}: mean held-out loss {shown(mean, 'eval_loss')} nats"
    text += f" ({shown(low, 'eval_loss')} to {shown(high, 'eval_loss')})"
    if mean["scanned"]:
        ratios = f"{number(low['ratio'])} to {number(high['ratio'])}"
        text += f"; largest ratio |h| / median {ratios}, massive in {_massive(mean)}"
    return text + "."


def _massive(mean: pd.Series) -> str:
    share, n = mean["massive"], int(mean["n_runs"])
    whole = round(share * n, 6)
    return f"{int(whole)} of {n}" if whole == int(whole) else percent(share)


def shown(row: pd.Series, column: str) -> str:
    """A number of a run as the table has it: '-' for what was not measured, never a zero."""
    value = float(row[column])
    if not row[_HAS[column]] or (math.isnan(value) and _lacks(row, column)):
        return "-"
    if column == "massive":
        return ("yes" if value else "no") if row["row"] == "run" else _massive(row)
    if column == "onset" and math.isnan(value):
        return "none"
    whole = column in ("steps", "tokens", "onset") and math.isfinite(value) and value == int(value)
    return f"{int(value):,}" if whole else cell(value)


def _lacks(row: pd.Series, column: str) -> bool:
    """Whether a NaN stands for what is not there, not for a measured value that is no number."""
    if column in TRAINED:  # a training that did not end has no losses, images no perplexity
        return math.isnan(row["steps"]) or (column == "perplexity" and not math.isnan(row["eval_loss"]))
    return column in EXPLAINED
