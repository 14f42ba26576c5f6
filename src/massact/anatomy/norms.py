"""The norms inside the blocks of a stack."""

from __future__ import annotations

from torch import Tensor, nn

from massact.anatomy.projections import sizes_of
from massact.records.anatomy import Stack


def norms_of(module: nn.Module, stack: Stack) -> list[tuple[int, str]]:
    """(layer, dotted path) of every module of a block with a scale as wide as the residual stream, as they are held.

    Blocks that share their modules name these once for each layer.
    """
    found: dict[tuple[int, str], None] = {}
    for block in stack.blocks:
        linear = ""
        for name, part in module.get_submodule(block.module).named_modules():
            weight = getattr(part, "weight", None)
            if linear and name.startswith(f"{linear}."):  # the magnitudes of an adapter (DoRA)
                continue
            linear = name if name and sizes_of(part) else linear
            if isinstance(weight, Tensor) and weight.ndim == 1 and len(weight) == stack.d_model:
                found[block.layer, f"{block.module}.{name}" if name else block.module] = None
    return list(found)
