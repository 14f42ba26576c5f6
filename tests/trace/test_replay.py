"""Prefix: a pass that skips the first blocks is the full pass, bit for bit, with and without an edit behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import massact as ma
from massact.anatomy import example_inputs
from massact.corpora import Batch
from massact.models import Model
from massact.records.anatomy import Stack
from massact.trace import Edit, edited
from massact.trace.replay import Prefix
from tests.families import FAMILIES, build

HEADED = [name for name, (_, _, cls) in FAMILIES.items() if "For" in cls and cls != "ViTMAEForPreTraining"]


@cache
def model_of(name: str) -> Model:
    return ma.load(build(name))


def run(model: Model) -> Tensor:
    with torch.inference_mode():
        out = model.module(**example_inputs(model.module, seed=7))
    return out.logits.clone()


def ends(model: Model) -> list[tuple[Stack, int]]:
    return [(stack, layer) for stack in model.anatomy.stacks for layer in {1, stack.n_layers}]


@contextmanager
def counted(model: Model, modules: set[str]) -> Iterator[list[str]]:
    """Names of these modules, as often as each of them runs."""
    calls: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [model.module.get_submodule(n).register_forward_hook(hook(n)) for n in sorted(modules)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def inside(model: Model, stack: Stack, layer: int) -> set[str]:
    """The modules inside one block."""
    block = stack.blocks[layer - 1].module
    return {name for name, _ in model.module.named_modules() if name.startswith(f"{block}.")}


def half(h: Tensor, batch: Batch) -> Tensor:
    return h * 0.5 + 0.1


@pytest.mark.parametrize("name", HEADED)
def test_skipping_gives_the_logits_of_the_full_pass(name: str) -> None:
    model = model_of(name)
    for stack, layer in ends(model):
        prefix = Prefix(model.module, stack, layer)
        with prefix.recording():
            plain = run(model)
        skipped = {m for n in range(1, layer + 1) for m in inside(model, stack, n)}
        shared = len({b.module for b in stack.blocks}) < stack.n_layers
        with counted(model, skipped) as calls, prefix.skipping():
            assert torch.equal(run(model), plain), (stack.name, layer)
        assert bool(calls) == (shared and layer < stack.n_layers), "a skipped block works"
        with counted(model, inside(model, stack, 1)) as calls:
            assert torch.equal(run(model), plain)
        assert calls, "this counts nothing"


@pytest.mark.parametrize("name", HEADED)
def test_an_edit_behind_the_prefix_is_that_of_the_full_pass(name: str) -> None:
    model = model_of(name)
    for stack, layer in ends(model):
        where = f"{stack.name}/{layer}.resid_post" if stack.name else f"{layer}.resid_post"
        edit, prefix = Edit("half", where, half), Prefix(model.module, stack, layer)
        with prefix.recording():
            plain = run(model)
        with edited(model, edit):
            wanted = run(model)
        with edited(model, edit) as fired, prefix.skipping():
            assert torch.equal(run(model), wanted), (stack.name, layer)
        assert fired[0].n_calls == 1 and not torch.equal(wanted, plain)


def test_a_shared_block_is_skipped_as_often_as_it_was_recorded() -> None:
    """ALBERT runs one module L times: behind the prefix the same module must work again, L - l times."""
    model = model_of("albert")
    stack = model.anatomy.stacks[0]
    part = next(m for m in sorted(inside(model, stack, 1)) if m.endswith("attention"))
    for layer in range(1, stack.n_layers + 1):
        edit, prefix = Edit("half", f"{layer}.resid_post", half), Prefix(model.module, stack, layer)
        with prefix.recording():
            plain = run(model)
        with prefix.skipping(), counted(model, {part}) as calls:
            assert torch.equal(run(model), plain)
        assert len(calls) == stack.n_layers - layer
        with edited(model, edit):
            wanted = run(model)
        with edited(model, edit), prefix.skipping():
            assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("name", ["llama", "albert"])
def test_forward_is_restored_after_an_error(name: str) -> None:
    model = model_of(name)
    prefix = Prefix(model.module, model.anatomy.stacks[0], 2)
    with prefix.recording():
        plain = run(model)
    with pytest.raises(ZeroDivisionError), prefix.skipping():
        run(model)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), prefix.recording():
        raise ZeroDivisionError
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.module.modules())
    assert torch.equal(run(model), plain)


def test_a_forward_that_others_have_patched_is_put_back() -> None:
    """Offloading libraries set `forward` on the module itself: theirs must be there again, and run."""
    model = ma.load(build("llama"))
    block, calls = model.module.model.layers[0], []
    own = block.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = patched
    prefix = Prefix(model.module, model.anatomy.stacks[0], 2)
    with prefix.recording():
        plain = run(model)
    calls.clear()
    with prefix.skipping():
        assert torch.equal(run(model), plain)
    assert not calls and vars(block)["forward"] is patched
    assert torch.equal(run(model), plain) and calls
