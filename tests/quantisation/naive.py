"""What a deployed model does, predicted naively: compressed-tensors' fake quantisation at every Linear, by plain hooks.

Shapes: B sequences, T tokens, F inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

FUSED = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))  # one global scale of NVFP4 for all of them


@torch.no_grad()
def nll_B(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence, over targets 1.., in float64."""
    rows = []
    for ids_T in ids_BT:
        logits_TV = model(input_ids=ids_T[None]).logits[0, :-1].double()
        rows.append(cross_entropy(logits_TV, ids_T[1:]))
    return torch.stack(rows)


@contextmanager
def predicted(
    model: nn.Module, scheme: QuantizationScheme, modules: Iterable[str], text_BT: Tensor
) -> Iterator[nn.Module]:
    """The model, quantised: weights in place, inputs by hooks; static ranges are of its own run on `text_BT`."""
    linears = {name: model.get_submodule(name) for name in modules}
    inputs, weights = scheme.input_activations, scheme.weights
    ranges = _ranges(model, linears, text_BT) if inputs is not None and inputs.dynamic is not True else {}
    kept = {name: linear.weight.data for name, linear in linears.items()}
    hooks = []
    for name, linear in linears.items():
        if inputs is not None:
            hooks.append(linear.register_forward_pre_hook(_rounded(inputs, ranges.get(name))))
        if weights is not None:
            linear.weight.data = _weight(kept[name], weights, _partners(name, kept))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            linear.weight.data = kept[name]


def _ranges(model: nn.Module, linears: dict[str, Any], text_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and greatest input of each module over a text."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: seen[n].append(x[0].detach())) for n, m in linears.items()]
    nll_B(model, text_BT)
    for hook in hooks:
        hook.remove()
    return {
        n: (torch.stack([x.min() for x in xs]).min(), torch.stack([x.max() for x in xs]).max())
        for n, xs in seen.items()
    }


def _rounded(args: Any, ends: tuple[Tensor, Tensor] | None) -> Any:
    """A hook that rounds what comes in."""
    whole = None
    if ends is not None and args.strategy == "tensor_group":
        whole = generate_gparam(ends[0].reshape(1), ends[1].reshape(1))

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if ends is not None and whole is None:
            scale, zero = calculate_qparams(ends[0].reshape(1), ends[1].reshape(1), args)
        else:
            scale, zero = compute_dynamic_scales_and_zp(given[0], args, module, global_scale=whole)
        return (fake_quantize(given[0], scale, zero, args, global_scale=whole), *given[1:])

    return hook


def _weight(weight_OF: Tensor, args: Any, amax: Tensor) -> Tensor:
    whole = None
    if args.strategy == "tensor":
        low, high = weight_OF.min().reshape(1), weight_OF.max().reshape(1)
    elif args.strategy == "channel":
        low, high = weight_OF.amin(1, keepdim=True), weight_OF.amax(1, keepdim=True)
    else:
        groups = weight_OF.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
        if args.strategy == "tensor_group":
            whole = generate_gparam(-amax.reshape(1), amax.reshape(1))
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    made: Tensor = fake_quantize(weight_OF, scale, zero, args, global_scale=whole)
    return made


def _partners(name: str, weights: dict[str, Tensor]) -> Tensor:
    """Greatest |w| of a matrix and those that are run with it as one."""
    stem, _, leaf = name.rpartition(".")
    fused = next((group for group in FUSED if leaf in group), (leaf,))
    return torch.stack([weights[f"{stem}.{x}" if stem else x].abs().max() for x in fused]).max()
