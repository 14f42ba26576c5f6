"""Parameters and buffers of a model by name; of those that accelerate's hooks bring in for each call, what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class NamedTensors(Mapping[str, Tensor]):
    """Name -> tensor, fetched when it is asked for where it lies elsewhere."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._held: dict[str, Tensor] = dict(root.named_parameters()) | dict(root.named_buffers())

    def __getitem__(self, name: str) -> Tensor:
        value = self._held[name]
        return fetched(self.root, name, value) if value.is_meta else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def fetched(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """What a tensor on the meta device stands for, where its module runs; itself where nothing is kept of it."""
    holder, _, leaf = name.rpartition(".")
    for hook in hooks_of(module.get_submodule(holder)):
        kept = getattr(hook, "weights_map", None) if getattr(hook, "offload", False) else None
        if kept is not None:
            return kept[leaf].to(device=getattr(hook, "execution_device", None), dtype=value.dtype)
    return value


def hooks_of(module: nn.Module) -> list[Any]:
    """accelerate's hooks of one module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
