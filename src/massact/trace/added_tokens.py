"""Tokens of zeros in the residual stream for the length of a `with`: in before the first block, out after the last.

Nothing is learned and no weight is added (for a learned token see `extra_token`). The rest of the model, from the
last norm on, sees as many tokens as it would without them.

Shapes: B batch, T tokens, N added tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from massact.records.anatomy import Place, Stack
from massact.records.errors import UserError
from massact.trace.hooks import tapped
from massact.trace.watch import follow, replaced

# First block -> where the added tokens stood in the last forward pass, for the length of the `with`.
_IN_FORCE: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()


def added_positions(root: nn.Module, stack: Stack) -> tuple[int, ...]:
    """Where tokens that are added now stood in the last forward pass; () where none are."""
    return _IN_FORCE.get(root.get_submodule(stack.blocks[0].places["resid_pre"].module), ())


@contextmanager
def tokens_added(
    root: nn.Module, stack: Stack, n: int, at: int | None, count: Callable[[Tensor], None]
) -> Iterator[None]:
    """Add N tokens of zeros to every sequence of a stack.

    Args:
        root: the model.
        stack: whose residual stream.
        n: how many.
        at: index of the first of them; None: behind all tokens.
        count: told of the added tokens (B, N, D) in every forward pass.

    Raises:
        UserError: the first block takes its hidden state in no way that can be changed, or has added tokens already.
    """
    first, last = stack.blocks[0].places["resid_pre"], stack.blocks[-1].places["resid_post"]
    if first.side != "in" or first.layout or sum(block.module == stack.blocks[0].module for block in stack.blocks) > 1:
        raise UserError("No token can be added.", f"The first block is not one that can be told apart ({first}).")
    module = root.get_submodule(first.module)
    if module in _IN_FORCE:
        raise UserError("Tokens are added to this model already.", do="Add all of them at once: n=...")
    with ExitStack() as exit_stack:
        # The taps that take the tokens out again, of the pass that goes on: made after all others are installed, so
        # that whoever looks at the last block sees the added tokens there too.
        taking = exit_stack.enter_context(ExitStack())

        def put_in(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            taking.close()  # left over where a pass was ended half-way
            named = isinstance(first.path[0], str)
            value: Any = kwargs if named else args
            h_BTD = follow(value, first.path)
            begin = h_BTD.shape[1] if at is None else at
            zeros_BND = h_BTD.new_zeros(len(h_BTD), n, h_BTD.shape[-1])
            count(zeros_BND)
            _IN_FORCE[module] = tuple(range(begin, begin + n))
            value = replaced(value, first.path, torch.cat([h_BTD[:, :begin], zeros_BND, h_BTD[:, begin:]], 1))
            taking.enter_context(tapped(root, [(_unscaled(last), _without(begin, n))])).begin()
            return (args, value) if named else (value, kwargs)

        _IN_FORCE[module] = ()
        handle = module.register_forward_pre_hook(put_in, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
            _IN_FORCE.pop(module, None)


def _unscaled(place: Place) -> Place:
    return Place(place.module, place.side, place.path, place.call)  # what is left out needs no factor


def _without(begin: int, n: int) -> Callable[[Tensor], Tensor]:
    return lambda h_BTD: torch.cat([h_BTD[:, :begin], h_BTD[:, begin + n :]], 1)
