"""The equation of a stream that is no plain sum: `end = A(start) + sum of B_i(write_i)`, read from the dataflow.

A and B_i scale each entry, or mix several streams, by constants, parameters, or what the model computes: whatever is
linear and leaves tokens and dims where they are. Each of them is kept as the model's own operations (`Formula`), so
that a term can be made again in any pass, and the sum be proved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from massact.records.anatomy import Formula, Op, Place, Ref, Size
from massact.trace.watch import Key, Step, Watch
from massact.trace.watch import Ref as Named

# Operations that hand values on, in another order or shape, or added up over streams.
_PASS = {
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "select", "slice",
    "alias", "detach", "clone", "contiguous", "_to_copy", "flatten", "unflatten", "repeat", "sum", "mean", "neg",
    "split", "split_with_sizes", "chunk", "unbind", "dropout", "native_dropout", "lift_fresh", "copy", "clamp",
}  # fmt: skip
_JOIN = {"add", "sub", "cat", "stack", "slice_scatter", "select_scatter"}
_SAME = _PASS - {"sum", "mean", "neg", "repeat", "permute", "transpose", "select", "slice"}
# Operations with lengths among their arguments, and where those stand: of what they read, or of a tensor of their own.
_SIZED = {"view": 1, "_unsafe_view": 1, "reshape": 1, "expand": 1, "repeat": 1, "new_full": 1, "new_ones": 1,
          "new_zeros": 1, "new_empty": 1, "full": 0, "ones": 0, "zeros": 0, "empty": 0}  # fmt: skip
_COUNTED = {"arange": (0, 1), "slice": (3,), "linspace": (2,)}  # single numbers that may be a length
# Operations that give what they give whatever the values are that they are handed.
_BLIND = {"zeros_like", "ones_like", "full_like", "empty_like", "new_full", "new_ones", "new_zeros", "new_empty"}


class NoTerms(Exception):
    """What stands in the way of a linear equation."""


@dataclass
class Terms:
    """What a tensor is a sum of.

    Args:
        watch: a watched forward pass.
        start: exact key of what the block takes.
        shape, axes: of the stream, and which axes of it are batch, tokens, and streams (None for one).
        borders: exact keys of tensors at the borders of module calls -> where.
        named: parameters and buffers, by identity.
        stream: exact keys at which the walk back ends: earlier values of the stream.
        writes: exact keys of what modules give in the width of the stream.
    """

    watch: Watch
    start: Key
    shape: tuple[int, ...]
    axes: tuple[int, int, int | None]
    borders: Mapping[Key, Place]
    named: Mapping[int, str]
    stream: set[Key] = field(default_factory=set)
    writes: set[Key] = field(default_factory=set)
    _leads: dict[Key, bool] = field(default_factory=dict)
    _holds: dict[Key, bool] = field(default_factory=dict)
    _bound: dict[Key, bool] = field(default_factory=dict)

    # ---- what is linear in what
    def carried(self, step: Step) -> list[Key]:
        """The tensors that the result of an operation is linear in, if it is one that this reader knows."""
        reads = step.reads()
        if step.op in _PASS:
            return reads[-1:] if step.op == "copy" else reads[:1]
        if step.op in _JOIN:
            return reads
        if step.op in ("mul", "div") and len(reads) == 2:
            sides = (reads, reads[::-1]) if step.op == "mul" else (reads,)
            return [k for k, factor in sides if not self._reads_stream(factor)]
        if step.op in ("mul", "div"):
            return reads
        if step.op in ("bmm", "mm", "matmul"):
            return self._mixed(reads)
        return []

    def _mixed(self, reads: list[Key]) -> list[Key]:
        """Of a matrix product that sums over streams: the side that holds these."""
        n = None if self.axes[2] is None else self.shape[self.axes[2]]
        a, b = (self.watch.shape(k) for k in reads)
        if n is None or a is None or b is None or a[-1] not in (1, n):
            return []
        D = self.shape[-1]  # einsum lays tokens and dims out in one axis
        sides = [k for k, s, wide in ((reads[0], a, -2), (reads[1], b, -1)) if s[wide] % D == 0]
        return [k for k in sides if self.leads(k) or self.holds(k)] if len(sides) > 1 else sides  # as many as dims

    def _reads_stream(self, factor: Key) -> bool:
        """Whether a factor is made from the stream itself, with no module between (a norm divides by what it reads)."""
        if factor not in self._bound:
            self._bound[factor] = False
            if factor in self.stream or self.leads(factor):
                self._bound[factor] = True
            elif factor not in self.borders and (step := self.watch.steps.get(factor)) and step.op not in _BLIND:
                self._bound[factor] = any(map(self._reads_stream, step.reads()))
        return self._bound[factor]

    def since(self, stream: Iterable[Key]) -> None:
        """Walk back to other values of the stream from now on."""
        self.stream = set(stream)
        for memo in (self._leads, self._bound):
            memo.clear()

    def leads(self, key: Key) -> bool:
        """Whether a tensor is linear in an earlier value of the stream."""
        if key in self.stream:
            return True
        if key not in self._leads:
            self._leads[key] = False
            step = self.watch.steps.get(key)
            self._leads[key] = step is not None and any(self.leads(k) for k in self.carried(step))
        return self._leads[key]

    def holds(self, key: Key) -> bool:
        """Whether a tensor is linear in what a module writes."""
        if key in self.writes:
            return True
        if key not in self._holds:
            self._holds[key] = False
            step = self.watch.steps.get(key)
            self._holds[key] = step is not None and any(self.holds(k) for k in self.carried(step))
        return self._holds[key]

    def factor(self, step: Step) -> tuple[Key, Key | None]:
        """Of a product: the side that is the term, and its coefficient.

        Raises:
            NoTerms: both are made from the stream, or neither from anything that is known.
        """
        reads = step.reads()
        if len(reads) == 1:
            return reads[0], None
        for test in (self.leads, self.holds):
            sides = [k for k in self.carried(step) if test(k)]
            if len(sides) == 2:  # a gate that a module gives: it is the narrower one, or the one that is made further
                sides.sort(key=lambda k: (-math.prod(self.watch.shape(k) or ()), k not in self.writes))
            if sides:
                other = reads[1] if sides[0] == reads[0] else reads[0]
                return sides[0], other
        raise NoTerms(f"{step.op!r} of tensors that are neither the stream nor what a module gives")

    def obstacle(self, end: Key) -> str:
        """Why a tensor is not linear in the stream, in words."""
        ops: dict[str, None] = {}
        todo, seen = [end], set()
        while todo:
            key = todo.pop()
            step = self.watch.steps.get(key)
            if key in seen or key in self.writes or step is None:
                continue
            seen.add(key)
            carried = self.carried(step)
            todo += carried
            if not carried and step.reads():
                ops[repr(step.op)] = None
        if not ops:
            return "what it gives is a sum of what modules give, and no longer of what it takes"
        return f"it goes through {', '.join(ops)}, which is no scale and no sum"

    # ---- the leaves of a sum
    def leaves(self, end: Key) -> tuple[list[Key], list[Key], bool]:
        """What a tensor is a sum of.

        Returns:
            The values of the stream, the writes in the order in which they are added, and whether a constant is added.
        Raises:
            NoTerms: it is not linear in these.
        """
        streams: dict[Key, None] = {}
        writes: dict[Key, None] = {}
        constant = False
        todo, seen = [end], set()
        while todo:
            key = todo.pop()
            if key in seen:
                continue
            seen.add(key)
            if key in self.stream and key != end:
                streams[key] = None
            elif key in self.writes and not self.leads(key):
                writes[key] = None
            elif self.leads(key) or self.holds(key):
                step = self.watch.steps[key]
                if step.op == "mul":
                    todo.append(self.factor(step)[0])
                    continue
                todo += reversed(self.carried(step))
                constant |= step.op in ("add", "sub") and len(step.reads()) == 1 and step.args[1] != 0
            elif key[0] in self.named or self.constant(key):
                constant = True
            else:
                made = self.watch.steps.get(key)
                raise NoTerms(f"{made.op if made else 'a tensor'!r} is neither the stream nor what a module gives")
        order = {k: i for i, k in enumerate(self.watch.steps)}
        return list(streams), sorted(writes, key=lambda k: order.get(k, 0)), constant

    def constant(self, key: Key) -> bool:
        """Whether a tensor is made from parameters alone."""
        todo, seen = [key], set()
        while todo:
            k = todo.pop()
            if k in seen or k[0] in self.named:
                continue
            seen.add(k)
            if k not in self.watch.steps or k in self.borders:
                return False
            todo += self.watch.steps[k].reads()
        return True

    # ---- one term
    def formula(self, end: Key, leaf: Key | None, write: bool, part: tuple[int, int] | None) -> Formula | None:
        """How one term of a tensor is made; None where it is the leaf itself.

        Args:
            end: the tensor.
            leaf: the value of the stream, or the write; None for the constant.
            write: whether it is a write.
            part: which of several streams of the tensor is meant.
        """
        return _Maker(self, leaf, write).made(end, part)


@dataclass
class _Maker:
    """Builds the operations of one term."""

    terms: Terms
    leaf: Key | None
    write: bool
    leaves: dict[Place | str, int] = field(default_factory=dict)
    ops: list[tuple[Step, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    values: dict[tuple[Key, bool], int | None] = field(default_factory=dict)  # leaves count from -1 downwards
    factors: dict[str, None] = field(default_factory=dict)
    plain: bool = True  # nothing but casts and views so far

    def made(self, end: Key, part: tuple[int, int] | None) -> Formula | None:
        last = self.term(end)
        if last is None:
            raise NoTerms("a term that is always zero")
        if part is not None:
            last = self._op(_named("select", "int"), (Ref(last), *part), {})
        if self.plain and self.leaf is not None and not (self.write and part is not None):
            return None
        return self._formula()

    # a value's number: leaf i is -1 - i until the number of leaves is known
    def term(self, key: Key) -> int | None:
        """The number of the part of a tensor that is this term; None where it has none."""
        if (key, True) not in self.values:
            self.values[key, True] = self._term(key)
        return self.values[key, True]

    def _term(self, key: Key) -> int | None:
        t = self.terms
        if key == self.leaf:
            return self._leaf(t.borders[key])
        if key in t.stream or (key in t.writes and not t.leads(key)):
            return None
        if not (t.leads(key) or t.holds(key)):
            return self.whole(key) if self.leaf is None else None
        step = t.watch.steps[key]
        if step.op == "mul":
            inner, coefficient = t.factor(step)
            mine = self.term(inner)
            if mine is None:
                return None
            self.plain = False
            self.factors[self._words(coefficient, step)] = None
            return self._again(step, lambda k: mine if k == inner else self.whole(k))
        carried = set(t.carried(step))
        if step.op in _JOIN:
            return self._joined(key, step)
        found = {k: self.term(k) for k in carried}
        if all(v is None for v in found.values()):
            return None
        if None in found.values():
            raise NoTerms(f"{step.op!r} of two tensors that are both made from the stream")
        if step.op not in _SAME:
            self.plain = False
        if step.op in ("div", "neg") or step.op.endswith("mm"):
            others = [k for k in step.reads() if k not in carried]
            self.factors[self._words(others[0] if others else None, step)] = None
        return self._again(step, lambda k: found[k] if k in found else self.whole(k))

    def _joined(self, key: Key, step: Step) -> int | None:
        found = {k: self.term(k) for k in step.reads()}
        mine = [k for k in step.reads() if found[k] is not None]
        scalar = step.op in ("add", "sub") and len(step.reads()) == 1
        if scalar and self.leaf is None:
            self.plain = False
            base = found[step.reads()[0]]
            return self._again(step, lambda k: self._zero(k) if base is None else base)
        if not mine:
            return None
        if scalar:
            return found[mine[0]]
        if step.op in ("add", "sub") and len(mine) == 1:
            one = mine[0]
            alpha = float(step.kwargs.get("alpha", 1.0)) * (-1.0 if step.op == "sub" else 1.0)
            same = self.terms.watch.shape(one) == self.terms.watch.shape(key)
            if same and (one == step.reads()[0] or alpha == 1.0):
                return found[one]
            self.plain = False
            if same:
                self.factors[f"{alpha:g}"] = None
                return self._op(_named("mul", "Scalar"), (Ref(found[one] or 0), alpha), {})
        self.plain = False
        if len(mine) > len(set(mine)):
            self.factors["itself, more than once"] = None
        return self._again(step, lambda k: self._zero(k) if found[k] is None else found[k])

    def _zero(self, key: Key) -> int:
        return self._op(_named("zeros_like", "default"), (Ref(self.whole(key)),), {})

    def whole(self, key: Key) -> int:
        """The number of a tensor as it is: a coefficient.

        Raises:
            NoTerms: it cannot be made from what is seen.
        """
        if (key, False) not in self.values:
            self.values[key, False] = self._whole(key)
        found = self.values[key, False]
        assert found is not None
        return found

    def _whole(self, key: Key) -> int:
        t = self.terms
        if key in t.borders:
            return self._leaf(t.borders[key])
        if key[0] in t.named and key[1] == 0:
            return self._leaf(t.named[key[0]])
        step = t.watch.steps.get(key)
        if step is None:
            raise NoTerms("a factor is neither a parameter nor a buffer, and no module gives it")
        return self._again(step, self.whole)

    def _leaf(self, leaf: Place | str) -> int:
        return -1 - self.leaves.setdefault(leaf, len(self.leaves))

    def _words(self, key: Key | None, step: Step) -> str:
        """What a coefficient is, in words."""
        if key is None:
            scalars = [a for a in step.args if isinstance(a, (int, float))]
            return f"{'1 / ' if step.op == 'div' else ''}{scalars[0]:g}" if scalars else "-1"
        t, todo, seen = self.terms, [key], set()
        found: dict[str, None] = {}
        while todo:
            k = todo.pop()
            if k in seen:
                continue
            seen.add(k)
            if k in t.borders:
                found[str(t.borders[k])] = None
            elif k[0] in t.named:
                found[t.named[k[0]]] = None
            elif k in t.watch.steps:
                todo += t.watch.steps[k].reads()
        return " and ".join(found) or "a constant"

    def _again(self, step: Step, value: Any) -> int:
        """The operation once more, on the values that `value` gives for its tensors."""

        def put(x: Any) -> Any:
            return Ref(value(x.key)) if isinstance(x, Named) else x

        args, kwargs = tree_map(put, (step.args, step.kwargs), is_leaf=lambda x: isinstance(x, Named))
        if step.op in _SIZED:
            at = _SIZED[step.op]
            args = (*args[:at], self._sizes(step, args[at]), *args[at + 1 :])
        elif counted := self._counted(step):
            args = tuple(Size("T") if i in counted else x for i, x in enumerate(args))
        if any(isinstance(x, Named) for x in step.args):  # where its tensors are, there it runs
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
        return self._op(step, args, kwargs)

    def _op(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        self.ops.append((step, args, kwargs))
        return len(self.ops) - 1

    def _sizes(self, step: Step, sizes: Iterable[Any]) -> tuple[Any, ...]:
        """Lengths that change with the input in place of those of the example."""
        t = self.terms
        B, T, D = t.shape[t.axes[0]], t.shape[t.axes[1]], t.shape[-1]
        n = 1 if t.axes[2] is None else t.shape[t.axes[2]]
        reads = step.reads()
        source = t.watch.shape(reads[0]) if reads else ()
        kept = step.op in ("view", "_unsafe_view", "reshape", "repeat")
        sizes = list(sizes)
        if kept and self._has_one_size(reads[0]):
            return tuple(sizes)
        found: list[Any] = []
        # einsum puts streams first: there the batch stands before the tokens
        before = next((i for i in range(len(sizes) - 1) if T > 1 and sizes[i : i + 2] == [B, T]), None)
        for axis, size in enumerate(sizes):
            times = next((k for k in (1, D, n, n * D) if T > 1 and size == B * T * k), None)
            if step.op == "expand" and axis < len(source) == len(sizes) and source[axis] == size:
                found.append(-1)
            elif size == T and T > 1:
                found.append(Size("T"))
            elif times is not None:
                found.append(Size("BT", times))
            elif (
                axis == before
                or (n != B or before is None)
                and size == B
                and (axis == 0 or (axis == t.axes[0] and source[t.axes[0] : axis + 1] == (B,)))
            ):
                found.append(Size("B"))
            else:
                found.append(size)
        # Windows or frames of all sequences: as many as are left where nothing else changes with the input.
        fixed = all(isinstance(x, int) and x > 0 for x in found)
        if step.op in ("view", "_unsafe_view", "reshape") and fixed and found and found[0] % B == 0:
            found[0] = -1
        return tuple(found)

    def _counted(self, step: Step) -> list[int]:
        """Which arguments are the number of tokens."""
        T = self.terms.shape[self.terms.axes[1]]
        return [i for i in _COUNTED.get(step.op, ()) if T > 1 and i < len(step.args) and step.args[i] == T]

    def _has_one_size(self, key: Key) -> bool:
        """Whether a tensor is made from parameters alone, and is not cut to the length of the input."""
        steps = self.terms.watch.steps
        if not self.terms.constant(key):
            return False
        todo = [key]
        while todo:
            step = steps.get(todo.pop())
            if step is not None:
                if self._counted(step) or _SIZED.get(step.op) == 0:
                    return False
                todo += step.reads()
        return True

    def _formula(self) -> Formula:
        t = self.terms
        leaf = None if self.leaf is None else self.leaves[t.borders[self.leaf]]
        sizes = self._sized_by()  # may add a leaf
        n = len(self.leaves)

        def number(x: Any) -> Any:
            if isinstance(x, Ref):
                return Ref(-1 - x.of if x.of < 0 else n + x.of)
            return tuple(map(number, x)) if isinstance(x, (list, tuple)) else x

        ops = tuple(
            Op(
                f"{s.func._schema.name.replace('::', '.')}.{s.func._overloadname}",
                number(args),
                tuple((k, number(v)) for k, v in kwargs.items()),
                s.index,
            )
            for s, args, kwargs in self.ops
        )
        words = ", ".join(self.factors) or "its share of a stream"
        return Formula(tuple(self.leaves), ops, sizes, leaf if self.write else None, words)

    def _sized_by(self) -> tuple[int, int, int]:
        """The leaf that has the batch and the tokens, and on which axes: the term itself, or what the block takes."""
        t = self.terms
        B, T = t.shape[t.axes[0]], t.shape[t.axes[1]]
        if self.leaf is not None:
            shape, mine = t.watch.shape(self.leaf), self.leaves[t.borders[self.leaf]]
            if shape == t.shape:
                return mine, t.axes[0], t.axes[1]
            if shape[:2] == (B, T):
                return mine, 0, 1
        return self.leaves.setdefault(t.borders[t.start], len(self.leaves)), t.axes[0], t.axes[1]


def _named(op: str, overload: str) -> Step:
    return Step(getattr(getattr(torch.ops.aten, op), overload), (), {})
