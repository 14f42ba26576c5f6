"""A comparison of runs in a terminal: words, a row for each run, and the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from massact.records.kinds.comparison import Comparison
from massact.reports.kinds.comparison.table import EXPLAINED, SCANNED, TRAINED, differing
from massact.reports.kinds.scan.views import StackView, census, views
from massact.reports.render.terminal import _framed, _plain, _Section, _table
from massact.reports.spelling import cell, listed, number, percent, quoted, shortened, visible

LONGEST_NAME = 28
MOST_PLACES = 4  # dims, tokens and positions that are named in one cell
WIDTH_OF_A_RUN = 36  # of its four columns of the table of layers
_HEADS = {
    "steps": "steps", "tokens": "tokens", "train_loss": "train\nloss", "eval_loss": "held-out\nloss",
    "perplexity": "perplexity", "massive": "massive", "onset": "onset\nlayer", "max": "max\n|h|",
    "ratio": "largest\nratio", "sink_rate": "sink\nrate", "mass_first": "on\npos. 0", "slot_mass": "slot\nmass",
    "value_norm_first": "value\nnorm",
}  # fmt: skip
_HAS = {**dict.fromkeys(TRAINED, "trained"), **dict.fromkeys(SCANNED, "scanned"),
        **dict.fromkeys(EXPLAINED, "explained")}  # fmt: skip


# What the columns of attention are, of runs that have them.
ATTENTION = ("; attention, means over heads: sink rate (alpha_0 > eps), share on position 0 and on a learned slot, "
             "value norm of position 0 over the others")  # fmt: skip


def comparison_in_words(c: Comparison) -> list[str]:
    """A sentence or two on each run, then what differs between them."""
    rows = c.compare[c.compare["row"] == "run"]
    known = rows[rows["scanned"]]
    with_, without = (list(known.loc[known["massive"] == x, "label"]) for x in (1.0, 0.0))
    words = [_verdict(with_, without)]
    words += [_sentence(row) for _, row in rows.iterrows()]
    for name in c.groups:
        words.append(_group_sentence(name, c.compare[c.compare["label"] == name].set_index("row")))
    differs = differing(c.runs)
    if differs:
        words.append(f"The trainings differ in {listed(differs)}.")
    elif sum(run.training is not None for run in c.runs) > 1:
        words.append("The trainings have the same configuration.")
    return words


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
    elif row["massive"]:
        onset = f", first at layer {int(row['onset'])}" if not math.isnan(row["onset"]) else ""
        parts.append(f"massive activations{onset}, {_sizes(row)}")
    else:
        parts.append(f"nothing massive, {_sizes(row)}")
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


def show_comparison(c: Comparison, console: Console) -> None:
    """Print a comparison in words, then its tables.

    Args:
        c: fresh.
        console: where to; colours and width are its own. Nothing in a run is read as markup.
    """
    console.print(_framed(comparison_in_words(c), console.encoding, "comparison"))  # names are escaped already
    for note in c.notes:
        console.print(_plain(note, console.encoding, "dim"))
    runs = c.compare[c.compare["row"] == "run"]
    rules = list(dict.fromkeys(x for x in runs["criterion"] if x))
    of = f" (massive by {visible(rules[0], console.encoding)})" if len(rules) == 1 else ""
    if runs["trained"].any():
        console.print()
        console.print(_Section("Training; losses in nats", _rows(runs, TRAINED, ("variant",), console.encoding)))
    console.print()
    extra = ("criterion",) if len(rules) > 1 else ()
    told = ATTENTION if runs["explained"].any() else ""
    table = _rows(runs, (*SCANNED, *EXPLAINED), extra, console.encoding)
    console.print(_Section(f"Activations and attention{of}; ratio: |h| / median{told}", table))
    groups = c.compare[c.compare["row"] == "mean"]
    if len(groups):
        console.print()
        console.print(_Section("Over seeds: mean, and (least to greatest)", _seeds(c, console.encoding)))
    if any(run.scan is not None for run in c.runs):
        console.print()
        console.print(_Section("Where the findings are, at the layer of the largest", _places(c, console.encoding)))
    _show_layers(c, console)


def _places(c: Comparison, encoding: str) -> Any:
    """A row for each run and stack: dims, tokens and positions of its findings, each token counted once."""
    heads = ("dims", "tokens", "positions")
    table = _table("run", "layer", "findings", *heads, left=("run", *heads), folding=("run", *heads))
    for run in c.runs:
        for view in views(run.scan) if run.scan is not None else []:
            name = shortened(visible(f"{run.label} {view.label}".strip(), encoding), LONGEST_NAME)
            table.add_row(Text(name), *map(Text, places_of(view, encoding)))
    return table


def places_of(view: StackView, encoding: str = "utf-8") -> tuple[str, str, str, str, str]:
    """Layer of the largest finding, findings there, and their dims, tokens and positions, the most frequent first."""
    here = view.findings[view.findings["layer"] == view.peak_layer]
    if not len(here):
        return "-", "0", "-", "-", "-"
    once = here.drop_duplicates(["sequence", "pos"])
    dims, positions = (t[t >= 0].value_counts() for t in (here["dim"], once["pos"]))
    tokens = [f"{quoted(t, 16, encoding)} ({n:,})" for (t, _), n in census(here).items()]
    return (
        str(view.peak_layer), f"{len(here):,}", listed([str(d) for d in dims.index], MOST_PLACES),
        listed(tokens, MOST_PLACES), listed([f"{p} ({n:,})" for p, n in positions.items()], MOST_PLACES),
    )  # fmt: skip


def _rows(runs: pd.DataFrame, columns: Sequence[str], words: Sequence[str], encoding: str) -> Any:
    table = _table("run", *words, *(_HEADS[c] for c in columns), left=("run", *words), folding=("run", *words))
    for _, row in runs.iterrows():
        name = shortened(visible(row["label"], encoding), LONGEST_NAME)
        said = [Text(visible(row[w], encoding) or "-") for w in words]
        table.add_row(Text(name), *said, *(shown(row, c) for c in columns))
    return table


def _seeds(c: Comparison, encoding: str) -> Any:
    """A column for each group, since a range takes room."""
    names = {name: shortened(visible(name, encoding), LONGEST_NAME) for name in c.groups}
    table = _table("", *names.values(), left=("",), folding=tuple(names.values()))
    rows = {name: c.compare[c.compare["label"] == name].set_index("row", drop=False) for name in c.groups}
    for column in ("train_loss", "eval_loss", "perplexity", *SCANNED, *EXPLAINED):
        cells = []
        for name in c.groups:
            mean, low, high = (rows[name].loc[kind] for kind in ("mean", "min", "max"))
            middle = shown(mean, column)
            plain = middle in ("-", "none") or column == "massive"
            cells.append(middle if plain else f"{middle} ({shown(low, column)} to {shown(high, column)})")
        table.add_row(_HEADS[column].replace("\n", " "), *map(Text, cells))
    return table


def _show_layers(c: Comparison, console: Console) -> None:
    """Fig. 10 in numbers: as many runs beside each other as the terminal has room for."""
    layers = c.compare_layers[c.compare_layers["row"] == "run"]
    for (stack, site), part in layers.groupby(["stack", "site"], sort=False):
        labels = list(dict.fromkeys(part["label"]))
        room = max(1, (console.width - 7) // WIDTH_OF_A_RUN)
        for start in range(0, len(labels), room):
            chosen = labels[start : start + room]
            heads = [f"{shortened(visible(n, console.encoding), 10) if not i else ''}\n{what}" for n in chosen
                     for i, what in enumerate(("top 1", "top 2", "top 3", "median"))]  # fmt: skip
            table = _table("layer", *heads)
            by = {n: part[part["label"] == n].set_index("layer") for n in chosen}
            for layer in sorted({x for rows in by.values() for x in rows.index}):
                cells = [cell(rows.at[layer, k]) if layer in rows.index else "-" for rows in by.values()
                         for k in ("top1", "top2", "top3", "median")]  # fmt: skip
                table.add_row(str(layer), *cells)
            where = ", ".join(visible(x, console.encoding) for x in (stack, site) if x and x != "resid_post")
            name = "Largest and median |h| of each layer, mean over sequences"
            console.print()
            console.print(_Section(f"{name}{f' ({where})' if where else ''}", table))
