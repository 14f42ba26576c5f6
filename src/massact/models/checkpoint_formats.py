"""Quantised checkpoints, as transformers reads them: what they need, how they run, what is recorded of them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.projections import packed_sizes
from massact.records.errors import UserError

# Method as config.json names it -> module, package. All are in the extra `quant`.
_LIBRARIES = {"compressed-tensors": ("compressed_tensors", "compressed-tensors"), "torchao": ("torchao", "torchao")}
# What compressed-tensors keeps beside a weight; a scale is no weight of the model.
BESIDE = ("_scale", "_zero_point", "_shape", "_g_idx")
_BY_NAME = {"mxfp4": ("float", 4), "fp8": ("float", 8), "fbgemm_fp8": ("float", 8)}  # methods that say it by their name
_WRITTEN = {torch.int8: ("int", 8), torch.uint8: ("uint", 8), torch.int4: ("int", 4), torch.uint4: ("uint", 4),
            torch.float8_e4m3fn: ("float", 8), torch.float8_e5m2: ("float", 8)}  # fmt: skip


# LLM.int8: as it runs inputs are quantised too, but for outliers.
_INT8_INPUTS = {"type": "int", "bits": 8, "strategy": "token", "group_size": None, "symmetric": True, "dynamic": True}


def method_of(config: Any) -> str | None:
    """By which library the weights of a checkpoint were quantised, as its configuration says."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def need_library(spec: str, config: Any, dtype: torch.dtype | str) -> None:
    """Refuse a quantised checkpoint that cannot be read here.

    Raises:
        UserError: its library is missing, or another dtype is asked for than packed weights can have.
    """
    method = method_of(config)
    module, package = _LIBRARIES.get(str(method), ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"The weights of {spec!r} were quantised by {method}.", f"The package {package} is missing.",
                        "pip install 'massact[quant]'")  # fmt: skip
    stored = getattr(config, "dtype", None)
    if method == "torchao" and dtype != "auto" and stored is not None and dtype != stored:
        raise UserError(f"The weights of {spec!r} were quantised by torchao for {str(stored).removeprefix('torch.')}.",
                        "They cannot be had in another dtype.", "Leave --dtype out.")  # fmt: skip


@contextlib.contextmanager
def silent(config: Any) -> Iterator[None]:
    """Without the bars that the libraries draw for each step of reading."""
    with contextlib.redirect_stderr(io.StringIO()) if method_of(config) in _LIBRARIES else contextlib.nullcontext():
        yield


def unpack(module: nn.Module) -> None:
    """Let compressed-tensors unpack its weights now, once; by itself it would do so in the first forward pass.

    What runs is what its own runtime computes: unpacked weights, and activations quantised where the scheme says so.
    """
    compressor = getattr(getattr(module, "hf_quantizer", None), "compressor", None)
    packed = [m for m in module.modules() if _text(getattr(m, "quantization_status", None)) == "compressed"]
    if compressor is None or not packed:
        return
    from compressed_tensors.compressors import decompress_module

    for part in packed:  # not `decompress_model`, which also wraps every module for offloading
        decompress_module(part, compressor.force_compression_format)
    compressor.remove_decompression_hook(module)


def unpacked_for_cpu(module: nn.Module) -> list[str]:
    """Keep bitsandbytes from packing 4-bit weights for this CPU in the first forward pass, and say so.

    Whoever calls `state_dict()` after that has scales that are laid out otherwise than the weights (bitsandbytes 0.50).

    Raises:
        UserError: they are packed already.
    """
    parts = [part for part in module.modules() if getattr(part, "support_avx512bf16_for_cpu", False)]
    for part in parts:
        if getattr(getattr(part.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                "The 4-bit weights of this model are packed for this CPU.",
                "bitsandbytes did so when the model ran, and reading packed weights changes them.",
                "Build or read the model again, and load it before it runs.",
            )
    for part in parts:
        part.support_avx512bf16_for_cpu = False
    return ["bitsandbytes does not pack 4-bit weights for this CPU: reading packed ones changes them."] if parts else []


def packing_record(module: nn.Module) -> dict[str, Any] | None:
    """How the weights of a module are quantised, see `massact.records.weight_types`; None where they are not."""
    method = method_of(getattr(module, "config", None))
    others = _of_others if method is not None else _of_codes
    method = method or _live_method(module)
    if method is None:
        return None
    found = {"compressed-tensors": _of_compressed_tensors, "torchao": _of_torchao}.get(method, others)(module)
    package = _LIBRARIES.get(method, ("", ""))[1]
    return {"method": method, "library": f"{package} {metadata.version(package)}" if package else None} | found


def _live_method(module: nn.Module) -> str | None:
    """What quantised the weights of a model whose configuration does not say so: the package of what holds them."""
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if getattr(part, "quantization_scheme", None) is not None:
            return "compressed-tensors"
        if isinstance(weight, Tensor) and type(weight.data) is not Tensor and hasattr(weight.data, "dequantize"):
            return type(weight.data).__module__.partition(".")[0]
        if packed_sizes(part):
            return type(part).__module__.partition(".")[0]
    return None


def _of_codes(module: nn.Module) -> dict[str, Any]:
    """From modules that hold codes in the place of a matrix, whatever made them: how many bits a weight has."""
    weights, types, inputs, ignored = Counter[Any](), Counter[str](), Counter[Any](), []
    for name, part in module.named_modules():
        sizes = packed_sizes(part)
        if not sizes:
            ignored += [name] * isinstance(part, nn.Linear)
            continue
        held = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        codes = max(
            (t for t in held if not t.is_floating_point() or t.itemsize == 1), key=lambda t: t.nbytes, default=None
        )
        bits = None if codes is None else round(8 * codes.nbytes / math.prod(sizes)) or None
        kind = "float" if codes is not None and codes.is_floating_point() else "int"
        format_ = f"{type(part).__module__.partition('.')[0]}.{type(part).__name__}"
        weights[_items({"type": kind, "bits": bits, "strategy": None, "group_size": None, "format": format_})] += 1
        types[f"{kind}{bits}"] += 1
        if bits == 8 and format_.startswith("bitsandbytes."):
            inputs[_items(_INT8_INPUTS)] += 1
    known = _counted(inputs) if inputs else [] if all("4bit" in dict(w)["format"] for w in weights) else None
    return {"weights": _counted(weights), "activations": known, "kv_cache": None, "ignored": ignored,
            "types": dict(types), "dequantised": False}  # fmt: skip


def _of_compressed_tensors(module: nn.Module) -> dict[str, Any]:
    """From the schemes that its modules run under."""
    weights, inputs, types, ignored = Counter[Any](), Counter[Any](), Counter[str](), []
    for name, part in module.named_modules():
        scheme = getattr(part, "quantization_scheme", None)
        if isinstance(part, nn.Linear) and getattr(scheme, "weights", None) is None:
            ignored.append(name)
        if scheme is None or not isinstance(part, (nn.Linear, nn.Embedding)):
            continue
        if scheme.weights is not None:
            weights[_items(_arguments(scheme.weights) | {"format": _text(scheme.format)})] += 1
            types[f"{_arguments(scheme.weights)['type']}{scheme.weights.num_bits}"] += 1
        if scheme.input_activations is not None:
            inputs[_items(_arguments(scheme.input_activations))] += 1
    said: Any = getattr(getattr(module, "config", None), "quantization_config", None)
    settings = getattr(said, "quantization_config", None)
    if not weights:  # read with dequantize=True: plain linear maps
        groups = getattr(settings, "config_groups", {}).values()
        weights = Counter({_items(_arguments(g.weights)): 1 for g in groups if g.weights is not None})
        return {"weights": [dict(scheme) for scheme in weights], "activations": [], "kv_cache": None, "ignored": [],
                "types": {}, "dequantised": True}  # fmt: skip
    cache = getattr(settings, "kv_cache_scheme", None)
    return {
        "weights": _counted(weights), "activations": _counted(inputs),
        "kv_cache": None if cache is None else _arguments(cache), "ignored": ignored, "types": dict(types),
        "dequantised": True,
    }  # fmt: skip


def _arguments(args: Any) -> dict[str, Any]:
    """A scheme of compressed-tensors."""
    return {
        "type": _text(args.type), "bits": int(args.num_bits), "strategy": _text(args.strategy),
        "group_size": args.group_size if args.group_size and args.group_size > 0 else None,
        "symmetric": bool(args.symmetric), "dynamic": bool(args.dynamic),
    }  # fmt: skip


def _of_torchao(module: nn.Module) -> dict[str, Any]:
    """From the packed weights themselves."""
    weights, inputs, types, ignored = Counter[Any](), Counter[Any](), Counter[str](), []
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or not isinstance(part, (nn.Linear, nn.Embedding)):
            continue
        scheme = None if type(weight.data) is Tensor else _tensor_scheme(weight.data)
        if scheme is None:
            ignored += [name] * isinstance(part, nn.Linear)
            continue
        weights[_items(scheme | {"format": type(weight.data).__name__})] += 1
        types[f"{scheme['type']}{scheme['bits']}"] += 1
        active = _input_scheme(weight.data)
        if active is not None:
            inputs[_items(active)] += 1
    return {"weights": _counted(weights), "activations": _counted(inputs), "kv_cache": None, "ignored": ignored,
            "types": dict(types), "dequantised": False}  # fmt: skip


def _tensor_scheme(packed: Any) -> dict[str, Any]:
    """Of a packed weight of torchao: its type, and how many values share a scale."""
    block, shape = list(getattr(packed, "block_size", ())), list(packed.shape)
    kind, bits = _WRITTEN.get(_dtype_of(packed), ("int", 4 if "Int4" in type(packed).__name__ else 8))
    strategy = "tensor" if block == shape else "channel" if block[-1:] == shape[-1:] else "group"
    return {
        "type": kind, "bits": bits, "strategy": strategy, "group_size": block[-1] if strategy == "group" else None,
        "symmetric": not _shifted(getattr(packed, "zero_point", None)), "dynamic": False,
    }  # fmt: skip


def _shifted(zero_point: Tensor | None) -> bool:
    return zero_point is not None and bool(zero_point.any())


def _dtype_of(packed: Any) -> torch.dtype | None:
    target = getattr(packed, "target_dtype", None)
    return target if target is not None else getattr(getattr(packed, "qdata", None), "dtype", None)


def _input_scheme(packed: Any) -> dict[str, Any] | None:
    """How the input of a linear map with this packed weight is quantised; None where it is not."""
    asked = getattr(packed, "act_quant_kwargs", None)
    named = getattr(packed, "activation_quantization", None)  # "int8_asym_per_token"
    if asked is None and named is None:
        return None
    of = "row" if named is not None else type(getattr(asked, "granularity", None)).__name__.lower()
    dynamic = getattr(packed, "act_quant_scale", None) is None
    kind = "float" if "float8" in type(asked).__name__.lower() else "int"
    mapping = str(getattr(asked, "mapping_type", "")).lower() if named is None else str(named)
    return {"type": kind, "bits": 8, "strategy": "tensor" if of.endswith("tensor") else "token", "group_size": None,
            "symmetric": "asym" not in mapping, "dynamic": dynamic}  # fmt: skip


def _of_others(module: nn.Module) -> dict[str, Any]:
    """Of a method that is only known by its configuration (bitsandbytes, GPTQ, AWQ, MXFP4)."""
    said: Any = module.config.quantization_config
    settings = said if isinstance(said, dict) else said.to_dict()
    kind, bits = _BY_NAME.get(str(method_of(module.config)), ("int", None))
    bits = bits or next(
        (settings[k] for k in ("bits", "num_bits", "w_bit", "nbits") if isinstance(settings.get(k), int)), None
    )
    if bits is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        bits = 4 if settings.get("load_in_4bit") else 8
    size = settings.get("group_size") or settings.get("q_group_size")
    scheme = {"type": kind, "bits": bits, "strategy": "group" if size else None, "group_size": size}
    active = [_INT8_INPUTS] if settings.get("load_in_8bit") and method_of(module.config) == "bitsandbytes" else []
    left = settings.get("modules_to_not_convert") or settings.get("llm_int8_skip_modules") or []
    return {"weights": [scheme] if bits else [], "activations": active, "kv_cache": None, "ignored": list(left),
            "types": {}, "dequantised": bool(settings.get("dequantize", False))}  # fmt: skip


def _text(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def _items(scheme: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(scheme.items())


def _counted(schemes: Counter[Any]) -> list[dict[str, Any]]:
    """Different schemes with the number of modules that have each, the most frequent first."""
    return [dict(scheme) | {"n_modules": n} for scheme, n in schemes.most_common()]
