"""A training in a terminal: how it ended, and its massive activations."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.kinds.training import Trained
from massact.records.rules import WORDS
from massact.records.runinfo import duration
from massact.reports.kinds.trajectory.steps import heat_over_steps
from massact.reports.panels import Axis, Color, Line, Panel, column
from massact.reports.parts import Part, Section, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import cell, counted, noted, number, or_dash, real, visible

MOST_LAYERS = 38


def training_in_words(t: Trained) -> list[str]:
    """How a training ended, and its notes, in sentences."""
    c, losses = t.info.config, t.info.losses
    variant = "plain softmax attention" if c.get("variant") == "softmax" else f"the attention {c.get('variant')!r}"
    words = [f"{c.get('name')} with {variant}: {t.info.status}."]
    if losses:
        what = "images" if "n_images" in t.info.corpus else "tokens"
        words.append(
            f"{_count(losses.get('step'))} steps, {_count(losses.get('tokens'))} {what} in {duration(t.info.wall_s)}; "
            f"loss {number(losses.get('train_loss'))} nats, held out {number(losses.get('eval_loss'))}."
        )
    if t.info.error:
        words.append(t.info.error)
    massive = [a for a in t.info.alarms if a.get("level") == "massive"]
    if massive:
        a = massive[0]
        words.append(f"Massive activations ({WORDS}) from step {_count(a.get('step'))} on, "
                     f"first at layer {_count(a.get('layer'))}: {number(a.get('top1'))}, {number(a.get('ratio'))} x "
                     "the median.")  # fmt: skip
    elif len(t.monitor):
        top = t.monitor.loc[t.monitor["ratio"].idxmax()] if t.monitor["ratio"].notna().any() else None
        told = "" if top is None else f"; the greatest ratio was {number(top['ratio'])}, at layer {top['layer']}"
        steps = t.monitor["step"]
        looked = f"(looked at: {counted(steps.nunique(), 'step')}, the last one step {int(steps.max()):,})"
        words.append(f"No massive activations were seen {looked}{told}.")
    return [*words, *noted(t.info.notes)]


def _count(x: object) -> str:
    return f"{real(x):,.0f}"


def _real(x: object) -> bool:
    return isinstance(x, float) and math.isfinite(x)


def section(t: Trained) -> Section:
    """Losses and massive activations over the steps of a training."""
    parts: list[Part | None] = [Words(training_in_words(t)), _losses(t.training)]
    for stack, rows in t.monitor.groupby("stack", sort=False):
        head = f"{visible(stack)}: " if stack else ""
        parts.append(heat_over_steps(rows, "step", "top1", f"{head}Greatest |h|"))
        parts.append(heat_over_steps(rows, "step", "ratio", f"{head}Ratio to the median"))
    parts += [table_of("training", t.training.iloc[::-1], "Losses, the last step first"),
              table_of("monitor", t.monitor.iloc[::-1], "Monitor, the last step first")]  # fmt: skip
    return Section("training", "Training", parts_of(*parts))


SEEN = "How well the model predicts while it trains: lower is better."


def _losses(rows: pd.DataFrame) -> Panel | None:
    lines = []
    for name, label, color in (("loss", "training", Color.BLUE), ("eval_loss", "held out", Color.ORANGE)):
        known = rows[rows[name].notna()]
        said = [f"{label}, step {int(s):,}" for s in known["step"]]
        lines += [Line(column(known, "step"), column(known, name), label, color, said=said)] * bool(len(known))
    return Panel("Loss", lines, Axis("Step"), Axis("Loss (nats)"), sees=SEEN, width="full") if lines else None


def brief(t: Trained) -> list[Section]:
    """The layers at the last observation."""
    last = t.monitor[t.monitor["step"] == t.monitor["step"].max()]
    fits = {(d.get("stack"), real(d.get("layer"))): d.get("r2") for d in t.info.dynamics}
    fitted = any(_real(r) for r in fits.values())
    rows = []
    for _, row in last.head(MOST_LAYERS).iterrows():
        name = f"{row['stack']}/{row['layer']}" if row["stack"] else str(row["layer"])
        r2 = fits.get((row["stack"], row["layer"]), math.nan)
        rows.append(
            [
                visible(name),
                *(cell(row[c]) for c in ("top1", "median", "ratio")),
                *(or_dash(row[c]) for c in ("sink_mass", "value_drain")),
                *[or_dash(r2)] * fitted,
            ]
        )
    heads = (
        "layer",
        "top |h|",
        "median",
        "ratio",
        "attention on\nposition 0",
        "value norm\nratio",
        *["R^2 of\nthe curve"] * fitted,
    )
    title = f"Layers at step {int(last['step'].iloc[0]):,}" if len(last) else ""
    return [Section("monitor", "", parts_of(grid(title, heads, rows)))]


READING = Reading(training_in_words, (section,), brief, table="training")
