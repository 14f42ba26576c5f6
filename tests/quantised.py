"""Quantised checkpoints as llm-compressor and torchao write them: schemes, scales, a folder."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn


def quantise_compressed(module: nn.Module, scheme: Any, inputs: dict[str, Tensor], **settings: Any) -> None:
    """Set a module up to run under a scheme of compressed-tensors, with scales from its weights and from one pass.

    Args:
        module: changed in place.
        scheme: a QuantizationScheme.
        inputs: of the pass that fixed scales of activations are taken from.
        settings: more of a QuantizationConfig (ignore, kv_cache_scheme).
    """
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        disable_quantization,
        enable_quantization,
    )

    config = QuantizationConfig(config_groups={"group_0": scheme}, **({"ignore": ["lm_head"]} | settings))
    apply_quantization_config(module, config, show_progress=False)
    parts = {n: m for n, m in module.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    seen: dict[str, Tensor] = {}
    handles = [
        part.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]) if args else None)
        for name, part in parts.items()
    ]
    module.apply(disable_quantization)
    with torch.no_grad():
        module(**inputs)
    for handle in handles:
        handle.remove()
    module.apply(enable_quantization)
    for name, part in parts.items():
        _set_scales(part, seen.get(name))


def _set_scales(part: nn.Module, given: Tensor | None) -> None:
    """Scales of one module: of its weight from the values that share one, of its input from those of a pass."""
    from compressed_tensors.quantization.utils import calculate_qparams

    def put(name: str, low: Tensor, high: Tensor, args: Any) -> None:
        scale, zero = calculate_qparams(low, high, args)
        for kind, values in (("scale", scale), ("zero_point", zero)):
            kept = getattr(part, f"{name}_{kind}", None)
            if kept is not None:
                kept.data.copy_(values.reshape(kept.shape))

    scheme: Any = part.quantization_scheme
    if scheme.weights is not None:
        weight = part.weight.detach()
        shared = {"tensor": (1, -1), "channel": (len(weight), -1)}.get(scheme.weights.strategy)
        size = scheme.weights.group_size
        rows = weight.reshape(shared) if shared else weight.reshape(len(weight), -1, size)
        put("weight", rows.amin(-1, keepdim=bool(shared)), rows.amax(-1, keepdim=bool(shared)), scheme.weights)
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        for name in ("input", "k", "v"):
            low, high = (given.min()[None], given.max()[None]) if given is not None else torch.tensor([[-3.0], [3.0]])
            put(name, low, high, scheme.input_activations)


def save_compressed(module: Any, folder: Path) -> Path:
    """Pack the weights of a module that runs under schemes, and save it as llm-compressor does."""
    from compressed_tensors.compressors import ModelCompressor

    with contextlib.redirect_stderr(io.StringIO()):
        compressor = ModelCompressor.from_pretrained_model(module)
        compressor.compress_model(module)
        module.save_pretrained(folder)
        compressor.update_config(folder)
    return folder


def preset(name: str, group_size: int | None = None) -> Any:
    """A scheme of compressed-tensors by its name (W8A8, W4A16, FP8, FP8_DYNAMIC), for all linear maps."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = group_size
    return scheme


def save_torchao(plain: Path, config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Quantise a saved model by torchao, through transformers, and save it."""
    with contextlib.redirect_stderr(io.StringIO()):
        asked = transformers.TorchAoConfig(config)
        module = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked, dtype=dtype)
        module.save_pretrained(folder)
    return folder
