"""Sections of the other verbs: interventions, classic works, trainings, checkpoints, the toy lab."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.classics import Classics
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.lab import Lab
from massact.records.kinds.reproduction import AGREES, DIFFERS, Reproduction
from massact.records.kinds.training import Trained
from massact.records.kinds.trajectory import Trajectory
from massact.reports.effects import HARMFUL, HARMLESS, OPEN, main_metric, verdict
from massact.reports.legible import real, shortened, visible
from massact.reports.page import charts, scanned
from massact.reports.page.held import Held
from massact.reports.page.markup import figure_text
from massact.reports.page.parts import Chart, Column, Facts, Part, Section, parts_of, table_of
from massact.reports.readings import READINGS

VERDICTS = {HARMFUL: ("--limit", "diamond"), HARMLESS: ("--s3", "circle"), OPEN: ("--s6", "square")}


def interventions(held: Held) -> Section | None:
    """What edits of the massive activations do, with intervals and controls (Sun 2024, Table 3)."""
    e = held.of(Intervention)
    if e is None:
        return None
    parts: list[Part | None] = [scanned.words_of(held, "intervention"), effects_chart(e.effects)]
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


def effects_chart(effects: pd.DataFrame, title: str = "") -> Chart | None:
    """The change of the main metric under each edit, with its interval."""
    metric = main_metric(effects)
    rows = effects[(effects["metric"] == metric) & (effects["group"] == "all")]
    if not len(rows):
        return None
    names = [f"{row['edit']}" for _, row in rows.iterrows()]
    delta = charts.rows_of(rows, "delta")
    low, high = (charts.rows_of(rows, c) for c in ("ci_low", "ci_high"))
    reach = [(d - a, b - d) if math.isfinite(a) and math.isfinite(b) else (0.0, 0.0)
             for d, a, b in zip(delta, low, high, strict=True)]  # fmt: skip
    said = [figure_text(f"{n}: {verdict(row)}, 95% interval {a:.4g} to {b:.4g}", 120)
            for n, (_, row), a, b in zip(names, rows.iterrows(), low, high, strict=True)]  # fmt: skip
    looks = [VERDICTS[verdict(row)] for _, row in rows.iterrows()]
    trace = {
        "type": "scatter", "mode": "markers", "x": charts.drawable(delta), "y": list(range(len(names))),
        "marker": {"size": 9, "color": [color for color, _ in looks], "symbol": [symbol for _, symbol in looks]},
        "error_x": {"type": "data", "symmetric": False, "array": charts.drawable([b for _, b in reach]),
                    "arrayminus": charts.drawable([a for a, _ in reach]), "color": "--muted", "thickness": 1.4},
        "text": said, "hovertemplate": "%{text}<br>change %{x:+.4~g}<extra></extra>",
    }  # fmt: skip
    layout = charts.bar_layout(names, f"Change of {metric.replace('_', ' ')}")
    layout["yaxis"]["showgrid"] = True
    layout["xaxis"] = {"title": layout["xaxis"]["title"], "zeroline": True, "zerolinewidth": 1}
    base = real(rows["baseline"].iloc[0])
    unseen = [n for n, d in zip(names, delta, strict=True) if not math.isfinite(d)]
    caption = f"Without an edit {metric.replace('_', ' ')} is {base:.4g}. Bars: 95% intervals. Red diamonds: "
    caption += "harmful; green circles: harmless; grey squares: inconclusive."
    caption += f" Not finite, so not drawn: {', '.join(visible(n) for n in unseen)}." if unseen else ""
    head = f"{title}: change under each edit" if title else "Change under each edit"
    return Chart(head, [trace], layout, caption, 90 + 44 * max(len(names), 3))


def classic_works(held: Held) -> Section | None:
    """What the works that the paper grew from find on this model."""
    c = held.of(Classics)
    if c is None:
        return None
    return Section("classics", "Classic works", parts_of(
        scanned.words_of(held, "classics"),
        table_of("classics", c.classics, "All that was measured", most=500),
        table_of("classic_effects", c.classic_effects, "What their edits did"),
    ))  # fmt: skip


def founding_paper(held: Held) -> Section | None:
    """The experiments of Sun 2024 on this model, beside what was published of it."""
    r = held.of(Reproduction)
    if r is None:
        return None
    columns = ("experiment", "quantity", "stack", "layer", "place", "unit", "ours", "ours_text", "published",
               "published_text", "tag", "source", "verdict", "reason")  # fmt: skip
    compared = r.reproduced[r.reproduced["verdict"].isin((AGREES, DIFFERS))]
    return Section("paper", "The founding paper, redone", parts_of(
        scanned.words_of(held, "reproduction"),
        table_of("reproduced", compared, "Beside published values", columns, shown_first=True),
        table_of("reproduced", r.reproduced[r.reproduced["headline"]], "What the lines say", columns, most=400),
    ))  # fmt: skip


def training(held: Held) -> Section | None:
    """Losses and massive activations over the steps of a training."""
    t = held.of(Trained)
    if t is None:
        return None
    parts: list[Part | None] = [scanned.words_of(held, "training"), _losses(t.training)]
    for stack, rows in t.monitor.groupby("stack", sort=False):
        parts.append(_over_steps(rows, "step", "top1", f"{visible(stack) + ': ' if stack else ''}Greatest |h|"))
        parts.append(_over_steps(rows, "step", "ratio", f"{visible(stack) + ': ' if stack else ''}Ratio to the median"))
    parts += [table_of("training", t.training.iloc[::-1], "Losses, the last step first"),
              table_of("monitor", t.monitor.iloc[::-1], "Monitor, the last step first")]  # fmt: skip
    return Section("training", "Training", parts_of(*parts))


def _losses(rows: pd.DataFrame) -> Chart | None:
    data = []
    for column, name, color in (("loss", "training", "--s1"), ("eval_loss", "held out", "--s2")):
        known = rows[rows[column].notna()]
        if len(known):
            data.append(charts.line(known["step"], known[column], name, color, text=[
                f"{name}, step {int(s):,}" for s in known["step"]]))  # fmt: skip
    layout = {"xaxis": {"title": {"text": "Step"}}, "yaxis": {"title": {"text": "Loss (nats)"}}}
    return Chart("Loss", data, layout, "", 320) if data else None


def _over_steps(rows: pd.DataFrame, x: str, column: str, title: str) -> Chart | None:
    """log10 of a column at every layer, over steps or checkpoints."""
    order = list(dict.fromkeys(rows[x]))
    table = rows.pivot_table(index="layer", columns=x, values=column, aggfunc="first", dropna=False)
    values = table.reindex(columns=order).to_numpy(float)
    log_LN = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    if not np.isfinite(log_LN).any():
        return None
    names = [f"{int(s):,}" if isinstance(s, int | float) and math.isfinite(s) else visible(str(s)) for s in order]
    text = [[figure_text(f"{x} {n}, layer {int(y)}: {v:.4g}", 90) for n, v in zip(names, row, strict=True)]
            for y, row in zip(table.index, values, strict=True)]  # fmt: skip
    data = [charts.heat(log_LN, list(range(len(order))), [int(y) for y in table.index], low=None, high=None,
                        what="log10", text=text)]  # fmt: skip
    at = list(range(0, len(order), max(1, -(-len(order) // 8))))
    layout = {"xaxis": {"title": {"text": x.capitalize()}, "tickmode": "array", "tickvals": at, "showgrid": False,
                        "ticktext": [figure_text(names[i], 16) for i in at]},
              "yaxis": {"title": {"text": "Layer"}, "showgrid": False, "dtick": max(1, len(table) // 8)}}  # fmt: skip
    return Chart(f"{title}, log10", data, layout, "What is not finite is left empty.", 320, width="half")


def checkpoints(held: Held) -> Section | None:
    """Where in a training massive activations emerge, over published checkpoints."""
    t = held.of(Trajectory)
    if t is None:
        return None
    parts: list[Part | None] = [scanned.words_of(held, "trajectory")]
    for (stack, site), rows in t.revisions.groupby(["stack", "site"], sort=False):
        head = f"{visible(stack)} {visible(site)}: " if t.revisions[["stack", "site"]].nunique().max() > 1 else ""
        most = rows.groupby("revision", sort=False)["ratio"].max()
        names = [visible(str(n)) for n in most.index]
        curve = charts.line(range(len(most)), most, "greatest of any layer", "--s1",
                            text=[figure_text(n) for n in names])  # fmt: skip
        at = list(range(0, len(names), max(1, -(-len(names) // 8))))
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": "Checkpoint"}, "tickmode": "array", "tickvals": at,
                      "ticktext": [figure_text(names[i], 16) for i in at]},
            "yaxis": {"title": {"text": "Ratio"}, **charts.log_axis(most)},
            "showlegend": False,
        }  # fmt: skip
        parts += [Chart(f"{head}Top 1 / median over the training", [curve], layout, "", 320, log=True, width="half"),
                  _over_steps(rows, "revision", "ratio", f"{head}Ratio of each layer")]  # fmt: skip
    parts.append(table_of("revisions", t.revisions, "Every checkpoint and layer", most=600))
    return Section("checkpoints", "Checkpoints", parts_of(*parts))


def toy_lab(held: Held) -> Section | None:
    """The toy lab: losses, attention on the first position and effects of every variant."""
    lab = held.of(Lab)
    if lab is None:
        return None
    parts: list[Part | None] = [scanned.words_of(held, "lab")]
    parts += [_over_the_steps(lab, *panel) for panel in (
        ("backcopy_nats", "Loss of targets that repeat"), ("first_attention", "Attention on the first position"),
        ("top1", "Greatest |h|"))]  # fmt: skip
    parts += [table_of("lab", lab.lab.groupby("variant", sort=False).tail(1), "Every variant at the end",
                       shown_first=True),
              table_of("lab_effects", lab.lab_effects, "Effects of edits"),
              table_of("lab", lab.lab, "Every measurement")]  # fmt: skip
    return Section("lab", "Toy lab", parts_of(*parts))


def of_other_packages(held: Held) -> Section | None:
    """Results of kinds that other packages add: their words, and every table."""
    parts: list[Part | None] = []
    for kind, result in held.results.items():
        if kind not in READINGS:
            parts.append(scanned.words_of(held, kind))
            parts += [table_of(name, rows, f"{kind}: {name}", most=600, shown_first=True)
                      for name, rows in result.tables().items()]  # fmt: skip
    return Section("others", "Results of other packages", parts_of(*parts)) if parts else None


def _over_the_steps(lab: Lab, column: str, title: str) -> Chart | None:
    """A curve of a column for every variant that has it."""
    data = []
    for i, name in enumerate(lab.variants):
        rows = lab.lab[lab.lab["variant"] == name]
        if rows[column].notna().any():
            said = [f"{figure_text(name)}, step {int(s):,}" for s in rows["step"]]
            color = charts.SERIES[i % len(charts.SERIES)]
            data.append(charts.line(rows["step"], rows[column], name, color, text=said))
    return Chart(title, data, {"xaxis": {"title": {"text": "Step"}}}, "", 300, width="third") if data else None
