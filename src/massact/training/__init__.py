"""Train transformers into and out of massive activations: attention variants, Trainer glue, a monitor, a toy lab.

Takes a model or a configuration, text and options; gives a trained model and its run directory. Knows every remedy by
its formula and its paper, and how a training is resumed exactly. Must not know criteria, findings, explanations or how
results are drawn.
"""

from __future__ import annotations

import importlib
from typing import Any

# Name -> the file it comes from. Imported on first use: transformers is slow to import, and not everything needs it.
_FILES = {
    "RECIPES": "configs", "TrainConfig": "configs",
    "Dynamics": "monitor", "fit_dynamics": "monitor",
    "LabConfig": "toy", "run_lab": "lab", "train_toy": "lab",
    "Tokens": "data", "Windows": "data", "prepare": "data",
    "Alarm": "monitor", "Monitor": "monitor", "dynamics_of": "monitor",
    "MassiveActivationsCallback": "callback",
    "train": "job",
    "VARIANTS": "variants", "apply_variant": "applied", "apply_remedy": "remedies", "REMEDIES": "remedies",
    "from_pretrained": "saved", "load_variant": "saved",
}  # fmt: skip

__all__ = list(_FILES)


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f"massact.training.{_FILES[name]}"), name)
    raise AttributeError(f"module 'massact.training' has no attribute {name!r}")
