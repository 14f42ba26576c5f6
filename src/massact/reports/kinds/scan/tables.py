"""The small tables of a scan, stack by stack: layers, clusters, ranks, near misses."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from massact.records.clusters import HUMP, OUTLIER
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.by_input import small_by_input
from massact.reports.kinds.scan.criteria import small
from massact.reports.kinds.scan.portrait import nouns
from massact.reports.kinds.scan.rises import mixed_ways, rises
from massact.reports.kinds.scan.sections import ranks_of
from massact.reports.kinds.scan.streams import sets_of, side_by_side, title_of
from massact.reports.kinds.scan.views import Rule, StackView, rule_of, views
from massact.reports.parts import Section, Table, grid, narrow, parts_of
from massact.reports.spelling import ROUNDING, cell, or_dash, percent, quoted, real, token_list, visible

RANKS = {
    "rank": "rank",
    "magnitude": "|h|",
    "value_mean": "signed value",
    "value_std": "std",
    "same_dim": "share at the\nsame dim",
    "n_sequences": "sequences",
}
MOST_LAYERS, MOST_CLUSTERS, MOST_NEAR_MISSES = 38, 16, 5


def brief(scan: ScanResult) -> list[Section]:
    """A section of small tables for each stack; of several streams for one, and what all have side by side."""
    of = nouns(scan).the()
    if of == "the prompt" and (tokens := scan.portrait.get("tokens")) is not None:
        of += f" {quoted(''.join(map(str, tokens)), 40)}"
    rule, made = rule_of(scan), []
    stacks = views(scan)
    sets = sets_of(scan, stacks)
    other = {v.label for streams in sets for v in streams.others}
    for view in (v for v in stacks if v.label not in other):
        tables = (
            _layers(view),
            small_by_input(scan, view),
            _clusters(view, rule),
            rises(view, scan.rises),
            *_ranks(view, of),
            _near_misses(view, rule),
            small(scan, view),
        )
        made.append(Section("stack", view.label, parts_of(*tables)))
    for streams in sets:
        made.append(Section("streams", title_of(streams), parts_of(*side_by_side(streams, scan.criteria))))
    return made


def _layers(view: StackView) -> Table | None:
    """Fig. 4 of Sun 2024 in numbers."""
    rows, looks, previous = [], [], -1
    mixed = ("mixer",) * mixed_ways(view.layers)
    tops = ("top1",) if mixed else ("top1", "top2", "top3")  # of both kinds there is no room in 80 columns
    for i in kept_rows(view):
        if i > previous + 1:
            between = int(view.layers["n_findings"][previous + 1 : i].sum())
            rows.append(["", "...", *[""] * len(mixed), *[""] * (3 + len(tops)), f"{between:,}"])
            looks.append("dim")
        row, previous = view.layers.iloc[i], i
        values = [cell(row[c]) for c in (*tops, "median", "ratio", "headroom_fp16")]
        mark = _mark(int(row["layer"]), view.span, view.peak_layer)
        rows.append(
            [mark, str(row["layer"]), *(visible(row[c]) for c in mixed), *values, f"{int(row['n_findings']):,}"]
        )
        overflows = row["headroom_fp16"] < 1 or row["nonfinite"] > 0
        looks.append("red" if overflows else "" if row["n_findings"] else "dim")
    mean, of = (f", mean over {view.n_sequences:,} sequences", " of all") if view.n_sequences > 1 else ("", "")
    columns = f"ratio: top 1 / median; fp16 headroom: 65,504 / the largest |h|{of}"
    heads = (
        "<",
        "layer",
        *(f"<{c}" for c in mixed),
        *(c.replace("top", "top ") for c in tops),
        "median",
        "ratio",
        "fp16\nheadroom",
        "findings",
    )
    columns += "; top 2 and 3 are in layers.parquet" * bool(mixed)
    return grid(f"Largest and median |h| of each layer{mean} ({columns})", heads, rows, looks)


def _mark(layer: int, span: tuple[int, int] | None, peak: int | None) -> str:
    """Where a layer is between onset and offset."""
    if span is None or not span[0] <= layer <= span[1]:
        return ""
    if layer in span:
        return "only" if span[0] == span[1] else "onset" if layer == span[0] else "offset"
    return "peak" if layer == peak else "|"


def kept_rows(view: StackView) -> list[int]:
    """Rows of the layers table to print: all; of deep models the ends and what is near onset and offset."""
    n, numbers = len(view.layers), [int(x) for x in view.layers["layer"]]
    if n <= MOST_LAYERS + 2:
        return list(range(n))
    wanted = [x for x in (*(view.span or ()), view.peak_layer, view.shown_layer) if x is not None]
    marked = [numbers.index(x) for x in wanted if x in numbers]
    # In order of importance: the marked rows, both ends, their neighbours ever further away.
    order = [*marked, 0, n - 1]
    for distance in range(1, n):
        order += [i + side * distance for i in dict.fromkeys([*marked, 0, n - 1]) for side in (-1, 1)]
    kept: set[int] = set()
    for i in order:
        if 0 <= i < n and len(kept) < MOST_LAYERS - 4:  # at most five gaps, one row each
            kept.add(i)
    return sorted(kept)


def _clusters(view: StackView, rule: Rule) -> Table | None:
    """What there is, where, and how constant (Sun 2024, section 2.2 and Table 2)."""
    rows = view.clusters
    if rule.kind != "element":  # whole tokens and dims have one label, that of the rule
        rows = rows.assign(label=rows["label"].where(rows["label"] == HUMP, OUTLIER))
    more = f", the first {MOST_CLUSTERS} of {len(rows):,}" if len(rows) > MOST_CLUSTERS else ""
    title = f"Clusters, the largest first{more} (share: of the sequences; each at its peak layer)"
    heads = ("<what", "dim", "<class", "layers", "peak", ">mean ± std", "ratio", "share", "found", "<tokens")
    return grid(title, heads, [_cluster(row) for _, row in rows.head(MOST_CLUSTERS).iterrows()])


def _cluster(row: pd.Series) -> list[str]:
    tokens = token_list(row["tokens"])
    named = ", ".join(quoted(t, 12) for t in tokens[:2])
    left = int(row["n_tokens"]) - min(len(tokens), 2)
    spread = f" ± {cell(row['std'])}" if row["spread"] > ROUNDING else ""
    return [
        visible(row["label"]).partition(" ")[0],
        _index(row["dim"]),
        "-" if math.isnan(real(row["share"])) else visible(row["position_class"]),
        "-".join(dict.fromkeys(str(int(row[name])) for name in ("onset", "offset"))),
        str(int(row["peak_layer"])),
        f"{cell(row['mean'])}{spread}",
        or_dash(row["ratio"]),
        "-" if math.isnan(real(row["share"])) else percent(row["share"]),
        f"{int(row['n_findings']):,}",
        named + (f", {left:,} more" if left > 0 and named else ""),
    ]  # fmt: skip


def _index(value: Any) -> str:
    """-1 stands for 'has none' in the tables."""
    return str(int(value)) if int(value) >= 0 else "-"


def _ranks(view: StackView, of: str) -> list[Table | None]:
    """Tables 1 and 2 of Sun 2024; of the second also the share of sequences whose value sits at the same dim (E8)."""
    return [
        narrow(
            ranks_of(view, "prompt", of), f"Ranks of |h| in the hidden state of {of}, layer {view.shown_layer}", RANKS
        ),
        narrow(
            ranks_of(view, "corpus", of),
            f"Ranks of |h| over the sequences of the corpus, layer {view.shown_layer}",
            {**RANKS, "magnitude": "mean |h|", "value_mean": "mean value"},
        ),
    ]


def _near_misses(view: StackView, rule: Rule) -> Table | None:
    """The activations that come nearest to the criterion without passing."""
    near = view.near_misses
    rows = [
        [
            str(row["layer"]),
            *(_index(row[c]) for c in ("sequence", "pos", "dim")),
            visible(row["position_class"]),
            cell(row["value"]),
            cell(row["ratio"]),
            ", ".join(rule.failed(row["magnitude"], row["ratio"])) or "-",
            quoted(row["token"], 20),  # all of 'frame 10.56-10.58 s'
        ]
        for _, row in near.head(MOST_NEAR_MISSES).iterrows()
    ]
    order = "largest |h|" if near["ratio"].isna().all() else "highest ratio (|h| / median)"
    heads = ("layer", "sequence", "pos", "dim", "<class", "value", "ratio", "<fails on", "<token")
    return grid(f"Near misses: {len(rows)} of {len(near):,}, the {order} first", heads, rows)
