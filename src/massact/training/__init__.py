"""Train transformers into and out of massive activations: Trainer glue, losses and optimisers, a monitor.

Takes a model or a configuration, text and options; gives a trained model and its run directory. Knows every remedy of
the training by its formula and its paper, and how a training is resumed exactly. Must not know criteria, findings,
explanations or how results are drawn.
"""

from __future__ import annotations

import importlib
from typing import Any

# Name -> the module it comes from. Imported on first use: transformers is slow to import, and not everything needs it.
_PLACES = {
    "RECIPES": "training.configs", "TrainConfig": "training.configs",
    "Dynamics": "training.monitor", "fit_dynamics": "training.monitor",
    "Tokens": "training.data", "Windows": "training.data", "prepare": "training.data",
    "Alarm": "training.monitor", "Monitor": "training.monitor", "dynamics_of": "training.monitor",
    "MassiveActivationsCallback": "training.callback",
    "train": "training.job",
    "VARIANTS": "variants.registry", "apply_variant": "variants.application",
    "apply_remedy": "variants.remedies", "REMEDIES": "variants.remedies",
    "from_pretrained": "models.transformers_models", "load_variant": "variants.storage",
}  # fmt: skip

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"massact.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'massact.training' has no attribute {name!r}")
