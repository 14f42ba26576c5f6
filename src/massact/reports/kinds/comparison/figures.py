"""Figures of a comparison: layers (Fig. 10 of Sun 2024), magnitudes (Fig. 9), losses and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D

from massact.records.kinds.comparison import ComparedRun, Comparison
from massact.reports.kinds.scan.curves import CURVES, _plottable
from massact.reports.kinds.scan.portrait import MOST_TOKENS, _dim_ticks, _kept_tokens, _largest, _panel, peaks
from massact.reports.kinds.scan.views import StackView, rule_of, views
from massact.reports.lettering import LARGEST, STACKS, layer_axis, lettered, linear_axis, log_axis, says
from massact.reports.spelling import counted, number, real

MOST_COLUMNS = 3
TITLE = 34  # characters of a label over a panel
WIDE_RANGE = 50.0  # greatest value over greatest median from which on a linear axis would hide the medians
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))


def shown_names(c: Comparison) -> list[str]:
    """What has a curve of its own: every group of seeds, and every run that is in none, in the order given."""
    group_of = {i: name for name, places in c.groups.items() for i in places}
    return list(dict.fromkeys(group_of.get(i, run.label) for i, run in enumerate(c.runs)))


def _looks(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """A colour for each name; beyond the colours also another dash and marker."""
    return {
        name: {"color": STACKS[i % len(STACKS)], "linestyle": DASHES[i // len(STACKS) % len(DASHES)],
               "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }  # fmt: skip


def _named(*parts: str) -> str:
    """A name for a legend, which would leave out one that begins with an underscore."""
    label = ", ".join(x for x in (lettered(part, TITLE) for part in parts) if x)
    return f" {label}" if label.startswith("_") else label


def _grid(figure: Figure, n: int, **options: object) -> list[Axes]:
    """n panels in rows of `MOST_COLUMNS`; those left over in the last row are not drawn."""
    columns = _columns(n)
    panels = figure.subplots(math.ceil(n / columns), columns, squeeze=False, **options).ravel()  # type: ignore[call-overload]
    for left in panels[n:]:
        left.set_visible(False)
    return list(panels[:n])


def _columns(n: int) -> int:
    return 2 if n == 4 else min(n, MOST_COLUMNS)


def _size(n: int, height: float) -> tuple[float, float]:
    columns = _columns(n)
    return max(2.75 * columns + 0.5, 4.2), height * math.ceil(n / columns) + 0.45


# ---------------------------------------------------------------------------------------- Fig. 10
def draw_compare_layers(c: Comparison) -> Figure | None:
    """The three largest |h| and the median of every layer: a panel for each run (or group of seeds), one y axis."""
    names, table = shown_names(c), c.compare_layers
    if not len(table):
        return None
    parts: list[tuple[str, str, pd.DataFrame]] = []
    for name in names:
        mine = table[table["label"] == name]
        split = [("", mine)] if not len(mine) else [
            (", ".join(x for x in key if x and x != "resid_post"), rows)
            for key, rows in mine.groupby(["stack", "site"], sort=False)
        ]  # fmt: skip
        parts += [(name, where, rows) for where, rows in split]
    drawn = pd.concat([rows for *_, rows in parts])
    values = np.concatenate([drawn[name].to_numpy(float) for name, *_ in CURVES])
    tops, medians = (_known(drawn[name].to_numpy(float)) for name in ("top1", "median"))
    log = bool(tops.size and medians.size and tops.max() > WIDE_RANGE * max(medians.max(), 1e-300))
    figure = Figure(figsize=_size(len(parts), 2.45), layout="constrained")
    panels = _grid(figure, len(parts), sharey=True)
    legend: Axes | None = None
    for i, (axes, (name, where, rows)) in enumerate(zip(panels, parts, strict=True)):
        axes.set_title(lettered(", ".join(x for x in (name, where) if x), TITLE))
        (log_axis if log else linear_axis)(axes, values)
        if not len(rows):
            axes.set_visible(True)
            axes.text(0.5, 0.5, "Not scanned.", ha="center", va="center", transform=axes.transAxes)
            axes.set_xticks([])
            continue
        _curves(axes, rows, log)
        legend = legend or axes
        layer_axis(axes, int(rows["layer"].max()))
        if i % _columns(len(parts)) == 0:
            axes.set_ylabel("Magnitude (log)" if log else "Magnitude")
    if legend is not None:
        figure.legend(*legend.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _known(values: np.ndarray) -> np.ndarray:
    return values[(values > 1 / LARGEST) & (values < LARGEST)]


def _by_kind(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Middle, least and greatest of a run (where all are one) or of a group, in the order of the layers."""
    kinds = [rows[rows["row"] == kind].sort_values("layer") for kind in ("mean", "min", "max")]
    if len(kinds[0]):
        return kinds[0], kinds[1], kinds[2]
    run = rows.sort_values("layer")
    return run, run, run


def _curves(axes: Axes, rows: pd.DataFrame, log: bool) -> None:
    middle, low, high = _by_kind(rows)
    size = 3.0 if len(middle) <= 49 else 2.0
    for name, label, colour, marker in CURVES:
        y, least, most = (_plottable(part[name].to_numpy(float), log) for part in (middle, low, high))
        axes.plot(middle["layer"], y, color=colour, marker=marker, markersize=size, label=label, zorder=3)
        if low is not middle:
            axes.fill_between(middle["layer"], least, most, color=colour, alpha=0.18, linewidth=0, zorder=2)


# ---------------------------------------------------------------------------------------- Fig. 9
def draw_compare_magnitudes(c: Comparison) -> Figure | None:
    """|h| of one prompt over tokens and dims, at one layer where that hides nothing, with one z axis.

    Of a group of seeds its first run is drawn, since magnitudes at other places have no mean.
    """
    chosen = []
    for name in shown_names(c):
        places = c.groups.get(name, [i for i, run in enumerate(c.runs) if run.label == name])
        drawable = [c.runs[i] for i in places if _portrait(c.runs[i]) is not None]
        if drawable:
            chosen.append((drawable[0], f"first of {len(places)} seeds" if name in c.groups else ""))
    if not chosen:
        return None
    same = _same_layer([run for run, _ in chosen])
    portraits = [_portrait(run, same) for run, _ in chosen]
    top = max(_largest(found[1]) for found in portraits if found is not None)
    columns = _columns(len(chosen))
    n_rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(3.7 * columns, 3.2 * n_rows))
    for i, ((run, of), found) in enumerate(zip(chosen, portraits, strict=True)):
        assert found is not None and run.scan is not None
        layer, h_TD, tokens = found
        place = ((i % columns + 0.05) / columns, 1 - (i // columns + 0.95) / n_rows, 0.84 / columns, 0.84 / n_rows)
        axes = figure.add_axes(place, projection="3d", computed_zorder=False)
        assert isinstance(axes, Axes3D)
        rule = rule_of(run.scan)
        spikes = peaks(h_TD, rule)
        kept = _kept_tokens(len(tokens), [pos for pos, _ in spikes])
        ticks = _dim_ticks(np.where(np.isfinite(h_TD), h_TD, 0.0), spikes)
        _panel(axes, h_TD, [tokens[pos] for pos in kept], kept, rule, top, ticks)
        known = f", max {number(_largest(h_TD))}" if np.isfinite(h_TD).any() else ""
        part = f", {counted(len(kept), 'token')} of {len(tokens):,}" if len(tokens) > MOST_TOKENS else ""
        second = ", ".join(x for x in (f"layer {layer}{known}{part}", of) if x)
        axes.set_title(f"{lettered(run.label, TITLE)}\n{second}", loc="center", y=0.93, fontsize=9)
    return figure


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
    view = _shown(runs[0])
    return max(1, round(view.n_layers / 2)) if view is not None else None


def _portrait(run: ComparedRun, same: int | None = None) -> tuple[int, np.ndarray, list[str]] | None:
    """Layer, (T, D) magnitudes and tokens of a run, None where it has none.

    Args:
        same: the layer to show, where the run has it and it hides no finding; else the layer that shows most.
    """
    found = run.scan.portrait if run.scan is not None else {}
    if run.scan is None or not {"magnitude", "layers", "tokens"} <= set(found) or 0 in found["magnitude"].shape:
        return None
    magnitude, layers = found["magnitude"].astype(np.float64), [int(x) for x in found["layers"]]  # (P, T, D)
    view = _shown(run)
    span = view.span if view is not None else None
    wanted = [same] if span is None or (same is not None and span[0] <= same <= span[1]) else []
    wanted += [view.shown_layer] if view is not None else []
    at = next((layers.index(x) for x in wanted if x is not None and x in layers), None)
    if at is None:
        at = int(np.argmax([_largest(h_TD) for h_TD in magnitude]))
    return layers[at], magnitude[at], [str(t) for t in found["tokens"]]


# ---------------------------------------------------------------------------------------- losses
def draw_compare_losses(c: Comparison) -> Figure | None:
    """Loss over the steps of every training (over tokens where a step has not the same), evaluations as points."""
    trained = [run for run in c.runs if run.training is not None and len(run.training.training)]
    if not trained:
        return None
    tables = [run.training.training for run in trained if run.training is not None]
    per_step = {round(float((t["tokens"] / t["step"]).iloc[-1]), 3) for t in tables}
    x = "step" if len(per_step) == 1 else "tokens"
    names = shown_names(c)
    looks, group_of = _looks(names), {c.runs[i].label: name for name, places in c.groups.items() for i in places}
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes, seen = figure.subplots(), set()
    for run, table in zip(trained, tables, strict=True):
        name = group_of.get(run.label, run.label)
        look = looks[name]
        loss, held = (table[[x, column]][np.isfinite(table[column])] for column in ("loss", "eval_loss"))
        label = "_" if name in seen else _named(name)
        axes.plot(loss[x], loss["loss"], color=look["color"], linestyle=look["linestyle"], linewidth=1.0,
                  alpha=0.75 if name in c.groups else 1.0, label=label if len(loss) else "_")  # fmt: skip
        axes.plot(held[x], held["eval_loss"], color=look["color"], marker=look["marker"], markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.6, linestyle="none", zorder=4,
                  label="_" if len(loss) else label)  # fmt: skip
        seen.add(name)
    if not any(len(line.get_xdata()) for line in axes.lines):
        says(axes, "No finite loss.")
        return figure
    images = any(run.training is not None and "n_images" in run.training.info.corpus for run in trained)
    axes.set_xlabel("Step" if x == "step" else "Images" if images else "Tokens")
    axes.set_ylabel("Loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(lambda v, _: number(v))
    axes.plot([], [], color="#333333", linewidth=1.0, label="training")
    axes.plot([], [], color="#333333", marker="o", linestyle="none", markersize=4.5, label="held out")
    axes.legend(loc="best")
    return figure


# ---------------------------------------------------------------------------------------- sinks
def draw_compare_sinks(c: Comparison) -> Figure | None:
    """Attention on position 0 and on a learned slot, layer by layer; bands are the range over seeds."""
    table, names = c.compare_layers, shown_names(c)
    if not table[["mass_first", "slot_mass"]].notna().any(axis=None):
        return None
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    looks, handles = _looks(names), {}
    for axes, column, title, lacking in (
        (panels[0], "mass_first", "Attention on the first position", "Not measured."),
        (panels[1], "slot_mass", "Attention on a learned slot", "No run has a learned slot."),
    ):
        for name in names:
            mine = table[table["label"] == name]
            for (stack, site), rows in mine.groupby(["stack", "site"], sort=False):
                if site != "resid_post" and "resid_post" in set(mine["site"]):
                    continue  # the same blocks seen at a second point
                middle, low, high = (part[part["layer"] > 0] for part in _by_kind(rows))
                y = middle[column].to_numpy(float)
                if np.isnan(y).all():
                    continue
                key = (names.index(name), str(stack))
                handles[key] = axes.plot(middle["layer"], y, markersize=3.5, label=_named(name, str(stack)), zorder=3,
                                         **looks[name])[0]  # fmt: skip
                if len(low) and (low[column].to_numpy(float) != y).any():
                    axes.fill_between(middle["layer"], low[column], high[column], color=looks[name]["color"],
                                      alpha=0.18, linewidth=0, zorder=2)  # fmt: skip
        axes.set_title(title)
        axes.set_ylim(-0.03, 1.03)
        layer_axis(axes, int(table["layer"].max()))
        axes.set_xlim(0.5, max(1.5, int(table["layer"].max()) + 0.5))
        if not axes.lines:
            axes.text(0.5, 0.5, lacking, ha="center", va="center", transform=axes.transAxes, color="#333333")
    panels[0].set_ylabel("Share, mean over heads")
    figure.legend(handles=[handles[key] for key in sorted(handles)], loc="outside lower center",
                  ncols=min(4, len(handles)))  # fmt: skip
    return figure


COMPARE_FIGURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "compare_layers": draw_compare_layers,
    "compare_magnitudes": draw_compare_magnitudes,
    "compare_losses": draw_compare_losses,
    "compare_sinks": draw_compare_sinks,
}
