"""The values of a model's weights: finite, and known by their hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from massact.anatomy.projections import packed_sizes
from massact.models.adapters import adapter_states
from massact.models.checkpoint_formats import BESIDE, packing_record
from massact.models.offloading import stored
from massact.records.errors import UserError
from massact.trace.compilation import ORIGINAL


def check_finite(module: nn.Module) -> None:
    """Refuse weights with NaN or Inf.

    Raises:
        UserError: names the first such tensor and how many values of it are not finite.
    """
    weights = {name for name, _ in module.named_parameters()}
    for name, tensor in stored(module):
        if not isinstance(tensor, Tensor):  # the packed weights of a quantised module
            continue
        if tensor.is_meta or is_lazy(tensor):
            raise UserError(
                f"Weight {name!r} holds no values.",
                "The model was built on the meta device, or its shapes are not known yet.",
                "Load its weights (or run it once), then give it to load().",
            )
        for part, values in plain_parts(name, tensor):
            _check(part, values, name in weights)


def _check(name: str, tensor: Tensor, weight: bool) -> None:
    """Refuse a tensor with NaN or Inf; a buffer may hold infinities on purpose (a mask, bounds that clip nothing)."""
    # Sums are not defined for every 8-bit float.
    tensor = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return
    bad = int((~torch.isfinite(tensor) if weight else tensor.isnan()).sum())
    if bad:
        raise UserError(
            f"Weight {name!r} is NaN or Inf in {bad:,} of {tensor.numel():,} places.",
            "Nothing measured with such weights would mean anything.",
            "Load the original checkpoint, or a dtype with more range (--dtype bfloat16).",
        )


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a packed weight consists of (codes, scales), under names of their own; a plain one is itself."""
    data = tensor.data
    if type(data) is Tensor or not is_traceable_wrapper_subclass(data):
        yield name, data
        return
    for part in data.__tensor_flatten__()[0]:
        yield from plain_parts(f"{name}.{part}", getattr(data, part))


def unpacked(weight: Tensor) -> Tensor:
    """The values of a weight in floating point; those of a packed one as codes and scales make them."""
    data: Any = weight.detach()
    packed = type(data.data) is not Tensor and hasattr(data, "dequantize")
    return data.dequantize() if packed else data


def n_parameters(module: nn.Module) -> int:
    """How many weights a model has, packed ones by the matrix that they stand for; scales are none."""
    known: dict[int, int] = {}
    for part in module.modules():
        sizes = packed_sizes(part)
        if sizes:
            known[id(part)] = math.prod(sizes)
        for name, parameter in part.named_parameters(recurse=False):
            beside = name != "bias" if sizes else hasattr(part, "quantization_scheme") and name.endswith(BESIDE)
            if not beside:
                known[id(parameter)] = parameter.numel()
    return sum(known.values())


def vectors_hash(module: nn.Module) -> str:
    """SHA-256 over the values, in float32, of all vectors among the parameters: norms and biases, never quantised.

    A model and its quantised form have the same one, as long as nothing was folded into the norms.
    """
    digest = hashlib.sha256()
    vectors = {name.replace(f"{ORIGINAL}.", "") for name, p in module.named_parameters() if p.ndim == 1}
    for name, tensor in stored(module):
        if name in vectors and not name.endswith(BESIDE):
            values = next(values for _, values in plain_parts(name, tensor))
            digest.update(name.encode())
            digest.update(memoryview(values.float().cpu().contiguous().numpy()))
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in the order of their names.

    Where activations are quantised as it runs, also over how, and over the state of adapters: with the same weights it
    is another model.
    """
    digest = hashlib.sha256()
    packing = packing_record(module) or {}
    if packing.get("activations") or packing.get("kv_cache"):
        digest.update(json.dumps([packing["activations"], packing["kv_cache"]]).encode())
    states = [(name, state) for name, _, state in adapter_states(module)]
    if states:  # with the same weights a model whose adapter is not active is another one
        digest.update(json.dumps(states, sort_keys=True).encode())
    for name, tensor in stored(module):
        if not isinstance(tensor, Tensor):  # the packed weights of a quantised module
            digest.update(f"{name} {tensor!r}".encode())
            continue
        for part, values in plain_parts(name, tensor):
            digest.update(f"{part} {values.dtype} {tuple(values.shape)}".encode())
            data = values.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(data.view(torch.uint8).numpy()) if data.numel() else b"")
    return digest.hexdigest()
