"""A vision toy lab out of thin air, for what is printed and drawn of one."""

from __future__ import annotations

import math
from typing import Any

from massact.records.kinds.shapes import ShapeLab, ShapesInfo
from massact.records.tables import frame

Effects = dict[tuple[str, str], tuple[float, float]]


def shape_lab(registers: Effects | None = None, layers: int = 4, **greatest: float) -> ShapeLab:
    """Three arms of four blocks over three measurements.

    Args:
        registers: (target, edit) -> (change, half of the interval) of the arm with registers; nothing: a bias.
        layers: blocks.
        greatest: columns of the layers that are to be otherwise in all layers of all arms.
    """
    arms = {"softmax": ("softmax", 0), "softmax+registers": ("softmax", 4), "kv-bias": ("kv-bias", 0)}
    info = ShapesInfo(config={"steps": 100, "optimiser": "adamw", "seed": 0, "background": "mixed"},
                      corpus={"n_held_out": 512, "background_share": 0.6, "outlier": 4.0},
                      arms={arm: {"attention": a, "registers": r, "key_std": None, "uniform_attention": 0.0154}
                            for arm, (a, r) in arms.items()})  # fmt: skip
    shapes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    effects: list[dict[str, Any]] = []
    for arm, (attention, n) in arms.items():
        shapes += [{"arm": arm, "step": step, "nats": 2.8 - step / 50, "accuracy": 0.06 + step / 200, "top1": 17.0,
                    "ratio": 5.0, "massive": 0.0, "patch_norm_ratio": 1.4, "outliers": 0.0, "wall_s": 1.0}
                   for step in (0, 50, 100)]  # fmt: skip
        for layer in range(layers + 1):
            row = dict.fromkeys(list(ShapeLab.TABLES["shapes_layers"])[2:], 0.25)
            row |= {"arm": arm, "layer": layer, "top1": 17.0, "ratio": 5.0, "massive": 0.0, "outliers": 0.0,
                    "patch_norm_ratio": 1.2 + 0.1 * layer, "class_norm_ratio": 1.1}  # fmt: skip
            for key, there in (("registers", n), ("slot", attention == "kv-bias")):
                if not there:
                    row |= {f"{query}_to_{key}": math.nan for query in ("class", "patches")}
            rows.append(row | {} if n else row | {"register_norm_ratio": math.nan})
            rows[-1] |= greatest if layer else {}
        for layer in range(1, layers):
            told = TOP | ((BIAS if registers is None else registers) if n else {})
            for (target, edit), (delta, half) in told.items():
                effects.append({
                    "arm": arm, "layer": layer, "target": target, "edit": edit, "tokens": 1, "cosine": 0.8,
                    "baseline_nats": 0.8, "delta_nats": delta * layer, "ci_low": delta * layer - half,
                    "ci_high": delta * layer + half, "baseline_accuracy": 0.56, "delta_accuracy": -delta,
                    "accuracy_low": -2 * delta, "accuracy_high": 0.0, "n_images": 512,
                })  # fmt: skip
    return ShapeLab(info, frame("shapes", shapes), frame("shapes_layers", rows), frame("shapes_effects", effects))


TOP: Effects = {("top patch", "zero"): (0.01, 0.02), ("top patch", "mean"): (0.0, 0.01),
                ("another patch", "zero"): (0.01, 0.01), ("another patch", "mean"): (0.0, 0.01)}  # fmt: skip
BIAS: Effects = {("registers", "zero"): (0.2, 0.02), ("registers", "mean"): (0.005, 0.01),
                 ("other patches", "zero"): (0.02, 0.01), ("other patches", "mean"): (0.0, 0.01)}  # fmt: skip
