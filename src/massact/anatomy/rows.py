"""Rows are sequences and positions are tokens: shown on an example with one sequence more, and on a shorter one.

A sequence may be several rows, its pieces (windows, frames), one behind another, or all may be in one row: then sites
are laid out so. A row is one sequence and nothing else: shown by giving the others what the last one has. The proof of
the sums does not tell: they hold entry by entry, whatever the axes mean and whatever a term was made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.discovery import run_example
from massact.records.anatomy import ONE_ROW, PIECES, Anatomy, Block, Place, Stack
from massact.records.errors import ProofError, UserError
from massact.trace import BATCH_FIRST, tapped, unchanged
from massact.trace.hooks import Tap

CUT = 2  # tokens that the shorter example lacks

Shapes = dict[str, tuple[int, ...]]  # name of a stack -> shape of what its first block takes in
Ends = dict[str, Tensor]  # name of a stack -> what its last block gives
Run = Callable[[dict[str, Any]], tuple[Shapes, Ends]]
_ALONE = "Take out what reads the whole batch: a mean over it, a batch norm without running statistics."
_MIXED = 1e-3  # of a row's typical entry, or 4 eps: far beyond rounding, since tensors of the same shapes run


def proved_rows(
    module: nn.Module, anatomy: Anatomy, example: dict[str, Any], reads: Callable[[Stack], str | None]
) -> Anatomy:
    """The same anatomy without the stacks whose rows are not sequences or whose positions are not tokens.

    With one sequence more in the example a stack of (batch, tokens, width) has one row more; with `CUT` tokens less a
    stack with k positions for each token has k `CUT` less; with other sequences beside it the last row stays as it was.
    An example that cannot be changed so shows nothing: then every forward pass of a measurement is still held to its
    rows (`massact.trace.measure`).

    Args:
        module: that the anatomy is of.
        example: what it was proved on.
        reads: stack -> name of the input whose positions it has, or None.

    Raises:
        ProofError: no stack is left.
    """

    def run(inputs: dict[str, Any]) -> tuple[Shapes, Ends]:
        return _pass(module, anatomy, inputs)

    n = _sequences(example)
    longer = {k: _one_more(x, n) for k, x in example.items()}
    before, ends = run(example)
    more, _ = run(longer)
    as_they_lie = {stack.name: _rows(before, more, stack.name, n) for stack in anatomy.stacks}
    laid = tuple(_laid_out(module, example, stack, before, more, n) for stack in anatomy.stacks)
    if laid != anatomy.stacks:
        anatomy = replace(anatomy, stacks=laid)
        before, ends = run(example)
        more, _ = run(longer)
    _, beside = run({k: _all_last(x, n) for k, x in example.items()}) if n > 1 else ({}, {})
    refused: dict[str, tuple[str, str]] = {}  # why, and what to do
    for stack in anatomy.stacks:
        ids = example.get(reads(stack) or "")
        why = _rows(before, more, stack.name, n) or _positions(run, example, ids, before.get(stack.name), stack.name)
        if why:
            refused[stack.name] = why, BATCH_FIRST
        elif mixed := _mixed(ends, beside, stack, n):
            lies = as_they_lie[stack.name]  # where it was laid out otherwise, its pieces are not one behind another
            refused[stack.name] = (lies, BATCH_FIRST) if lies else (mixed, _ALONE)
    if not refused:
        return anatomy
    left = tuple(s for s in anatomy.stacks if s.name not in refused)
    if not left:
        stack = anatomy.stacks[0]
        why, do = refused[stack.name]
        raise ProofError(f"The blocks in {stack.path!r} are not understood.", f"{why}.", do)
    out = [f"{s.path} was left out. {refused[s.name][0]}." for s in anatomy.stacks if s.name in refused]
    return replace(anatomy, stacks=left, left_out=(*anatomy.left_out, *out))


def _laid_out(module: nn.Module, example: dict[str, Any], stack: Stack, before: Shapes, more: Shapes, n: int) -> Stack:
    """A stack whose sequences are several rows each, or all in one row, as (batch, tokens, width)."""
    was, now = before.get(stack.name, ()), more.get(stack.name, ())
    if len(was) != 3 or len(now) != 3 or was[2] != now[2] or was == now:
        return stack
    pieces, left = divmod(was[0], n)
    in_order = pieces > 1 and not left and now[:2] == (pieces * (n + 1), was[1])
    if in_order and _are_fixed(module, example, pieces):
        layout = PIECES
    elif was[0] == now[0] == 1 and was[1] * (n + 1) == now[1] * n:
        layout, pieces = ONE_ROW, 1
    else:
        return stack
    places = {place for block in stack.blocks for place in block.places.values() if not place.layout}
    alike = {place for place, shape in _shapes(module, example, places).items() if shape[:2] == was[:2]}

    def laid(block: Block) -> Block:
        return replace(block, places={name: replace(place, layout=layout, pieces=pieces) if place in alike else place
                                      for name, place in block.places.items()})  # fmt: skip

    return replace(stack, blocks=tuple(map(laid, stack.blocks)))


def _are_fixed(module: nn.Module, example: dict[str, Any], pieces: int) -> bool:
    """Whether a sequence cannot have another number of pieces: as many as an input has images are none, unless the
    model takes nothing else and no other number of them (pairs of images)."""
    inputs = [x for x in example.values() if isinstance(x, Tensor)]
    if not any(pieces in x.shape[1:] for x in inputs):
        return True
    if not all(x.ndim > 1 and x.shape[1] == pieces for x in inputs):
        return False
    more = {k: torch.cat([x, x[:, :1]], 1) if isinstance(x, Tensor) else x for k, x in example.items()}
    return not _runs(module, more)


def _shapes(module: nn.Module, inputs: dict[str, Any], places: set[Place]) -> dict[Place, tuple[int, ...]]:
    """The shape of what passes each place."""
    found: dict[Place, tuple[int, ...]] = {}

    def see(place: Place) -> Callable[[Tensor], None]:
        return lambda h: found.__setitem__(place, tuple(h.shape))

    _runs(module, inputs, [(place, see(place)) for place in places])
    return found


def _rows(before: Shapes, more: Shapes, stack: str, n: int) -> str:
    """What is wrong with the first axis; "" for nothing, or where it was not seen."""
    was, now = before.get(stack), more.get(stack)
    if was is None or now is None or len(was) != 3 or was == now:
        return ""
    if (was[0], now[0]) == (n, n + 1) and was[1:] == now[1:]:
        return ""
    what = f"Its blocks take {was} for {n} sequences and {now} for {n + 1}"
    if was[0] == now[0]:
        return f"{what}: the batch is not the first axis"
    return f"{what}: several rows for each sequence (streams, windows, frames), and none of them is the stream"


def _mixed(ends: Ends, beside: Ends, stack: Stack, n: int) -> str:
    """What is wrong where the last row is not what it was when the others are copies of it; "" for nothing."""
    was, now = ends.get(stack.name), beside.get(stack.name)
    if was is None or now is None or was.shape != now.shape:
        return ""
    if stack.blocks[0].places["resid_pre"].layout == ONE_ROW:
        was, now = was.unflatten(0, (n, -1)), now.unflatten(0, (n, -1))
    if was.ndim != 3 or len(was) != n:
        return ""
    dtype, was, now = was.dtype, was[-1].double(), now[-1].double()
    # Of typical entries: a massive one is rounded in larger steps. In 16 bits rounding may send one token to other
    # experts, whose groups are of other sizes.
    off_T, eps = (now - was).abs().median(-1).values / was.abs().median(-1).values, torch.finfo(dtype).eps
    off = float(off_T.max() if eps < 1e-6 else off_T.median())
    if not off > max(_MIXED, 4 * eps):
        return ""
    return f"The hidden states of one sequence change by {off:.2g} of their size with the other sequences of its batch"


def _positions(run: Run, example: dict[str, Any], ids: Any, was: tuple[int, ...] | None, stack: str) -> str:
    """What is wrong with the positions of a stack that reads tokens; "" for nothing, or where it was not seen."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or was is None or len(was) != 3:
        return ""
    T = ids.shape[1]
    if was[1] == T or T <= 2 * CUT:
        return ""
    shorter = {k: x[:, : T - CUT] if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == T else x
               for k, x in example.items()}  # fmt: skip
    now = run(shorter)[0].get(stack)
    if now is None or was[1] < T or was[1] * (T - CUT) != now[1] * T:
        return ""  # tokens that are always there (prompts, a sink, padding), or tokens that are joined
    return f"Its blocks have {was[1]} positions for {T} tokens and {now[1]} for {T - CUT}: several for each token"


def _sequences(example: dict[str, Any]) -> int:
    """Length of the axis that most inputs begin with."""
    return Counter(x.shape[0] for x in example.values() if isinstance(x, Tensor) and x.ndim).most_common(1)[0][0]


def _one_more(x: Any, n: int) -> Any:
    return torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == n else x


def _all_last(x: Any, n: int) -> Any:
    return x[-1:].expand_as(x).clone() if isinstance(x, Tensor) and x.ndim and x.shape[0] == n else x


def _pass(module: nn.Module, anatomy: Anatomy, inputs: dict[str, Any]) -> tuple[Shapes, Ends]:
    """What stacks begin and end with; nothing where the model does not run on these inputs."""
    shapes: Shapes = {}
    ends: Ends = {}

    def first(name: str) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            shapes[name] = tuple(h.shape)

        return see

    def last(name: str) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            ends[name] = h.detach().clone()  # it may be written in place behind the block

        return see

    taps = [(stack.blocks[0].places["resid_pre"], first(stack.name)) for stack in anatomy.stacks]
    taps += [(stack.blocks[-1].places["resid_post"], last(stack.name)) for stack in anatomy.stacks]
    return (shapes, ends) if _runs(module, inputs, taps) else ({}, {})


def _runs(module: nn.Module, inputs: dict[str, Any], taps: Iterable[tuple[Place, Tap]] = ()) -> bool:
    """One forward pass with taps; False where the model does not run on these inputs."""
    with torch.inference_mode(), unchanged(module, values=True), tapped(module, taps) as state:
        state.begin()
        try:
            run_example(module, inputs)
        except UserError:
            return False
    return True
