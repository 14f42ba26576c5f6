"""Watch one short forward pass: which tensor was made from which, and which module saw it.

Module names tell little about a model that nobody has seen before; the dataflow tells all. A dispatch
mode sees every tensor operation, hooks see every module call, and both speak of tensors by identity, so
"what is added to the residual stream" is a question about a graph, not about names.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Key = tuple[int, int]  # (identity of a tensor, how often it was written in place)

# Operations whose result holds the same values in the same (row-major) order as their input. A clamp is one as
# long as it clips nothing, which the proof checks: fp16 models of T5, BART and Whisper clamp every block.
_SAME_VALUES = {
    "view", "_unsafe_view", "reshape", "alias", "detach", "clone", "contiguous", "_to_copy", "to", "squeeze",
    "unsqueeze", "flatten", "unflatten", "dropout", "clamp", "native_dropout", "slice", "expand", "lift_fresh",
    "narrow",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """How one tensor was made: the operation, its tensor inputs, and what the analysis asks of them."""

    op: str
    inputs: tuple[Key, ...]
    shapes: tuple[tuple[int, ...], ...]
    args: tuple[Any, ...]  # positional arguments; tensors are replaced by their keys
    factor: float = 1.0  # an addition is first + factor * second: `alpha`, and -1 for a difference


@dataclass(frozen=True)
class Ref:
    """A tensor among the arguments of a `Step`."""

    key: Key


@dataclass(frozen=True)
class Step:
    """One operation as it ran, so that it can run again on other tensors.

    Args:
        func: the operation; one that writes in place, as the one that gives a new tensor.
        args, kwargs: its arguments, tensors as `Ref`.
        index: which of its results this is; None where it gives one tensor.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None

    @property
    def op(self) -> str:
        return self.func._schema.name.split("::")[1]

    def reads(self) -> list[Key]:
        return [leaf.key for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Seen:
    """One tensor at the border of a module call: `path` leads to it inside the arguments or the output."""

    path: tuple[int | str, ...]
    key: Key
    shape: tuple[int, ...]


_FUSED: dict[str, Any] = {
    "aten::addcmul": lambda x, a, b, value=1: x + value * (a * b),
    "aten::addcdiv": lambda x, a, b, value=1: x + value * (a / b),
    "aten::lerp": lambda x, y, weight: (1 - weight) * x + weight * y,  # no difference of two large terms
    "aten::rsub": lambda x, y, alpha=1: -alpha * x + y,
    "aten::baddbmm": lambda x, a, b, beta=1, alpha=1: beta * x + alpha * (a @ b),
}


def _apart(func: Any) -> Any:
    """What a fused sum (a gated residual in one call) is made of; None for all others."""
    return _FUSED.get(_functional(func)._schema.name)


def _functional(func: Any) -> Any:
    """The same operation with a result of its own, of one that writes in place."""
    name = func._schema.name.split("::")[1]
    if not name.endswith("_") or not func._schema.name.startswith("aten::"):
        return func
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, func._overloadname, func) if packet is not None else func


@dataclass
class Call:
    """One call of one module."""

    name: str
    module: nn.Module
    number: int  # how many calls of this module came before, in this forward pass
    depth: int
    parent: Call | None
    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)

    def inside(self, other: Call) -> bool:
        call = self.parent
        while call is not None:
            if call is other:
                return True
            call = call.parent
        return False


def tensors_in(
    value: Any, path: tuple[int | str, ...] = (), depth: int = 0
) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """All floating tensors in arguments or an output, with the path that leads to each.

    Layer outputs are tensors in some models, tuples or records in others: this is the one place that knows.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif depth < 3 and isinstance(value, dict):
        for name, item in value.items():
            yield from tensors_in(item, (*path, name), depth + 1)
    elif depth < 3 and isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors_in(item, (*path, i), depth + 1)
    elif depth < 3 and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_in(getattr(value, item.name), (*path, item.name), depth + 1)


def follow(value: Any, path: tuple[int | str, ...]) -> Any:
    """The object that `path` leads to inside `value`."""
    for step in path:
        value = _inside(value, step)
    return value


def _inside(value: Any, step: Any) -> Any:
    # Outputs of transformers are dictionaries as well as dataclasses: a dictionary it is.
    return value[step] if isinstance(value, (dict, tuple, list)) else getattr(value, str(step))


def replaced(value: Any, path: tuple[int | str, ...], tensor: Tensor) -> Any:
    """A copy of `value` with the tensor at `path` replaced; the original is left as it was."""
    if not path:
        return tensor
    step, inner = path[0], replaced(_inside(value, path[0]), path[1:], tensor)
    if isinstance(value, dict):  # transformers' outputs are dictionaries too, and copy as what they are
        return type(value)(**{**value, step: inner}) if type(value) is not dict else {**value, step: inner}
    if not isinstance(value, (tuple, list)):
        copied = copy.copy(value)
        object.__setattr__(copied, str(step), inner)  # a frozen dataclass is copied, not changed
        return copied
    items = [inner if i == step else item for i, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


class Watch(TorchDispatchMode):
    """Records every tensor operation and every module call of the forward passes run inside it.

    Holds on to all intermediate tensors, so it is for one short input.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.calls: list[Call] = []
        self.made: dict[Key, Node] = {}
        self.steps: dict[Key, Step] = {}  # of every tensor, views and copies included
        self._shapes: dict[Key, tuple[int, ...]] = {}
        self._parts: dict[int, tuple[Tensor, Step]] = {}  # identity of a view -> what it shows a part of, and how
        self._alias: dict[Key, Key] = {}
        self._writes: dict[int, int] = defaultdict(int)
        self._alive: list[Tensor] = []  # an identity is only unique while its tensor lives
        self._open: list[Call] = []
        self._counts: dict[str, int] = defaultdict(int)
        self._weights = {id(p) for p in root.parameters()}
        self.brought: dict[int, str] = {}  # parameters that were brought in for a call (offloading), by identity

    # ---- tensors
    def key(self, tensor: Tensor) -> Key:
        return (id(tensor), self._writes[id(tensor)])

    def shape(self, key: Key) -> tuple[int, ...]:
        return self._shapes[key]

    def canon(self, key: Key) -> Key:
        """The key of the tensor that first held these values."""
        while key in self._alias:
            key = self._alias[key]
        return key

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (parts := _apart(func)) is not None:
            with self:
                out = parts(*args, **kwargs)
                return out if _functional(func) is func else args[0].copy_(out)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        keys = tuple(self.key(t) for t in given)
        self._name_brought(given)
        self._shapes.update((k, tuple(t.shape)) for k, t in zip(keys, given, strict=True))
        shown = tuple(self.key(a) if isinstance(a, Tensor) else a for a in args)
        refs = tree_map(lambda a: Ref(self.key(a)) if isinstance(a, Tensor) else a, (args, kwargs))
        out = func(*args, **kwargs)
        for spec, value in zip(func._schema.arguments, args, strict=False):
            if spec.alias_info is not None and spec.alias_info.is_write and isinstance(value, Tensor):
                self._writes[id(value)] += 1
        op = func._schema.name.split("::")[1].rstrip("_") if "::" in func._schema.name else func._schema.name
        if func._schema.name.startswith("aten::_"):
            op = func._schema.name.split("::")[1]
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            self._alive.append(tensor)
            key = self.key(tensor)
            if key in keys:
                continue
            self._note_step(key, tensor, func, refs, out)
            if op in _SAME_VALUES and given and tensor.numel() == given[0].numel():
                self._alias[key] = keys[0]
            else:
                factor = kwargs.get("alpha", 1.0) if op in ("add", "sub") else 1.0
                factor = float(factor) * (-1.0 if op == "sub" else 1.0)
                self.made[key] = Node(op, keys, tuple(tuple(t.shape) for t in given), shown, factor)
            self._write_through(tensor, key)
            if op in ("slice", "select") and given:
                self._parts[id(tensor)] = given[0], self.steps[key]
        self._alive.extend(given)
        return out

    def _name_brought(self, given: list[Tensor]) -> None:
        """Name parameters that the model did not hold before the pass, by the module that holds them now."""
        for t in given:
            if isinstance(t, nn.Parameter) and id(t) not in self._weights and id(t) not in self.brought:
                for call in reversed(self._open):
                    for leaf in (n for n, p in call.module._parameters.items() if p is t):
                        self.brought[id(t)] = f"{call.name}.{leaf}".lstrip(".")

    def _note_step(self, key: Key, tensor: Tensor, func: Any, refs: Any, out: Any) -> None:
        """Note how a tensor was made."""
        index = next((i for i, x in enumerate(out) if x is tensor), None) if isinstance(out, (tuple, list)) else None
        self.steps[key] = Step(_functional(func), refs[0], refs[1], index)
        self._shapes[key] = tuple(tensor.shape)

    def _write_through(self, view: Tensor, key: Key) -> None:
        """What is written into a part of a tensor (a scan that fills its output token by token) is written into it."""
        while key[1] > 0 and id(view) in self._parts:
            whole, shown = self._parts[id(view)]
            old, self._writes[id(whole)] = self.key(whole), self._writes[id(whole)] + 1
            shapes = (tuple(whole.shape), tuple(view.shape))
            view, key, source = whole, self.key(whole), key
            self.made[key] = Node("select_scatter", (old, source), shapes, (old, source))
            put = getattr(torch.ops.aten, f"{shown.op}_scatter").default
            self.steps[key] = Step(put, (Ref(old), Ref(source), *shown.args[1:]), shown.kwargs)
            self._shapes[key] = tuple(whole.shape)

    # ---- modules
    def _seen(self, value: Any) -> list[Seen]:
        found = []
        for path, tensor in tensors_in(value):
            self._alive.append(tensor)
            self._shapes[self.key(tensor)] = tuple(tensor.shape)
            found.append(Seen(path, self.key(tensor), tuple(tensor.shape)))
        return found

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        parent = self._open[-1] if self._open else None
        call = Call(name, module, self._counts[name], len(self._open), parent)
        self._counts[name] += 1
        call.inputs = self._seen(args) + self._seen(kwargs)
        self._open.append(call)
        self.calls.append(call)

    def _leave(self, output: Any) -> None:
        self._open.pop().outputs = self._seen(output)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Hooks on every module of the root, and the dispatch mode, for the length of a `with`."""
        handles = []
        try:
            for name, module in self.root.named_modules():
                handles.append(
                    # Behind the hooks of others, as `hooks.tapped` will be: what they put there is what runs.
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: self._enter(name, m, args, kwargs), with_kwargs=True
                    )
                )
                handles.append(module.register_forward_hook(lambda m, args, out: self._leave(out)))
            with torch.no_grad(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
