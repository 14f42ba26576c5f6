"""The figure of the vision toy lab: learning, sizes, attention and edits of its arms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from massact.records.kinds.shapes import COMPARED_WITH, ShapeLab
from massact.reports.lab import _looks
from massact.reports.legible import real
from massact.reports.lettering import PLAIN, STACKS, lettered
from massact.reports.shapes import mean_attention

PARTS = (("registers", "registers"), ("slot", "slot"), ("class", "class token"), ("top_patch", "most attended patch"))


def shapes_figure(lab: ShapeLab) -> Figure:
    """Accuracy and ratio over the steps, patch norms over the layers, attention, and what the edits change."""
    figure = Figure(figsize=(10.4, 5.8), layout="constrained")
    panels = figure.subplots(2, 3, width_ratios=(1, 1, 1.35))
    looks = _looks(lab.arms)
    for arm in lab.arms:
        rows, layers = lab.shapes[lab.shapes["arm"] == arm], lab.layers(arm)
        panels[0, 0].plot(rows["step"], rows["accuracy"], **looks[arm])
        panels[0, 1].plot(rows["step"], rows["ratio"], **looks[arm])
        panels[0, 2].plot(layers["layer"], layers["patch_norm_ratio"], marker="o", **looks[arm])
    titles = ("Accuracy, held out", "Greatest |h| / median\n(massive: 1,000)",
              "Norm of the largest patch / median")  # fmt: skip
    for axes, title, x in zip(panels[0], titles, ("Step", "Step", "Layer"), strict=True):
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0, 0].set_ylim(-0.03, 1.03)
    _attention(panels[1, 0], lab, "patches", "Attention of the patches\n(mean over blocks)")
    _attention(panels[1, 1], lab, "class", "Attention of the class token\n(mean over blocks)")
    _bars(panels[1, 2], lab, looks)
    handles = panels[0, 0].lines
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _attention(axes: Axes, lab: ShapeLab, query: str, title: str) -> None:
    """Bars of what goes to registers, slot, class token and most attended patch, one on the other."""
    bottom = np.zeros(len(lab.arms))
    for (key, name), color in zip(PARTS, STACKS, strict=False):
        height = np.array([real(mean_attention(lab, arm)[f"{query}_to_{key}"]) for arm in lab.arms])
        height = np.where(np.isnan(height), 0, height)  # a bar that is not there
        axes.barh(range(len(lab.arms)), height, left=bottom, height=0.7, color=color, label=name)
        bottom += height
    axes.set_title(title)
    axes.set_yticks(range(len(lab.arms)), [lettered(arm, 22) for arm in lab.arms] if query == "patches" else [])
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.05, 2.6 * float(bottom.max())))  # with room for the legend
    axes.legend(fontsize=7, loc="center right")


def _bars(axes: Axes, lab: ShapeLab, looks: dict[str, dict[str, Any]]) -> None:
    """The change of the loss by each edit after the middle block, with its interval."""
    axes.set_title(f"Change of the loss (nats): states after\nblock {lab.middle} set to")
    if not len(lab.shapes_effects):
        axes.text(0.5, 0.5, "One block: nothing reads it.", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        return
    places = [(name, edit) for target, others in COMPARED_WITH.items()
              for name, edit in ((target, "zero"), (target, "mean"), (others, "zero"))]  # fmt: skip
    width = 0.8 / len(lab.arms)
    for i, arm in enumerate(lab.arms):
        found = [lab.effect(arm, *place) for place in places]
        at = np.arange(len(places)) + (i - (len(lab.arms) - 1) / 2) * width
        delta, low, high = (np.array([math.nan if e is None else real(e[c]) for e in found])
                            for c in ("delta_nats", "ci_low", "ci_high"))  # fmt: skip
        axes.bar(at, delta, width * 0.9, color=looks[arm]["color"])
        axes.errorbar(at, delta, yerr=[delta - low, high - delta], fmt="none", ecolor="#333333", capsize=2,
                      linewidth=0.8)  # fmt: skip
    axes.axhline(0, color=PLAIN, linewidth=0.6)
    names = {"registers": "regis-\nters", "other patches": "other\npatches", "top patch": "top\npatch",
             "another patch": "another\npatch"}  # fmt: skip
    axes.set_xticks(range(len(places)), [f"{edit}\n{names[name]}" for name, edit in places], fontsize=7)
