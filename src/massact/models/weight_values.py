"""The values of a model's weights: finite, and known by their hash."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from massact.records.errors import UserError


def check_finite(module: nn.Module) -> None:
    """Refuse weights with NaN or Inf.

    Raises:
        UserError: names the first such tensor and how many values of it are not finite.
    """
    weights = {name for name, _ in module.named_parameters()}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):  # the packed weights of a quantised module
            continue
        if tensor.is_meta or is_lazy(tensor):
            raise UserError(
                f"Weight {name!r} holds no values.",
                "The model was built on the meta device, or its shapes are not known yet.",
                "Load its weights (or run it once), then give it to load().",
            )
        # Sums are not defined for every 8-bit float.
        tensor = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
            # A buffer may hold infinities on purpose: a mask, or the bounds of a clamp that clips nothing.
            bad = int((~torch.isfinite(tensor) if name in weights else tensor.isnan()).sum())
            if bad:
                raise UserError(
                    f"Weight {name!r} is NaN or Inf in {bad:,} of {tensor.numel():,} places.",
                    "Nothing measured with such weights would mean anything.",
                    "Load the original checkpoint, or a dtype with more range (--dtype bfloat16).",
                )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # the packed weights of a quantised module
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(data.view(torch.uint8).numpy()) if data.numel() else b"")
    return digest.hexdigest()
