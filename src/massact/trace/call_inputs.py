"""What a module is called with while something else runs: the denoising steps of a diffusion pipeline, say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from massact.corpora.batch import Corpus
from massact.corpora.packing import Request
from massact.corpora.tensors import from_tensors
from massact.records.errors import UserError


def recorded(module: nn.Module, run: Callable[[], Any]) -> Corpus:
    """A corpus of what a module is called with: one sequence for each row of each call, in the order of the calls.

    A number that a whole call shares (a timestep) is given to each of its rows. What has no rows (tables of positions,
    flags) is left out: a module that cannot do without it is wrapped in one that gives it.

    Args:
        module: what is called, such as the transformer of a pipeline.
        run: calls it, any number of times.

    Raises:
        UserError: it is never called, or calls have inputs of different names or shapes.
    """
    names, calls = list(inspect.signature(module.forward).parameters), list[dict[str, Any]]()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        calls.append({k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in given.items()})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if not calls:
        raise UserError(f"{type(module).__name__} was not called.", do="Run what calls this module, not a copy of it.")
    rows = [_rows(call) for call in calls]
    some = {name for row in rows for name in row}
    if lacking := sorted(name for name in some if not all(name in row for row in rows)):
        raise UserError(
            f"{type(module).__name__} is not called with the same inputs every time.",
            f"Some calls have {', '.join(lacking)}, others do not.",
            "Record calls of one kind.",
        )
    shapes = {name: {tuple(row[name].shape[1:]) for row in rows} for name in rows[0]}
    if uneven := [name for name, found in shapes.items() if len(found) > 1]:
        raise UserError(
            f"{type(module).__name__} is called with inputs of different shapes.",
            "; ".join(f"{name}: {', '.join(map(str, sorted(shapes[name])))}" for name in uneven) + ".",
            "Record calls of one resolution and length.",
        )
    return from_tensors({k: torch.cat([row[k] for row in rows]) for k in rows[0]}, None, Request(), name="calls")


def _rows(call: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs of one call that have a row for each sequence."""
    tensors = {k: v for k, v in call.items() if isinstance(v, Tensor)}
    n = next((len(v) for v in tensors.values() if v.ndim > 1), 0)
    if not n:
        raise UserError("A call has no input with rows.", do="Record a module that takes (batch, ...) tensors.")
    return {
        k: v.reshape(1).expand(n).clone() if v.numel() == 1 and v.ndim < 2 else v
        for k, v in tensors.items()
        if (v.ndim and len(v) == n) or (v.numel() == 1 and v.ndim < 2)
    }
