"""What a module is called with while something else runs: the denoising steps of a diffusion pipeline, say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from massact.corpora.batch import Corpus
from massact.corpora.packing import Request
from massact.corpora.tensors import from_tensors
from massact.records.errors import UserError

_SHAPING = {"return_dict"}  # says in what an output is put, and changes no value


def recorded(module: nn.Module, run: Callable[[], Any]) -> Corpus:
    """A corpus of what a module is called with: one sequence for each row of each call, in the order of the calls.

    A number that a whole call shares (a timestep; a Python number that differs between calls, or has no default) is
    given to each of its rows. What else has no rows (tables of positions, flags) is left out, and the notes of a scan
    say so: a module that cannot do without it is wrapped in one that gives it.

    Args:
        module: what is called, such as the transformer of a pipeline.
        run: calls it, any number of times; what it raises goes on to the caller.

    Raises:
        UserError: it is never called, calls have inputs of different names or shapes, or inputs have no names.
    """
    if not callable(run):
        raise UserError(f"run is {type(run).__name__}, nothing that can be called.",
                        do="Give a function: recorded(module, lambda: pipe(...)).")  # fmt: skip
    signature, calls = inspect.signature(module.forward), list[dict[str, Any]]()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _named(signature, type(module).__name__, args, kwargs)
        calls.append({k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in given.items()})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if not calls:
        raise UserError(f"{type(module).__name__} was not called.", do="Run what calls this module, not a copy of it.")
    defaults = {name: p.default for name, p in signature.parameters.items()}
    calls = [call | _numbers(call, calls, defaults) for call in calls]
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
    made = from_tensors({k: torch.cat([row[k] for row in rows]) for k in rows[0]}, None, Request(), name="calls")
    left = dict.fromkeys(_words(k, v) for call in calls for k, v in call.items()
                         if k not in some | _SHAPING and not _is_default(v, defaults.get(k)))  # fmt: skip
    if not left:
        return made
    note = (f"Left out of what {type(module).__name__} was called with: {', '.join(left)}. They have no row for each "
            "sequence, and it is measured without them.")  # fmt: skip
    return replace(made, origin=replace(made.origin, source=made.origin.source | {"notes": [note]}))


def _named(signature: inspect.Signature, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of one call by name.

    Raises:
        UserError: some have none.
    """
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the module says so itself
        return kwargs
    named: dict[str, Any] = {}
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and value:
            raise UserError(f"{who} is called with inputs that have no names.", f"Its forward takes *{name}.",
                            "Record the module inside it, or call it with keywords.")  # fmt: skip
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def _numbers(call: dict[str, Any], calls: list[dict[str, Any]], defaults: dict[str, Any]) -> dict[str, Tensor]:
    """Of one call the Python numbers that are inputs, as tensors: they differ between calls, or have no default."""
    return {
        name: torch.tensor(value)
        for name, value in call.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if defaults.get(name) is inspect.Parameter.empty or any(other.get(name) != value for other in calls)
    }


def _is_default(value: Any, default: Any) -> bool:
    """Whether a call gives what would be there without it."""
    if value is None or value is default:
        return True
    return isinstance(value, bool | int | float | str) and type(value) is type(default) and value == default


def _words(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{name} {tuple(value.shape)}"
    return f"{name}={value!r}" if isinstance(value, bool | int | float | str) else f"{name} ({type(value).__name__})"


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
