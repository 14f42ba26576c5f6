"""What a checkpoint holds of the changes of its model: made again as config.json says, and their weights filled in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from massact.records.errors import UserError, near
from massact.variants.application import apply_variant
from massact.variants.changes import PREFIX, changeable, changes_of
from massact.variants.remedies import apply_remedy

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # versions that save every architecture under its own names
    revert_weight_conversion = None

_AGAIN = "Copy or download the model again."
_CHANGES = {"apply_variant": apply_variant, "apply_remedy": apply_remedy}


def load_variant(model: nn.Module, path: str | os.PathLike[str] | None = None) -> nn.Module:
    """Make the changes that a model's configuration tells of, and fill in their weights.

        model = load_variant(AutoModelForCausalLM.from_pretrained(path))

    Args:
        model: as transformers' `from_pretrained` gives it: the plain architecture.
        path: where it came from, a folder or a Hub id; None for what the model says.

    Returns:
        The same model, changed.

    Raises:
        UserError: there is nothing to load, or a weight is missing; the model is then not to be used.
    """
    config = changeable(model)
    told = told_changes(config)
    if not told:
        raise UserError("This model's configuration tells of no attention variant.",
                        do="It was not saved after apply_variant: use it as it is.")  # fmt: skip
    if changes_of(model):
        raise UserError(f"This model already has its changes: {', '.join(changes_of(model))}.")
    for change in told:
        options = dict(change)
        kind = str(options.pop("change", "?"))
        if kind not in _CHANGES:
            raise UserError(f"config.json tells of a change {kind!r} that massact does not know.",
                            "It was saved by another version.", near(kind, _CHANGES))  # fmt: skip
        try:
            _CHANGES[kind](model, **options)
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:  # options of any kind
            raise UserError(f"The change that config.json tells of cannot be made: {change!r:.200}.",
                            f"{type(error).__name__}: {str(error)[:200]}", _AGAIN) from error  # fmt: skip
    added = all(change["change"] == apply_variant.__name__ for change in told)
    _fill(model, config.name_or_path if path is None else os.fspath(path), PREFIX if added else "")
    return model


def told_changes(config: Any) -> list[dict[str, Any]]:
    """The changes that a configuration tells of."""
    record = getattr(config, "massact", None) or {}
    told = record.get("changes", []) if isinstance(record, dict) else None
    if not isinstance(told, list) or not all(isinstance(change, dict) for change in told):
        raise UserError(f"What config.json tells of changes is damaged: {record!r:.200}.", do=_AGAIN)
    return told


def _fill(model: nn.Module, path: str, word: str) -> None:
    """Put stored weights into the parameters and buffers whose name holds a word; none of them may be missing."""
    wanted = {name: t for name, t in model.state_dict(keep_vars=True).items() if word in name}
    stored = _stored(path, _names_in_files(model, wanted), getattr(model, "base_model_prefix", ""))
    filled = {id(wanted[n]) for n in stored}  # tied weights have several names and are stored once
    missing = sorted(n for n, t in wanted.items() if id(t) not in filled)
    wrong = [n for n in stored if stored[n].shape != wanted[n].shape]
    if missing or wrong:
        raise UserError(
            f"{path!r} does not hold the weights of its changes: {len(missing)} missing, {len(wrong)} of another shape "
            f"(first: {(missing or wrong)[0]}).",
            "They would be random numbers.", "Copy or download the model again.",
        )  # fmt: skip
    with torch.no_grad():
        for name, value in stored.items():
            wanted[name].copy_(value)


def _names_in_files(model: nn.Module, wanted: dict[str, Tensor]) -> dict[str, str]:
    """Name in the files -> name in the model: transformers saves some architectures under their older names."""
    if revert_weight_conversion is None:
        return {name: name for name in wanted}
    return {key: name for name, t in wanted.items() for key in revert_weight_conversion(model, {name: t})}


def _stored(path: str, names: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the model; the files may have them with or without a head."""
    found: dict[str, Tensor] = {}
    for file in _files(path):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                for name in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"):
                    if name in names:
                        found[names[name]] = tensors.get_tensor(key)
    return found


def _files(path: str) -> list[str]:
    """The safetensors files of a folder or a Hub id."""
    if Path(path).is_dir():
        files = sorted(str(p) for p in Path(path).glob("*.safetensors"))
    else:
        index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        names = {"model.safetensors"} if index is None else set(
            json.loads(Path(index).read_text())["weight_map"].values())  # fmt: skip
        files = [found for n in sorted(names) if (found := cached_file(path, n)) is not None]
    if not files:
        raise UserError(f"{path!r} holds no safetensors files.", do="Save it with save_pretrained.")
    return files
