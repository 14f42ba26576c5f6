"""Tiny random models in which tokens see much of one another, so that a wrong slot shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import massact as ma
from massact.models import Model
from tests.families import FAMILIES

# Of some families a window that a test can cross, beside layers without one.
MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
}


def module_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of a family with weights eight times as large as they are drawn."""
    config_name, args, model_name = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**args | MORE.get(family, {}))
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.to(dtype)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Model:
    """The same, proved."""
    return ma.load(module_of(family, dtype))


def texts(n: int = 4, length: int = 20) -> list[Tensor]:
    """Texts of random tokens."""
    return list(torch.randint(3, 90, (n, length), generator=torch.Generator().manual_seed(1)))
