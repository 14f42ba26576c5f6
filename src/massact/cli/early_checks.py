"""What can be refused before torch is imported, which takes seconds."""

from __future__ import annotations

import os
from functools import partial
from glob import escape, glob
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
        model = target_of(inputs) if scan is None else scan.info.model.get("id")
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


def target_of(inputs: Any) -> str | None:
    """The run or the model that a verb of either was given."""
    target = getattr(inputs, "run", getattr(inputs, "target", None))
    return None if target is None else str(target)


def is_model(spec: str) -> bool:
    """Whether a name that must be there means a model; what else it means is a run, or what should be one."""
    inside = partial(os.path.join, spec)
    if os.path.isdir(spec):
        named = any(os.path.isfile(inside(name)) for name in ("config.json", "adapter_config.json"))
        return not os.path.isfile(inside("run.json")) and (named or bool(glob(os.path.join(escape(spec), "*.gguf"))))
    if os.path.exists(spec):
        return spec.endswith(".gguf")
    owner, _, rest = spec.partition("/")
    of_runs = bool(rest) and os.path.isdir(owner)  # where runs are, not who owns a model
    return spec == "embedded" or spec.startswith("timm:") or (name_on_hub(spec) != "" and not of_runs)


def name_on_hub(spec: str) -> str:
    """OWNER/NAME of what can only be on the Hub; "" where it can be anything else."""
    spec = spec.removeprefix("timm:hf-hub:").partition("@")[0] if spec.startswith("timm:") else spec
    owner, *rest = spec.split("/")
    if not spec or spec == "embedded" or os.path.exists(spec) or owner in ("", ".", "..", "~") or "\\" in spec:
        return ""
    if len(rest) > 1:  # a file of a repository, or a path that is not there
        return f"{owner}/{rest[0]}" if spec.endswith(".gguf") and not os.path.isdir(os.path.dirname(spec)) else ""
    return "" if spec.startswith("timm:") or spec.endswith(".gguf") else spec
