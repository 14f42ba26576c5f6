"""A toy lab out of thin air, for what is printed and drawn of one."""

from __future__ import annotations

import math
from typing import Any

from massact.records.kinds.lab import Lab, LabInfo
from massact.records.tables import frame


def lab(effects: dict[str, dict[tuple[str, int], tuple[float, float]]] | None = None, **slots: float) -> Lab:
    """Three variants over three measurements.

    Args:
        effects: variant -> {(edit, position): (change, half of the interval)}; nothing: the story.
        slots: variant, with _ for -, -> mass of its slot at the end.
    """
    told = STORY if effects is None else effects
    info = LabInfo(config={"steps": 100, "optimiser": "adamw", "seed": 0, "starts": "mixed", "share": 0.8},
                   corpus={"looked_at": "an ordinary character", "from_query": 8, "ordinary": 9},
                   variants={name: {"key_std": None, "uniform_attention": 0.056} for name in told})  # fmt: skip
    rows: list[dict[str, Any]] = []
    changes: list[dict[str, Any]] = []
    for name, edits in told.items():
        slot = slots.get(name.replace("-", "_"), math.nan if name == "softmax" else 0.5)
        for step in (0, 50, 100):
            grown = step / 100
            first = 0.05 + (0.3 if name == "softmax" else 0.0) * grown
            rows.append({
                "variant": name, "step": step, "nats": 4 - grown, "backcopy_nats": 4 - 3 * grown,
                "bigram_excess_nats": 1.5 - grown, "first_attention": first, "first_attention_max": 2 * first,
                "slot_mass": slot * grown, "norm_ratio": 1.0 + 0.5 * grown, "top1": 20.0, "ratio": 6.0,
                "wall_s": 10 * grown,
            })  # fmt: skip
        for (edit, position), (delta, half) in edits.items():
            changes.append({
                "variant": name, "layer": 1, "targets": "far", "position": position, "edit": edit, "baseline_nats": 3.0,
                "delta_nats": delta, "ci_low": delta - half, "ci_high": delta + half, "cosine": 0.9,
                "n_sequences": 256,
            })  # fmt: skip
    return Lab(info, frame("lab", rows), frame("lab_effects", changes))


_ORDINARY = {("zero", 9): (0.02, 0.005), ("mean", 9): (0.01, 0.005)}
STORY = {
    "softmax": {("zero", 0): (0.15, 0.02), ("mean", 0): (-0.002, 0.003)} | _ORDINARY,
    "kv-bias": {("zero", 0): (0.02, 0.005), ("mean", 0): (0.001, 0.003)} | _ORDINARY,
    "softmax-off-by-one": {("zero", 0): (0.01, 0.005), ("mean", 0): (0.0, 0.003)} | _ORDINARY,
}
