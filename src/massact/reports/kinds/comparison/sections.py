"""Sections of several runs: side by side, their layers in one figure, then the answer of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from massact.records.kinds.comparison import Comparison
from massact.records.kinds.intervention import Intervention
from massact.records.tables import columns_of, frame
from massact.reports.contents import Contents
from massact.reports.kinds.comparison import figures
from massact.reports.kinds.comparison.tables import deltas, differences, layer_deltas, places, side_by_side
from massact.reports.kinds.comparison.words import told
from massact.reports.kinds.intervention import effects_panel, main_metric, margin_of, with_verdicts
from massact.reports.panels import parts_in
from massact.reports.parts import MOST_SAVED, Column, Part, Section, Table, Words, parts_of, said_where_empty, table_of
from massact.reports.spelling import visible

MOST_SCENES = 6


def answer(runs: Sequence[Contents], c: Comparison) -> Section:
    """What differs, in words, and the numbers of every run."""
    tables = (side_by_side(c, "run", "Runs side by side"), deltas(c), places(c))
    means = side_by_side(c, "mean", "Over seeds: means")
    return Section("answer", "Answer", parts_of(Words(told(c), True), *tables, means))


def survival(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """What became of every cluster in the quantised forms of a model."""
    made = table_of("survival", c.survival, "Clusters of each model, and of its quantised form", most=400)
    return Section("survival", "Quantised", parts_of(made)) if made is not None else None


def layers(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """The layers of all runs in one figure (Sun 2024, Fig. 10)."""
    rows = c.compare_layers[c.compare_layers["row"] == "run"]
    if not len(rows):
        return None
    labels = list(dict.fromkeys(rows["label"]))
    parts: list[Part | None] = [*figures.overlays(c), *parts_in(figures.draw_compare_layers(c))]
    parts += figures.sinks(c, labels)
    parts.append(table_of("compare_layers", rows, "Layers of every run", ("label", "stack", "site", "layer", "top1",
                          "top2", "top3", "median", "mass_first", "slot_mass"), most=1000))  # fmt: skip
    parts.append(layer_deltas(c))
    return Section("layers", "Layers", parts_of(*parts))


def portraits(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """|h| of the prompt of each run at the layer where it is greatest (Sun 2024, Fig. 9)."""
    made = figures.scenes([(run, "") for run in c.runs[:MOST_SCENES]])
    return Section("portrait", "One prompt in three dimensions", said_where_empty(made)) if made else None


def losses(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """The losses of all trainings."""
    parts = parts_of(*parts_in(figures.draw_compare_losses(c)))
    return Section("losses", "Losses", parts) if parts else None


def interventions(runs: Sequence[Contents], c: Comparison) -> Section | None:
    """What the edits of each run do to its main metric, in one table, and with intervals."""
    found = [(visible(held.label), made) for held in runs if (made := held.of(Intervention)) is not None]
    done = [(label, with_verdicts(made.effects, margin_of(made))) for label, made in found]
    parts: list[Part | None] = [_effects(done), _effect_deltas(done)]
    for (label, rows), (_, made) in zip(done, found, strict=True):
        parts += [
            effects_panel(rows, label, margin_of(made)),
            table_of("effects", rows, f"Effects in {label}", most=200),
        ]
    return Section("interventions", "Interventions", parts_of(*parts)) if done else None


def _effects(done: Sequence[tuple[str, pd.DataFrame]]) -> Table | None:
    """The main metric of every run and edit."""
    rows, labels = [], []
    for name, effects in done:
        mine = effects[(effects["metric"] == main_metric(effects)) & (effects["group"] == "all")]
        rows.append(mine)
        labels += [name] * len(mine)
    wanted = ("edit", "layer", "metric", "baseline", "edited", "delta", "ci_low", "ci_high", "verdict", "n_needed",
              "delta_nats", "nats_low", "nats_high", "share_of_zero", "share_low", "share_high",
              "n_sequences")  # fmt: skip
    both = pd.concat(rows, ignore_index=True) if rows else frame("effects")
    made = table_of("effects", both, "Effects of every edit, run by run", wanted, 600, shown_first=True)
    if made is None:
        return None
    label = Column("label", columns_of("compare")["label"][1], labels[:600], labels[:600], False)
    whole = both.assign(label=labels).head(MOST_SAVED)
    return replace(made, columns=[label, *made.columns], whole=whole[["label", *both]])


def _effect_deltas(done: Sequence[tuple[str, pd.DataFrame]]) -> Table | None:
    """How what an edit does differs from what it does in the first run, of edits and metrics that both have."""
    by = []
    for _, effects in done:
        mine = effects[(effects["metric"] == main_metric(effects)) & (effects["group"] == "all")]
        by.append(mine.drop_duplicates(["stack", "edit"]).set_index(["stack", "edit", "metric"])["delta"])
    rows = [
        (visible(" ".join(filter(None, at))), [of.get(at, math.nan) for of in by], False)
        for at in (by[0].index if by else ())
    ]
    meaning = "the edit and the metric whose change by it is compared"
    return differences("What edits do: difference", [name for name, _ in done], rows, meaning)


def sections(runs: Sequence[Contents], c: Comparison) -> list[Section]:
    """The sections of several runs that put them side by side."""
    made = (make(runs, c) for make in (answer, survival, losses, layers, portraits, interventions))
    return [section for section in made if section is not None]
