"""Weights that lie elsewhere and are brought in for each call of their module: accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from massact.trace.compilation import ORIGINAL
from massact.trace.parameter_values import fetched, hooks_of


def stored(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and value of everything in a state_dict, in the order of names; what was offloaded is fetched, one by one.

    Names are those without torch.compile, so that a compiled model is known by its hash.
    """
    state = module.state_dict()
    for key, name in sorted((name.replace(f"{ORIGINAL}.", ""), name) for name in state):
        value = state[name]
        if isinstance(value, Tensor) and value.is_meta:
            value = fetched(module, name, value)
        yield key, value


def held(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter of a module, by its own name; fetched where it was offloaded."""
    weight: Tensor = getattr(module, name)
    return fetched(module, name, weight) if weight.is_meta else weight


def dispatched(module: nn.Module) -> bool:
    """Whether hooks bring inputs and weights to their devices: such a model cannot be moved."""
    return any(hooks_of(part) for part in module.modules())


def offload_notes(module: nn.Module) -> list[str]:
    """What a reader must know of weights that are brought in for each call: a sentence, or none."""
    n = sum(p.is_meta for p in module.parameters())
    if not n or not dispatched(module):
        return []
    return [f"{n:,} weights of the model are offloaded, and were brought in for each call of their module."]
