"""A scan of blocks that carry several streams: one of their stacks is told in full, of the others what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from massact.records.clusters import HUMP, passing
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.cluster_words import cluster_in_short
from massact.reports.kinds.scan.views import Rule, StackView
from massact.reports.parts import Table, grid
from massact.reports.spelling import counted, number, or_dash, ranges, real, visible
from massact.reports.stack_words import called, stream_sets

MOST = 2  # clusters of a stack that are told in its line
MOST_LAYERS = 40


@dataclass(frozen=True)
class StreamSet:
    """The stacks of several streams and of what is read of them, seen at one point.

    Args:
        views: all of them, in their order.
        lead: the one with the greatest ratio, which is told in full.
    """

    views: list[StackView]
    lead: StackView

    @property
    def others(self) -> list[StackView]:
        """Those of which only what differs is told."""
        return [v for v in self.views if v is not self.lead]


def sets_of(result: ScanResult, stacks: Sequence[StackView]) -> list[StreamSet]:
    """The sets of streams among the stacks of a scan; none for most models."""
    found = []
    for read, streams in stream_sets(result.info.model).items():
        for site in dict.fromkeys(v.site for v in stacks):
            mine = [v for v in stacks if v.site == site and v.stack in (*streams, read)]
            if len(mine) > 1:
                lead = max(mine, key=lambda v: (v.n_findings > 0, real(v.largest.ratio) if v.largest else -1.0))
                found.append(StreamSet(mine, lead))
    return found


def line(view: StackView, lead: StackView, rule: Rule, criteria: pd.DataFrame) -> str:
    """What one of the other stacks has, and where published rules say something else of it than of the lead."""
    having = passing(view.clusters)
    said = [cluster_in_short(row, view, rule) for _, row in having.head(MOST).iterrows()]
    said += [f"{counted(len(having) - MOST, 'more cluster')}"] * (len(having) > MOST)
    if not view.n_findings:
        said = [_nothing(view)]
    elif not said:
        said = [counted(view.n_findings, "finding")]
    if humps := int((view.clusters["label"] == HUMP).sum()):
        said.append(f"{counted(humps, 'hump')} near the threshold")
    most = view.layers["max"].max() if len(view.layers) else float("nan")
    said += [f"largest |h| {number(most)}"] * bool(most == most)
    said += [f"overflows fp16 at {counted(len(over), 'layer')} ({ranges(over)})" for over in
             [view.layers_below_one("fp16")] if over]  # fmt: skip
    said += [f"NaN or Inf at layers {ranges(bad)}" for bad in [view.nonfinite_layers()] if bad]
    own, others = (criteria[criteria["stack"].fillna("") == v.stack].set_index("criterion") for v in (view, lead))
    apart = [name for name in own.index.intersection(others.index)
             if {own["verdict"][name], others["verdict"][name]} == {"yes", "no"}]  # fmt: skip
    said += [f"unlike in {lead.label}, {visible(name)} says {visible(own['verdict'][name])}" for name in apart]
    return "; ".join(said) + "."


def _nothing(view: StackView) -> str:
    largest = view.largest
    if largest is None:
        return "no findings"
    return f"no findings; the largest ratio is {number(largest.ratio)} (layer {largest.layer}, dim {largest.dim})"


def side_by_side(streams: StreamSet, criteria: pd.DataFrame) -> list[Table | None]:
    """Tables with a column for each stack: the greatest |h| of each layer, and what each published rule says."""
    views = streams.views
    names = [visible(v.label) for v in views]
    layers = sorted({int(x) for v in views for x in v.layers["layer"]})
    shown = layers if len(layers) <= MOST_LAYERS else layers[:: -(-len(layers) // MOST_LAYERS)]
    tops = [dict(zip(v.layers["layer"].astype(int), v.column("top1"), strict=True)) for v in views]
    rows = [[str(n), *(or_dash(top.get(n)) for top in tops)] for n in shown]
    some = f", {len(shown)} of {len(layers)} layers" if len(shown) < len(layers) else ""
    verdicts = [_verdicts(criteria, v) for v in views]
    known = [rule for rule in verdicts[0] if any(said.get(rule, "-") != "-" for said in verdicts)]
    rules = [[visible(rule), *(visible(said.get(rule, "-")) for said in verdicts)] for rule in known]
    return [
        grid(f"Greatest |h| of each layer, mean over sequences{some}", ["layer", *names], rows, abreast=1),
        grid("What the published rules say", ["<rule", *(f"<{n}" for n in names)], rules, abreast=1),
    ]


def _verdicts(criteria: pd.DataFrame, view: StackView) -> dict[str, str]:
    mine = criteria[criteria["stack"].fillna("") == view.stack]
    known = mine["verdict"].where(mine["verdict"].isin(["yes", "no"]), "-")
    return dict(zip(mine["criterion"], known, strict=True))


def title_of(streams: StreamSet) -> str:
    """'collapsed and stream_0 to stream_3, side by side'."""
    return f"{called([v.label for v in streams.views])}, side by side"
