"""Clusters: what massive activations, outlier features and humps a model has, as groups of what a scan lists.

A cluster is one dim on one class of tokens (start, delimiter, padding, other), from its onset to its offset. Everything
that speaks of "the" massive activation of a model means the first of these, never the layer where a maximum lies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from massact.records.tables import Columns, frame

MASSIVE, OUTLIER, HUMP = "massive activation", "outlier feature", "hump"
LABELS = (MASSIVE, OUTLIER, HUMP)
KEYS = ["stack", "site", "dim", "position_class"]

HALF = 0.5  # of the sequences of the layer that has most (fewer: not the onset), of the tokens of a cluster
PERSISTS = 1 / 3  # of the greatest mean |h|: below it the value is another one
# An outlier feature is on most tokens of a sequence; where it is on fewer, on more of them than published for either.
MOST_TOKENS, OF_TOKENS, FEW = 0.5, 0.06, 8  # Dettmers 2022: at least 6 % of the tokens; Sun 2024 found at most 8
TENFOLD = 10.0  # a class that is so much larger than the rest of its dim is a phenomenon of its own

COLUMNS: Columns = {
    "stack": ("string", "name of the stack"),
    "site": ("string", "point of the hidden state"),
    "cluster": ("int64", "its place in that stack: massive activations first, then outlier features, then humps; of "
                "each the greatest mean |h| first"),
    "label": ("string", "massive activation (few tokens), outlier feature (many tokens of a sequence), hump (near the "
              "threshold: most of it does not pass)"),
    "dim": ("int64", "coordinate of the residual stream; -1 for criteria of whole tokens"),
    "position_class": ("string", "start, delimiter, padding or other"),
    "onset": ("int64", "first layer where it passes in half as many sequences as where it passes in most; of a hump: "
              "where it is near"),
    "offset": ("int64", "last such layer"),
    "first": ("int64", "first layer with any finding or near miss of the cluster"),
    "last": ("int64", "last layer at which its mean |h| is a third of the greatest or more, passing or not"),
    "peak_layer": ("int64", "of the layers where most sequences have it, the one of its greatest mean |h|; what "
                   "follows is of that layer"),
    "mean": ("float64", "mean signed value of its findings and near misses"),
    "std": ("float64", "its standard deviation over them"),
    "spread": ("float64", "std / |mean|: how far from constant"),
    "max": ("float64", "greatest |h|"),
    "ratio": ("float64", "mean of |h| / median"),
    "share": ("float64", "share of the sequences with at least one; NaN for criteria of whole dims or layers"),
    "per_sequence": ("float64", "tokens of a sequence that have it, mean over all sequences"),
    "token_share": ("float64", "tokens that have that dim large, of any class, over all tokens; NaN: not known"),
    "n_findings": ("int64", "entries that pass the criterion, all its layers"),
    "n_near": ("int64", "entries that reach half of every threshold, all its layers"),
    "n_tokens": ("int64", "different token strings"),
    "tokens": ("string", "most frequent token strings, as a JSON list"),
    "positions": ("string", "most frequent positions with their counts, as a JSON list of pairs"),
}  # fmt: skip


def keys_of(clusters: pd.DataFrame) -> pd.Series:
    """How clusters are called on a command line: 507@start."""
    return clusters["dim"].astype(str) + "@" + clusters["position_class"]


def clusters_table(
    findings: pd.DataFrame,
    near_misses: pd.DataFrame | None = None,
    *,
    n_sequences: int | None = None,
    n_tokens: Mapping[str, float] | None = None,
    kept: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The clusters of a scan, the largest first.

    Args:
        findings, near_misses: tables of a scan.
        n_sequences: that were scanned; None: as many as the findings tell of.
        n_tokens: of each stack, tokens of a sequence that count, mean over sequences; unknown where missing.
        kept: further entries whose values are known (stack, site, layer, sequence, pos, dim, magnitude), for how long a
            value persists after it no longer passes.
    """
    parts = [t.assign(passes=ok) for t, ok in ((findings, True), (near_misses, False)) if t is not None and len(t)]
    if not parts:
        return frame("clusters")
    rows = pd.concat(parts, ignore_index=True)
    n = int(n_sequences or rows["sequence"].max() + 1 or 1)
    at = rows.drop_duplicates(["stack", "site", "layer", "dim", "sequence", "pos"])
    on_dim = at.groupby(["stack", "site", "layer", "dim"]).agg(tokens=("pos", "size"), total=("magnitude", "sum"))
    held = _held(rows, kept)
    found: list[dict[str, Any]] = []
    for key, mine in rows.groupby(KEYS, sort=True):
        place = dict(zip(KEYS, key, strict=True))
        for part, hump in _parts(mine):
            one = place | _cluster(part, hump, n, held[key])
            dim_rows = on_dim.loc[(place["stack"], place["site"], one["peak_layer"], place["dim"])]
            width = (n_tokens or {}).get(str(place["stack"]), math.nan)
            found.append(one | _label(one, hump, dim_rows, n, width))
    made = pd.DataFrame(found)
    made = made.assign(order=made["label"].map(LABELS.index), size=made["mean"].abs())
    made = made.sort_values(["stack", "site", "order", "size"], ascending=[True, True, True, False], kind="stable")
    made["cluster"] = made.groupby(["stack", "site"]).cumcount() + 1
    return frame("clusters", made.reset_index(drop=True))


def _held(rows: pd.DataFrame, kept: pd.DataFrame | None) -> dict[tuple[Any, ...], pd.DataFrame]:
    """Of each cluster's tokens the |h| at every layer where it is known: (stack, site, dim, class) -> rows."""
    at = ["stack", "site", "dim", "sequence", "pos"]
    known = rows if kept is None else pd.concat([rows, kept], ignore_index=True)
    known = known[[*at, "layer", "magnitude"]].drop_duplicates([*at, "layer"])
    classes = rows[[*at, "position_class"]].drop_duplicates(at)
    return dict(iter(known.merge(classes, on=at).groupby(KEYS, sort=False)))


def _parts(rows: pd.DataFrame) -> list[tuple[pd.DataFrame, bool]]:
    """The rows of one dim and class by what they are: those of the value that passes, and a hump beside it.

    Returns:
        (rows, whether most of it does not pass), at most two.
    """
    by_layer = rows.groupby("layer")
    size, having = by_layer.magnitude.mean(), by_layer.sequence.nunique()
    passing = rows[rows.passes].groupby("layer").sequence.nunique().reindex(size.index, fill_value=0)
    most = int(passing.max())
    if most == 0 or most < HALF * having[passing.idxmax()]:
        return [(rows, True)]
    strong = passing[passing >= HALF * most].index
    inside = (size.index >= strong.min()) & (size.index <= strong.max())
    mine = rows.layer.isin(size.index[inside | (size >= PERSISTS * size[strong].max())])
    return [(rows[mine], False)] + [(rows[~mine], True)] * bool((~mine).any())


def _cluster(rows: pd.DataFrame, hump: bool, n: int, known: pd.DataFrame) -> dict[str, Any]:
    """Layers, size, constancy and places of one cluster."""
    counted = rows if hump else rows[rows.passes]
    having = counted.groupby("layer").sequence.nunique()
    layers = having[having >= HALF * having.max()].index
    sizes = rows.groupby("layer").magnitude.mean()
    peak = int(sizes[having.index[having == having.max()]].idxmax())  # where few have it, it is of the largest ones
    here = rows[rows.layer == peak]
    tokens = here.drop_duplicates(["sequence", "pos"])
    mean, std = float(here.value.mean()), float(here.value.std(ddof=0))
    strings, positions = tokens.token.value_counts(), tokens.pos.value_counts()
    return {
        "onset": int(layers.min()), "offset": int(layers.max()), "first": int(rows.layer.min()),
        "last": max(int(layers.max()), _persists(known, tokens, peak, float(sizes[peak]))), "peak_layer": peak,
        "mean": mean, "std": std, "spread": std / abs(mean) if mean else math.inf,
        "max": float(rows.magnitude.max()), "ratio": float(here.ratio.mean()),
        "share": here.sequence.nunique() / n if (here.sequence >= 0).all() else math.nan,
        "per_sequence": len(tokens) / n,
        "n_findings": int(rows.passes.sum()), "n_near": int((~rows.passes).sum()), "n_tokens": len(strings),
        "tokens": json.dumps([str(t) for t in strings.index[:8]], ensure_ascii=False),
        "positions": json.dumps([[int(p), int(k)] for p, k in positions.iloc[:8].items()]),
    }  # fmt: skip


def _persists(known: pd.DataFrame, tokens: pd.DataFrame, peak: int, size: float) -> int:
    """The last layer behind the peak, without a gap, at which these tokens still have a third of the greatest |h|.

    A layer counts where the value of at least half of the tokens is known there: it is kept only if it is among the
    greatest of its hidden state.
    """
    mine = known.merge(tokens[["sequence", "pos"]], on=["sequence", "pos"])
    by_layer = mine[mine.layer >= peak].groupby("layer").magnitude.agg(["size", "mean"])
    last = peak
    for layer, row in by_layer.iterrows():
        if layer > last + 1 or row["size"] < HALF * len(tokens) or row["mean"] < PERSISTS * size:
            break
        last = int(layer)
    return last


def _label(one: dict[str, Any], hump: bool, on_dim: pd.Series, n: int, width: float) -> dict[str, Any]:
    """Its label, by how many tokens have that dim large at the peak layer.

    Args:
        on_dim: of that dim at that layer, over all classes: entries, and the sum of their |h|.
        width: tokens of a sequence; NaN where not known.
    """
    share = float(on_dim.tokens) / n / width
    mine = one["per_sequence"] * n
    rest, total = float(on_dim.tokens) - mine, float(on_dim.total) - mine * abs(one["mean"])
    alone = rest <= 0 or abs(one["mean"]) >= TENFOLD * total / rest
    many = _many(mine / n if alone else float(on_dim.tokens) / n, width)
    return {"label": HUMP if hump else OUTLIER if many else MASSIVE, "token_share": share}


def _many(per_sequence: float, width: float) -> bool:
    """Whether so many tokens of a sequence are most of it, or more than massive activations were ever found on."""
    share = per_sequence / width
    return (per_sequence > 2 and share >= MOST_TOKENS) or (per_sequence > FEW and not share < OF_TOKENS)
