"""The null of every claim of "massive": the same architecture with weights of its own random initialisation."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from massact.models.loading import Model, proved
from massact.records.errors import UserError, class_and_line


def random_twin(model: Model, seed: int = 0) -> Model | str:
    """The same architecture with its own random initialisation, in full precision and without adapters.

    Blocks and other modules that a model has in several places are one in its twin too.

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
            twin = type(model.module)(config)
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
