"""Adapters (LoRA and its kin): the state they are in, and folders that hold one without its model."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from massact.records.adapter_states import in_words
from massact.records.errors import UserError
from massact.records.user_files import read_given, refuse_special_in

CONFIG = "adapter_config.json"
INSTALL = "pip install 'massact[peft]'"


def adapter_states(module: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, class, state) of every module that can run with and without an adapter, whatever kind that is."""
    for name, part in module.named_modules():
        known = (getattr(type(part), word, None) for word in ("active_adapters", "disable_adapters"))
        if not all(isinstance(x, property) for x in known):  # transformers' models have methods of these names
            continue
        merged = [str(n) for n in getattr(part, "merged_adapters", ())]
        active = part.active_adapters
        scaling = getattr(part, "scaling", None)
        used = set(merged) | set([active] if isinstance(active, str) else active)
        yield name, f"{type(part).__module__.split('.')[-2:][0]}.{type(part).__name__}", {
            "active": [str(n) for n in ([active] if isinstance(active, str) else active)],
            "disabled": bool(part.disable_adapters), "merged": merged,
            "scaling": {k: float(v) for k, v in scaling.items() if k in used} if isinstance(scaling, dict) else {},
        }  # fmt: skip


def adapter_record(module: nn.Module) -> dict[str, Any] | None:
    """The state of all adapters of a model, see `massact.records.adapter_states`; None where it has none."""
    found = list(adapter_states(module))
    if not found:
        return None
    states = Counter(json.dumps(state) for _, _, state in found)
    return {
        "states": [json.loads(state) | {"n_modules": n} for state, n in states.most_common()],
        "types": dict(Counter(kind for _, kind, _ in found)), "base": getattr(module, "massact_base", None),
    }  # fmt: skip


def adapter_notes(module: nn.Module) -> list[str]:
    """What a reader of its numbers must know of the adapters of a model."""
    return in_words(adapter_record(module))


# ---- folders
def local_adapter(name: str, options: dict[str, Any], revision: str | None) -> str:
    """Where the files of an adapter of the Hub lie, fetched where that is needed; the name itself of anything else."""
    where = {k: v for k, v in options.items() if k in ("token", "cache_dir")}
    where |= {"revision": revision} if revision else {}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False,
             "_raise_exceptions_for_gated_repo": False}  # fmt: skip
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return name
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file  # slow to import

    try:
        if cached_file(name, "config.json", **where, **quiet) or not cached_file(name, CONFIG, **where, **quiet):
            return name
        return str(snapshot_download(name, allow_patterns=["adapter_*", "*token*", "*.jinja"], **where))
    except Exception:  # no such model, no network: whoever reads the model itself says it
        return name


def adapter_config(folder: str, allow_pickle: bool) -> dict[str, Any] | None:
    """The configuration of an adapter folder; None where a folder holds a whole model, or is none.

    Raises:
        UserError: it is damaged, names no model, or holds pickled weights that were not allowed.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or (path / "config.json").exists():
        return None
    refuse_special_in(path)
    try:
        config = json.loads(read_given(path / CONFIG).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / CONFIG} is not valid JSON.", str(error), "Copy or download it again.") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"{path / CONFIG} does not say which model the adapter is of.",
                        do="Write its Hub id or folder there as base_model_name_or_path.")  # fmt: skip
    if not any(path.glob("adapter_model.safetensors")) and not allow_pickle:
        raise UserError(f"{path} holds no adapter_model.safetensors.", "Pickle files can run code when they are read.",
                        "Save the adapter with save_pretrained(), or pass --allow-pickle.")  # fmt: skip
    return config


def read_adapter(
    folder: str, config: dict[str, Any], read: Callable[[str, dict[str, Any]], tuple[nn.Module, Any]],
    options: dict[str, Any], read_tokenizer: Callable[[str], Any],
) -> tuple[nn.Module, Any]:  # fmt: skip
    """The model that an adapter folder names, with the adapter in it, and its tokenizer.

    Args:
        folder, config: see `adapter_config`.
        read: reads the model by name and options.
        options: for the model.
        read_tokenizer: of a folder; the adapter's own goes before the model's.

    Raises:
        UserError: PEFT is missing, the model cannot be read, or the adapter does not fit it.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder} holds an adapter.", "The package peft, which reads it, is missing.", INSTALL)
    base = str(config["base_model_name_or_path"])
    try:
        module, tokenizer = read(base, options)
    except UserError as error:
        raise UserError(
            f"The model {base!r} that the adapter {folder} is of cannot be read.", f"{error.what} {error.why}".strip(),
            f"{error.do} Where it lies elsewhere now, write that into {Path(folder) / CONFIG} "
            "(base_model_name_or_path).".strip(),
        ) from error  # fmt: skip
    import peft
    from safetensors import safe_open

    try:
        with torch.random.fork_rng(devices=[]):  # adapters are made at random, then filled
            whole = peft.PeftModel.from_pretrained(module, folder, torch_device="cpu")
    except Exception as error:
        raise UserError(
            f"The adapter {folder} cannot be put into {base!r}.",
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "Check that it was trained on this model, and that its files are whole.",
        ) from error
    files = list(Path(folder).glob("adapter_model.safetensors"))
    held = {key for file in files for key in safe_open(file, "pt").keys()}
    missing = sorted(set(peft.get_peft_model_state_dict(whole)) - held) if files else []
    if missing:
        raise UserError(f"The weights of the adapter {folder} do not fit {base!r}: {len(missing)} missing (first: "
                        f"{missing[0]}).", "Missing weights would be filled with random numbers.",
                        "Copy or download the adapter again, or name the model it was trained on.")  # fmt: skip
    module.massact_base = base
    return whole, read_tokenizer(folder) or tokenizer


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    """What an adapter's model is read with: revisions are of the adapter."""
    return {
        k: v
        for k, v in options.items()
        if k in ("trust_remote_code", "allow_pickle", "token", "cache_dir", "device_map")
    }
