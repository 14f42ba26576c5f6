"""Scales and biases of norms set to zero at some dims (Kovaleva 2021): whatever value of a weight that takes.

Shapes: D dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from massact.interventions.catalogue import norm_dims
from massact.models import Model, held
from massact.trace import Together, WeightEdit

ZEROS = (0.0, -1.0)  # where a scale is zero: of a norm that multiplies by w, and of one that multiplies by 1 + w
NOTHING = 1e-6  # of what the norm gives with the scale at one


@dataclass(frozen=True)
class Parameter:
    """Scale or bias of a norm, as `named_parameters` calls it.

    Args:
        name: dotted.
        zero: the value at which it does nothing.
        value_D: (D,) its distance from there, float64: the scale itself, for w and 1 + w alike.
        scale: whether it is the scale, not the bias.
    """

    name: str
    zero: float
    value_D: np.ndarray
    scale: bool


def zero_of(norm: nn.Module) -> float | None:
    """The value of its weight with which a norm gives zero, found by running it on one vector.

    Returns:
        0, or -1 for a norm that multiplies by 1 + weight; None where it cannot be run on a vector alone, or is
        neither.
    """
    weight: Tensor = norm.weight
    if weight.is_meta:  # offloaded
        return None
    x_11D = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)[None, None]
    rest = {name: torch.zeros_like(p) for name, p in norm.named_parameters() if name != "weight"}
    given = []
    with torch.no_grad():
        for value in (*ZEROS, 1.0):
            try:
                out = torch.func.functional_call(norm, rest | {"weight": torch.full_like(weight, value)}, (x_11D,))
            except (TypeError, ValueError, RuntimeError):  # one that wants a gate or a condition, say
                return None
            if not isinstance(out, Tensor):
                return None
            given.append(float(out.abs().max()))
    return next((z for z, most in zip(ZEROS, given, strict=False) if most <= NOTHING * given[-1]), None)


def parameters_of(model: Model, norms: Sequence[str]) -> tuple[list[Parameter], list[str]]:
    """Every scale and bias of some norms, once each, and the norms whose zero could not be found (0 is taken).

    Args:
        norms: their dotted paths.
    """
    names = {id(p): name for name, p in model.module.named_parameters()}
    found: dict[str, Parameter] = {}
    unsure: list[str] = []
    for path in dict.fromkeys(norms):  # blocks may share one
        norm = model.module.get_submodule(path)
        zero = zero_of(norm)
        if zero is None:
            unsure.append(path)
        for which, at in (("weight", zero or 0.0), ("bias", 0.0)):
            p = getattr(norm, which, None)
            if isinstance(p, Tensor) and id(p) in names:
                value_D = held(norm, which).detach().double().cpu().numpy() - at
                found.setdefault(names[id(p)], Parameter(names[id(p)], at, value_D, which == "weight"))
    return list(found.values()), unsure


def silenced(name: str, parameters: Sequence[Parameter], dims: Sequence[int]) -> Together:
    """Scale and bias zero at some dims, in all of some norms: one edit."""

    def moved(p: Parameter) -> WeightEdit:
        if p.zero == 0:
            return norm_dims(p.name, dims)

        def apply(weight_D: Tensor) -> Tensor:
            weight_D[list(dims)] = p.zero
            return weight_D

        return WeightEdit(f"{p.name} to {p.zero:g}", p.name, apply)

    return Together(name, tuple(moved(p) for p in parameters))
