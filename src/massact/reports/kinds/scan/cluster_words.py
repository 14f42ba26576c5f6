"""The clusters of a scan in English: what each is, where it begins and ends, how large and how constant it is."""

from __future__ import annotations

import json
import math

import pandas as pd

from massact.records.clusters import HUMP, OUTLIER
from massact.reports.kinds.scan.views import Rule, StackView
from massact.reports.spelling import (
    ROUNDING,
    counted,
    listed,
    number,
    percent,
    quoted,
    real,
    signed,
    token_list,
    visible,
)

CLASSES = {"start": "at the start of the sequence", "delimiter": "at delimiters", "padding": "in padding",
           "other": "at other tokens"}  # fmt: skip
MOST_CLUSTERS, MOST_HUMPS, MOST_TOKENS, MOST_POSITIONS = 6, 4, 4, 4


def clusters_in_words(view: StackView, rule: Rule) -> list[str]:
    """A sentence or two for each cluster of a stack, the largest first, then one for all humps."""
    passing = view.clusters[view.clusters["label"] != HUMP]
    outliers = (passing["label"] == OUTLIER) & (rule.kind == "element")
    told = [_sentence(row, view, rule) for _, row in passing[~outliers].iterrows()]
    told += [_outlier(rows, view) for _, rows in passing[outliers].groupby("dim", sort=False)]
    left = len(told) - MOST_CLUSTERS
    told = told[:MOST_CLUSTERS] + [f"And {left:,} smaller: see clusters.parquet."] * (left > 0)
    return told + _humps(view.clusters[view.clusters["label"] == HUMP], view)


def cluster_in_words(row: pd.Series, rule: Rule) -> str:
    """'massive activation, dim 507 at the start of the sequence', 'outlier tokens in padding', 'outlier dim 3'."""
    if rule.kind == "element":
        return f"{visible(row['label'])}, {_place(row)}"
    return f"outlier {_place(row).removeprefix('whole ')}"


def cluster_in_short(row: pd.Series, view: StackView, rule: Rule) -> str:
    """'massive activation, dim 5 at the start of the sequence, layers 2 to 3; +108,000 ± 9,000 at layer 2, ...'."""
    return f"{cluster_in_words(row, rule)}, {_span(row)}; {_size(row, view)}{_ratio(row)}"


def _ratio(row: pd.Series) -> str:
    return "" if math.isnan(real(row["ratio"])) else f", {number(row['ratio'])} times the median"


def _place(row: pd.Series) -> str:
    """'dim 507 at the start of the sequence'; criteria of whole dims have no tokens, those of whole tokens no dim."""
    what = f"dim {int(row['dim'])}" if row["dim"] >= 0 else "whole tokens"
    return what if math.isnan(real(row["share"])) else f"{what} {_where(row)}"


def _where(row: pd.Series) -> str:
    return CLASSES.get(str(row["position_class"]), visible(row["position_class"]))


def _sentence(row: pd.Series, view: StackView, rule: Rule) -> str:
    name = cluster_in_words(row, rule).replace(", ", ": ", 1)
    said = f"{name[0].upper()}{name[1:]}, {_layers(row, view)}; {_size(row, view)}{_ratio(row)}."
    return " ".join(part for part in (said, _tokens(row, view), _after(row, view, rule)) if part)


def _size(row: pd.Series, view: StackView) -> str:
    """'+23,100 ± 905 at layer 12 (a spread of 3.91%)'."""
    mean, peak = signed(row["mean"]), f"at layer {int(row['peak_layer'])}"
    if real(row["spread"]) > ROUNDING:
        return f"{mean} ± {number(row['std'])} {peak} (a spread of {percent(row['spread'])})"
    same = real(row["spread"]) <= ROUNDING and _having(row, view) > 1
    return f"{mean} {peak}" + " (the same in each sequence)" * same


def _layers(row: pd.Series, view: StackView) -> str:
    """'layers 12 to 28 of 30 (from model.layers.11 on)'; the module only where the first cluster does not have it."""
    first = int(row["onset"])
    told = row["cluster"] != 1 and first == view.clusters["onset"].iloc[0]
    module = "" if told else view.module(first)
    known = f" (from {module} on)" if module and first and first < row["offset"] else f" ({module})" if module else ""
    only = " only" if first == row["offset"] else ""
    return f"{_span(row)} of {view.n_layers}{known}{only}"


def _span(row: pd.Series) -> str:
    first, last = int(row["onset"]), int(row["offset"])
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _tokens(row: pd.Series, view: StackView) -> str:
    """Of how many sequences, on how many tokens of each, on which."""
    if math.isnan(real(row["share"])):
        return ""
    each = real(row["per_sequence"]) / real(row["share"] or math.nan)
    strings, n = [t for t in token_list(row["tokens"]) if t], int(row["n_tokens"])
    shown = [quoted(t) for t in strings[:MOST_TOKENS]]
    named = listed(shown + [f"{n - len(shown):,} more"] * (n > len(shown))) if shown else ""
    said = f"In {_sequences(row, view)}{_passing(row, view)}"
    if not math.isnan(each) and not math.isclose(each, 1, abs_tol=ROUNDING):
        said += f", on {number(each)} tokens each" + " on average" * (each % 1 != 0)
        said += f": {named}" if named else ""
    elif named:
        said += f", on {named}"
    first = view.answer is not None and view.answer.group == "start and first delimiter"
    said += " (the first delimiter)" * (first and row["position_class"] == "delimiter")
    return f"{said}{_positions(row)}."


def _sequences(row: pd.Series, view: StackView) -> str:
    """'all 8 sequences', '7 of 8 sequences', 'the sequence'."""
    n, having = view.n_sequences, _having(row, view)
    return "the sequence" if n == 1 else f"all {n:,} sequences" if having == n else f"{having:,} of {n:,} sequences"


def _having(row: pd.Series, view: StackView) -> int:
    """How many sequences have it; a damaged table may say anything."""
    share = real(row["share"])
    return round(share * view.n_sequences) if 0 <= share <= 1 else 0


def _passing(row: pd.Series, view: StackView) -> str:
    """' (passing in 5)' where the value is in more sequences than it passes in."""
    having, mine = _having(row, view), _findings(row, view)
    passing = mine.loc[mine["layer"] == row["peak_layer"], "sequence"].nunique()
    return f" (passing in {passing:,})" if passing < having else ""


def _findings(row: pd.Series, view: StackView) -> pd.DataFrame:
    """The findings of that dim and class."""
    key = ["dim", "position_class"]
    return view.findings[(view.findings[key] == row[key]).all(axis=1)]


def _positions(row: pd.Series) -> str:
    """Where in the sequence, unless the class says so, or no position comes twice."""
    at = _counted_positions(row)
    if row["position_class"] == "start" or not at or (len(at) > MOST_POSITIONS and at[0][1] == 1):
        return ""
    said = listed([str(pos) for pos, _ in sorted(at[:MOST_POSITIONS])])
    return f", {'mostly ' * (len(at) > MOST_POSITIONS)}at position{'s' * (len(at) > 1)} {said}"


def _counted_positions(row: pd.Series) -> list[tuple[int, int]]:
    """The most frequent positions with their counts; [] where the table is damaged."""
    try:
        return [(int(pos), int(count)) for pos, count in json.loads(row["positions"])]
    except (TypeError, ValueError, OverflowError, RecursionError):
        return []


def _after(row: pd.Series, view: StackView, rule: Rule) -> str:
    """Whether the value stays where it no longer passes, and whether it is the median that grew."""
    last, offset = int(row["last"]), int(row["offset"])
    if last <= offset:
        return ""
    medians = view.layers.set_index("layer")["median"]
    before, after = real(medians.get(offset)), real(medians.get(last))
    mine = _findings(row, view)
    seldom = "passes in under half as many sequences" if (mine["layer"] > offset).any() else "no longer passes"
    ratio = real(mine.loc[mine["layer"] == offset, "ratio"].mean())
    if rule.ratio is not None and after > 0 and ratio * before / after < rule.ratio:
        return (f"The value stays until layer {last}, but the median grows from {number(before)} to {number(after)}: "
                f"after layer {offset} it {seldom}.")  # fmt: skip
    return f"After layer {offset} it {seldom}, but a third of that value or more stays until layer {last}."


def _outlier(rows: pd.DataFrame, view: StackView) -> str:
    """One dim that is large on many tokens, of whatever class: one sentence."""
    share = real(rows["token_share"].max())
    on = "many tokens" if math.isnan(share) else f"up to {percent(share)} of all tokens"
    if len(rows) == 1:
        row = rows.iloc[0]
        return f"Outlier feature: {_place(row)}, {_layers(row, view)}; {_size(row, view)}, large on {on}."
    parts = [f"{_where(row)}, {_span(row)}, {_size(row, view)}" for _, row in rows.iterrows()]
    return f"Outlier feature: dim {int(rows.iloc[0]['dim'])}, large on {on}: {'; '.join(parts)}."


def _humps(rows: pd.DataFrame, view: StackView) -> list[str]:
    """What is near the threshold and mostly does not pass."""
    if not len(rows):
        return []
    parts = [_hump(row, view) for _, row in rows.head(MOST_HUMPS).iterrows()]
    left = len(rows) - MOST_HUMPS
    parts += [f"{counted(left, 'smaller hump')} in clusters.parquet"] * (left > 0)
    return [f"Hump{'s' * (len(rows) > 1)} near the threshold (half of it or more): {'; '.join(parts)}."]


def _hump(row: pd.Series, view: StackView) -> str:
    """'dim 507 at other tokens, layers 3 to 7 (+660 at layer 3; 2 of 47 entries pass)'."""
    passing, every = int(row["n_findings"]), int(row["n_findings"] + row["n_near"])
    few = _having(row, view) < view.n_sequences
    facts = [f"{signed(row['mean'])}" + f" at layer {int(row['peak_layer'])}" * bool(row["onset"] != row["offset"])]
    facts += [f"in {_sequences(row, view)}"] if few else []  # rules of whole dims are of no sequence
    whole = math.isnan(real(row["share"]))
    if not whole and row["position_class"] not in ("start", "padding") and row["per_sequence"] <= MOST_TOKENS:
        strings = [quoted(t) for t in token_list(row["tokens"]) if t]
        told = f"on {listed(strings)}" * (0 < len(strings) <= MOST_TOKENS) + _positions(row)
        facts += [told.removeprefix(", ")] * bool(told)
    facts += [f"{passing:,} of {counted(every, 'entry', 'entries')} pass"] * (passing > 0)
    return f"{_place(row)}, {_span(row)} ({', '.join(facts)})"
