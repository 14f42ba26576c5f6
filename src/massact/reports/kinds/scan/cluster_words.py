"""The clusters of a scan in English: what each is, where it begins and ends, how large and how constant it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from massact.records.clusters import HUMP, MASSIVE, OUTLIER
from massact.reports.kinds.scan.views import Rule, StackView
from massact.reports.spelling import counted, listed, number, percent, quoted, real, signed, token_list, visible

CLASSES = {"start": "at the start of the sequence", "delimiter": "at delimiters", "padding": "in padding",
           "other": "at other tokens"}  # fmt: skip
MOST_CLUSTERS, MOST_TOKENS, MOST_POSITIONS = 6, 6, 4


def clusters_in_words(view: StackView, rule: Rule) -> list[str]:
    """A sentence or two for each cluster of a stack, the largest first."""
    told = [_sentence(row, view, rule) for _, row in view.clusters.head(MOST_CLUSTERS).iterrows()]
    left = len(view.clusters) - MOST_CLUSTERS
    if left > 0:
        kinds = view.clusters["label"].iloc[MOST_CLUSTERS:].value_counts()
        named = listed([counted(int(n), visible(label)) for label, n in kinds.items()])
        told.append(f"And {counted(left, 'smaller cluster')} ({named}): see clusters.parquet.")
    return told


def cluster_name(row: pd.Series) -> str:
    """'dim 507 at the start of the sequence'."""
    where = CLASSES.get(str(row["position_class"]), visible(row["position_class"]))
    return f"dim {int(row['dim'])} {where}" if row["dim"] >= 0 else f"whole tokens {where}"


def _sentence(row: pd.Series, view: StackView, rule: Rule) -> str:
    label = visible(row["label"]) if rule.kind == "element" else rule.noun.removesuffix("s")
    name = cluster_name(row)
    size = f"{signed(row['mean'])}" + (f" ± {number(row['std'])}" if row["std"] > 0 else "")
    ratio = "" if math.isnan(real(row["ratio"])) else f", {number(row['ratio'])} times the median"
    if row["label"] == HUMP:
        passing, every = int(row["n_findings"]), int(row["n_findings"] + row["n_near"])
        label += f" near the threshold ({passing:,} of {counted(every, 'entry', 'entries')} pass)"
    said = (
        f"{label[0].upper()}{label[1:]}: {name}, {_layers(row, view)}; {size} at layer {int(row['peak_layer'])}{ratio}"
    )
    if row["std"] > 0:
        said += f", a spread of {percent(row['spread'])}"
    return f"{said}. {_where(row, view)}{_MORE.get(str(row['label']), _nothing)(row, view)}"


def _layers(row: pd.Series, view: StackView) -> str:
    """'layers 12 to 28 of 30 (from model.layers.11 on)'."""
    first, last = int(row["onset"]), int(row["offset"])
    module = view.module(first)
    known = f" (from {module} on)" if module and first and first < last else f" ({module})" if module else ""
    return (f"layer {first} of {view.n_layers}{known} only" if first == last else
            f"layers {first} to {last} of {view.n_layers}{known}")  # fmt: skip


def _where(row: pd.Series, view: StackView) -> str:
    """Of how many sequences, on how many tokens of each, on which."""
    if math.isnan(real(row["share"])):
        return ""
    tokens, n = token_list(row["tokens"]), int(row["n_tokens"])
    named = listed([quoted(t) for t in tokens] + [f"{n - len(tokens):,} more"] * (n > len(tokens)), MOST_TOKENS)
    share = "the sequence" if view.n_sequences == 1 else f"{percent(row['share'])} of the sequences"
    places = ""
    if row["position_class"] != "start":
        at = [int(pos) for pos, _ in json.loads(row["positions"])]
        places = f", first of all at position{'s' * (len(at) > 1)} {listed([str(p) for p in at[:MOST_POSITIONS]])}"
    return f"In {share}, {_tokens(row['per_sequence'])} each{places}: {named}."


def _tokens(per_sequence: float) -> str:
    return "1 token" if per_sequence == 1 else f"{number(per_sequence)} tokens"


def _massive(row: pd.Series, view: StackView) -> str:
    last, offset = int(row["last"]), int(row["offset"])
    if last <= offset:
        return ""
    grew = view.layers.loc[view.layers["layer"].isin([offset, last]), "median"].to_numpy(float)
    why = (
        f": the median grew from {number(grew[0])} to {number(grew[1])}" if len(grew) == 2 and grew[1] > grew[0] else ""
    )
    return f" The value stays until layer {last}, where it no longer passes{why}."


def _outlier(row: pd.Series, view: StackView) -> str:
    share = real(row["token_share"])
    of = "many tokens" if math.isnan(share) else f"{percent(share)} of all tokens"
    return f" {of[0].upper()}{of[1:]} have that dim large: it is no bias of a few tokens."


def _nothing(row: pd.Series, view: StackView) -> str:
    return ""


_MORE: dict[str, Callable[[pd.Series, Any], str]] = {MASSIVE: _massive, OUTLIER: _outlier}
