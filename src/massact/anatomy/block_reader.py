"""The residual stream of one block in a watched forward pass, and what its writes are made from.

A block is a module that takes a residual stream and gives one back. Walking backwards from what it gives,
every addition that leads to what it took is a write; every norm on the way makes the block post-LN. A stream
that cannot be followed so is read with factors (`stretches.py`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard

from torch import nn

from massact.anatomy.stretches import Stretches
from massact.anatomy.terms import NoTerms
from massact.records.anatomy import CHANNELS, GRID, TURNED, Place
from massact.records.errors import ProofError
from massact.trace.watch import Call, Key, Node, Watch

_MATMULS = {"mm": 0, "bmm": 0, "matmul": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "linear": 0}
_MULTIPLIED = "It takes the stream times what its modules give, and adds nothing to it."


@dataclass(frozen=True)
class Value:
    """One value of the residual stream inside a block, and how it came about."""

    key: Key
    made_by: str  # "start" | "add" | "norm"
    write: Key | None = None
    factor: float = 1.0  # of the write
    writes: tuple[tuple[Key, Place], ...] | None = None  # where they are known already
    kept: Place | None = None  # what goes on of the value before, where it is scaled or mixed
    place: Place | None = None


@dataclass(frozen=True)
class Ends:
    """Which tensors at the borders of a block belong to the stream that runs on from block to block.

    Args:
        taken: inputs that are made from what the block before gives.
        given: outputs that what the next block takes is made from.
        same: those of both that are handed on as they are.
        layout: how its tensors lie, where it is not (batch, tokens, width).
    """

    taken: frozenset[Key] = frozenset()
    given: frozenset[Key] = frozenset()
    same: frozenset[Key] = frozenset()
    layout: str = ""


class BlockReader:
    """Reads one block call out of a watched forward pass."""

    def __init__(
        self,
        watch: Watch,
        call: Call,
        params: dict[int, str],
        ends: Ends | None = None,
        ranks: tuple[int, ...] = (3, 2),
    ) -> None:
        ends = ends or Ends()
        self._look(watch, call, params, [c for c in watch.calls if c.inside(call)], ends.layout)
        self.tokens = 0 if ends.layout == TURNED else -2  # the axis
        self.pairs = pairs = self._pairs(ends, (4,) if ends.layout in (GRID, CHANNELS) else ranks)
        for self.start, self.end in [*pairs, pairs[0]]:  # the last one is for the refusal, where none leads
            self.numel = math.prod(self.start.shape)
            shape = self.start.shape
            rows_apart = {GRID: shape[1:3], CHANNELS: shape[2:4]}.get(ends.layout)
            self.n_tokens = math.prod(rows_apart) if rows_apart else shape[self.tokens]
            self._leads: dict[Key, bool] = {}
            if self._leads_to_start(self.canon(self.end.key)):
                break

    def _look(self, watch: Watch, call: Call, params: dict[int, str], inner: list[Call], layout: str = "") -> None:
        """Note which of some module calls gave which tensor."""
        self.watch, self.call, self.params, self.inner, self.layout = watch, call, params, inner, layout
        self.makers: dict[Key, list[tuple[Call, Any]]] = defaultdict(list)
        for made in inner:
            for seen in made.outputs:
                self.makers[self.canon(seen.key)].append((made, seen))

    def canon(self, key: Key) -> Key:
        key = self.watch.canon(key)
        while self.layout == CHANNELS and _moves_channels(node := self.watch.made.get(key)):
            key = self.watch.canon(node.inputs[0])
        return key

    @property
    def width(self) -> int:
        return self.start.shape[1 if self.layout == CHANNELS else -1]

    def fail(self, why: str) -> ProofError:
        return ProofError(
            f"Block {self.call.name!r} ({type(self.call.module).__name__}) is not understood.",
            why,
            "massact needs every write to the residual stream to be the output of a module inside the block: "
            "wrap it in a module (nn.Identity will do), or give other blocks with blocks='path'."
            + (" The block has hooks of its own, which may change it: remove them." if self._hooked() else ""),
        )

    def _hooked(self) -> bool:
        """Whether someone else's hooks are on the block (those of `watch` are gone by now)."""
        return bool(self.call.module._forward_hooks or self.call.module._forward_pre_hooks)

    def _pairs(self, ends: Ends, ranks: tuple[int, ...]) -> list[tuple[Any, Any]]:
        """What may be the block's input and output on the residual stream: pairs of tensors of one shape."""
        alike = [(a, b) for a in self.call.inputs for b in self.call.outputs if a.shape == b.shape]
        pairs = next((p for rank in ranks if (p := [(a, b) for a, b in alike if len(a.shape) == rank])), None)
        if not pairs:
            raise self.fail("No input and output of it have the same (batch, tokens, width) shape.")
        for i, known in enumerate((ends.taken, ends.given)):
            # Where none of them goes on, the proof of what lies between the blocks says so.
            pairs = [p for p in pairs if self.watch.canon(p[i].key) in known] or pairs
        # First what is handed from block to block as it is, then what something is made from on the way.
        return sorted(pairs, key=lambda p: sum(self.watch.canon(s.key) not in ends.same for s in p))

    # ---- the residual path, walked backwards
    def _addends(self, key: Key) -> tuple[Key, Key] | None:
        """The two tensors that this one is a sum or a difference of."""
        node = self.watch.made.get(key)
        if node is None or node.op not in ("add", "sub") or len(node.inputs) != 2:
            return None
        if not all(math.prod(s) == self.numel for s in node.shapes):
            return None
        return self.canon(node.inputs[0]), self.canon(node.inputs[1])

    def norm_input(self, key: Key) -> Key | None:
        """The input of the norm module whose output this is."""
        for inner, _ in self.makers.get(key, ()):
            if _is_norm(inner.module, self.width) and inner.inputs:
                source = self.canon(inner.inputs[0].key)
                if source != key:
                    return source
        return None

    def _leads_to_start(self, key: Key) -> bool:
        if key == self.canon(self.start.key):
            return True
        if key not in self._leads:
            self._leads[key] = False  # cycles cannot happen; this only bounds the recursion
            pair = self._addends(key)
            sources = pair if pair else tuple(k for k in (self.norm_input(key),) if k)
            self._leads[key] = any(self._leads_to_start(s) for s in sources)
        return self._leads[key]

    def stream(self) -> list[Value]:
        """The values of the residual stream from the block's input to its output."""
        values: list[Value] = []
        key, start = self.canon(self.end.key), self.canon(self.start.key)
        while key != start:
            pair = self._addends(key)
            if pair is not None:
                through = [k for k in pair if self._leads_to_start(k)]
                factor = self.watch.made[key].factor
                if len(through) == 1 and pair[0] != pair[1] and (factor == 1.0 or through[0] == pair[0]):
                    first = through[0] == pair[0]
                    values.append(Value(key, "add", pair[first], factor if first else 1.0))
                    key = through[0]
                    continue
            source = self.norm_input(key)
            if source is None or not self._leads_to_start(source):
                raise self.fail(
                    "Walking back from its output, the residual stream cannot be followed to its input"
                    f"{self._obstacle(key)} (after {len(values)} step(s) back)."
                )
            if values and values[-1].made_by == "norm":
                raise self.fail("It normalises the residual stream twice in a row.")
            values.append(Value(key, "norm"))
            key = source
        if not any(v.made_by == "add" for v in values):
            raise self.fail("Nothing is added to its input: it has no residual stream.")
        if values[-1].made_by == "norm":
            raise self.fail("It normalises the residual stream before it adds anything to it.")
        return [Value(start, "start"), *reversed(values)]

    def _obstacle(self, key: Key) -> str:
        """What stands in the way of the residual stream at a value, in words."""
        pair = self._addends(key)
        ops = sorted({self.watch.made[k].op for k in pair or (key,) if k in self.watch.made})
        if pair and all(self._leads_to_start(k) for k in pair):
            return ": both terms of a sum are the stream itself"
        if pair:
            return f": no term of a sum is the stream, they come from {' and '.join(map(repr, ops))}"
        return f": {ops[0]!r} stands in the way" if ops else ""

    def scaled_stream(self, refused: ProofError) -> list[Value]:
        """The same of a stream that is scaled or normalised before anything is added to it.

        Raises:
            ProofError: it cannot be followed so either; says what was refused first.
        """
        why = ""
        for start, end in self.pairs:
            try:
                values = self.values_of(Stretches(self, start, end, (0, 1, None)))
                self.start, self.end = start, end
                return values
            except NoTerms as error:
                why = why or str(error)
        if why == _MULTIPLIED:
            do = "massact accounts for what is added to a stream: give blocks that add something with blocks='path'."
            raise ProofError(refused.what, why, do) from refused
        do = f"{refused.do} What the stream itself may go through is in docs/residual-stream.md."
        raise ProofError(refused.what, f"{refused.why} With factors: {why}.", do) from refused

    def values_of(self, stretches: Stretches, part: tuple[int, int] | None = None) -> list[Value]:
        """The values of the stream along its stretches.

        Args:
            part: which of several streams, as (axis, number).

        Raises:
            NoTerms: what stands in the way.
        """
        found = stretches.read(part)
        if not any(s.writes for s in found):
            raise NoTerms(_MULTIPLIED if any(s.kept is not None for s in found) else "nothing is added to its input")
        values = [self.value(stretches.start.key, replace(stretches.place(stretches.start.key), part=part))]
        for s in found:
            place = replace(stretches.place(s.end), part=part)
            values.append(
                Value(self.canon(s.end), "norm" if s.norm else "add", writes=s.writes, kept=s.kept, place=place)
            )
        return values

    def value(self, key: Key, place: Place) -> Value:
        """A value of the stream that is seen at a place."""
        return Value(self.canon(key), "start", place=place)

    def is_norm(self, module: nn.Module) -> bool:
        return _is_norm(module, self.width)

    # ---- where a tensor can be seen
    def _outermost(self, key: Key, skip: Call | None = None) -> tuple[Call, Any] | None:
        made = [m for m in self.makers.get(key, ()) if m[0] is not skip]
        return min(made, key=lambda m: m[0].depth) if made else None

    def place_of_value(self, value: Value) -> Place | None:
        """A place where this value of the residual stream passes the border of some module call."""
        if value.place is not None:
            return value.place
        if value.key == self.canon(self.start.key):
            return Place(self.call.name, "in", self.start.path, self.call.number)
        if value.key == self.canon(self.end.key):
            return Place(self.call.name, "out", self.end.path, self.call.number)
        made = self._outermost(value.key)
        if made is not None:
            return Place(made[0].name, "out", made[1].path, made[0].number)
        for inner in self.inner:
            for seen in inner.inputs:
                if self.canon(seen.key) == value.key:
                    return Place(inner.name, "in", seen.path, inner.number)
        return None

    def writes_of(self, value: Value) -> Iterable[tuple[Key, Place]]:
        """What is added to make a value of the stream, and where it is seen."""
        if value.writes is not None:
            return value.writes
        assert value.write is not None  # of an addition
        return self.places_of_write(value.write, value.factor)

    def places_of_write(self, key: Key, scale: float | str = 1.0) -> list[tuple[Key, Place]]:
        """The module output(s) that make up one write, taken apart where a sum of several is added at once."""
        made = self._outermost(key)
        if made is not None:
            return [(key, Place(made[0].name, "out", made[1].path, made[0].number, scale))]
        node = self.watch.made.get(key)
        factor, source = self.factor_of(node)
        if source is not None:
            both = factor
            if scale != 1.0:
                if isinstance(scale, str) or isinstance(factor, str):
                    raise self.fail(f"What it adds is scaled twice ({factor} and {scale}): massact can undo one scale.")
                both = scale * factor
            return [(key, place) for _, place in self.places_of_write(source, both)]
        pair = self._addends(key)
        if pair is not None and node is not None and (not isinstance(scale, str) or node.factor == 1.0):
            second = scale if isinstance(scale, str) else scale * node.factor
            return self.places_of_write(pair[0], scale) + self.places_of_write(pair[1], second)
        raise self.fail(
            "What it adds to the residual stream is not the output of any module inside it"
            + (f" (it comes from {node.op!r})." if node else ".")
        )

    def factor_of(self, node: Node | None) -> tuple[float | str, Key | None]:
        """A constant or a parameter times a tensor: the factor, and the tensor; None where it is something else."""
        if node is None or node.op not in ("mul", "div", "neg"):
            return 1.0, None
        if len(node.inputs) == 1:
            scalars = [a for a in node.args if isinstance(a, (int, float))]
            if node.op == "neg":
                scalars = [-1.0]
            if not scalars or scalars[0] == 0:
                return 1.0, None
            factor = 1.0 / scalars[0] if node.op == "div" else float(scalars[0])
            return factor, self.canon(node.inputs[0])
        if node.op == "div":
            return 1.0, None
        for i, key in enumerate(node.inputs):
            if self.canon(key)[0] in self.params:
                return self.params[self.canon(key)[0]], self.canon(node.inputs[1 - i])
        return 1.0, None

    def cuts(self, points: Mapping[Key, str]) -> dict[str, tuple[float, float]]:
        """Clamps at points of the block, which cut nothing here: each with its bounds, NaN where not known."""
        found: dict[str, tuple[float, float]] = {}
        for key, step in self.watch.steps.items():
            if step.op == "clamp" and (point := points.get(self.canon(key))):
                asked = [*step.args[1:3], None, None][:2]
                given = step.kwargs.get("min", asked[0]), step.kwargs.get("max", asked[1])
                low, high = (nowhere if x is None else float(x) if isinstance(x, (int, float)) else math.nan
                             for x, nowhere in zip(given, (-math.inf, math.inf), strict=True))  # fmt: skip
                found[point] = low, high
        return found

    # ---- what a write is made from
    def cone(self, key: Key, stop: set[Key]) -> set[Key]:
        """Everything that `key` was computed from, back to the residual stream and the block's other inputs."""
        seen: set[Key] = set()
        stop = stop | {self.canon(s.key) for s in self.call.inputs}
        todo = [key]
        while todo:
            k = self.canon(todo.pop())
            if k in seen:
                continue
            seen.add(k)
            if k in stop and k != self.canon(key):
                continue
            if k in self.watch.made:
                todo.extend(self.watch.made[k].inputs)
        return seen

    def calls_attention(self, cone: set[Key]) -> bool:
        ops = (self.watch.made[key].op for key in cone if key in self.watch.made)
        return any("attention" in op or op.startswith("scaled_dot_product") for op in ops)

    def attends(self, cone: set[Key]) -> bool:
        """Whether a softmax, an attention kernel, or a product of two activations contracted over tokens is in it."""
        if self.calls_attention(cone):
            return True
        nodes = [self.watch.made[key] for key in cone if key in self.watch.made]
        return any("softmax" in n.op or (n.op == "bmm" and n.shapes[0][-1] in self._token_counts) for n in nodes)

    def mixes_tokens(self, cone: set[Key]) -> bool:
        """Whether the dataflow shows an attention, a convolution, or a product contracted over tokens."""
        if self.calls_attention(cone):
            return True
        for key in cone:
            node = self.watch.made.get(key)
            if node is None:
                continue
            if node.op.startswith("convolution"):
                return True
            if node.op in _MATMULS and len(node.shapes) > _MATMULS[node.op]:
                if node.shapes[_MATMULS[node.op]][-1] in self._token_counts:
                    return True
        return False

    def _other_sequences(self, other_length: bool = True) -> list[Any]:
        """Inputs that are states of another sequence: (batch, other tokens, width)."""
        batch, tokens = (1, 0) if self.tokens == 0 else (0, 1)
        return [
            s
            for s in self.call.inputs
            if len(s.shape) == 3
            and s.shape[batch] == self.start.shape[batch]
            and s.shape[tokens] != 1
            and self.canon(s.key) != self.canon(self.start.key)
            and (s.shape[tokens] != self.n_tokens or (not other_length and s.shape == self.start.shape))
        ]

    @cached_property
    def _token_counts(self) -> set[int]:
        return {self.n_tokens} | {s.shape[1 if self.tokens else 0] for s in self._other_sequences()}

    def crosses(self, cone: set[Key], other_length: bool = True) -> bool:
        """Whether the write reads another sequence (the encoder's) besides the residual stream.

        Args:
            cone: what the write is made from.
            other_length: count sequences of another length only: one of the same length may be positions.
        """
        return any(self.canon(s.key) in cone for s in self._other_sequences(other_length))

    def read_by(self, cone: set[Key], values: list[Value], before: Value) -> Value:
        """What a sublayer reads: a value of the stream, else another stream that the block takes (reversible ones)."""
        for value in values:
            if value.key in cone:
                return value
        for seen in self.call.inputs:
            if seen.shape == self.start.shape and self.canon(seen.key) in cone:
                return Value(self.canon(seen.key), "start")
        return before  # a kernel that nobody can look into

    def sublayer_input(self, cone: set[Key], before: Value) -> Place | None:
        """Where the sublayer reads what it is given: behind its norm, or the tensor itself."""
        for inner in self.inner:
            if _is_norm(inner.module, self.width) and inner.inputs and inner.outputs:
                reads = self.canon(inner.inputs[0].key)
                if (
                    reads == before.key
                    and self.canon(inner.outputs[0].key) in cone
                    and reads != self.canon(inner.outputs[0].key)
                ):
                    return Place(inner.name, "out", inner.outputs[0].path, inner.number)
        return self.place_of_value(before)


def _moves_channels(node: Node | None) -> TypeGuard[Node]:
    """Whether channels are moved from the second axis to the last one, or back: other axes, the same entries."""
    return node is not None and node.op == "permute" and list(node.args[1]) in ([0, 2, 3, 1], [0, 3, 1, 2])


def _is_norm(module: nn.Module, width: int) -> bool:
    """A module that rescales each token: only vectors for parameters, at most a few of the stream's width."""
    params = list(module.parameters())
    if any(p.ndim > 1 for p in params) or sum(p.numel() for p in params) > 4 * width:
        return False
    named = any(word in type(module).__name__.lower() for word in ("norm", "dyt", "dynamictanh"))
    return named or any(p.numel() == width for p in params)
