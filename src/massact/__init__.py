"""Find, explain, remove and train away massive activations in transformers.

import massact as ma
model = ma.load("openai-community/gpt2")
result = ma.scan(model, ma.corpus("wikitext-2", seq_len=1024, n_sequences=64))
result.findings
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the room it comes from. Imported on first use, so that `massact --help` needs no torch.
_ROOMS = {
    "load": "models", "Model": "models",
    "corpus": "corpora",
    "measure": "trace", "Probe": "trace", "Edit": "trace",
    "scan": "scans", "criterion": "scans",
    "explain": "explanations", "intervene": "interventions", "edited": "trace",
    "ScanResult": "records.kinds.scan", "open_run": "records.kinds.scan",
    "MassactError": "records.errors",
    "report": "reports",
}  # fmt: skip

__all__ = list(_ROOMS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"massact.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'massact' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_ROOMS, "__version__", "__doc__"])  # what a user may want to complete, and nothing else
