"""What may be asked of `load`: devices, dtypes, options of transformers, and what is given in place of a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from massact.corpora.tensors import is_cache, no_cache
from massact.records.errors import UserError, check_options, first_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
          "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # fmt: skip
# Keyword arguments of transformers' `from_pretrained` that can be given by name; others go into `options`.
PRETRAINED = (
    "allow_pickle", "attn_implementation", "cache_dir", "device_map", "gguf_file", "local_files_only", "max_memory",
    "offload_folder", "quantization_config", "subfolder", "token", "torch_dtype", "trust_remote_code", "variant",
)  # fmt: skip
NAMES = ("spec", "tokenizer", "blocks", "inputs", "device", "dtype", "revision", "options", "processor", *PRETRAINED)


@dataclass(frozen=True)
class Request:
    """How a model is to be read.

    Args:
        device: where it is to run. dtype: of its weights, or "auto".
        options: for `from_pretrained`.
        given: names of what was asked for that means nothing for a live module.
    """

    device: torch.device
    dtype: torch.dtype | str
    options: dict[str, Any]
    given: tuple[str, ...]

    def refuse_of_live(self) -> None:
        """Refuse what would change a module that its owner has in hand.

        Raises:
            UserError: something of it was asked for.
        """
        if self.given:
            raise UserError(
                f"{', '.join(self.given)} cannot be given with a live module.",
                "It is measured where and as it is.",
                "Change it before: load(module.to(device, dtype)).",
            )


def request_of(
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    revision: str | None,
    options: Mapping[str, Any] | None,
    pretrained: Mapping[str, Any],
) -> Request:
    """How a model is to be read, see `load`.

    Raises:
        UserError: an unknown name, device or dtype, or two that say the same.
    """
    check_options("load", pretrained, NAMES)
    asked = {**(options or {}), **pretrained}
    auto = dtype in ("auto", None)
    other = asked.pop("torch_dtype", None)
    if other is not None and not auto and dtype_of(other) != dtype_of(dtype):
        raise UserError(f"dtype={dtype!r} and torch_dtype={other!r} were given.", do="Give one of them.")
    if asked.get("device_map") is None:
        asked.pop("device_map", None)
    elif device != "auto":
        raise UserError(f"device={str(device)!r} and device_map were given.", do="Give one of them.")
    wanted = other if other is not None else "auto" if auto else dtype
    given = {"device": device != "auto", "dtype": wanted != "auto", "revision": revision is not None}
    names = tuple([name for name, is_given in given.items() if is_given] + sorted(k for k, v in asked.items() if v))
    where = device_of_name("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else None
    return Request(where or device_of_name(device), dtype_of(wanted), asked, names)


def device_of_name(name: str | torch.device) -> torch.device:
    """A device that can be used.

    Raises:
        UserError: it cannot.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        what = f"Device {str(name)!r} cannot be used."
        raise UserError(what, first_line(error), "Use --device cpu, or auto.") from None


def dtype_of(name: Any) -> torch.dtype | str:
    """A dtype by name, or as torch has it; "auto" stays.

    Raises:
        UserError: weights cannot have it.
    """
    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    if name == "auto":
        return "auto"
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise UserError(f"Unknown dtype {str(name)!r}.", do=f"Known: auto, {', '.join(DTYPES)}.")
    return DTYPES[name.removeprefix("torch.")]


def live_name(module: nn.Module) -> str:
    """What a live module is called: what it was loaded by, where transformers knows that, else its class."""
    known = getattr(getattr(module, "config", None), "name_or_path", None)
    return known if isinstance(known, str) and known else type(module).__name__


def paths_of(blocks: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Dotted paths of lists of blocks, one or several.

    Raises:
        UserError: they are no texts.
    """
    if blocks is None:
        return None
    paths = (blocks,) if isinstance(blocks, str) else tuple(blocks) if isinstance(blocks, Iterable) else ()
    if not paths or not all(isinstance(p, str) for p in paths):
        raise UserError(
            f"blocks={blocks!r} is no path.",
            do="Give the dotted path(s) of the list(s) of blocks: blocks='model.layers'.",
        )
    return paths


def checked_example(inputs: Any) -> dict[str, Any]:
    """One short example input, name -> tensor.

    Raises:
        UserError: it is no dictionary, or holds a cache.
    """
    if not isinstance(inputs, Mapping):
        raise UserError(
            f"inputs= is {type(inputs).__name__}, not a dictionary.",
            "massact calls the model by keywords.",
            "Give load(model, inputs={'name': tensor, ...}).",
        )
    for name, value in inputs.items():
        if is_cache(name, value):
            raise no_cache(name)
    return dict(inputs)
