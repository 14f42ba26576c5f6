"""The small tables of a comparison: a row for each run, seeds, where findings are, and the layers of runs abreast."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from massact.records.kinds.comparison import Comparison
from massact.reports.kinds.comparison.table import EXPLAINED, SCANNED, TRAINED
from massact.reports.kinds.comparison.words import shown
from massact.reports.kinds.scan.views import StackView, census, views
from massact.reports.parts import Section, Table, grid, parts_of
from massact.reports.spelling import cell, listed, quoted, shortened, visible

LONGEST_NAME = 28
MOST_PLACES = 4  # dims, tokens and positions that are named in one cell
HEADS = {
    "steps": "steps", "tokens": "tokens", "train_loss": "train\nloss", "eval_loss": "held-out\nloss",
    "perplexity": "perplexity", "massive": "massive", "onset": "onset\nlayer", "max": "max\n|h|",
    "ratio": "largest\nratio", "sink_rate": "sink\nrate", "mass_first": "on\npos. 0", "slot_mass": "slot\nmass",
    "value_norm_first": "value\nnorm",
}  # fmt: skip
# What the columns of attention are, of runs that have them.
ATTENTION = ("; attention, means over heads: sink rate (alpha_0 > eps), share on position 0 and on a learned slot, "
             "value norm of position 0 over the others")  # fmt: skip
DRAWN = {"top1": "top 1", "top2": "top 2", "top3": "top 3", "median": "median"}


def brief(c: Comparison) -> list[Section]:
    """Trainings, activations and attention, seeds, places, layers."""
    runs = c.compare[c.compare["row"] == "run"]
    rules = list(dict.fromkeys(x for x in runs["criterion"] if x))
    of = f" (massive by {visible(rules[0])})" if len(rules) == 1 else ""
    made: list[Table | None] = []
    if runs["trained"].any():
        made.append(_rows("Training; losses in nats", runs, TRAINED, ("variant",)))
    told = ATTENTION if runs["explained"].any() else ""
    title = f"Activations and attention{of}; ratio: |h| / median{told}"
    made.append(_rows(title, runs, (*SCANNED, *EXPLAINED), ("criterion",) if len(rules) > 1 else ()))
    return [Section("runs", "", parts_of(*made, _seeds(c), _places(c), *_layers(c)))]


def _name(label: str, limit: int = LONGEST_NAME) -> str:
    return shortened(visible(label), limit)


def _rows(title: str, runs: pd.DataFrame, columns: Sequence[str], words: Sequence[str]) -> Table | None:
    rows = [
        [_name(row["label"]), *(visible(row[w]) or "-" for w in words), *(shown(row, c) for c in columns)]
        for _, row in runs.iterrows()
    ]
    return grid(title, ("<run", *(f"<{w}" for w in words), *(HEADS[c] for c in columns)), rows)


def _seeds(c: Comparison) -> Table | None:
    """A column for each group, since a range takes room."""
    by_name = {name: c.compare[c.compare["label"] == name].set_index("row", drop=False) for name in c.groups}
    rows = []
    for column in ("train_loss", "eval_loss", "perplexity", *SCANNED, *EXPLAINED):
        cells = []
        for group in by_name.values():
            mean, low, high = (shown(group.loc[kind], column) for kind in ("mean", "min", "max"))
            plain = mean in ("-", "none") or column == "massive"
            cells.append(mean if plain else f"{mean} ({low} to {high})")
        rows.append([HEADS[column].replace("\n", " "), *cells])
    heads = ("<", *(f">{_name(name)}" for name in by_name))
    return grid("Over seeds: mean, and (least to greatest)", heads, rows) if by_name else None


def _places(c: Comparison) -> Table | None:
    """A row for each run and stack: dims, tokens and positions of its findings, each token counted once."""
    rows = [
        [_name(f"{run.label} {view.label}".strip()), *places_of(view)]
        for run in c.runs
        if run.scan is not None
        for view in views(run.scan)
    ]
    heads = ("<run", "layer", "findings", "<dims", "<tokens", "<positions")
    return grid("Where the findings are, at the layer of the largest", heads, rows)


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


def _layers(c: Comparison) -> list[Table | None]:
    """Fig. 10 in numbers: as many runs abreast as there is room for."""
    layers, made = c.compare_layers[c.compare_layers["row"] == "run"], []
    for (stack, site), part in layers.groupby(["stack", "site"], sort=False):
        by = {label: part[part["label"] == label].set_index("layer") for label in dict.fromkeys(part["label"])}
        heads = [
            f"={'' if i else _name(label, 10)}\n{head}" for label in by for i, head in enumerate(DRAWN.values())
        ]
        rows = [
            [str(layer), *(cell(of.at[layer, c]) if layer in of.index else "-" for of in by.values() for c in DRAWN)]
            for layer in sorted({x for of in by.values() for x in of.index})
        ]
        where = ", ".join(visible(x) for x in (stack, site) if x and x != "resid_post")
        title = f"Largest and median |h| of each layer, mean over sequences{f' ({where})' if where else ''}"
        made.append(grid(title, ("layer", *heads), rows, abreast=len(DRAWN)))
    return made
