"""Clusters: what massive activations, outlier features and humps a model has, as groups of what a scan lists.

A cluster is one dim on one class of tokens (start, delimiter, padding, other), from its onset to its offset. Everything
that speaks of "the" massive activation of a model means the first of these, never the layer where a maximum lies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from massact.records.tables import Columns, frame

MASSIVE, OUTLIER, HUMP = "massive activation", "outlier feature", "hump"
LABELS = (MASSIVE, OUTLIER, HUMP)
KEYS = ["stack", "site", "dim", "position_class"]

HALF = 0.5  # of the sequences of the layer that has most (fewer: not the onset), of the tokens of a cluster
PERSISTS = 1 / 3  # of the greatest mean |h|: below it the value is another one
# An outlier feature is on most tokens of a sequence; where it is on fewer, on more of them than published for either.
MOST_TOKENS, OF_TOKENS, FEW = 0.5, 0.06, 8  # Dettmers 2022: at least 6 % of the tokens; Sun 2024 found at most 8
MOST = 8  # token strings and positions of a cluster that are listed
TENFOLD = 10.0  # a class that is so much larger than the rest of its dim is a phenomenon of its own

COLUMNS: Columns = {
    "stack": ("string", "name of the stack"),
    "site": ("string", "point of the hidden state"),
    "cluster": ("int64", "its place in that stack: massive activations first, then outlier features, then humps; of "
                "each those in half of the sequences or more first, of these the greatest mean |h| first"),
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
    "n_generated": ("int64", "of those that pass, on tokens that the model generated (--generate)"),
    "n_near": ("int64", "entries that reach half of every threshold, all its layers"),
    "n_tokens": ("int64", "different token strings"),
    "tokens": ("string", "most frequent token strings, as a JSON list"),
    "positions": ("string", "most frequent positions with their counts, as a JSON list of pairs"),
}  # fmt: skip


def passing(clusters: pd.DataFrame) -> pd.DataFrame:
    """The clusters that have findings, the largest first."""
    return clusters[clusters["n_findings"] > 0]


def alike(clusters: pd.DataFrame) -> pd.DataFrame:
    """Those of the label of the largest one: with a massive activation no outlier feature is meant, and no hump."""
    return clusters[clusters["label"] == clusters["label"].iloc[0]] if len(clusters) else clusters


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
    given = [t.assign(passes=ok) for t, ok in ((findings, True), (near_misses, False)) if t is not None and len(t)]
    rows = pd.concat(given, ignore_index=True) if given else pd.DataFrame({"magnitude": []})
    rows = rows[np.isfinite(rows["magnitude"].astype(float))].reset_index(drop=True)  # others have no size
    if not len(rows):
        return frame("clusters")
    n = int(n_sequences or rows["sequence"].max() + 1 or 1)
    rows, hump = _parts(rows)
    made = _layers(rows, hump)
    rows = rows.assign(peak=rows["layer"] == made["peak_layer"].reindex(rows["part"]).to_numpy())
    made = made.join(_sizes(rows, n)).join(_places(rows))
    made["per_sequence"] = made["count"] / n
    made["last"] = np.maximum(made["offset"], _persists(rows, kept, made))
    made = made.join(rows.groupby("part")[KEYS].first())
    many, made["token_share"] = _on_many(rows, made, n, made["stack"].map(n_tokens or {}).astype(float))
    made["label"] = np.select([hump, many], [HUMP, OUTLIER], MASSIVE)
    order = made.assign(order=made["label"].map(LABELS.index), rare=made["share"] < HALF)
    by = {"stack": True, "site": True, "order": True, "rare": True, "size": False}
    order = order.sort_values(list(by), ascending=list(by.values()), kind="stable")
    made = made.loc[order.index]
    made["cluster"] = made.groupby(["stack", "site"]).cumcount() + 1
    return frame("clusters", made.reset_index(drop=True))


def _parts(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """The rows of one dim and class by what they are: those of the value that passes, and a hump beside it.

    Returns:
        The rows with "part", a number for each, and whether each is a hump: most of it does not pass.
    """
    group = rows.groupby(KEYS, sort=True).ngroup()
    by = [group, rows["layer"]]
    layers = pd.DataFrame({
        "size": rows["magnitude"].groupby(by).mean(), "having": rows["sequence"].groupby(by).nunique(),
        "passing": rows["sequence"].where(rows["passes"]).groupby(by).nunique(),
    }).rename_axis(["group", "layer"]).reset_index()  # fmt: skip
    most = layers.loc[layers.groupby("group")["passing"].idxmax()].set_index("group")
    weak = (most["passing"] == 0) | (most["passing"] < HALF * most["having"])
    strong = layers[layers["passing"] >= HALF * most["passing"].reindex(layers["group"]).to_numpy()]
    span = strong.groupby("group").agg(low=("layer", "min"), high=("layer", "max"), size=("size", "max"))
    at = span.reindex(layers["group"]).set_index(layers.index)
    inside = (layers["layer"] >= at["low"]) & (layers["layer"] <= at["high"])
    beside = ~(weak.reindex(layers["group"]).to_numpy() | inside | (layers["size"] >= PERSISTS * at["size"]))
    apart = pd.Series(beside.to_numpy(), index=pd.MultiIndex.from_frame(layers[["group", "layer"]]))
    rows = rows.assign(part=2 * group + apart.reindex(pd.MultiIndex.from_arrays(by)).to_numpy())
    parts = np.sort(rows["part"].unique())
    return rows, pd.Series(weak.reindex(parts // 2).to_numpy() | (parts % 2 == 1), index=parts)


def _layers(rows: pd.DataFrame, hump: pd.Series) -> pd.DataFrame:
    """Onset, offset, first and peak layer of each part."""
    counted = rows[rows["passes"] | hump.reindex(rows["part"]).to_numpy()]
    having = counted.groupby(["part", "layer"])["sequence"].nunique().rename("having").reset_index()
    having["most"] = having.groupby("part")["having"].transform("max")
    having["size"] = rows.groupby(["part", "layer"])["magnitude"].mean().reindex(
        pd.MultiIndex.from_frame(having[["part", "layer"]])).to_numpy()  # fmt: skip
    enough = having[having["having"] >= HALF * having["most"]].groupby("part")["layer"]
    full = having[having["having"] == having["most"]]  # where few have it, the mean is of the largest ones
    peak = full.loc[full.groupby("part")["size"].idxmax()].set_index("part")
    return pd.DataFrame({"onset": enough.min(), "offset": enough.max(), "first": rows.groupby("part")["layer"].min(),
                         "peak_layer": peak["layer"], "size": peak["size"]})  # fmt: skip


def _sizes(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """Size, constancy and counts of each part; but for the counts and the maximum at its peak layer."""
    here, every = rows[rows["peak"]].groupby("part"), rows.groupby("part")
    made = pd.DataFrame({"mean": here["value"].mean(), "std": here["value"].std(ddof=0)})
    with np.errstate(divide="ignore", invalid="ignore"):
        made["spread"] = np.where(made["mean"] == 0, np.inf, made["std"] / made["mean"].abs())
    alone = here["sequence"].min() < 0  # findings of whole dims or layers are of no sequence
    return made.assign(
        max=every["magnitude"].max(), ratio=here["ratio"].mean(), share=(here["sequence"].nunique() / n).mask(alone),
        n_findings=every["passes"].sum(), n_near=every["passes"].size() - every["passes"].sum(),
        n_generated=_generated(rows).groupby(rows["part"]).sum(),
    )  # fmt: skip


def _generated(rows: pd.DataFrame) -> pd.Series:
    """Which entries pass on a token that the model generated; rows of an older run do not say."""
    origin = rows["origin"] if "origin" in rows else pd.Series("", rows.index)
    return rows["passes"] & (origin == "generated")


def _places(rows: pd.DataFrame) -> pd.DataFrame:
    """The tokens of each part at its peak layer: how many, which strings, at which positions."""
    tokens = rows[rows["peak"]].drop_duplicates(["part", "sequence", "pos"])

    def listed(column: str) -> pd.DataFrame:
        counts = tokens.groupby(["part", column], sort=False).size().rename("n").reset_index()
        return counts.sort_values(["part", "n"], ascending=[True, False], kind="stable").groupby("part").head(MOST)

    strings, positions = listed("token"), listed("pos")
    positions = positions.assign(both=list(zip(positions["pos"].tolist(), positions["n"].tolist(), strict=True)))
    return pd.DataFrame({
        "count": tokens.groupby("part").size(), "n_tokens": tokens.groupby("part")["token"].nunique(),
        "tokens": strings.groupby("part")["token"].agg(lambda t: json.dumps(list(map(str, t)), ensure_ascii=False)),
        "positions": positions.groupby("part")["both"].agg(lambda p: json.dumps(list(p))),
    })  # fmt: skip


def _persists(rows: pd.DataFrame, kept: pd.DataFrame | None, made: pd.DataFrame) -> pd.Series:
    """The last layer behind the peak, without a gap, at which the same tokens still have a third of the greatest |h|.

    A layer counts where the value of at least half of the tokens is known there: it is kept only if it is among the
    greatest of its hidden state.
    """
    at = ["stack", "site", "dim", "sequence", "pos"]
    known = rows if kept is None else pd.concat([rows, kept], ignore_index=True)
    known = known[[*at, "layer", "magnitude"]].drop_duplicates([*at, "layer"])
    mine = known.merge(rows.loc[rows["peak"], [*at, "part"]].drop_duplicates(), on=at)
    later = mine[mine["layer"] >= made["peak_layer"].reindex(mine["part"]).to_numpy()]
    stays = later.groupby(["part", "layer"])["magnitude"].agg(["size", "mean"]).reset_index()
    of = made.reindex(stays["part"]).set_index(stays.index)
    next_one = stays["layer"] == of["peak_layer"] + stays.groupby("part").cumcount()
    enough = (stays["size"] >= HALF * of["count"]) & (stays["mean"] >= PERSISTS * of["size"])
    without_gap = (next_one & enough).groupby(stays["part"]).cummin()
    return stays[without_gap].groupby("part")["layer"].max().reindex(made.index).fillna(made["peak_layer"]).astype(int)


def _on_many(rows: pd.DataFrame, made: pd.DataFrame, n: int, width: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Whether many tokens of a sequence have that dim large at the peak layer, and the share of all tokens that have.

    A class whose values are ten times as large as those of the other tokens of its dim goes by its own tokens.

    Args:
        width: of each part, tokens of a sequence; NaN where not known.
    """
    at = ["stack", "site", "layer", "dim"]
    once = rows.drop_duplicates([*at, "sequence", "pos"]).groupby(at)["magnitude"].agg(["size", "sum"])
    of = once.reindex(pd.MultiIndex.from_frame(made.rename(columns={"peak_layer": "layer"})[at])).set_index(made.index)
    size = made["size"]
    rest, total = of["size"] - made["count"], of["sum"] - made["count"] * size
    alone = (rest <= 0) | (size * rest >= TENFOLD * total)
    counted = made["count"].where(alone, of["size"]) / n
    share = counted / width
    many = ((counted > 2) & (share >= MOST_TOKENS)) | ((counted > FEW) & ~(share < OF_TOKENS))
    return many, of["size"] / n / width
