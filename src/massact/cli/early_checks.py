"""What can be refused before torch is imported, which takes seconds."""

from __future__ import annotations

import os
from typing import Any

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
    corpus = getattr(inputs, "corpus", None)
    if isinstance(corpus, str) and (name := name_on_hub(corpus)) and _of_a_data_set(name):
        check_on_hub(name.partition(":")[0], "dataset")


def _of_a_data_set(name: str) -> bool:
    """Whether a corpus can only be a data set; a name without owner may be one of ours, what ends in .csv is a path."""
    return "/" in name and not os.path.splitext(name)[1] and not any(map(str.isspace, name))


def name_on_hub(spec: str) -> str:
    """OWNER/NAME of what can only be on the Hub; "" where it can be anything else."""
    spec = spec.removeprefix("timm:hf-hub:").partition("@")[0] if spec.startswith("timm:") else spec
    owner, *rest = spec.split("/")
    if not spec or spec == "embedded" or os.path.exists(spec) or owner in ("", ".", "..", "~") or "\\" in spec:
        return ""
    if len(rest) > 1:  # a file of a repository, or a path that is not there
        return f"{owner}/{rest[0]}" if spec.endswith(".gguf") and not os.path.isdir(os.path.dirname(spec)) else ""
    return "" if spec.startswith("timm:") or spec.endswith(".gguf") else spec
