"""The matrix of a linear map, however its module keeps it: plain, packed, with an adapter beside it, or elsewhere.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from massact.anatomy.examples import device_of, float_dtype
from massact.models.weight_values import unpacked
from massact.trace import unchanged

AT_ONCE = 512  # rows of the identity in one call
_ALIKE = 0.1  # activations of 8 bits are off by about 0.01; codes without their scale by orders of magnitude


def matrix_of(module: nn.Module, n_inputs: int) -> Tensor:
    """What a linear map multiplies by: W_OI in float32, without its bias, on its device.

    The weight that a module holds is taken where the module multiplies by it (to the rounding of its activations).
    Where it holds codes, or runs an adapter beside it, or holds nothing until it is called, W is what the module makes
    of the identity: W[:, i] = f(e_i) - f(0).

    Args:
        module: of a linear map.
        n_inputs: I.
    """
    written = _written(module, n_inputs)
    return _measured(module, n_inputs) if written is None else written


def _written(module: nn.Module, n_inputs: int) -> Tensor | None:
    """The weight that a module holds as (O, I), whichever way its class keeps it; None where it is not what it does."""
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    if weight is None or weight.is_meta or any(True for c in module.children() for _ in c.parameters()):
        return None
    weight_OI = unpacked(weight).float()
    if weight_OI.ndim != 2 or n_inputs not in weight_OI.shape:
        return None
    kept_so = weight_OI.shape[1] == n_inputs and not (
        weight_OI.shape[0] == n_inputs and type(module).__name__ == "Conv1D"
    )
    weight_OI = weight_OI if kept_so else weight_OI.T
    x_1I = torch.randn(1, n_inputs, generator=torch.Generator().manual_seed(0)).to(weight_OI.device)
    try:
        given_O, wanted_O = _apply(module, x_1I)[0], (x_1I @ weight_OI.T)[0]
    except Exception:  # it is called with more than its input: nothing can be shown
        return weight_OI
    alike = given_O.shape == wanted_O.shape and float((given_O - wanted_O).norm()) <= _ALIKE * float(wanted_O.norm())
    return weight_OI if alike else None


def _measured(module: nn.Module, n_inputs: int) -> Tensor:
    rows = [torch.eye(n_inputs)[i : i + AT_ONCE] for i in range(0, n_inputs, AT_ONCE)]
    return torch.cat([_apply(module, x_RI) for x_RI in rows]).T.contiguous()


def linear_part(module: nn.Module, x_RI: Tensor) -> Tensor:
    """f(x) - f(0) of a linear map in its own dtype, (R, I) -> (R, O), without what watches or changes its calls."""
    x_RI = x_RI.to(device_of(module), float_dtype(module))
    with torch.inference_mode(), unchanged(module):
        # Not module(x): taps on its output (a write of the residual stream) are for the model's own calls.
        return (module.forward(x_RI) - module.forward(torch.zeros_like(x_RI[:1]))).float()


def _apply(module: nn.Module, x_RI: Tensor) -> Tensor:
    return linear_part(module, x_RI).clone()  # out of inference mode
