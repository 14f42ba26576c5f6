"""What torch.compile made of a model or of its parts, and the originals in its place.

A compiled module runs no hook that comes later, or is compiled anew for each; its attention is out of sight. The
original modules compute the same up to rounding, and see every hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

ORIGINAL = "_orig_mod"  # what torch.compile(module) calls the module inside


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs this very module: as a wrapper, in place (`module.compile()`), or its `forward`."""
    in_place = module.__dict__.get("_compiled_call_impl") is not None
    return in_place or ORIGINAL in module._modules or hasattr(module.forward, "_torchdynamo_orig_callable")


def compiled_parts(root: nn.Module) -> list[str]:
    """Dotted names of the modules of a model that torch.compile runs."""
    return [name for name, module in root.named_modules() if is_compiled(module)]


@contextmanager
def originals(root: nn.Module, around: bool = False) -> Iterator[None]:
    """Run the original code of everything compiled, for the length of a `with`, where a model has such parts.

    Args:
        around: a module around it is compiled.
    """
    if not around and not any(map(is_compiled, root.modules())):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
