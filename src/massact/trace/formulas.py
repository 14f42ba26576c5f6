"""Terms of a stream's equation that no module gives, made again from tensors of the same pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from massact.records.anatomy import Formula, Op, Place, Ref, Size
from massact.records.errors import WorkError


class Gathered:
    """The leaves of one formula as a pass goes by, and the term once all of them have been seen.

    Args:
        formula: of the term.
        named: parameters and buffers of the model, by name.
    """

    def __init__(self, formula: Formula, named: Mapping[str, Tensor]) -> None:
        self.formula = formula
        self._fixed = {i: named[leaf] for i, leaf in enumerate(formula.leaves) if isinstance(leaf, str)}
        self._funcs = [_function(op) for op in formula.ops]
        self._seen: dict[int, Tensor] = {}

    @property
    def places(self) -> list[tuple[int, Place]]:
        """The leaves that are tensors of a pass."""
        return [(i, leaf) for i, leaf in enumerate(self.formula.leaves) if isinstance(leaf, Place)]

    def begin(self) -> None:
        self._seen.clear()

    def add(self, i: int, tensor: Tensor) -> Tensor | None:
        """Take in leaf i; gives the term if it was the last one missing."""
        self._seen[i] = tensor
        return self.made_of(self._seen) if len(self._seen) == len(self.places) else None

    def inverse(self, i: int, change: Tensor) -> Tensor | None:
        """How leaf i must change for the term to change so, entry by entry; None where no change of it will do."""
        factor = self.made_of(self._seen | {i: torch.ones_like(self._seen[i])})
        if factor.shape != self._seen[i].shape or factor.shape != change.shape:
            return None
        needed = change / factor
        return None if bool((factor == 0).logical_and(change != 0).any()) else needed.masked_fill(change == 0, 0)

    def made_of(self, seen: dict[int, Tensor]) -> Tensor:
        """The term of some leaves.

        Raises:
            WorkError: it cannot be made of tensors of these shapes.
        """
        values: list[Any] = [self._fixed[i] if i in self._fixed else seen[i] for i in range(len(self.formula.leaves))]
        leaf, batch, token = self.formula.sizes
        B, T = values[leaf].shape[batch], values[leaf].shape[token]
        sizes = {"B": B, "T": T, "BT": B * T}
        for op, func in zip(self.formula.ops, self._funcs, strict=True):
            try:
                out = func(*_filled(op.args, values, sizes), **{k: _filled(v, values, sizes) for k, v in op.kwargs})
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise self._not_made(op, values[leaf], error) from error
            values.append(out if op.index is None else out[op.index])
        return values[-1]

    def _not_made(self, op: Op, leaf: Tensor, error: RuntimeError) -> WorkError:
        """What is said where an operation of the short example does not run on what this pass gives it."""
        places = " and ".join(str(place) for _, place in self.places)
        return WorkError(
            f"A term of the residual stream (of {places}, times {self.formula.words}) cannot be made from "
            f"{tuple(leaf.shape)} tensors.",
            f"A length of the short example stands in {op.name!r}: {str(error).splitlines()[0]}.",
            "Use sequences of the length and number of the example, or make what is added the output of a module.",
        )


def _function(op: Op) -> Callable[..., Any]:
    """The operation of a name; one that is no view where tensors may lie otherwise in memory than in the example."""
    if op.name in ("aten.view.default", "aten._unsafe_view.default"):
        return torch.ops.aten.reshape.default
    found: Any = torch.ops
    for part in op.name.split("."):
        found = getattr(found, part)
    return found


def _filled(arg: Any, values: Sequence[Any], sizes: dict[str, int]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.of]
    if isinstance(arg, Size):
        return sizes[arg.axes] * arg.times
    return [_filled(a, values, sizes) for a in arg] if isinstance(arg, tuple) else arg
