"""Sections of several runs: side by side, their layers in one figure, then the answer of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from massact.records.kinds.comparison import Comparison
from massact.records.kinds.intervention import Intervention
from massact.records.tables import columns_of, frame
from massact.reports import charts
from massact.reports.contents import Contents
from massact.reports.kinds.comparison.tables import places, side_by_side
from massact.reports.kinds.comparison.words import told
from massact.reports.kinds.intervention import effects_chart, main_metric
from massact.reports.kinds.scan.sections import portraits as portraits_of
from massact.reports.parts import Chart, Column, Part, Section, Table, Words, parts_of, table_of
from massact.reports.spelling import visible

DASHES = ("solid", "dash", "dot", "dashdot")


def answer(runs: Sequence[Contents], c: Comparison) -> Section:
    """What differs, in words, and the numbers of every run."""
    tables = (side_by_side(c, "run", "Runs side by side"), places(c), side_by_side(c, "mean", "Over seeds: means"))
    return Section("answer", "Answer", parts_of(Words(told(c), True), *tables))


def layers(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """The layers of all runs in one figure (Sun 2024, Fig. 10)."""
    rows = c.compare_layers[c.compare_layers["row"] == "run"]
    if not len(rows):
        return None
    parts: list[Part | None] = []
    several = rows[["stack", "site"]].drop_duplicates()
    panels = (("top1", "Greatest |h|", True), ("median", "Median |h|", True), ("mass_first", "Attention on position 0",
              False), ("slot_mass", "Probability of a learned sink", False))  # fmt: skip
    for (stack, site), mine in rows.groupby(["stack", "site"], sort=False):
        head = f"{visible(stack) or visible(site)}: " if len(several) > 1 else ""
        for column, title, log in panels:
            known = mine[mine[column].notna()]
            data = [
                charts.line(part["layer"], part[column], str(label), charts.SERIES[i % len(charts.SERIES)],
                            dash=DASHES[i // len(charts.SERIES) % len(DASHES)])
                for i, label in enumerate(dict.fromkeys(mine["label"]))
                if len(part := known[known["label"] == label])
            ]  # fmt: skip
            if data:
                layout = charts.layer_layout(int(mine["layer"].max()), title, log=log, values=known[column])
                parts.append(Chart(f"{head}{title} of each layer", data, layout, "Mean over sequences." if log else "",
                                   340, log=log, width="half"))  # fmt: skip
    parts.append(table_of("compare_layers", rows, "Layers of every run", ("label", "stack", "site", "layer", "top1",
                          "top2", "top3", "median", "mass_first", "slot_mass"), most=1000))  # fmt: skip
    return Section("layers", "Layers", parts_of(*parts))


def portraits(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """|h| of the prompt of each run at the layer where it is greatest (Sun 2024, Fig. 9)."""
    parts: list[Part] = []
    for held in runs[:6]:
        kept = held.scan.portrait if held.scan is not None else {}
        if held.scan is None or "magnitude" not in kept or 0 in kept["magnitude"].shape:
            continue
        greatest = [float(h[h == h].max()) if (h == h).any() else -math.inf for h in kept["magnitude"]]
        best = max(range(len(greatest)), key=greatest.__getitem__)
        parts += portraits_of(held.scan, best, visible(held.label))
    return Section("portrait", "One prompt in three dimensions", parts) if parts else None


def interventions(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """What the edits of each run do to its main metric, in one table, and with intervals."""
    done = [held for held in runs if held.of(Intervention) is not None]
    parts: list[Part | None] = [_effects(done)]
    for held in done:
        if held.of(Intervention) is not None:
            chart = effects_chart(held.of(Intervention).effects, visible(held.label))
            rows = held.of(Intervention).effects
            parts += [chart, table_of("effects", rows, f"Effects in {visible(held.label)}", most=200)]
    return Section("interventions", "Interventions", parts_of(*parts)) if done else None


def _effects(runs: Sequence[Contents]) -> Table | None:
    """The main metric of every run and edit."""
    rows, labels = [], []
    for held in runs:
        effects = held.of(Intervention).effects if held.of(Intervention) is not None else frame("effects")
        mine = effects[(effects["metric"] == main_metric(effects)) & (effects["group"] == "all")]
        rows.append(mine)
        labels += [visible(held.label)] * len(mine)
    wanted = ("edit", "layer", "metric", "baseline", "edited", "delta", "ci_low", "ci_high", "n_sequences")
    both = pd.concat(rows, ignore_index=True) if rows else frame("effects")
    made = table_of("effects", both, "Effects of every edit, run by run", wanted, 600, shown_first=True)
    if made is None:
        return None
    label = Column("label", columns_of("compare")["label"][1], labels[:600], labels[:600], False)
    return replace(made, columns=[label, *made.columns])


def sections(runs: Sequence[Contents], c: Comparison) -> list[Section]:
    """The sections of several runs that put them side by side."""
    made = (make(runs, c) for make in (answer, layers, portraits, interventions))
    return [section for section in made if section is not None]
