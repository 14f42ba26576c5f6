"""What edits did, in words, as a table and as a figure: harmful, harmless or inconclusive, with the interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.intervention import Intervention
from massact.reports.panels import Axis, Color, Limit, Panel, Points, Sheet, column, headed, named_axis
from massact.reports.parts import Column, Facts, Part, Section, Table, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import (
    counted,
    noted,
    number,
    numbered,
    percent,
    real,
    shortened,
    signed,
    spanned,
    visible,
)

HARM = 0.01  # relative change of perplexity, change of accuracy: within it nothing has happened
HARMFUL, HARMLESS, OPEN = "harmful", "harmless", "inconclusive"
EDITS_ABREAST = 4  # columns of one table that a narrow terminal holds


def main_metric(effects: pd.DataFrame) -> str:
    """The metric that a verdict is about: perplexity, accuracy, or else how often the top answer stays."""
    have = set(effects["metric"])
    return next((m for m in ("perplexity", "accuracy", "top1_agreement") if m in have), "")


def verdict(row: pd.Series) -> str:
    """Harmful if the whole interval is beyond the margin, harmless if all of it is within, else inconclusive.

    The margin is 1 % of the perplexity, or 0.01 of the accuracy. An edited value that is not finite is harmful;
    a classifier that is never right shows nothing.
    """
    low, high = real(row["ci_low"]), real(row["ci_high"])
    if row["metric"] == "perplexity":
        if not math.isfinite(real(row["edited"])):
            return HARMFUL
        low, high = low / row["baseline"], high / row["baseline"]
    else:
        low, high = -high, -low  # less is worse
    never_right = row["metric"] == "accuracy" and real(row["baseline"]) == 0  # it cannot get worse
    if math.isnan(low) or math.isnan(high) or never_right:
        return OPEN
    return HARMFUL if low > HARM else HARMLESS if high < HARM and low > -HARM else OPEN


def effects_in_words(e: Intervention) -> list[str]:
    """Put effects into sentences.

    Args:
        e: fresh, or read from a run directory.
    Source: Sun 2024, Table 3; the controls of Owen 2025 and Parodi 2026.
    """
    metric, target = main_metric(e.effects), e.info.target
    rows = e.effects[(e.effects["metric"] == metric) & (e.effects["group"] == "all")]
    said = [
        f"Edited: the massive activations at {_where(target)}, {_which(e.info.config)}; "
        f"effects on {visible(e.info.evaluated_on)}, values estimated on {visible(e.info.estimated_on)}."
    ]
    for _, row in rows.iterrows():
        said.append(f"{_sentence(row)}: {verdict(row)}.")
    if len(rows):
        margin = f"{percent(HARM)} of the perplexity" if metric == "perplexity" else f"{HARM} in {_spaced(metric)}"
        said.append(f"An edit is harmful if its whole interval is worse by more than {margin}, harmless if all of it "
                    f"is within {margin}, else inconclusive.")  # fmt: skip
    groups = e.effects[(e.effects["metric"] == metric) & (e.effects["group"] != "all")]
    for name, mine in groups.groupby("edit", sort=False):
        worst = mine.loc[(mine["delta"] * (1 if metric == "perplexity" else -1)).idxmax()]
        said.append(f"{visible(str(name))} hurts {visible(worst['group'])} most: {_change(worst)}.")
    return said + noted(e.info.notes)


def _where(target: Mapping[str, Any]) -> str:
    """'12.resid_post, dims 247 and 507', of several layers 'resid_post of layers 12-13, dims ... (at layer 12)'."""
    site, dims = visible(str(target.get("site", "?"))), numbered("dim", target.get("dims") or [])
    layers = [int(x) for x in target.get("layers") or []]
    if len(layers) < 2:
        return f"{site}, {dims}"
    return f"{site.rpartition('.')[2]} of {spanned('layer', layers)}, {dims} (those of layer {layers[0]})"


def _which(config: Mapping[str, Any]) -> str:
    return "exactly the findings" if config.get("exact") else "found again by half the size of the smallest finding"


def _sentence(row: pd.Series) -> str:
    fired = f"{counted(int(row['n_elements']), 'element')} in {counted(int(row['n_calls']), 'call')}"
    return f"{visible(row['edit'])} ({fired}): {_spaced(row['metric'])} {_change(row)}"


def _spaced(metric: str) -> str:
    return metric.replace("_", " ")


def _change(row: pd.Series) -> str:
    spell = number if row["metric"] == "perplexity" else percent
    difference = signed(row["delta"]) if row["metric"] == "perplexity" else f"{percent(row['delta'])}"
    low, high = real(row["ci_low"]), real(row["ci_high"])
    within = "no interval" if math.isnan(low) else f"95% interval {spell(low)} to {spell(high)}"
    return f"{spell(row['baseline'])} to {spell(row['edited'])} ({difference}, {within})"


def draw_effects(e: Intervention) -> Sheet | None:
    """The change of the main metric under each edit, with its interval."""
    panel = effects_panel(e.effects)
    return Sheet([panel], f"Edits at {visible(str(e.info.target.get('site', '?')))}") if panel else None


VERDICTS = {HARMFUL: (Color.LIMIT, "diamond"), HARMLESS: (Color.GREEN, "circle"), OPEN: (Color.GREY, "square")}


def section(e: Intervention) -> Section:
    """What edits of the massive activations do, with intervals and controls (Sun 2024, Table 3)."""
    parts: list[Part | None] = [Words(effects_in_words(e)), effects_panel(e.effects)]
    metrics = e.effects.assign(harm=[_judged(row, main_metric(e.effects)) for _, row in e.effects.iterrows()])
    table = table_of("effects", e.effects, "Effects of every edit on every metric", most=600, shown_first=True)
    if table is not None:
        said = [str(x) for x in metrics["harm"].head(600)]
        meaning = "harmful: the whole interval is beyond 1% of the perplexity (0.01 of an accuracy); harmless: all of "
        column = Column("verdict", f"{meaning}it is within; of the main metric only", said, said, False)
        table = replace(table, columns=_after(table.columns, "metric", column))
    return Section("interventions", "Interventions", parts_of(*parts, _head(e.info.config.get("head")), table))


def _head(record: Any) -> Facts | None:
    """The head that was built for a model without one; None where the model has its own."""
    if not isinstance(record, dict):
        return None
    names = {"kind": "Kind", "n_classes": "Classes", "templates": "Prompts, {} is the class",
             "classes": "First classes", "classes_sha256": "Classes, SHA-256", "file": "File",
             "sha256": "SHA-256", "reads": "Reads"}  # fmt: skip
    pairs = []
    for key, name in names.items():
        value = record.get(key)
        if value is not None:
            texts = value if isinstance(value, list) else [value]
            pairs.append((name, "; ".join(shortened(visible(str(text)), 120) for text in texts)))
    return Facts(pairs, "Head that gave the classes")


def _after(columns: Sequence[Column], name: str, new: Column) -> list[Column]:
    """The columns with a new one behind that of a name."""
    place = [c.name for c in columns].index(name) + 1
    return [*columns[:place], new, *columns[place:]]


def _judged(row: pd.Series, metric: str) -> str:
    return verdict(row) if row["metric"] == metric else "not judged"


def effects_panel(effects: pd.DataFrame, title: str = "") -> Panel | None:
    """The change of the main metric under each edit, with its interval."""
    metric = main_metric(effects)
    rows = effects[(effects["metric"] == metric) & (effects["group"] == "all")]
    if not len(rows):
        return None
    names, verdicts = [visible(name) for name in rows["edit"]], [verdict(row) for _, row in rows.iterrows()]
    delta, low, high = (column(rows, name) for name in ("delta", "ci_low", "ci_high"))
    said = [f"{n}: {v}, 95% interval {a:.4g} to {b:.4g}" for n, v, a, b in zip(names, verdicts, low, high, strict=True)]
    colors, symbols = zip(*(VERDICTS[v] for v in verdicts), strict=True)
    points = Points(delta, range(len(names)), colors, symbols, low, high, said)
    base, spaced = real(rows["baseline"].iloc[0]), metric.replace("_", " ")
    unseen = [n for n, d in zip(names, delta, strict=True) if not math.isfinite(d)]
    caption = f"Without an edit {spaced} is {base:.4g}. Bars: 95% intervals. Red diamonds: "
    caption += "harmful; green circles: harmless; grey squares: inconclusive."
    left_out = f"Not finite, so not drawn: {', '.join(unseen)}." if unseen else ""
    known = number(base) if math.isfinite(base) else "not finite"
    x = _change_axis(np.concatenate([delta, low, high]), base, f"Change of {spaced} (without edit: {known})")
    head, y = "change under each edit" if title else "Change under each edit", named_axis(names, slots=3)
    nothing, height = Limit(0.0, upright=True, color=Color.MUTED), 90 + 44 * max(len(names), 3)
    return Panel(headed(title, head), [points], x, y, caption, left_out, [nothing], height=height, width="full")


def _change_axis(values: np.ndarray, base: float, title: str) -> Axis:
    """Logarithmic to both sides of what counts as nothing, so that a harm does not hide the harmless."""
    near = 10.0 ** math.floor(math.log10(max(HARM * base if math.isfinite(base) else 0.0, 1e-3)))
    far = max([near, *np.abs(values[np.isfinite(values)])])
    decades = near * 10.0 ** np.arange(0, max(1, math.ceil(math.log10(far / near)) + 1))
    ticks = [(float(x), number(x)) for x in (*-decades[::-1], 0.0, *decades)]
    return Axis(title, "symlog", ticks=ticks, near=near)


def brief(e: Intervention) -> list[Section]:
    """A line for each metric, a column for each edit, group by group."""
    made: list[Table | None] = []
    for group, rows in e.effects.groupby("group", sort=False):
        edits = list(dict.fromkeys(rows["edit"]))
        for start in range(0, len(edits), EDITS_ABREAST):
            few = rows[rows["edit"].isin(edits[start : start + EDITS_ABREAST])]
            made.append(_changes(few, "" if group == "all" else str(group)))
    return [Section("effects", "", parts_of(*made))]


def _changes(effects: pd.DataFrame, group: str) -> Table | None:
    """The change of each metric by each edit, starred where the interval leaves out zero."""
    edits, lines = list(dict.fromkeys(effects["edit"])), []
    for metric, mine in effects.groupby("metric", sort=False):
        by_edit = {row["edit"]: row for _, row in mine.iterrows()}
        before = [real(row["baseline"]) for row in by_edit.values()]
        # Sink statistics are of the layers behind an edit, so edits at different layers differ in them.
        same = all(b == before[0] or abs(b - before[0]) <= 1e-6 * abs(before[0]) for b in before)
        lines.append(
            [
                _spaced(visible(str(metric))),
                number(before[0]) if same else "varies",
                *(_starred(by_edit[edit]) if edit in by_edit else "-" for edit in edits),
            ]
        )
    of = f" of {visible(group)}" if group else ""
    nats = "; nll and kl in nats" if {"nll", "kl"} & set(effects["metric"]) else ""
    heads = ["<metric", "without", *(f">{shortened(visible(str(edit)), 24)}" for edit in edits)]
    return grid(f"Change by each edit{of} (*: zero is outside of the 95% interval{nats})", heads, lines)


def _starred(row: pd.Series) -> str:
    low, high = real(row["ci_low"]), real(row["ci_high"])
    return signed(row["delta"]) + ("*" if low > 0 or high < 0 else " ")


READING = Reading(effects_in_words, (section,), brief, figures={"effects": draw_effects}, table="effects")
