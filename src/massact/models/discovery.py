"""Find the anatomy of a model nobody has seen before, by watching one short forward pass.

A block is a module that takes a residual stream and gives one back. Walking backwards from what it gives,
every addition that leads to what it took is a write; every norm on the way makes the block post-LN. A write
is attention if it mixes tokens (a product contracted over token positions), an MLP if it does not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from massact.records.anatomy import Anatomy, Block, Place, Stack, Sum
from massact.records.errors import ProofError
from massact.trace.watch import Call, Key, Watch

_MATMULS = {"mm": 0, "bmm": 0, "matmul": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "linear": 0}
_NO_BLOCKS = "Give the path of the list of blocks: load(model, blocks='path.to.blocks', inputs={...})."


@dataclass(frozen=True)
class _Value:
    """One value of the residual stream inside a block, and how it came about."""

    key: Key
    made_by: str  # "start" | "add" | "norm"
    write: Key | None = None


class _BlockReader:
    """Reads one block call out of a watched forward pass."""

    def __init__(self, watch: Watch, call: Call, params: dict[int, str]) -> None:
        self.watch, self.call, self.params = watch, call, params
        self.inner = [c for c in watch.calls if c.inside(call)]
        self.start, self.end = self._stream()
        self.numel = math.prod(self.start.shape)
        self.n_tokens = self.start.shape[-2]
        self._leads: dict[Key, bool] = {}
        self._makers: dict[Key, list[tuple[Call, Any]]] = defaultdict(list)
        for inner in self.inner:
            for seen in inner.outputs:
                self._makers[self.canon(seen.key)].append((inner, seen))

    def canon(self, key: Key) -> Key:
        return self.watch.canon(key)

    def fail(self, why: str) -> ProofError:
        return ProofError(
            f"Block {self.call.name!r} ({type(self.call.module).__name__}) is not understood.",
            why,
            "massact needs every write to the residual stream to be the output of a module inside the block: "
            "wrap it in a module (nn.Identity will do), or give other blocks with blocks='path'.",
        )

    def _stream(self) -> tuple[Any, Any]:
        """The block's input and output on the residual stream: the first pair of tensors of one shape."""
        for seen_in in self.call.inputs:
            for seen_out in self.call.outputs:
                if seen_in.shape == seen_out.shape and len(seen_in.shape) == 3:
                    return seen_in, seen_out
        raise self.fail("No input and output of it have the same (batch, tokens, width) shape.")

    # ---- the residual path, walked backwards
    def _full(self, node_input: Key, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) == self.numel

    def _addends(self, key: Key) -> tuple[Key, Key] | None:
        node = self.watch.made.get(key)
        if node is None or node.op != "add" or len(node.inputs) != 2:
            return None
        if not all(math.prod(s) == self.numel for s in node.shapes):
            return None
        return self.canon(node.inputs[0]), self.canon(node.inputs[1])

    def _norm_input(self, key: Key) -> Key | None:
        """The input of the norm module whose output this is."""
        for inner, _ in self._makers.get(key, ()):
            if _is_norm(inner.module, self.start.shape[-1]) and inner.inputs:
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
            sources = pair if pair else tuple(k for k in (self._norm_input(key),) if k)
            self._leads[key] = any(self._leads_to_start(s) for s in sources)
        return self._leads[key]

    def stream(self) -> list[_Value]:
        """The values of the residual stream from the block's input to its output."""
        values: list[_Value] = []
        key, start = self.canon(self.end.key), self.canon(self.start.key)
        while key != start:
            pair = self._addends(key)
            if pair is not None:
                through = [k for k in pair if self._leads_to_start(k)]
                if len(through) == 1 and pair[0] != pair[1]:
                    write = pair[1] if through[0] == pair[0] else pair[0]
                    values.append(_Value(key, "add", write))
                    key = through[0]
                    continue
            source = self._norm_input(key)
            if source is None or not self._leads_to_start(source):
                raise self.fail(
                    "Walking back from its output, the residual stream cannot be followed to its "
                    f"input (stopped after {len(values)} additions)."
                )
            values.append(_Value(key, "norm"))
            key = source
        if not any(v.made_by == "add" for v in values):
            raise self.fail("Nothing is added to its input: it has no residual stream.")
        if values[-1].made_by == "norm":
            raise self.fail("It normalises the residual stream before it adds anything to it.")
        return [_Value(start, "start"), *reversed(values)]

    # ---- where a tensor can be seen
    def _outermost(self, key: Key, skip: Call | None = None) -> tuple[Call, Any] | None:
        made = [m for m in self._makers.get(key, ()) if m[0] is not skip]
        return min(made, key=lambda m: m[0].depth) if made else None

    def place_of_value(self, value: _Value) -> Place | None:
        """A place where this value of the residual stream passes the border of some module call."""
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

    def places_of_write(self, key: Key) -> list[tuple[Key, Place]]:
        """The module output(s) that make up one write, taken apart where a sum of several is added at once."""
        made = self._outermost(key)
        if made is not None:
            return [(key, Place(made[0].name, "out", made[1].path, made[0].number))]
        node = self.watch.made.get(key)
        if node is not None and node.op == "mul":
            factor, source = self._factor(node)
            if source is not None:
                found = self.places_of_write(source)
                if len(found) == 1 and found[0][1].scale == 1.0:
                    p = found[0][1]
                    return [(key, Place(p.module, p.side, p.path, p.call, factor))]
        pair = self._addends(key)
        if pair is not None:
            return [w for part in pair for w in self.places_of_write(part)]
        raise self.fail(
            "What it adds to the residual stream is not the output of any module inside it"
            + (f" (it comes from {node.op!r})." if node else ".")
        )

    def _factor(self, node: Any) -> tuple[float | str, Key | None]:
        """A constant or a parameter times a tensor: the factor, and the tensor."""
        if len(node.inputs) == 1:
            scalars = [a for a in node.args if isinstance(a, (int, float))]
            return (float(scalars[0]), self.canon(node.inputs[0])) if scalars else (1.0, None)
        for i, key in enumerate(node.inputs):
            if self.canon(key)[0] in self.params:
                return self.params[self.canon(key)[0]], self.canon(node.inputs[1 - i])
        return 1.0, None

    # ---- what a write is made from
    def cone(self, key: Key, stop: set[Key]) -> set[Key]:
        """Everything that `key` was computed from, back to the residual stream and the block's other inputs."""
        seen: set[Key] = set()
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

    def mixes_tokens(self, cone: set[Key]) -> bool:
        for key in cone:
            node = self.watch.made.get(key)
            if node is None:
                continue
            if "scaled_dot_product" in node.op or node.op.startswith("convolution"):
                return True
            if node.op in _MATMULS and len(node.shapes) > _MATMULS[node.op]:
                if node.shapes[_MATMULS[node.op]][-1] in self._token_counts:
                    return True
        return False

    @property
    def _other_sequences(self) -> list[Any]:
        """Inputs that are states of another sequence: (batch, other tokens, width)."""
        return [
            s
            for s in self.call.inputs
            if len(s.shape) == 3 and s.shape[0] == self.start.shape[0] and s.shape[1] not in (1, self.n_tokens)
        ]

    @property
    def _token_counts(self) -> set[int]:
        return {self.n_tokens} | {s.shape[1] for s in self._other_sequences}

    def crosses(self, cone: set[Key]) -> bool:
        """Whether the write reads another sequence (the encoder's) besides the residual stream."""
        return any(self.canon(s.key) in cone for s in self._other_sequences)

    def sublayer_input(self, cone: set[Key], before: _Value) -> Place | None:
        """Where the sublayer reads the residual stream: behind its norm, or the stream itself."""
        for inner in self.inner:
            if _is_norm(inner.module, self.start.shape[-1]) and inner.inputs and inner.outputs:
                reads = self.canon(inner.inputs[0].key)
                if (
                    reads == before.key
                    and self.canon(inner.outputs[0].key) in cone
                    and reads != self.canon(inner.outputs[0].key)
                ):
                    return Place(inner.name, "out", inner.outputs[0].path, inner.number)
        return self.place_of_value(before)

    def last_projection(self, key: Key) -> Place | None:
        """Input of the last linear map of an MLP: walk back through scales and norms to a weight matrix."""
        for _ in range(8):
            for inner, _seen in self._makers.get(key, ()):
                weight = getattr(inner.module, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim == 2 and inner.inputs:
                    return Place(inner.name, "in", inner.inputs[0].path, inner.number)
            source = self._norm_input(key)
            if source is None:
                node = self.watch.made.get(key)
                source = self._factor(node)[1] if node is not None and node.op == "mul" else None
            if source is None:
                return None
            key = source
        return None


def _is_norm(module: nn.Module, width: int) -> bool:
    """A module that rescales each token: only vectors for parameters, at most a few of the stream's width."""
    params = list(module.parameters())
    if any(p.ndim > 1 for p in params) or sum(p.numel() for p in params) > 4 * width:
        return False
    named = any(word in type(module).__name__.lower() for word in ("norm", "dyt", "dynamictanh"))
    return named or any(p.numel() == width for p in params)


def read_block(watch: Watch, call: Call, layer: int, params: dict[int, str]) -> Block:
    """The anatomy of one block call.

    Raises:
        ProofError: the residual stream cannot be followed through it.
    """
    reader = _BlockReader(watch, call, params)
    values = reader.stream()
    stream_keys = {v.key for v in values}
    places: dict[str, Place] = {}
    sums: list[Sum] = []
    unavailable: dict[str, str] = {}
    place = reader.place_of_value(values[0])
    assert place is not None  # the block's own input
    places["resid_pre"] = place
    start, pending, before, last = "resid_pre", [], values[0], "resid_pre"
    i = 1
    while i < len(values):
        value = values[i]
        assert value.write is not None
        kinds = []
        for key, write_place in reader.places_of_write(value.write):
            cone = reader.cone(key, stream_keys)
            kind = _kind(reader, cone)
            reads = next((v for v in values if v.key in cone), before)
            name = _fresh(f"{kind}_out", places)
            places[name] = write_place
            pending.append(name)
            kinds.append(kind)
            source = reader.sublayer_input(cone, reads)
            if source is not None:
                places[_fresh(f"{kind}_in", places)] = source
            if kind == "mlp":
                _add_mlp_act(reader, key, places, unavailable)
        final_add = i == len(values) - 1 or (i == len(values) - 2 and values[-1].made_by == "norm")
        point = (
            "resid_post"
            if final_add
            else {"attn": "resid_mid", "cross_attn": "resid_cross"}.get(kinds[-1], "resid_mid")
        )
        normed = i + 1 < len(values) and values[i + 1].made_by == "norm"
        end = f"{point}_prenorm" if normed else point
        place = reader.place_of_value(value)
        if place is not None and end not in places:
            places[end] = place
            sums.append(Sum(start, tuple(pending), end))
            start, pending = end, []
        else:
            unavailable[end] = "the sum passes no module of its own (attention and MLP run in parallel)"
        before = value
        if normed:
            after = values[i + 1]
            place = reader.place_of_value(after)
            assert place is not None  # the output of a norm module
            places[point] = place
            start, before, i = point, after, i + 1
        last = point
        i += 1
    if last != "resid_post" or pending:
        raise reader.fail("The last sum of it is not what it gives back.")
    if "resid_mid" not in places:
        unavailable.setdefault("resid_mid", "attention and MLP run in parallel, or the block has only one of them")
    for point in ("attn_out", "mlp_out"):
        if point not in places:
            unavailable[point] = "the block has no such sublayer"
    return Block(layer, call.name, call.number, places, tuple(sums), unavailable)


def _kind(reader: _BlockReader, cone: set[Key]) -> str:
    if not reader.mixes_tokens(cone):
        return "mlp"
    return "cross_attn" if reader.crosses(cone) else "attn"


def _fresh(name: str, taken: Iterable[str]) -> str:
    """`name`, or `name_2`, `name_3` where a block has several sublayers of one kind."""
    taken = set(taken)
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in taken)


def _add_mlp_act(reader: _BlockReader, key: Key, places: dict[str, Place], unavailable: dict[str, str]) -> None:
    place = reader.last_projection(key)
    if place is None:
        unavailable["mlp_act"] = "the MLP has no single output projection module (mixture of experts)"
    else:
        places[_fresh("mlp_act", places)] = place


# ---------------------------------------------------------------------------- stacks
def find_stacks(watch: Watch, blocks: Iterable[str] | None, counts: set[int]) -> list[tuple[str, list[Call]]]:
    """The lists of blocks of a watched model, outermost first, each with its calls in the order they ran.

    Args:
        watch: a watched forward pass.
        blocks: paths given by the user; None to search.
        counts: numbers of layers that the configuration names; {} when unknown.
    """
    lists: dict[str, list[Call]] = defaultdict(list)
    for call in watch.calls:
        parent = call.name.rpartition(".")[0]
        if call.name and _maps_stream(call):
            lists[parent].append(call)
    if blocks is not None:
        return [_given(watch, path, lists) for path in blocks]
    containers = {name for name, m in watch.root.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    found = {
        p: calls
        for p, calls in lists.items()
        if p in containers and _one_after_another(calls) and any(c.module.parameters() for c in calls)
    }
    outer = {p: calls for p, calls in found.items() if not any(p.startswith(q + ".") for q in found if q != p)}
    if counts:
        outer = {p: calls for p, calls in outer.items() if len(calls) in counts} or outer
    return sorted(outer.items(), key=lambda item: watch.calls.index(item[1][0]))


def _maps_stream(call: Call) -> bool:
    shapes = [s.shape for s in call.inputs if len(s.shape) == 3]
    return any(s.shape in shapes for s in call.outputs) and any(True for _ in call.module.parameters())


def _one_after_another(calls: list[Call]) -> bool:
    return all(not a.inside(b) and not b.inside(a) for a, b in zip(calls, calls[1:], strict=False))


def _given(watch: Watch, path: str, lists: dict[str, list[Call]]) -> tuple[str, list[Call]]:
    names = dict(watch.root.named_modules())
    if path not in names:
        raise ProofError(
            f"The model has no module {path!r}.",
            do="Module lists in it: "
            + ", ".join(n for n, m in names.items() if isinstance(m, (nn.ModuleList, nn.Sequential)))
            + ".",
        )
    if not lists.get(path):
        raise ProofError(f"No child of {path!r} takes and gives a (batch, tokens, width) tensor.", do=_NO_BLOCKS)
    return path, lists[path]


def stack_names(paths: list[str]) -> list[str]:
    """The shortest word of each path that tells the stacks apart; "" for a single stack."""
    if len(paths) == 1:
        return [""]
    parts = [p.split(".") for p in paths]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    names = [p[shared] if shared < len(p) else p[-1] for p in parts]
    return names if len(set(names)) == len(names) else paths


def discover(model: nn.Module, inputs: dict[str, Any], blocks: Iterable[str] | None = None) -> Anatomy:
    """Find the stacks, blocks and sites of a model by watching it run once.

    Args:
        model: the module, in evaluation mode.
        inputs: keyword arguments for one short forward pass.
        blocks: dotted paths of the lists of blocks; None to search.

    Raises:
        ProofError: no stack of blocks is found, or a block cannot be read.
    """
    watch = Watch(model)
    with watch.watching():
        model(**inputs)
    counts = layer_counts(getattr(model, "config", None))
    candidates = find_stacks(watch, blocks, counts)
    params = {id(p): name for name, p in model.named_parameters()}
    stacks: list[tuple[str, list[Block], int]] = []
    refused: list[ProofError] = []
    for path, calls in candidates:
        try:
            read = [read_block(watch, call, i + 1, params) for i, call in enumerate(calls)]
        except ProofError as error:
            # A list of the length that the configuration names is a stack: not reading it is a refusal.
            if blocks is not None or len(calls) in counts:
                raise
            refused.append(error)
            continue
        stacks.append((path, read, _width(watch, calls[0])))
    if not stacks:
        if refused:
            raise refused[0]
        raise ProofError(
            f"No stack of transformer blocks was found in {type(model).__name__}.",
            "No module list in it runs children that take and give a (batch, tokens, width) tensor.",
            _NO_BLOCKS,
        )
    names = stack_names([path for path, _, _ in stacks])
    return Anatomy(
        tuple(Stack(n, path, tuple(read), width) for n, (path, read, width) in zip(names, stacks, strict=True)),
        _logits_place(watch),
    )


def _width(watch: Watch, call: Call) -> int:
    return next(s.shape[-1] for s in call.inputs if len(s.shape) == 3)


def _logits_place(watch: Watch) -> Place | None:
    head = getattr(watch.root, "get_output_embeddings", lambda: None)()
    top = watch.calls[0]
    if head is None:
        return None
    return next((Place("", "out", s.path) for s in top.outputs if s.path and s.path[-1] == "logits"), None)


def layer_counts(config: Any) -> set[int]:
    """Every number of layers that a configuration (and its sub-configurations) names."""
    words = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
             "num_decoder_layers", "decoder_num_hidden_layers", "depth")  # fmt: skip
    counts: set[int] = set()
    for holder in (config, *(getattr(config, k, None) for k in getattr(config, "sub_configs", {}))):
        counts |= {v for w in words if isinstance(v := getattr(holder, w, None), int)}
    return counts
