"""What a user put around a model: the model inside is found, shown to give the same, and what was done is said.

A wrapper holds one module that has all parameters. That it passes on what it is given, and gives what it gets, is shown
on a short input (PEFT, a class of one's own); of torch's own wrappers (DataParallel, DistributedDataParallel,
AveragedModel, torch.compile) it is known, and running them would compile, or wait for other processes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from massact.anatomy.examples import device_of, example_variants, float_dtype, to_device
from massact.models.adapters import adapter_states
from massact.models.checkpoint_formats import unpacked_for_cpu
from massact.models.offloading import offload_notes
from massact.models.sharding import refuse_shards
from massact.records.errors import UserError, class_and_line
from massact.trace import tensors_in, unchanged
from massact.trace.compilation import ORIGINAL, compiled_parts

_NAMED = 4


def unwrapped(module: nn.Module, inputs: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
    """The model inside whatever was put around it, and what a reader of its numbers must know of that, a sentence each.

    Args:
        module: as the user brought it.
        inputs: an example of the user's own: then only wrappers of torch itself are taken off.

    Raises:
        UserError: parts of the weights lie in other processes, or what is around a model changes what it gives.
    """
    refuse_shards(module)
    compiled = [name or type(module).__name__ for name in compiled_parts(module)]
    inside, around = module, list[str]()
    while (held := inside_torch(inside)) is not None:
        if ORIGINAL not in inside._modules:
            around.append(type(inside).__name__)
        inside = held
    if inputs is None and not says_inputs(inside):
        held, names = _model_inside(inside)
        inside, around = held, around + names
    notes = [f"The model was wrapped in {', '.join(around)}: what is inside gives the same, and is measured."]
    notes = notes if around else []
    if compiled:
        notes.append(f"torch.compile was left aside in {_few(compiled)}: measured are the original modules, whose "
                     "numbers compiled ones repeat up to rounding.")  # fmt: skip
    return inside, [*notes, *offload_notes(inside), *unpacked_for_cpu(inside)]


def no_plain_weights(module: nn.Module) -> tuple[str, str] | None:
    """Why the weights of a model cannot be changed or saved as they are, and what to do; None where they can."""
    if next(adapter_states(module), None) is not None:
        return "Adapters run beside its weights.", "Merge them first: load(peft_model.merge_and_unload())."
    if offload_notes(module):
        return "Weights of it are offloaded.", "Load it without offloading."
    return None


def inside_torch(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper of torch itself holds; None where a module is no such wrapper."""
    original = module._modules.get(ORIGINAL)
    if original is not None:
        return original
    of_torch = type(module).__module__.startswith("torch.") and "_fsdp_wrapped_module" not in module._modules
    return _held(module) if of_torch and _passes_all(module) else None


def _held(module: nn.Module) -> nn.Module | None:
    """The one child that holds all parameters of a module; None where others do too."""
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    return holders[0] if len(holders) == 1 and not own else None


def _passes_all(module: nn.Module) -> bool:
    """Whether the forward of a module names no argument: forward(*args, **kwargs)."""
    parameters = inspect.signature(module.forward).parameters.values()
    return bool(parameters) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def says_inputs(module: nn.Module) -> bool:
    """Whether a module is itself a model of transformers or timm, and no wrapper that hands on its attributes."""
    return hasattr(type(module), "main_input_name") or "pretrained_cfg" in vars(module)


def _model_inside(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model of transformers or timm in the innermost of several shells, and the names of these.

    Where there is none the module is one of the user's own.

    Raises:
        UserError: there is one, and what is around it does something of its own.
    """
    names, held = list[str](), module
    while not says_inputs(held):
        names.append(type(held).__name__)
        inner = _held(held)
        if inner is None:
            break
        held = inner
    why = _difference(module, held) if says_inputs(held) else _own_weights(held)
    if says_inputs(held) and not why:
        return held, names
    paths = _models_in(module)
    if not paths:
        return module, []
    first = module.get_submodule(paths[0])
    raise UserError(
        f"{type(module).__name__} does something of its own around {type(first).__name__}.",
        why,
        f"Give load() the model inside it, get_submodule({paths[0]!r}), which is measured without what is around it; "
        "or one short example of the whole: load(model, inputs={'name': tensor, ...}).",
    )


def _own_weights(wrapper: nn.Module) -> str:
    """What a wrapper has beside the model inside it, in words."""
    learned = [str(getattr(c, "peft_type", "")).rpartition(".")[2].lower().replace("_", " ")
               for c in (getattr(wrapper, "peft_config", None) or {}).values()
               if getattr(c, "is_prompt_learning", False)]  # fmt: skip
    if learned:
        return (f"PEFT's {learned[0]} puts learned tokens, or keys and values, in front of the text, and these stand "
                "in no input.")  # fmt: skip
    models = _models_in(wrapper)
    own = [n for n, _ in wrapper.named_parameters() if not any(n.startswith(f"{path}.") for path in models)]
    return f"It has weights of its own beside the model{f': {_few(own)}' if own else ''}."


def _models_in(module: nn.Module) -> list[str]:
    """Dotted names of the outermost models of transformers or timm inside a module."""
    found: list[str] = []
    for name, part in module.named_modules():
        if name and says_inputs(part) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _difference(wrapper: nn.Module, model: nn.Module) -> str:
    """In what a wrapper differs from the model inside it, on a short input; "" where it gives the same, bit by bit."""
    for example in example_variants(model):
        given = to_device(example, device_of(model), float_dtype(model))
        args, taken = _as_taken(wrapper, given)
        left = taken if not args else {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        with torch.inference_mode(), unchanged(wrapper, values=True):
            try:  # as massact runs it, and without the flags (use_cache) that the wrapper does not take
                bare = [[t.clone() for _, t in tensors_in(model(**g))] for g in (given, left)]
            except Exception:  # another layout of the inputs is tried; that none of them runs is said later
                continue
            try:
                whole = [t.clone() for _, t in tensors_in(wrapper(*args, **taken))]
            except Exception as error:
                return f"It does not take what the model inside takes ({class_and_line(error)})."
        same = any(len(one) == len(whole) and all(map(_equal, one, whole)) for one in bare)
        return "" if same else "It gives something else than the model inside, on the same short input."
    return ""


def _as_taken(wrapper: nn.Module, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a wrapper: no flags that it does not name; the only tensor by its place where it is renamed."""
    named = inspect.signature(wrapper.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in named.values()):
        return (), given
    tensors = [name for name, x in given.items() if isinstance(x, torch.Tensor)]
    taken = {name: x for name, x in given.items() if name in named or name in tensors}
    if len(tensors) == 1 and tensors[0] not in named:
        return (taken.pop(tensors[0]),), taken
    return (), taken


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
