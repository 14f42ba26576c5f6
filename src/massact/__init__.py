"""Find, explain, remove and train away massive activations in transformers.

import massact as ma
model = ma.load("openai-community/gpt2")
result = ma.scan(model, ma.corpus("wikitext-2", seq_len=1024, n_sequences=64))
result.findings
"""

from __future__ import annotations

import importlib
from typing import Any

from massact.records.notebooks import shown_by
from massact.records.readers import read_changed_with

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


def _read_changed(*given: Any) -> Any:
    """`models/` loads checkpoints with an attention variant; `training/`, of which it must not know, reads them."""
    return importlib.import_module("massact.training.saved").read_changed(*given)


read_changed_with(_read_changed)


def _in_a_notebook(result: Any) -> str:
    """`records/` holds results, which a notebook shows; `reports/`, of which it must not know, writes the HTML."""
    return str(importlib.import_module("massact.reports").notebook_html(result))


shown_by(_in_a_notebook)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
