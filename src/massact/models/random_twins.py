"""The null of every claim of "massive": the same architecture with weights of its own random initialisation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from massact.models.loading import Model, proved
from massact.records.errors import UserError, class_and_line


def random_twin(model: Model, seed: int = 0, spend: bool = False) -> Model | str:
    """The same architecture with its own random initialisation, in full precision and without adapters.

    Blocks and other modules that a model has in several places are one in its twin too.

    Args:
        model: stays as it is, unless
        spend: its own weights may be overwritten, where that gives the same twin: half the memory.

    Returns:
        The twin, or the reason why there is none.
    """
    config = getattr(model.module, "config", None)
    if config is None or not hasattr(model.module, "_init_weights"):
        return "the model is not from transformers, so it does not say how it is initialised"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):  # its weights are not
            del config.quantization_config
        try:
            if spend and _is_as_built(model) and _initialised(model.module):
                return replace(model, name=f"random twin of {model.name}", revision=None)
            twin = _built(type(model.module), config, seed)
        except Exception as error:
            return f"its configuration alone does not make another one ({class_and_line(error)})"
        for change in getattr(model.module, "massact_changes", ()):  # attention variants and other changes by training
            twin = change(twin)
        twin = _with_same_sharing(twin, model.module).to(model.device, model.dtype).eval()
    made = replace(model, module=twin, name=f"random twin of {model.name}", revision=None, taken_off=[])
    names = {name for name, _ in twin.named_modules()}
    if names >= {place.module for place in model.anatomy.sites().values()}:
        return made
    return _proved_anew(made)  # modules have other names: compiled ones, adapters


def _is_as_built(model: Model) -> bool:
    """Whether nothing was put around or into a model since it was built, and all of its weights are numbers."""
    if model.around or model.quantised or hasattr(model.module, "massact_changes"):
        return False
    known = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    kept = set(model.module.state_dict(keep_vars=True)) - known
    numbers = all(p.is_floating_point() and p.device.type != "meta" for p in model.module.parameters())
    return numbers and not kept  # statistics that were learned are not drawn anew


def _built(kind: Any, config: Any, seed: int) -> nn.Module:
    """A model of a configuration, initialised once: building it otherwise draws most weights twice."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        made: nn.Module = kind(config)
    if not _initialised(made):
        torch.manual_seed(seed)
        made = kind(config)
    return made


def _initialised(module: Any) -> bool:
    """Give a module its own random initialisation; False where that does not set all of its parameters."""
    for tensor in module.parameters():
        tensor.data.fill_(torch.nan)
        tensor.__dict__.pop("_is_hf_initialized", None)
    for part in module.modules():
        part.__dict__.pop("_is_hf_initialized", None)
    module.init_weights()
    return not any(bool(tensor.isnan().any()) for tensor in module.parameters())


def _with_same_sharing(twin: nn.Module, module: nn.Module) -> nn.Module:
    """The twin, in which modules are one where they are in the model."""
    first: dict[int, str] = {}
    known = dict(twin.named_modules())
    for name, part in module.named_modules(remove_duplicate=False):
        other = first.setdefault(id(part), name)
        if other != name and {name, other} <= set(known):
            twin.set_submodule(name, known[other])
    return twin


def _proved_anew(made: Model) -> Model | str:
    """The twin with an anatomy of its own, where that has the stacks of the model."""
    try:
        anatomy, proof, arguments, example = proved(made.module, [s.path for s in made.anatomy.stacks], None)
    except UserError as error:
        return f"the model was changed after it was built, and what its configuration makes is not proved: {error.what}"
    if [(s.name, s.n_layers) for s in anatomy.stacks] != [(s.name, s.n_layers) for s in made.anatomy.stacks]:
        return "the model was changed after it was built: its configuration makes one with other layers"
    return replace(made, anatomy=anatomy, proof=proof, arguments=arguments, example=example)
