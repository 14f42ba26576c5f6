"""The small tables of a comparison: a row for each run, seeds, where findings are, and the layers of runs abreast."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.kinds.comparison import Comparison
from massact.records.tables import columns_of
from massact.reports.kinds.comparison.table import EXPLAINED, SCANNED, TRAINED
from massact.reports.kinds.comparison.words import shown
from massact.reports.kinds.scan.views import views
from massact.reports.parts import UNAVAILABLE, Column, Section, Table, grid, narrow, parts_of
from massact.reports.spelling import cell, listed, percent, quoted, shortened, token_list, visible

LONGEST_NAME = 28
MOST_PLACES, MOST_CLUSTERS = 4, 4  # tokens that are named in one cell, clusters of a run
HEADS = {
    "label": "run",
    "variant": "variant",
    "criterion": "criterion",
    "steps": "steps",
    "tokens": "tokens",
    "train_loss": "train\nloss",
    "eval_loss": "held-out\nloss",
    "perplexity": "perplexity",
    "massive": "massive",
    "onset": "onset\nlayer",
    "max": "max\n|h|",
    "ratio": "largest\nratio",
    "sink_rate": "sink\nrate",
    "mass_first": "on\npos. 0",
    "slot_mass": "slot\nmass",
    "value_norm_first": "value\nnorm",
}
# What the columns of attention are, of runs that have them.
ATTENTION = (
    "; attention, means over heads: sink rate (alpha_0 > eps), share on position 0 and on a learned slot, "
    "median value norm of position 0 over the others"
)
DRAWN = {"top1": "top 1", "top2": "top 2", "top3": "top 3", "median": "median"}


def brief(c: Comparison) -> list[Section]:
    """Trainings, activations and attention, seeds, places, layers."""
    runs = c.compare[c.compare["row"] == "run"]
    rules = list(dict.fromkeys(x for x in runs["criterion"] if x))
    of = f" (massive by {visible(rules[0])})" if len(rules) == 1 else ""
    told = ATTENTION if runs["explained"].any() else ""
    table = side_by_side(c, "run", "")
    models = ("label", *(["criterion"] if len(rules) > 1 else []), *SCANNED, *EXPLAINED)
    made = [
        narrow(table, f"Activations and attention{of}; ratio: |h| / median{told}", {n: HEADS[n] for n in models}),
        _seeds(c),
        narrow(places(c), "Clusters of each run, the largest first"),
        *_layers(c),
    ]
    if runs["trained"].any():
        trained = {n: HEADS[n] for n in ("label", "variant", *TRAINED)}
        made.insert(0, narrow(table, "Training; losses in nats", trained))
    return [Section("runs", "", parts_of(*made))]


def _name(label: str, limit: int = LONGEST_NAME) -> str:
    return shortened(visible(label), limit)


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


def side_by_side(c: Comparison, row: str, title: str) -> Table | None:
    """The numbers of every run, or of every group of runs; a note names what none of them has."""
    rows = c.compare[c.compare["row"] == row]
    if not len(rows):
        return None
    columns, missing = [], []
    trained = bool(rows["trained"].any())
    for name in ("label", "model", "variant", "criterion", *TRAINED, *SCANNED, *EXPLAINED):
        numeric, meaning = columns_of("compare")[name][0] != "string", columns_of("compare")[name][1]
        values = rows[name].tolist()
        said = [shown(r, name) for _, r in rows.iterrows()] if numeric else [visible(v) or UNAVAILABLE for v in values]
        said = [UNAVAILABLE if s == "-" else s for s in said]
        if set(said) == {UNAVAILABLE}:
            missing += [name] * (trained or name not in (*TRAINED, "variant"))
        else:
            columns.append(Column(name, meaning, values, said, numeric))
    notes = [f"Unavailable in all of them: {listed(missing)}."] if missing else []
    return Table(title, columns, len(rows), notes, True)


def places(c: Comparison) -> Table | None:
    """The largest clusters of every run and stack."""
    rows = [
        (visible(f"{run.label} {view.label}".strip()), *_cluster(row))
        for run in c.runs
        for view in (views(run.scan) if run.scan is not None else ())
        for _, row in view.clusters.head(MOST_CLUSTERS).iterrows()
    ]
    if not rows:
        return None
    heads = (
        ("run", "which"),
        ("what", "massive activation (few tokens), outlier feature (many tokens), hump (near the threshold)"),
        ("dim", "coordinate"),
        ("class", "of its tokens"),
        ("layers", "onset to offset"),
        ("value", "mean at its peak layer"),
        ("share", "of the sequences"),
        ("tokens", "the most frequent first"),
    )
    columns = [
        Column(name, meaning, list(cells), list(cells), False)
        for (name, meaning), cells in zip(heads, zip(*rows, strict=True), strict=True)
    ]
    return Table("Clusters of each run, the largest first", columns, len(rows), [], True)


def _cluster(row: pd.Series) -> tuple[str, ...]:
    tokens = token_list(row["tokens"])[:MOST_PLACES]
    left = int(row["n_tokens"]) - len(tokens)
    return (
        visible(row["label"]).partition(" ")[0],
        str(row["dim"]) if row["dim"] >= 0 else UNAVAILABLE,
        visible(row["position_class"]),
        "-".join(dict.fromkeys(str(int(row[name])) for name in ("onset", "offset"))),
        cell(row["mean"]),
        UNAVAILABLE if math.isnan(row["share"]) else percent(row["share"]),
        listed([quoted(t, 16) for t in tokens] + [f"{left:,} more"] * (left > 0)),
    )


def _layers(c: Comparison) -> list[Table | None]:
    """Fig. 10 in numbers: as many runs abreast as there is room for."""
    layers, made = c.compare_layers[c.compare_layers["row"] == "run"], []
    for (stack, site), part in layers.groupby(["stack", "site"], sort=False):
        by = {label: part[part["label"] == label].set_index("layer") for label in dict.fromkeys(part["label"])}
        heads = [f"={'' if i else _name(label, 10)}\n{head}" for label in by for i, head in enumerate(DRAWN.values())]
        rows = [
            [str(layer), *(cell(of.at[layer, c]) if layer in of.index else "-" for of in by.values() for c in DRAWN)]
            for layer in sorted({x for of in by.values() for x in of.index})
        ]
        where = ", ".join(visible(x) for x in (stack, site) if x and x != "resid_post")
        title = f"Largest and median |h| of each layer, mean over sequences{f' ({where})' if where else ''}"
        made.append(grid(title, ("layer", *heads), rows, abreast=len(DRAWN)))
    return made
