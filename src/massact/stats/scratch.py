"""Reused buffers: a fresh one per layer doubles the cost of a reduction (page faults)."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_BUFFERS = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU buffer that the next call with the same name and dtype overwrites.

    One per thread. It grows to the largest request and never per layer.
    """
    buffers: dict[tuple[str, torch.dtype], Tensor] = _BUFFERS.__dict__
    key, n = (name, dtype), math.prod(shape)
    if key not in buffers or buffers[key].numel() < n:
        # Made inside inference mode, it could not be written outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(n, dtype=dtype)
    return buffers[key][:n].view(shape)
