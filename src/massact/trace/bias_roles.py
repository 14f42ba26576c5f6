"""Which entries of which biases feed queries, keys and values: by gradients, whatever the layout of the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.anatomy import AttentionPlace
from massact.trace.attention import AttentionCall, attending

ROLES = ("q", "k", "v")


def bias_roles(
    root: nn.Module, example: Mapping[str, Any], places: Sequence[AttentionPlace], seed: int = 0
) -> list[dict[str, dict[str, Tensor]]]:
    """For every attention call, the entries of 1-d biases inside its module that its q, k and v depend on.

    With w random, entry i of a bias b feeds the queries where d(sum of w q) / d b_i is not zero. An entry that is not
    used by a query (of another head, of the keys) has the gradient zero, exactly. What a module takes is detached, so
    that a bias which several layers share does not reach later queries through earlier layers.

    Args:
        root: the model that the places were found in; no `.grad` and no `requires_grad` is left changed.
        example: keyword arguments of one short forward pass.
        places: attention calls.
        seed: of the random weights.

    Returns:
        For every place: name of the parameter -> role ("q", "k", "v") -> (N,) bool on the CPU. A role is absent where
        its tensor was not seen (attention that is written out) or has no gradient.
    """
    names = {id(p): name for name, p in root.named_parameters()}
    modules = dict(root.named_modules())
    mine = [_biases(modules[place.module], names) for place in places]
    found: list[dict[str, dict[str, Tensor]]] = [{} for _ in places]
    generator = torch.Generator().manual_seed(seed)

    def see(i: int) -> Callable[[AttentionCall], None]:
        def look(call: AttentionCall) -> None:
            for role, x in zip(ROLES, (call.q_BHTE, call.k_BKSE, call.v_BKSF), strict=True):
                if x is None or not x.requires_grad or not mine[i]:
                    continue
                w = torch.randn(x.shape, generator=generator).to(x)
                given = torch.autograd.grad((w * x).sum(), list(mine[i].values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(mine[i], given, strict=True):
                    if gradient is not None and bool((gradient != 0).any()):
                        found[i].setdefault(name, {})[role] = (gradient != 0).cpu()

        return look

    wanted = {id(p) for biases in mine for p in biases.values()}
    # Tensors made in inference mode cannot be saved for a gradient: inputs are copied out of it.
    with torch.inference_mode(False), torch.enable_grad(), _only(root, wanted):
        inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in example.items()}
        apart = _apart(modules[name] for name in dict.fromkeys(p.module for p in places))
        with apart, attending(root, {place: see(i) for i, place in enumerate(places)}) as heads:
            heads.begin()
            root(**inputs)
    return found


def _biases(module: nn.Module, names: Mapping[int, str]) -> dict[str, Tensor]:
    return {names[id(p)]: p for own, p in module.named_parameters()
            if own.endswith("bias") and p.ndim == 1 and p.is_floating_point()}  # fmt: skip


@contextmanager
def _apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What these modules take has no history."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _bare(args), _bare(kwargs)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bare(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_bare(v) for v in value)
    return {k: _bare(v) for k, v in value.items()} if type(value) is dict else value


@contextmanager
def _only(root: nn.Module, wanted: set[int]) -> Iterator[None]:
    """Only some parameters ask for a gradient; all flags as before afterwards."""
    flags = [(p, p.requires_grad) for p in root.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
