"""The small tables of a comparison: a row for each run, seeds, where findings are, and the layers of runs abreast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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
        deltas(c),
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


def deltas(c: Comparison) -> Table | None:
    """How every other run differs from the first: in its numbers, and in the value of each cluster that both have."""
    runs = c.compare[c.compare["row"] == "run"].to_dict("records")
    clusters = [_largest(run) for run in c.runs]
    rows: list[tuple[str, Sequence[float], bool]] = []
    for column in (*TRAINED, *SCANNED, *EXPLAINED):
        if column not in ("massive", "steps", "tokens"):
            rows.append((HEADS[column].replace("\n", " "), [run[column] for run in runs], column == "onset"))
    for stack, dim, where in list(clusters[0])[:MOST_CLUSTERS]:
        here = [of.get((stack, dim, where), math.nan) for of in clusters]
        rows.append((visible(f"{stack} dim {dim} at {where}".strip()), here, False))
    meaning = "what is compared; of a dim and class of tokens its largest cluster"
    return differences("Difference", [run["label"] for run in runs], rows, meaning)


def layer_deltas(c: Comparison) -> Table | None:
    """How the largest |h| of every layer differs from that of the first run, where all have the same layers."""
    rows = c.compare_layers[c.compare_layers["row"] == "run"].drop_duplicates(["label", "stack", "site", "layer"])
    labels = list(dict.fromkeys(rows["label"]))
    by = [rows[rows["label"] == label].set_index(["stack", "site", "layer"])["top1"] for label in labels]
    if len(by) < 2 or any(set(of.index) != set(by[0].index) for of in by):
        return None
    several = len({at[:2] for at in by[0].index}) > 1
    told = [
        (visible(f"{f'{stack} {site} '.lstrip() if several else ''}layer {layer}"), [of[at] for of in by], False)
        for at in by[0].index
        for stack, site, layer in [at]
    ]
    made = differences("Largest |h| of each layer: difference", labels, told, "the layer, mean over sequences")
    return replace(made, open=False) if made is not None else None


def differences(
    title: str, labels: Sequence[str], rows: Sequence[tuple[str, Sequence[float], bool]], meaning: str
) -> Table | None:
    """Values of several runs less those of the first, and in percent of its size; None where none are known.

    Args:
        labels: of the runs, R. meaning: what the rows are.
        rows: what each is of, its values (R), and whether they are whole numbers that name something: no percent.
    """
    made = [(of, [_delta(values[0], value) for value in values[1:]], whole) for of, values, whole in rows]
    made = [row for row in made if not all(math.isnan(change) for change, _ in row[1])]
    if not made or len(labels) < 2:
        return None
    first, names = _name(labels[0]), [_name(label) for label in labels[1:]]
    these = [of for of, _, _ in made]
    columns = [Column("of", meaning, these, these, False)]
    for i, name in enumerate(names):
        changes = [cells[i][0] for _, cells, _ in made]
        shares = [math.nan if whole else cells[i][1] for _, cells, whole in made]
        said = [_signed(x, whole) for x, (_, _, whole) in zip(changes, made, strict=True)]
        told = [UNAVAILABLE if math.isnan(x) else f"{x:+,.1f}%" for x in shares]
        columns.append(Column(name, f"how much greater it is than in {first}", changes, said, True))
        columns.append(Column(f"{name} (%)", f"the same in percent of the size in {first}", shares, told, True))
    return Table(f"{title} from {first}, and in percent of it", columns, len(made), [], True, abreast=2)


def _delta(one: float, other: float) -> tuple[float, float]:
    """How much greater the other is, and in percent of the size of the first; NaN where that is not known."""
    one, other = float(one), float(other)
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.nan, math.nan
    return other - one, 100 * (other - one) / abs(one) if one else math.nan


def _signed(change: float, whole: bool) -> str:
    if math.isnan(change):
        return UNAVAILABLE
    return f"{change:+,.0f}" if whole else ("+" if change >= 0 else "") + cell(change)


def _largest(run: Any) -> dict[tuple[str, int, str], float]:
    """Stack, dim and class of a run's clusters -> value of the largest of them; a hump before it has the same dim."""
    found: dict[tuple[str, int, str], float] = {}
    for view in _views(run):
        for _, row in view.clusters.iterrows():
            found.setdefault((view.label, row["dim"], row["position_class"]), row["mean"])
    return found


def _views(run: Any) -> Sequence[Any]:
    return views(run.scan) if run.scan is not None else ()


def places(c: Comparison) -> Table | None:
    """The largest clusters of every run and stack."""
    named = [
        (visible(f"{run.label} {view.label}".strip()), row)
        for run in c.runs
        for view in _views(run)
        for row in view.clusters.head(MOST_CLUSTERS).to_dict("records")
    ]
    if not named:
        return None
    rows, found = [(name, *_cluster(row)) for name, row in named], [row for _, row in named]
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
    exact = {name: [row[name] for row in found] for name in ("dim", "mean", "share")}
    exact["value"] = exact.pop("mean")
    columns = [
        Column(name, meaning, exact.get(name, list(cells)), list(cells), name in exact)
        for (name, meaning), cells in zip(heads, zip(*rows, strict=True), strict=True)
    ]
    return Table("Clusters of each run, the largest first", columns, len(rows), [], True)


def _cluster(row: Mapping[str, Any]) -> tuple[str, ...]:
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
