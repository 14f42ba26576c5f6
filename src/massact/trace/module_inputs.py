"""A module that leaves its input where a function that is called inside it can read it.

An attention function of transformers' registry is given queries, keys and values; a gate needs what the module itself
was given. The hooks are functions of this file, so that copies and pickles of the model keep them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_NAME = "massact_input"


def keep_input(module: nn.Module) -> list[Any]:
    """From now on `input_of(module)` is the first tensor that the module was called with, while it runs.

    Returns:
        The handles of its hooks, to take them away again.
    """
    return [
        module.register_forward_pre_hook(_keep, with_kwargs=True),
        module.register_forward_hook(_forget, always_call=True),
    ]


@contextmanager
def inputs_kept(root: nn.Module) -> Iterator[None]:
    """The same for every module of a model, for the length of a `with`."""
    handles = [handle for module in root.modules() for handle in keep_input(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in root.modules():
            module.__dict__.pop(_NAME, None)


def input_of(module: nn.Module) -> Tensor:
    """The first tensor that a module was called with (B, T, D), while it runs.

    Raises:
        RuntimeError: it does not run, or `keep_input` was not called on it.
    """
    x = module.__dict__.get(_NAME)
    if x is None:
        raise RuntimeError(f"{type(module).__name__} keeps no input: it does not run, or its hooks were removed.")
    return x


def _keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    module.__dict__[_NAME] = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def _forget(module: nn.Module, *_: Any) -> None:
    module.__dict__[_NAME] = None  # a tensor that is kept would keep its graph
