"""A scan result cut into its stacks of blocks, and its criterion read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import pandas as pd

from massact.records.answer import Answer, Peak, StackAnswer
from massact.records.clusters import passing
from massact.records.formats import MAXIMA, step_at
from massact.records.kinds.scan import ScanResult
from massact.records.kinds.trajectory import Trajectory
from massact.reports.spelling import number, real, spanned, visible

# What formats can hold: their name in the tables, their name in words, their largest finite value.
FORMATS = tuple(
    (name, name.replace("_", "-"), largest if largest < 1e6 else float(f"{largest:.3g}"))
    for name, largest in MAXIMA.items()
)


@dataclass(frozen=True)
class Rule:
    """The criterion of a run.

    Args:
        name, formula, source: as recorded.
        kind: what a finding is: element (one scalar), token, dim or layer.
        thresholds: its constants. changed: whether one of them is another than was published.
    """

    name: str
    formula: str
    source: str
    kind: str
    thresholds: dict[str, float]
    changed: bool = False

    @property
    def magnitude(self) -> float | None:
        """What |h| must exceed, for rules of that form."""
        return self.thresholds.get("magnitude") if self.kind == "element" else None

    @property
    def ratio(self) -> float | None:
        """What |h| / median must reach; None where the rule divides by something else (An 2025: the mean)."""
        to_median = self.kind == "element" and (not self.formula or "median" in self.formula)
        return self.thresholds.get("ratio") if to_median else None

    @property
    def noun(self) -> str:
        """What the rule finds."""
        return {"token": "outlier tokens", "dim": "outlier dims", "layer": "outlier layers"}.get(
            self.kind, "massive activations"
        )

    def failed(self, magnitude: float, ratio: float) -> list[str]:
        """The names of the thresholds that an activation misses."""
        missed = []
        if self.magnitude is not None and not magnitude > self.magnitude:
            missed.append("magnitude")
        if self.ratio is not None and not ratio >= self.ratio:
            missed.append("ratio")
        return missed

    def in_words(self) -> str:
        """'sun2024 (|h| > 100 and |h| >= 1,000 x median|h| ...)': the formula with the constants in force."""
        text, left = self.formula, []
        for name, value in self.thresholds.items():
            text, n = re.subn(rf"(?<=[<>=] ){re.escape(name)}\b", number(value, 6), text, count=1)
            if not n:
                left.append(f"{name} {number(value, 6)}")
        inside = "; ".join(part for part in (text, ", ".join(left)) if part)
        name = f"{self.name} with other constants than published" if self.changed else self.name
        return f"{name} ({inside})" if inside else name


def model_name(result: ScanResult) -> str:
    """The name of the model for people."""
    return visible(result.info.model.get("name") or result.info.model.get("id") or "")


def rule_of(result: ScanResult | Trajectory) -> Rule:
    """The criterion behind the findings."""
    record = result.info.criterion or {}
    recorded = record.get("thresholds")
    thresholds = {visible(k): real(v) for k, v in recorded.items()} if isinstance(recorded, dict) else {}
    told = record.get("published")
    published = {visible(k): real(v) for k, v in told.items()} if isinstance(told, dict) else {}
    return Rule(
        visible(record.get("name")) or "the criterion",
        visible(record.get("formula")),
        visible(record.get("source")),
        visible(record.get("kind")) or "element",
        {k: v for k, v in thresholds.items() if not math.isnan(v)},
        any(v != thresholds.get(k, v) for k, v in published.items() if not math.isnan(v)),
    )


@dataclass(frozen=True)
class StackView:
    """One stack of blocks seen at one point: its rows of every table, and its part of the answer.

    Args:
        stack, site: which.
        label: how to call it; "" where there is only one.
        answer: its part of the answer; None for a run without one.
        layers, findings, near_misses, coordinates, clusters, ranks: its rows; layers in order, near misses the
            largest ratio first, clusters the largest first.
    """

    stack: str
    site: str
    label: str
    answer: StackAnswer | None
    layers: pd.DataFrame
    findings: pd.DataFrame
    near_misses: pd.DataFrame
    coordinates: pd.DataFrame
    clusters: pd.DataFrame
    ranks: pd.DataFrame

    @cached_property  # asked hundreds of times by one table
    def main(self) -> pd.Series | None:
        """The largest cluster that passes; None without findings."""
        having = passing(self.clusters)
        return having.iloc[0] if len(having) else None

    def module(self, layer: int) -> str:
        """Dotted path of a block, for people; "" where it is not recorded."""
        known = self.layers.loc[self.layers["layer"] == layer, "module"]
        return visible(known.iloc[0]) if len(known) else ""

    @property
    def n_layers(self) -> int:
        """L."""
        if self.answer:
            return int(self.answer.n_layers)
        return int(self.layers["layer"].max()) if len(self.layers) else 0

    @property
    def n_findings(self) -> int:
        return int(self.answer.n_findings) if self.answer else len(self.findings)

    @property
    def n_sequences(self) -> int:
        return int(self.layers["n_sequences"].max()) if len(self.layers) else 0

    @property
    def span(self) -> tuple[int, int] | None:
        """Onset and offset of the largest cluster (E5)."""
        return None if self.main is None else (int(self.main["onset"]), int(self.main["offset"]))

    @property
    def peak_layer(self) -> int | None:
        """The layer at which the largest cluster is largest; None without findings."""
        return None if self.main is None else int(self.main["peak_layer"])

    @property
    def shown_layer(self) -> int | None:
        """The layer that tables of one layer show: the peak if it was ranked, else that of the largest ratio."""
        ranked = [int(x) for x in self.ranks["layer"]]
        if self.peak_layer is not None:
            return self.peak_layer if self.peak_layer in ranked or not ranked else ranked[0]
        if self.answer and self.answer.largest:
            return int(self.answer.largest.layer)
        return int(self.layers["layer"].iloc[0]) if len(self.layers) else None

    @property
    def largest(self) -> Peak | None:
        """The activation with the largest ratio, whether it passes or not."""
        if self.answer:
            return self.answer.largest
        if not len(self.near_misses):
            return None
        nearest = self.near_misses.iloc[0]
        return Peak(**{f.name: nearest[f.name] for f in fields(Peak)})

    def column(self, name: str) -> np.ndarray:
        """One column of the layers table as floats."""
        return self.layers[name].to_numpy(float, na_value=np.nan)

    def layers_without_values(self) -> list[int]:
        """Layers at which no value is finite, so that no statistic is known."""
        return [int(x) for x in self.layers.loc[(self.layers["nonfinite"] > 0) & self.layers["max"].isna(), "layer"]]

    def step(self, format_name: str, layer: int) -> float:
        """Distance between neighbouring numbers of a format at the largest |h| of a layer; NaN if it overflows."""
        most = self.layers.loc[self.layers["layer"] == layer, "max"].to_numpy(float, na_value=np.nan)
        return step_at(format_name, float(most[0])) if len(most) else math.nan

    def nonfinite_layers(self) -> list[int]:
        return [int(x) for x in self.layers.loc[self.layers["nonfinite"] > 0, "layer"]]

    def layers_below_one(self, format_name: str) -> list[int]:
        """Layers whose largest |h| a number format cannot hold."""
        return [int(x) for x in self.layers["layer"][self.column(f"headroom_{format_name}") < 1]]


def answer_of(result: ScanResult) -> Answer | None:
    """The answer of a run; None for a run that has none (failed, or interrupted)."""
    return Answer.from_dict(result.info.answer) if result.info.answer.get("stacks") is not None else None


def views(result: ScanResult) -> list[StackView]:
    """Cut a result into its stacks, in the order of the answer, then of the layers table."""
    answer = answer_of(result)
    parts = {(s.stack or "", s.site): s for s in answer.stacks} if answer else {}
    keys = list(dict.fromkeys([*parts, *_keys(result.layers)]))
    stacks, sites = {k[0] for k in keys}, {k[1] for k in keys}
    out: list[StackView] = []
    for stack, site in keys:
        label = ", ".join([visible(stack)] * (len(stacks) > 1) + [visible(site)] * (len(sites) > 1))
        rows = {
            t: _rows(getattr(result, t), stack, site)
            for t in ("layers", "findings", "near_misses", "coordinates", "clusters", "ranks")
        }
        rows["layers"] = rows["layers"].sort_values("layer", kind="stable", ignore_index=True)
        rows["near_misses"] = rows["near_misses"].sort_values(
            ["ratio", "magnitude"], ascending=False, kind="stable", ignore_index=True
        )
        view = StackView(stack, site, label, parts.get((stack, site)), **rows)
        out.append(replace(view, ranks=_ranks(view)))
    return out


def _ranks(view: StackView) -> pd.DataFrame:
    """The ranks of one stack at the shown layer, from the top down."""
    rows = view.ranks[view.ranks["layer"] == view.shown_layer]
    names = [visible(name) for name in rows["rank"]]
    return rows.iloc[sorted(range(len(names)), key=lambda i: _depth(names[i]))].reset_index(drop=True)


def _depth(rank: str) -> tuple[int, float]:
    """Order of 'top 1', ..., 'top 100', 'top 1%', 'top 10%', 'median'."""
    digits = re.search(r"[\d.]+", rank)
    return (2 if rank == "median" else 1 if rank.endswith("%") else 0), real(digits.group()) if digits else math.inf


def _keys(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(table["stack"].fillna(""), table["site"].fillna(""), strict=True))


def _rows(table: pd.DataFrame, stack: str, site: str) -> pd.DataFrame:
    mine = table["stack"].fillna("") == stack
    if "site" in table.columns:
        mine &= table["site"].fillna("") == site
    return table[mine.to_numpy(bool)].reset_index(drop=True)


def nonfinite_note(view: StackView) -> str:
    """Which layers hold NaN or Inf; "" when none does."""
    layers = view.nonfinite_layers()
    return f"NaN or Inf at {spanned('layer', layers)}" if layers else ""


def census(findings: pd.DataFrame) -> pd.Series:
    """How many tokens, each counted once whatever its dims, by text and class of position; the most frequent first.

    Args:
        findings: rows of one layer of one stack.
    """
    once = findings.drop_duplicates(["sequence", "pos"]).fillna({"token": "", "position_class": "other"})
    return once.groupby(["token", "position_class"]).size().sort_values(ascending=False, kind="stable")
