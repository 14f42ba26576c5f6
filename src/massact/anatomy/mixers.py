"""What mixes the tokens of a write: attention, a state that is carried on, a convolution, or something else.

Told from how the write is computed, and from an experiment: how many tokens away what it reads is felt. No names of
modules and no families. What neither of them tells has a neutral name (`mixer_out`) rather than a wrong one.

* attention: an attention kernel, or a function of q.k that is not linear (a softmax over the keys) before the product
  with the values, so that no state of a fixed size could stand for the keys;
* a state that is carried from token to token otherwise. Of these a *state-space* scan (`ssm`) has a step that says at
  once how much is kept (through exp) and, as a factor, how much of a token is added (Mamba), or a state of one entry
  for each channel, which no query reads (RG-LRU, RWKV);
* every other one, whose state is written and read by products of two activations, is *linear attention*;
* a convolution (`conv`): what is felt ends a few tokens away, and no such product is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from massact.records.sites import MIXERS
from massact.trace.watch import Key

if TYPE_CHECKING:
    from massact.anatomy.block_reader import BlockReader

WORDS = {
    "attn": "attention whose result another mixer reads",
    "ssm": "a state-space scan (a recurrence)",
    "linear_attn": "linear attention (a recurrence)",
    "conv": "a convolution along the tokens",
    "mixer": "something that is no attention over keys",
}
# Kernels that nobody can look into say what they are by the name of the operation.
_KERNELS = {
    "linear_attn": ("linear_attention", "linear_attn", "delta_rule", "retention", "lightning"),
    "ssm": ("selective_scan", "ssm", "mamba", "rg_lru"),
    "attn": ("attention", "scaled_dot_product", "flash_attn"),
}
_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "baddbmm": 1, "addbmm": 1, "addmm": 1}  # -> first of the two factors
_MOVES = {  # entries are moved, chosen, hidden or repeated
    "permute", "transpose", "t", "numpy_T", "expand", "repeat", "repeat_interleave", "slice", "select", "index", "cat",
    "stack", "index_select", "gather", "slice_scatter", "select_scatter", "copy", "as_strided", "unbind", "split",
    "split_with_sizes", "chunk", "flip", "roll", "constant_pad_nd", "pad", "tril", "triu", "masked_fill", "where",
    "clone", "_to_copy", "movedim", "diagonal", "unfold", "view", "reshape", "squeeze", "unsqueeze", "masked_scatter",
    "_unsafe_view", "new_zeros",
}  # fmt: skip
_SUMS = {"add", "sub", "rsub", "neg", "mul", "div", "clamp", "clamp_min", "clamp_max", "cumsum", "sum", "minimum"}
_BENDS = {  # applied to every entry, and not linear
    "_softmax", "softmax", "_safe_softmax", "sigmoid", "relu", "exp", "exp2", "silu", "gelu", "tanh", "pow", "square",
    "softplus", "log_sigmoid_forward", "elu", "leaky_relu", "hardtanh", "abs", "maximum",
}  # fmt: skip
_STEPS = {"softplus", "sigmoid", "log_sigmoid_forward", "relu", "silu", "exp", "elu"}  # what makes a positive step
_RUNNING = {"cumsum", "cumprod", "logcumsumexp", "associative_scan", "cummax"}


@dataclass(frozen=True)
class Mixing:
    """What mixes the tokens of one write.

    Args:
        kind: of the site: one of `MIXERS`, "cross_attn", or "mlp" where no tokens are mixed.
        all: kinds that take part in it: attention whose result a state-space scan reads is two of them.
    """

    kind: str
    all: tuple[str, ...] = ()


def mixing_of(reader: BlockReader, key: Key, stop: set[Key], reach: int | None) -> Mixing:
    """What mixes the tokens of a write.

    Args:
        reader: of the block.
        key: the write.
        stop: values of the residual stream, behind which nothing is looked for.
        reach: how many tokens away what it reads is felt, by experiment; None where there was none.
    """
    cone = reader.cone(key, stop)
    by_dataflow = reader.mixes_tokens(cone)
    if by_dataflow and not reach and reader.crosses(cone, other_length=reach is None):
        return Mixing("cross_attn")
    # An attention kernel is one even where nothing comes of it yet (values or weights that start at zero).
    mixes = by_dataflow if reach is None else reach > 0 or reader.calls_attention(cone)
    flow = _Flow(reader, cone, stop)
    # In rows of frames or patches no product is contracted over as many tokens as the stream has.
    if not mixes and (reach is not None or not flow.attention):
        return Mixing("mlp")
    return flow.mixing(reach)


def mixer_of(kinds: Iterable[str]) -> str:
    """Of a whole block: `attention`, `attention+ssm`, ..., or `none`."""
    found = set(kinds)
    return "+".join(MIXERS[kind] for kind in MIXERS if kind in found) or "none"


class _Flow:
    """How one write is computed from the residual stream, in the order in which it happens."""

    def __init__(self, reader: BlockReader, cone: set[Key], stop: set[Key]) -> None:
        self.reader, self.cone = reader, cone
        self.nodes = {k: reader.watch.made[k] for k in reader.watch.made if k in cone}
        alike = {reader.canon(s.key) for s in reader.call.inputs if s.shape == reader.start.shape}
        self.varies: set[Key] = stop | alike  # what depends on the tokens
        for k in self.nodes:
            if k not in self.varies and any(source in self.varies for source in self.inputs(k)):
                self.varies.add(k)

    def inputs(self, key: Key) -> list[Key]:
        return [self.reader.canon(k) for k in self.nodes[key].inputs] if key in self.nodes else []

    # ---- the parts
    def back(self, keys: Iterable[Key], through: set[str]) -> tuple[set[Key], set[Key]]:
        """What some tensors are made from by some operations alone, and where these end.

        Of a product with a smaller tensor (a normaliser, a gate) the greater one is followed.
        """
        on_way: set[Key] = set()
        ends: set[Key] = set()
        todo = [self.reader.canon(k) for k in keys]
        while todo:
            key = todo.pop()
            if key in on_way or key in ends:
                continue
            node = self.nodes.get(key)
            if node is None or node.op not in through:
                ends.add(key)
                continue
            on_way.add(key)
            sizes = [math.prod(shape) for shape in node.shapes]
            if node.op in ("mul", "div") and len(sizes) == 2:
                todo += [k for k, n in zip(self.inputs(key), sizes, strict=True) if n == max(sizes)]
            else:
                todo += self.inputs(key)
        return on_way, ends

    def factors(self, key: Key) -> tuple[Key, ...]:
        """The two activations that a tensor is a product of, contracted over something; () where it is no such."""
        node, at = self.nodes[key], _PRODUCTS.get(self.nodes[key].op)
        inputs = self.inputs(key)
        if at is not None and len(inputs) >= at + 2:
            pair = tuple(inputs[at : at + 2])
        elif node.op == "sum" and inputs and inputs[0] in self.nodes and self.nodes[inputs[0]].op == "mul":
            pair = tuple(self.inputs(inputs[0]))
            shapes = self.nodes[inputs[0]].shapes
            if len(pair) != 2 or shapes[0] == shapes[1]:  # squares for a norm; states are read by smaller tensors
                return ()
        else:
            return ()
        return pair if all(k in self.varies for k in pair) else ()

    @cached_property
    def products(self) -> dict[Key, tuple[Key, ...]]:
        found = {k: self.factors(k) for k in self.nodes}
        return {k: pair for k, pair in found.items() if pair}

    def kernels(self, kind: str) -> set[Key]:
        """Calls of kernels that say of themselves that they are of a kind."""
        return {
            k for k, node in self.nodes.items()
            if next((kind_ for kind_, words in _KERNELS.items() if any(w in node.op for w in words)), "") == kind
        }  # fmt: skip

    @cached_property
    def attention(self) -> set[Key]:
        """Kernels, and functions of scores that are not linear and weigh values."""
        found = self.kernels("attn")
        for pair in self.products.values():
            _, ends = self.back(pair, _MOVES | (_SUMS - {"sum", "cumsum"}))
            for bend in ends & set(self.nodes):
                if self.nodes[bend].op in _BENDS and self._of_scores(bend):
                    found.add(bend)
        return found

    def _of_scores(self, bend: Key) -> bool:
        """Whether a function is one of scores q.k: of a softmax, whether it is not one of a projection of a token."""
        _, ends = self.back(self.inputs(bend)[:1], _MOVES | _BENDS | (_SUMS - {"sum", "cumsum"}))
        if "softmax" in self.nodes[bend].op:
            return not ends or not all(self._projects(end) for end in ends if end in self.varies)
        return any(end in self.products for end in ends)

    def _projects(self, key: Key) -> bool:
        """Whether a tensor is the stream itself, or a product of it with weights."""
        node = self.nodes.get(key)
        return node is None or (
            (node.op in _PRODUCTS or "linear" in node.op or "convolution" in node.op or "norm" in node.op)
            and key not in self.products
        )

    # ---- what is carried from token to token
    @cached_property
    def behind(self) -> set[Key]:
        """What lies between attention and the write."""
        seen: set[Key] = set()
        used = {source for k in self.nodes for source in self.inputs(k)}
        todo = [k for k in self.nodes if k not in used]
        while todo:
            key = todo.pop()
            if key in seen or key in self.attention:
                continue
            seen.add(key)
            todo += self.inputs(key)
        return seen & set(self.nodes)

    def _made_from(self, keys: Iterable[Key]) -> set[Key]:
        seen: set[Key] = set()
        todo = list(keys)
        while todo:
            key = todo.pop()
            if key not in seen:
                seen.add(key)
                todo += self.inputs(key)
        return seen

    @cached_property
    def reads(self) -> set[Key]:
        """Products of two activations that are not those of attention: a state is written or read."""
        weighs = {
            k for k, pair in self.products.items()
            if self.attention & self.back(pair, _MOVES | (_SUMS - {"sum", "cumsum"}))[1]
        }  # fmt: skip
        return (set(self.products) & self.behind) - weighs

    @cached_property
    def stepped(self) -> bool:
        """Whether one step says, through exp, how much of a state is kept and, as a factor, how much is added."""
        through = _MOVES | _SUMS
        on_way: set[Key] = set()
        for k in self.behind:
            if self.nodes[k].op in ("exp", "exp2") and k in self.varies:
                way, ends = self.back(self.inputs(k), through)
                on_way |= way | {end for end in ends if end in self.nodes and self.nodes[end].op in _STEPS}
        steps: set[Key] = set()
        moved: set[Key] = set()
        for k in self.nodes:  # in order: what is made from a step alone is one
            if k in on_way and k in self.varies and (self.nodes[k].op in _STEPS or steps & set(self.inputs(k))):
                steps.add(k)
            elif self.nodes[k].op in _MOVES and self.inputs(k) and self.inputs(k)[0] in steps | moved:
                moved.add(k)
        known = steps | moved
        return any(
            self.nodes[k].op == "mul" and k not in known and len(set(pair)) == 2
            and any(a in known and b in self.varies and b not in known for a, b in (pair, pair[::-1]))
            for k in self.behind if len(pair := self.inputs(k)) == 2
        )  # fmt: skip

    @property
    def steps_along(self) -> bool:
        """Whether tokens are taken one by one, or summed up from the first on."""
        ops = [self.nodes[k].op for k in self.behind]
        return bool(_RUNNING & {*ops}) or sum(op in ("select", "unbind") for op in ops) >= self.reader.n_tokens - 1

    @property
    def decays(self) -> bool:
        return any(self.nodes[k].op in ("exp", "exp2") and k in self.varies for k in self.behind)

    def carried(self, bounded: bool) -> str:
        """What kind of state is carried from token to token; "" for none."""
        for kind in ("ssm", "linear_attn"):
            if self.kernels(kind) & self.behind:
                return kind
        if self.reads and (self.steps_along or self.stepped or not bounded):
            return "ssm" if self.stepped else "linear_attn"
        one_by_one = self.steps_along and not self.reads and not self.attention
        return "ssm" if one_by_one and (self.decays or not bounded) else ""

    def mixing(self, reach: int | None) -> Mixing:
        """The kind of the write; a state behind attention goes before it, beside it nothing does."""
        bounded = reach is not None and reach <= self.reader.n_tokens // 2
        carried = self.carried(bounded)
        if self.attention and carried:
            serial = self.attention & self._made_from(self.reads)
            return Mixing(carried if serial else "mixer", ("attn", carried))
        kind = "attn" if self.attention else carried
        if not kind:
            convolves = any(self.nodes[k].op.startswith("convolution") for k in self.behind)
            alone = not self.reads and not self.steps_along and not self._over_tokens()
            kind = "conv" if alone and (bounded or convolves) else "mixer"
        return Mixing(kind, (kind,))

    def _over_tokens(self) -> bool:
        """Whether weights or a transform go over all tokens."""
        return any(
            node.op.startswith("_fft") or (
                node.op in _PRODUCTS and k not in self.products
                and len(node.shapes) > _PRODUCTS[node.op]
                and node.shapes[_PRODUCTS[node.op]][-1] == self.reader.n_tokens
            )
            for k, node in self.nodes.items()
        )  # fmt: skip
