"""Which linear map makes a write of the residual stream, and what it reads: `mlp_act` and `o_in`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from massact.records.anatomy import Place
from massact.trace.watch import Key

if TYPE_CHECKING:
    from massact.anatomy.block_reader import BlockReader

_NO_DOWN = "the MLP has no single output projection module (a mixture of experts, for example)"
_NOT_ATTENTION = "what mixes tokens here is no attention over keys (a convolution, a recurrence, ...)"
_NO_PROJECTION = (
    "no single module with a matrix lies between the heads and what they add (a fused module, several projections)"
)


def sizes_of(module: nn.Module) -> tuple[int, ...]:
    """The sizes of the matrix that a module multiplies by, in the order in which it keeps them; () for none."""
    weight, said = getattr(module, "weight", None), _said_sizes(module)
    if isinstance(weight, torch.Tensor):
        if weight.ndim == 2 and (not said or weight.numel() == math.prod(said)):
            return tuple(weight.shape)
        if said and "weight" not in {*module._parameters, *module._buffers}:
            return said  # that of a module inside, packed, beside which an adapter runs
    return packed_sizes(module)


def packed_sizes(module: nn.Module) -> tuple[int, ...]:
    """(outputs, inputs) of a module that holds codes in the place of a matrix (GPTQ, bitsandbytes, torch.ao), or ()."""
    weight, said = getattr(module, "weight", None), _said_sizes(module)
    codes = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.ndim > 0]
    packed = callable(weight) or any(not t.is_floating_point() or t.itemsize == 1 for t in codes)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.itemsize > 1
    inside = any(True for child in module.children() for _ in child.parameters())
    return said if packed and not plain and not inside else ()


def _said_sizes(module: nn.Module) -> tuple[int, ...]:
    said = [getattr(module, name, None) for name in ("out_features", "in_features")]
    known = tuple(n for n in said if isinstance(n, int))
    return known if len(known) == len(said) else ()


def last_projection(reader: BlockReader, key: Key) -> Place | None:
    """Input of the last linear map of a write: walk back through scales and norms to a weight matrix."""
    for _ in range(8):
        for inner, _seen in reader.makers.get(key, ()):
            if sizes_of(inner.module) and inner.inputs:
                return Place(inner.name, "in", inner.inputs[0].path, inner.number)
        source = reader.norm_input(key)
        if source is None:
            source = reader.factor_of(reader.watch.made.get(key))[1]
        if source is None:
            return _adapted_projection(reader, key)
        key = source
    return None


def _adapted_projection(reader: BlockReader, key: Key) -> Place | None:
    """A linear map plus a low-rank update of it (LoRA): of two projections added up, the one that reads first."""
    node = reader.watch.made.get(key)
    if node is None or node.op != "add" or len(node.inputs) != 2:
        return None
    stop = {reader.canon(reader.start.key)}
    found = [(reader.canon(k), last_projection(reader, reader.canon(k))) for k in node.inputs]
    for (_, mine), (other, _) in (found, found[::-1]):
        if mine is not None and all(m is not None for _, m in found):
            if _seen_at(reader, mine)[0] in reader.cone(other, stop):
                return mine
    return None


def _seen_at(reader: BlockReader, place: Place) -> tuple[Key, tuple[int, ...]]:
    """The tensor at a place inside the block, and its shape."""
    calls = [c for c in reader.inner if (c.name, c.number) == (place.module, place.call)]
    seen = next(s for c in calls for s in (c.inputs if place.side == "in" else c.outputs) if s.path == place.path)
    return reader.canon(seen.key), seen.shape


def down_projection(reader: BlockReader, write: Place) -> tuple[Place | None, str]:
    """Input of the last linear map of the MLP that makes a write; None, and why, where there is none."""
    return last_projection(reader, _seen_at(reader, write)[0]), _NO_DOWN


def attention_projection(reader: BlockReader, write: Place, stop: set[Key]) -> tuple[Place | None, str]:
    """Input of attention's output projection W_O; None, and why, where there is none.

    It must hold one row for each token, and be made from what attends: a module that attends and projects at once
    reads something else.

    Args:
        write: what attention adds.
        stop: values of the residual stream, behind which nothing is looked for.
    """
    key, _ = _seen_at(reader, write)
    if not reader.attends(reader.cone(key, stop)):
        return None, _NOT_ATTENTION
    place = last_projection(reader, key)
    if place is None:
        return None, _NO_PROJECTION
    read, shape = _seen_at(reader, place)
    a_token_a_row = math.prod(shape[:-1]) == reader.numel // reader.width
    return (place, "") if a_token_a_row and reader.attends(reader.cone(read, stop)) else (None, _NO_PROJECTION)
