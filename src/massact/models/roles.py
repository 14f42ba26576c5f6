"""Which writes mix tokens: turn some tokens round where a sublayer reads them, and look at the others.

The dataflow cannot tell in every case (a kernel of its own, a recurrence made of additions, as many tokens
as features), and it says nothing about which axis holds the tokens. The experiment says both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.anatomy import Block, Place
from massact.records.errors import ProofError
from massact.trace.hooks import AllSeen, tapped

Write = tuple[str, int]  # (module, which call of it)


def mixing_writes(
    model: nn.Module, blocks: Iterable[Block], run: Callable[[], Any], same: Callable[[Place], list[Place]]
) -> dict[Write, bool]:
    """Find out by experiment which writes carry something from one token to another.

    One forward pass for all writes as they are, and one for each kind of write (writes of the same modules in
    blocks of one class are of one kind).

    Args:
        model: the module.
        blocks: as the dataflow tells them.
        run: runs the model on one example; always the same one.
        same: every argument of the same call that is the tensor at a place (query, key and value, say).

    Returns:
        For the writes where the experiment could be made: whether they mix tokens.

    Raises:
        ProofError: a write mixes sequences of the batch and not tokens, so the first axis is that of tokens.
    """
    modules = dict(model.named_modules())
    kinds: dict[Any, list[tuple[Block, str]]] = {}
    for block in blocks:
        for name in block.places:
            if "_out" in name and _source(name) in block.places:
                kinds.setdefault(_kind_of_write(modules, block, name), []).append((block, name))
    first = {kind: members[0] for kind, members in kinds.items()}
    still = _watched(model, run, [b.places[p] for b, n in first.values() for p in ("resid_pre", n)])
    found: dict[Write, bool] = {}
    for i, (kind, (block, name)) in enumerate(first.items()):
        stream, write = still[2 * i], still[2 * i + 1]
        if stream is None or write is None or stream.ndim not in (2, 3) or write.numel() != stream.numel():
            continue
        stream = stream[None] if stream.ndim == 2 else stream
        (moved,) = _watched(model, run, [block.places[name]], (same(block.places[_source(name)]), stream.shape))
        answer = None if moved is None else _compare(write.reshape(stream.shape), moved.reshape(stream.shape))
        if answer is None:
            continue
        tokens, sequences = answer
        if sequences and not tokens:
            raise ProofError(
                f"{name} of block {block.module!r} mixes the entries of the first axis, and none of the second: its "
                f"{tuple(stream.shape)} tensors are (tokens, batch, width).",
                "massact counts positions along the second axis, so every position it reported would be wrong.",
                "Build the model with batch_first=True, or wrap its blocks so that they take (batch, tokens, width).",
            )
        for b, n in kinds[kind]:
            found[b.places[n].module, b.places[n].call] = tokens
    return found


def _source(name: str) -> str:
    return name.replace("_out", "_in")


def _kind_of_write(modules: dict[str, nn.Module], block: Block, name: str) -> Any:
    write = block.places[name].module
    inside = write.removeprefix(block.module) if write.startswith(block.module) else write
    return type(modules[block.module]), name, inside, type(modules[write])


def _watched(
    model: nn.Module, run: Callable[[], Any], places: list[Place], turn: tuple[list[Place], torch.Size] | None = None
) -> list[Tensor | None]:
    """What passes some places in one forward pass; `turn`: where even tokens are turned round, and their shape."""
    seen: list[Tensor | None] = [None] * len(places)

    def keep(i: int) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            seen[i] = h.detach().clone()

        return see

    def turned_round(h: Tensor) -> Tensor | None:
        if turn is None or h.numel() != turn[1].numel():
            return None
        turned = h.detach().reshape(turn[1]).clone()
        # Of the first sequence only, so that the others tell whether sequences are mixed. Features are moved rather
        # than negated: gated convolutions and linear attention keep products of two features, where signs cancel.
        turned[0, ::2] = turned[0, ::2].roll(1, dims=-1)
        return turned.reshape(h.shape)

    taps = [(place, keep(i)) for i, place in enumerate(places)]
    if turn is not None:
        taps = [(place, turned_round) for place in turn[0]] + taps  # type: ignore[misc]
    try:
        with torch.no_grad(), tapped(model, taps, stop=True) as state:
            state.begin()
            run()
    except AllSeen:
        pass
    except Exception:
        if turn is None:
            raise
        return [None] * len(places)  # the model objects to such a tensor (a check for NaN): no experiment
    return seen


def _compare(still: Tensor, moved: Tensor) -> tuple[bool, bool] | None:
    """Whether tokens that were not turned changed: in the same sequence, in others. None: cannot be told."""
    size = still.double().abs().amax(-1)
    change = (moved.double() - still.double()).abs().amax(-1)
    if not bool(size.any()) or not bool(change.isfinite().all()):
        return None
    # Experts see groups of other sizes when a token moves and round in another order, and dynamic quantisation
    # takes one step for all tokens. Mixing changes a token by much more, since half of what it reads is another.
    changed = change > max(0.02, 4.0 * torch.finfo(still.dtype).eps) * size
    tokens, sequences = bool(changed[0, 1::2].any()), bool(changed[1:].any())
    return None if still.shape[1] < 2 and not sequences else (tokens, sequences)
