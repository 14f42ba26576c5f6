"""What can be refused before torch is imported, which takes seconds."""

from __future__ import annotations

import os
from typing import Any

from massact.records.presets import PRESETS
from massact.records.reachability import check_on_hub


def check_names(inputs: Any, scan: Any) -> None:
    """Refuse a model or a data set that is not on this machine and cannot be fetched.

    Args:
        inputs: of a verb.
        scan: of the run that was given; None where none was.

    Raises:
        UserError: says which, and why.
    """
    model = getattr(inputs, "model", None)
    if model is None:
        model = getattr(inputs, "target", None) if scan is None else scan.info.model.get("id")
        model = model if scan is None or "/" in str(model) else None  # a live one is called by its class
    for one in (model, getattr(inputs, "against", None)):
        if isinstance(one, str) and (name := name_on_hub(one)):
            check_on_hub(name)
    for text in (getattr(inputs, "corpus", None), getattr(inputs, "evaluate_on", None)):
        if isinstance(text, str) and (name := data_set_meant(text)):
            check_on_hub(name, "dataset")


def data_set_meant(corpus: str) -> str:
    """The name on the Hub of a corpus that can only be a data set; "" where it can be anything else, as x.csv can."""
    if corpus in PRESETS:
        return PRESETS[corpus].dataset
    name = name_on_hub(corpus)
    return "" if os.path.splitext(name)[1] or any(map(str.isspace, name)) else name.partition(":")[0]


def name_on_hub(spec: str) -> str:
    """OWNER/NAME of what can only be on the Hub; "" where it can be anything else."""
    spec = spec.removeprefix("timm:hf-hub:").partition("@")[0] if spec.startswith("timm:") else spec
    owner, *rest = spec.split("/")
    if not spec or spec == "embedded" or os.path.exists(spec) or owner in ("", ".", "..", "~") or "\\" in spec:
        return ""
    if len(rest) > 1:  # a file of a repository, or a path that is not there
        return f"{owner}/{rest[0]}" if spec.endswith(".gguf") and not os.path.isdir(os.path.dirname(spec)) else ""
    return "" if spec.startswith("timm:") or spec.endswith(".gguf") else spec
