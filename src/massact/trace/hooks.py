"""Taps: functions that see, and may replace, tensors at the borders of module calls.

Every hook that looks, or changes something for a time, is installed in this room inside a `with`, and removed in
`finally`. What a changed architecture consists of (`inputs_of`, `extra_token`) is a part of the model, as its
parameters are: copies, pickles and trainings keep it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.anatomy import CHANNELS, GRID, ONE_ROW, PIECES, TURNED, Place
from massact.records.errors import WorkError
from massact.trace.formulas import Gathered
from massact.trace.parameter_values import NamedTensors
from massact.trace.watch import follow, replaced

RECORDERS = "transformers.utils.output_capturing"

# Sees a tensor; gives None to leave it, or the tensor to put in its place.
Tap = Callable[[Tensor], Tensor | None]


class AllSeen(Exception):
    """Raised inside a forward pass when every tap has fired and the rest of the pass is not wanted."""


class Taps:
    """Installed taps, and how often each of them fired since `begin`."""

    def __init__(self, n: int, stop: bool = False, until: Callable[[], bool] = lambda: True) -> None:
        self.fired, self._earlier = [0] * n, [False] * n
        self.gathered: list[Gathered] = []
        self.stop, self.until = stop, until
        self.calls: dict[str, int] = defaultdict(int)  # of every border, since `begin`

    def hit(self, index: int) -> None:
        self.fired[index] += 1

    def check(self) -> None:
        """End the forward pass where nobody looks at the rest of it."""
        if self.stop and all(self.fired) and self.until():
            raise AllSeen

    def begin(self) -> None:
        """To be called before every forward pass."""
        self.calls.clear()
        for one in self.gathered:
            one.begin()
        self._earlier = self.ever()
        self.fired = [0] * len(self.fired)

    def ever(self) -> list[bool]:
        """Which taps have fired in any forward pass."""
        return [earlier or now > 0 for earlier, now in zip(self._earlier, self.fired, strict=True)]


def laid_out(tensor: Tensor, place: Place) -> Tensor:
    """The tensor at a place as (batch, tokens, width)."""
    if place.layout == TURNED:
        return tensor.transpose(0, 1)
    if place.layout == GRID:
        return tensor.flatten(1, -2)
    if place.layout == CHANNELS:
        return tensor.flatten(2).transpose(1, 2)
    if place.layout == PIECES and len(tensor) % place.pieces == 0:
        return tensor.reshape(-1, place.pieces * tensor.shape[1], tensor.shape[2])
    return tensor[0] if place.layout == ONE_ROW else tensor


def as_it_lay(new: Tensor, place: Place, whole: Tensor) -> Tensor:
    """A (batch, tokens, width) tensor as `whole` lies at a place."""
    if place.layout == TURNED:
        return new.transpose(0, 1).contiguous()
    if place.layout == CHANNELS:
        new = new.transpose(1, 2)
    return new.reshape(whole.shape) if place.layout else new


@dataclass(frozen=True)
class _Tap:
    index: int
    place: Place
    see: Tap
    scale: Any

    def __call__(self, value: Any, state: Taps) -> tuple[bool, Any]:
        """Whether the value was replaced, and the value."""
        whole = follow(value, self.place.path)
        tensor = laid_out(whole, self.place)
        part = tensor if self.place.part is None else tensor.select(*self.place.part)
        seen = part if self.scale is None else part * self.scale
        state.hit(self.index)
        new = self.see(seen)
        if new is None:
            return False, value
        new = new if self.scale is None else new / self.scale
        if self.place.part is not None:
            new = torch.select_scatter(tensor, new, *self.place.part)
        return True, replaced(value, self.place.path, as_it_lay(new, self.place, whole))


@dataclass(frozen=True)
class _Leaf:
    """One leaf of a term that is made of several tensors; the last of them to be seen makes the term fire.

    Only where that is the write itself can the term be edited: what is added then changes by what the edit adds to it.
    """

    tap: _Tap
    gathered: Gathered
    number: int
    place: Place

    def __call__(self, value: Any, state: Taps) -> tuple[bool, Any]:
        tensor = follow(value, self.place.path)
        term = self.gathered.add(self.number, tensor)
        if term is None:
            return False, value
        state.hit(self.tap.index)
        new = self.tap.see(laid_out(term, self.tap.place))
        if new is None:
            return False, value
        new = as_it_lay(new, self.tap.place, term)
        formula = self.gathered.formula
        change = self.gathered.inverse(self.number, new - term) if self.number == formula.write else None
        if change is None:
            raise WorkError(
                f"The site at {self.tap.place} cannot be edited.",
                f"It is a term of a sum that is made of several tensors (times {formula.words}), and no change of the "
                "write alone makes it what the edit wants.",
                "Edit the residual stream (resid_pre, resid_mid, resid_post), or the write in the stack that reads the "
                "streams.",
            )
        return True, replaced(value, self.place.path, tensor + change)


@contextmanager
def tapped(
    root: nn.Module,
    taps: Iterable[tuple[Place, Tap]],
    stop: bool = False,
    until: Callable[[], bool] = lambda: True,
) -> Iterator[Taps]:
    """Install taps on a model for the length of a `with`.

    Args:
        root: the model that the places were found in.
        taps: places, each with the function that sees its tensor; several at one place run in the given
            order, and a later one sees what an earlier one put there.
        stop: end a forward pass by raising `AllSeen` once every tap has fired,
        until: and this is true.
    """
    by_border: dict[tuple[str, str], list[_Tap | _Leaf]] = defaultdict(list)
    all_taps, named = list(taps), NamedTensors(root)
    state = Taps(len(all_taps), stop, until)
    for i, (place, see) in enumerate(all_taps):
        scale = named[place.scale] if isinstance(place.scale, str) else place.scale
        tap = _Tap(i, place, see, None if isinstance(scale, float) and scale == 1.0 else scale)
        if place.formula is None:
            by_border[place.module, place.side].append(tap)
            continue
        gathered = Gathered(place.formula, named)
        state.gathered.append(gathered)
        for number, leaf in gathered.places:
            by_border[leaf.module, leaf.side].append(_Leaf(tap, gathered, number, leaf))
    modules = dict(root.named_modules())
    handles = []
    try:
        for (name, side), here in by_border.items():
            handles.append(_install(modules[name], name, side, here, state))
        yield state
    finally:
        for handle in handles:
            handle.remove()


def _recorders_last(module: nn.Module) -> None:
    """Let transformers' own recorders of hidden states see what taps have put there.

    A mixed model takes the features of an image from these records, so that an edit behind them would not reach it.
    """
    hooks: Any = module._forward_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "") == RECORDERS]:
        hooks.move_to_end(key)


def _install(module: nn.Module, name: str, side: str, taps: list[_Tap | _Leaf], state: Taps) -> Any:
    border = f"{side}:{name}"

    def run(value: Any, mine: list[_Tap | _Leaf]) -> tuple[bool, Any]:
        call, changed = state.calls[border], False
        for tap in mine:
            if tap.place.call == call:
                new, value = tap(value, state)
                changed = changed or new
        return changed, value

    if side == "out":

        def after(_: nn.Module, args: tuple, output: Any) -> Any:
            changed, output = run(output, taps)
            state.calls[border] += 1
            state.check()
            return output if changed else None

        handle = module.register_forward_hook(after)
        _recorders_last(module)
        return handle

    by_position = [t for t in taps if isinstance(t.place.path[0], int)]
    by_keyword = [t for t in taps if isinstance(t.place.path[0], str)]

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        changed_args, args = run(args, by_position)
        changed_kwargs, kwargs = run(kwargs, by_keyword)
        state.calls[border] += 1
        state.check()
        return (args, kwargs) if changed_args or changed_kwargs else None

    return module.register_forward_pre_hook(before, with_kwargs=True)
