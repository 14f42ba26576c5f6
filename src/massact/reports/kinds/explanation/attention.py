"""Figures of an explanation: attention maps, three axes, heads, the bias, the writers, the trajectory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from massact.records.kinds.explanation import Explanation
from massact.reports.lettering import PLAIN, STACKS, TOP_1, TOP_2, TOP_3, WARNING, lettered, log_axis, says, token_label

HEADS = "YlGnBu"  # the colours of Figs. 5 and 6 of Sun 2024
LABELLED = 40  # tokens of a map that still have a label each
MOST_COORDINATES = 4
STAGES = ("hidden", "normed", "q", "k", "v")


def draw_maps(e: Explanation) -> Figure | None:
    """Mean logits and probabilities of a prompt, before, at and after the onset (Sun 2024, Figs. 5 and 6)."""
    if not e.maps:
        return None
    layers, tokens = e.maps["layers"], [token_label(t) for t in e.maps["tokens"]]
    figure = Figure(figsize=(2.9 * len(layers) + 0.8, 6.2), layout="constrained")
    grid = figure.subplots(2, len(layers), squeeze=False)
    for row, name in enumerate(("logits", "probs")):
        values = np.ma.masked_invalid(e.maps[name])
        if name == "probs":
            values = np.ma.masked_where(np.ma.getmask(np.ma.masked_invalid(e.maps["logits"])), values)
        low, high = (0.0, 1.0) if name == "probs" else (float(values.min()), float(values.max()))
        for axes, layer, value in zip(grid[row], layers, values, strict=True):
            image = axes.imshow(value, cmap=HEADS, vmin=low, vmax=high, interpolation="nearest")
            axes.set_title(f"{'Probabilities' if row else 'Logits'}, layer {layer}")
            axes.set_xticks([]), axes.set_yticks([])
            if len(tokens) <= LABELLED:
                axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6.5)
                axes.set_yticks(range(len(tokens)), tokens, fontsize=6.5)
        figure.colorbar(image, ax=list(grid[row]), shrink=0.8, pad=0.01)
    return figure


def _stacks(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name), rows.sort_values("layer")) for name, rows in table.groupby("stack", sort=False)]


def _line(axes: Axes, rows: pd.DataFrame, column: str, label: str, color: str, style: str = "-o") -> None:
    values = rows[column].to_numpy(float)
    if not np.isnan(values).all():
        axes.plot(rows["layer"], values, style, color=color, label=label)


def _drawn(axes: Axes) -> np.ndarray:
    """All values of the lines of a panel."""
    return np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])


def _onset(axes: Axes, rows: pd.DataFrame) -> None:
    after = rows.loc[rows["after_onset"], "layer"]
    if len(after):
        axes.axvspan(after.min() - 0.5, after.max() + 0.5, color="#000000", alpha=0.045, linewidth=0, zorder=0)


def _layers_below(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there is no layer 1.5


def draw_axes(e: Explanation) -> Figure | None:
    """Concentration, value drain and residual norm of every layer, side by side and never merged."""
    stacks = _stacks(e.axes)
    if not stacks:
        return None
    figure = Figure(figsize=(10.5, 2.7 * len(stacks) + 0.3), layout="constrained")
    for row, (stack, rows) in zip(figure.subplots(len(stacks), 3, squeeze=False), stacks, strict=True):
        _line(row[0], rows, "concentration", "tokens with findings", TOP_1)
        _line(row[0], rows, "concentration_first", "position 0", TOP_2, "--^")
        _line(row[0], rows, "concentration_null", "random tokens", PLAIN, ":s")
        row[0].set_ylim(-0.03, 1.03)
        row[0].set_title(" ".join(filter(None, (lettered(stack), "Attention on them"))))
        _line(row[1], rows, "value_drain", "tokens with findings", TOP_1)
        _line(row[1], rows, "value_drain_first", "position 0", TOP_2, "--^")
        row[1].set_title("Value norm / that of others")
        _line(row[2], rows, "residual_norm", "tokens with findings", TOP_3)
        row[2].set_title("Residual norm / that of others")
        for i, axes in enumerate(row):
            if not axes.lines:
                says(axes, "unavailable")
                continue
            _layers_below(axes)
            _onset(axes, rows)
            if i:
                log_axis(axes, _drawn(axes))
                axes.axhline(1, color=PLAIN, linewidth=0.6)
        if row[0].lines:
            row[0].legend(loc="best")
    return figure


def draw_heads(e: Explanation) -> Figure | None:
    """Attention on the tokens with findings (on position 0 where there are none) of every head."""
    stacks = _stacks(e.heads[e.heads["kind"] == "attention"])
    if not stacks:
        return None
    figure = Figure(figsize=(4.4 * len(stacks) + 0.8, 3.6), layout="constrained")
    grid = figure.subplots(1, len(stacks), squeeze=False)[0]
    for axes, (stack, rows) in zip(grid, stacks, strict=True):
        column = "mass_findings" if rows["mass_findings"].notna().any() else "mass_first"
        table = rows.pivot(index="head", columns="layer", values=column)
        image = axes.imshow(np.ma.masked_invalid(table.to_numpy(float)), cmap=HEADS, vmin=0, vmax=1, aspect="auto")
        every = max(1, len(table.columns) // 12)
        axes.set_xticks(range(0, len(table.columns), every), table.columns[::every])
        axes.set_yticks(range(0, len(table), max(1, len(table) // 12)))
        axes.set_xlabel("layer"), axes.set_ylabel("head")
        what = "tokens with findings" if column == "mass_findings" else "position 0"
        axes.set_title(" ".join(filter(None, (lettered(stack), f"Attention on {what}"))))
    figure.colorbar(image, ax=list(grid), shrink=0.8)
    return figure


def draw_bias(e: Explanation) -> Figure | None:
    """What the tokens with findings add to all others, beside random tokens (Sun 2024, Fig. 8)."""
    parts = [p for p in ("projected", "concat") if e.decomposition.loc[e.decomposition["part"] == p,
                                                                      "constancy"].notna().any()]  # fmt: skip
    if not parts:
        return None
    stacks = _stacks(e.decomposition[e.decomposition["part"] == parts[0]])
    figure = Figure(figsize=(10.5, 2.7 * len(stacks) + 0.3), layout="constrained")
    panels = (("constancy", "Spread between queries / mean", True), ("cosine", "Mean cosine between queries", False),
              ("energy_share", "Share of the output's energy", True))  # fmt: skip
    for row, (stack, rows) in zip(figure.subplots(len(stacks), 3, squeeze=False), stacks, strict=True):
        for axes, (column, title, log) in zip(row, panels, strict=True):
            _line(axes, rows, column, "tokens with findings", TOP_1)
            _line(axes, rows, f"null_{column}", "random tokens", PLAIN, ":s")
            axes.set_title(title), _layers_below(axes)
            if log and axes.lines:
                log_axis(axes, _drawn(axes))
        row[0].set_ylabel(lettered(stack))
        if row[0].lines:
            row[0].legend(loc="best")
    return figure


def draw_writers(e: Explanation) -> Figure | None:
    """What every submodule adds to the most frequent coordinates, layer by layer."""
    groups = list(e.writers.groupby(["stack", "dim", "position_class"], sort=False))[:MOST_COORDINATES]
    if not groups:
        return None
    figure = Figure(figsize=(9.0, 2.1 * len(groups) + 0.4), layout="constrained")
    for axes, ((stack, dim, where), rows) in zip(
        figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True
    ):
        names = list(dict.fromkeys(rows["submodule"]))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            mine = rows[rows["submodule"] == name].groupby("layer")["write"].sum()
            at = mine.index.to_numpy(float) + (i - (len(names) - 1) / 2) * width
            axes.bar(at, mine.to_numpy(float), width, color=STACKS[i % len(STACKS)], label=lettered(name))
        axes.axhline(0, color=PLAIN, linewidth=0.6)
        axes.set_title(" ".join(filter(None, (lettered(stack), f"dim {dim} ({where}): what is added to it"))))
        _layers_below(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_trajectory(e: Explanation) -> Figure | None:
    """How alike the tokens with findings are from the hidden state to q, k and v (Sun 2024, Fig. 7)."""
    after = e.axes[e.axes["after_onset"]]
    if not len(after):
        return None
    stacks = list(dict.fromkeys(after["stack"]))
    figure = Figure(figsize=(9.0, 2.7 * len(stacks) + 0.4), layout="constrained")
    for row, stack in zip(figure.subplots(len(stacks), 2, squeeze=False), stacks, strict=True):
        layer = int(after.loc[after["stack"] == stack, "layer"].min())
        rows = e.trajectory[(e.trajectory["stack"] == stack) & (e.trajectory["layer"] == layer)]
        panels = ((row[0], "cosine", "Mean cosine of two tokens"), (row[1], "sparsity", "Sparsity (1: a single entry)"))
        for axes, column, title in panels:
            for group, color in (("findings", TOP_1), ("random", WARNING), ("others", PLAIN)):
                values = rows[rows["group"] == group].set_index("stage")[column].reindex(STAGES).to_numpy(float)
                if not np.isnan(values).all():
                    axes.plot(range(len(STAGES)), values, "-o", color=color, label=f"{group}")
            axes.set_xticks(range(len(STAGES)), STAGES)
            axes.set_title(" ".join(filter(None, (lettered(stack), f"{title}, layer {layer}"))))
        if row[0].lines:
            row[0].legend(loc="best")
    return figure


EXPLAIN_FIGURES: dict[str, Callable[[Explanation], Figure | None]] = {
    "attention_maps": draw_maps,
    "attention_axes": draw_axes,
    "attention_heads": draw_heads,
    "attention_bias": draw_bias,
    "writers": draw_writers,
    "trajectory": draw_trajectory,
}
