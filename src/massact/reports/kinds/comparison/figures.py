"""Panels of a comparison: layers (Fig. 10 of Sun 2024), magnitudes (Fig. 9), losses and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from massact.records.kinds.comparison import ComparedRun, Comparison
from massact.reports import panels
from massact.reports.kinds.scan.curves import CURVES
from massact.reports.kinds.scan.portrait import dim_ticks, has_portrait, kept_tokens, largest, peaks, scene_of
from massact.reports.kinds.scan.views import StackView, rule_of, views
from massact.reports.panels import Axis, Color, Line, Panel, Scene, Sheet
from massact.reports.spelling import real, shortened, visible

TITLE = 34  # characters of a label over a panel
WIDE_RANGE = 50.0  # greatest value over greatest median from which on a linear axis would hide the medians


def shown_names(c: Comparison) -> list[str]:
    """What has a curve of its own: every group of seeds, and every run that is in none, in the order given."""
    group_of = {i: name for name, places in c.groups.items() for i in places}
    return list(dict.fromkeys(group_of.get(i, run.label) for i, run in enumerate(c.runs)))


def _by_kind(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Middle of a run or of a group, and of a group the least and the greatest, in the order of the layers."""
    kinds = [rows[rows["row"] == kind].sort_values("layer") for kind in ("mean", "min", "max")]
    return kinds if len(kinds[0]) else [rows.sort_values("layer")]


def _line(rows: pd.DataFrame, name: str, label: str, **look: str) -> Line:
    """The middle of a column over layers, with a band from the least to the greatest of a group."""
    middle, *ends = _by_kind(rows)
    low, high = (panels.column(part, name) for part in ends) if ends else (None, None)
    return Line(panels.column(middle, "layer"), panels.column(middle, name), label, **look, low=low, high=high)


# ---------------------------------------------------------------------------------------- Fig. 10
def draw_compare_layers(c: Comparison) -> Sheet | None:
    """The three largest |h| and the median of every layer: a panel for each run (or group of seeds), one y axis."""
    table, parts = c.compare_layers, []
    if not len(table):
        return None
    for name in shown_names(c):
        mine = table[table["label"] == name]
        parts += [
            (name, ", ".join(visible(x) for x in key if x and x != "resid_post"), rows)
            for key, rows in mine.groupby(["stack", "site"], sort=False)
        ] or [(name, "", mine)]
    drawn = pd.concat([rows for *_, rows in parts])
    tops, medians = (panels.shown(drawn[name], log=True) for name in ("top1", "median"))
    known = bool(np.isfinite(tops).any() and np.isfinite(medians).any())
    log = known and np.nanmax(tops) > WIDE_RANGE * max(np.nanmax(medians), 1e-300)
    values = drawn[[name for name, *_ in CURVES]]
    y = panels.log_axis(values, "Magnitude (log)") if log else panels.linear_axis(values, "Magnitude")
    width = "half" if len(parts) in (1, 2, 4) else "third"
    made, seen = [], "How large the largest numbers are in this run, on the same axis as in the others."
    for name, where, rows in parts:
        title = shortened(", ".join(x for x in (visible(name), where) if x), TITLE)
        lines = [_line(rows, column, label, color=color, symbol=symbol) for column, label, color, symbol in CURVES]
        last = int(rows["layer"].max()) if len(rows) else 1
        bands = "" if len(rows) and (rows["row"] == "run").all() else "Lines: mean over seeds; bands: their range."
        x = panels.layer_axis(last)
        made.append(Panel(title, lines * bool(len(rows)), x, y, bands, sees=seen, width=width, empty="Not scanned."))
    return Sheet(made)


# ---------------------------------------------------------------------------------------- Fig. 9
def draw_compare_magnitudes(c: Comparison) -> Sheet | None:
    """|h| of one prompt over tokens and dims, at one layer where that hides nothing, with one z axis.

    Of a group of seeds its first run is drawn, since magnitudes at other places have no mean.
    """
    chosen = []
    for name in shown_names(c):
        places = c.groups.get(name, [i for i, run in enumerate(c.runs) if run.label == name])
        drawable = [c.runs[i] for i in places if has_portrait(c.runs[i].scan)]
        if drawable:
            chosen.append((drawable[0], f"first of {len(places)} seeds" if name in c.groups else ""))
    return Sheet(scenes(chosen)) or None


def scenes(chosen: Sequence[tuple[ComparedRun, str]]) -> list[Scene]:
    """A scene for each of the runs that have a portrait, with what is said of each."""
    kept = [(run, said) for run, said in chosen if has_portrait(run.scan)]
    same = _same_layer([run for run, _ in kept])
    portraits = [_portrait(run, same) for run, _ in kept]
    made, top = [], max((largest(h_TD) for _, h_TD, _ in portraits), default=0.0)
    for (run, said), (layer, h_TD, tokens) in zip(kept, portraits, strict=True):
        assert run.scan is not None
        rule = rule_of(run.scan)
        spikes = peaks(h_TD, rule)
        title = ", ".join(x for x in (shortened(visible(run.label), TITLE), f"layer {layer}", said) if x)
        shown_tokens = kept_tokens(len(tokens), [pos for pos, _ in spikes])
        made.append(scene_of(h_TD, title, tokens, shown_tokens, rule, top, dim_ticks(h_TD, spikes)))
    return made


def _shown(run: ComparedRun) -> StackView | None:
    """The stack that the portrait of a run is of."""
    stack = str(run.scan.portrait.get("stack", "")) if run.scan is not None else ""
    return next((v for v in views(run.scan) if v.stack == stack), None) if run.scan is not None else None


def _same_layer(runs: Sequence[ComparedRun]) -> int | None:
    """A layer to show all runs at: that of the largest finding, else the middle one of the first run."""
    answers = [view.answer for run in runs if (view := _shown(run)) is not None]
    found = [(real(a.peak.magnitude), a.peak.layer) for a in answers if a is not None and a.peak is not None]
    if found:
        return max(found, key=lambda x: -1.0 if math.isnan(x[0]) else x[0])[1]
    view = _shown(runs[0]) if runs else None
    return max(1, round(view.n_layers / 2)) if view is not None else None


def _portrait(run: ComparedRun, same: int | None = None) -> tuple[int, np.ndarray, list[str]]:
    """Layer, (T, D) magnitudes and tokens of a run.

    Args:
        same: the layer to show, where the run has it and it hides no finding; else the layer that shows most.
    """
    assert run.scan is not None
    found, view = run.scan.portrait, _shown(run)
    magnitude, layers = found["magnitude"].astype(np.float64), [int(x) for x in found["layers"]]  # (P, T, D)
    span = view.span if view is not None else None
    wanted = [same] if span is None or (same is not None and span[0] <= same <= span[1]) else []
    wanted += [view.shown_layer] if view is not None else []
    at = next((layers.index(x) for x in wanted if x is not None and x in layers), None)
    if at is None:
        at = int(np.argmax([largest(h_TD) for h_TD in magnitude]))
    return layers[at], magnitude[at], [str(t) for t in found["tokens"]]


# ---------------------------------------------------------------------------------------- losses
def draw_compare_losses(c: Comparison) -> Sheet | None:
    """Loss over the steps of every training (over tokens where a step has not the same), evaluations as points."""
    trained = [run for run in c.runs if run.training is not None and len(run.training.training)]
    if not trained:
        return None
    tables = [run.training.training for run in trained if run.training is not None]
    per_step = {round(float((t["tokens"] / t["step"]).iloc[-1]), 3) for t in tables}
    x = "step" if len(per_step) == 1 else "tokens"
    names, lines, seen = shown_names(c), [], set()
    look_of = dict(zip(names, panels.looks(len(names)), strict=True))
    group_of = {c.runs[i].label: name for name, places in c.groups.items() for i in places}
    for run, table in zip(trained, tables, strict=True):
        name = group_of.get(run.label, run.label)
        look, label = look_of[name], "" if name in seen else visible(name)
        seen.add(name)
        for of, told, own in (("loss", "training", {"symbol": ""}), ("eval_loss", "held out", {"dash": ""})):
            known = table[np.isfinite(table[of])]
            said = [f"{visible(run.label)}, {told}, {x} {int(s):,}" for s in known[x]]
            if len(known):
                lines.append(Line(panels.column(known, x), panels.column(known, of), label, **(look | own), said=said))
                label = ""
    if not lines:
        return Sheet([Panel("Loss", empty="No finite loss.")])
    lines += [Line([], [], "training", Color.MUTED, ""), Line([], [], "held out", Color.MUTED, "circle", "")]
    images = any(run.training is not None and "n_images" in run.training.info.corpus for run in trained)
    along = Axis("Step" if x == "step" else "Images" if images else "Tokens", whole=True)
    sees = "How well each model predicts while it trains: lower is better; curves that coincide cost nothing."
    return Sheet([Panel("Loss", lines, along, Axis("Loss (nats)"), sees=sees)])


# ---------------------------------------------------------------------------------------- sinks
def draw_compare_sinks(c: Comparison) -> Sheet | None:
    """Attention on position 0 and on a learned slot, layer by layer; bands are the range over seeds."""
    known = c.compare_layers[["mass_first", "slot_mass"]].notna().any(axis=None)
    return Sheet(sinks(c, shown_names(c))) if known else None


def sinks(c: Comparison, names: Sequence[str]) -> list[Panel]:
    """Attention on position 0 and on a learned slot of runs and groups of these names."""
    table, made = c.compare_layers, []
    for name, title, lacking in (
        ("mass_first", "Attention on the first position", "Not measured."),
        ("slot_mass", "Attention on a learned slot", "No run has a learned slot."),
    ):
        lines = []
        for label, look in zip(names, panels.looks(len(names)), strict=True):
            mine = table[table["label"] == label]
            for (stack, site), rows in mine.groupby(["stack", "site"], sort=False):
                if site != "resid_post" and "resid_post" in set(mine["site"]):
                    continue  # the same blocks seen at a second point
                line = _line(rows[rows["layer"] > 0], name, ", ".join(visible(x) for x in (label, stack) if x), **look)
                lines += [line] * bool(np.isfinite(line.y).any())
        last = int(table["layer"].max()) if len(table) else 1
        y = panels.share_axis("Share, mean over heads")
        sees = "How much attention goes there in each run: what removes sinks brings the curve down."
        made.append(Panel(title, lines, panels.layer_axis(last), y, sees=sees, empty=lacking))
    return made


# ---------------------------------------------------------------------------------------- all runs in one
def overlays(c: Comparison) -> list[Panel]:
    """The greatest and the median |h| of every layer, all runs in one panel."""
    rows = c.compare_layers[c.compare_layers["row"] == "run"]
    several, made = len(rows[["stack", "site"]].drop_duplicates()) > 1, []
    for (stack, site), mine in rows.groupby(["stack", "site"], sort=False):
        labels = list(dict.fromkeys(mine["label"]))
        for name, title in (("top1", "Greatest |h|"), ("median", "Median |h|")):
            known = mine[mine[name].notna()]
            lines = [
                _line(part, name, visible(str(label)), **look)
                for label, look in zip(labels, panels.looks(len(labels)), strict=True)
                if len(part := known[known["label"] == label])
            ]
            head = panels.headed((visible(stack) or visible(site)) if several else "", f"{title} of each layer")
            x, y = panels.layer_axis(int(mine["layer"].max())), panels.log_axis(known[name], title)
            sees = "All runs over the same layers: where the curves part, the models differ."
            made += [Panel(head, lines, x, y, "Mean over sequences.", sees=sees, both=True)] * bool(lines)
    return made


COMPARE_FIGURES: dict[str, Callable[[Comparison], Sheet | None]] = {
    "compare_layers": draw_compare_layers,
    "compare_magnitudes": draw_compare_magnitudes,
    "compare_losses": draw_compare_losses,
    "compare_sinks": draw_compare_sinks,
}
