"""Run a model from the middle: the blocks before a layer give what they gave before, without their work.

So one forward pass and, for every edit at layer l of L, the share 1 - l / L of another one evaluate a table of edits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from massact.records.anatomy import Stack


class Prefix:
    """What block `layer` of a stack gave in one forward pass.

    Args:
        root: the model.
        stack: the stack of blocks.
        layer: 1..L; the blocks up to it can be skipped.
    """

    def __init__(self, root: nn.Module, stack: Stack, layer: int) -> None:
        self.root, self.blocks = root, stack.blocks[:layer]
        self.given: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what the last block of the prefix gives."""
        last, calls = self.blocks[-1], Counter[str]()

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if calls[last.module] == last.call:
                self.given = _copied(output)
            calls[last.module] += 1

        handle = self.root.get_submodule(last.module).register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Every block of the prefix gives what the last one of them gave; hooks on them run as ever."""
        left = Counter(block.module for block in self.blocks)
        originals: dict[str, Callable[..., Any]] = {}

        def instead(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if left[name] > 0:
                    left[name] -= 1
                    return _copied(self.given)
                return originals[name](*args, **kwargs)

            return forward

        modules = {name: self.root.get_submodule(name) for name in left}
        patched = {name: vars(module)["forward"] for name, module in modules.items() if "forward" in vars(module)}
        try:
            for name, module in modules.items():
                originals[name] = module.forward
                module.forward = instead(name)
            with torch.no_grad():
                yield
        finally:
            for name, module in modules.items():
                module.__dict__.pop("forward", None)
                if name in patched:  # by another library
                    module.forward = patched[name]


def _copied(given: Any) -> Any:
    """Tensors of their own: what comes after may write in place."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
