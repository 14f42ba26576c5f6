"""What the claims are judged by: the main cluster of a scan, and its value in every sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from massact.records.clusters import MASSIVE
from massact.records.kinds.scan import ScanResult
from massact.records.verdicts import ROUNDING
from massact.reproductions.claims import Part, averaged, bounded, shared, untold
from massact.reproductions.entries import Nothing, at, massive
from massact.stats.intervals import spread_interval

CONSTANT = 0.1  # of itself: the paper's largest values vary by 1 % and 5.5 %
MOST_CLUSTERS = 8


def n_sequences(scan: ScanResult) -> int:
    """How many sequences were scanned."""
    return int(scan.layers["n_sequences"].max()) if len(scan.layers) else 0


def massive_clusters(scan: ScanResult) -> pd.DataFrame:
    """The massive activations of the stack that has the largest, the main one first.

    Raises:
        Nothing: nothing passes, or what passes is no massive activation.
    """
    s = massive(scan)[0]
    mine = at(scan.clusters, stack=s.stack, site=s.site, label=MASSIVE)
    mine = mine[mine["dim"] >= 0].sort_values("cluster", kind="stable")
    if not len(mine):
        raise Nothing("What passes is no massive activation of a few tokens: outlier features, or whole tokens.")
    return mine


def main(scan: ScanResult) -> Any:
    """The main one, a row of `clusters`."""
    return next(massive_clusters(scan).itertuples())


def listed(scan: ScanResult, c: Any) -> pd.DataFrame:
    """The entries of a cluster, passing or near, in all layers at which they are its own."""
    rows = pd.concat([scan.findings.assign(passes=True), scan.near_misses.assign(passes=False)], ignore_index=True)
    rows = at(rows, stack=c.stack, site=c.site, dim=c.dim, position_class=c.position_class)
    return rows.drop_duplicates(["layer", "sequence", "pos"])


def inside(scan: ScanResult, c: Any) -> pd.DataFrame:
    """Those of its own layers: not of a hump before it."""
    rows = listed(scan, c)
    return rows[(rows["layer"] >= c.first) & (rows["layer"] <= max(c.last, c.offset))]


def values_at(scan: ScanResult, c: Any, layer: int) -> pd.Series:
    """Its signed value at a layer, by sequence: mean over the tokens of a sequence that have it."""
    return at(listed(scan, c), layer=layer).groupby("sequence")["value"].mean()


def same_by_construction(scan: ScanResult, c: Any) -> str:
    """Why its value can be no other in any sequence; empty where it can."""
    rows = at(listed(scan, c), layer=c.peak_layer)
    v = rows["value"].to_numpy()
    alike = len(v) > 1 and rows["pos"].nunique() == 1 and np.ptp(v) <= ROUNDING * np.abs(v).max()
    why = f"All sequences have {rows['token'].iloc[0]!r} there, with nothing different before it"
    return f"{why}: the value is the same by construction." if alike else ""


def constant(name: str, scan: ScanResult, c: Any, layer: int) -> Part:
    """Whether its value is nearly the same in every sequence."""
    why = same_by_construction(scan, c)
    if why:
        return untold(name, why, n=n_sequences(scan), stack=c.stack)
    v = values_at(scan, c, layer)
    return bounded(name, spread_interval(v), len(v), most=CONSTANT, unit="std / |mean|", stack=c.stack)


def counts(scan: ScanResult, rows: pd.DataFrame) -> np.ndarray:
    """How many of these entries every scanned sequence has, (N,)."""
    n = n_sequences(scan)
    return np.bincount(rows["sequence"].to_numpy(), minlength=n)[:n].astype(float)


def spans(scan: ScanResult, c: Any) -> pd.DataFrame:
    """First and last layer at which it passes, of every sequence where it does: columns min, max."""
    rows = inside(scan, c)
    return rows[rows["passes"]].groupby("sequence")["layer"].agg(["min", "max"])


def handful(scan: ScanResult, rows: pd.DataFrame, stack: str) -> list[Part]:
    """Whether most sequences have at least one of these entries, and fewer than ten."""
    of = counts(scan, rows)
    return [shared("share with any", int((of > 0).sum()), len(of), stack=stack),
            averaged("in one", of, most=9.0, unit="count", stack=stack)]  # fmt: skip
