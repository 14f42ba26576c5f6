"""The anatomy of a model: its stacks of blocks, and where in each block every site is seen.

Plain records, found by `discover` and proved by `prove`; nothing here runs a model.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from massact.records.errors import UserError, near
from massact.records.sites import POINTS, READER, Site, ranges, runs_of

TURNED = "(tokens, batch, width)"
GRID = "(batch, rows, columns, width)"
CHANNELS = "(batch, width, rows, columns)"
PIECES = "(batch x pieces, tokens, width)"
ONE_ROW = "(1, tokens of all sequences, width)"


@dataclass(frozen=True)
class Op:
    """One operation of a `Formula`.

    Args:
        name: such as "aten.mul.Tensor".
        args, kwargs: its arguments, nested tuples for lists; `Ref` for a tensor.
        index: which of its results is meant; None where it gives one.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    index: int | None = None


@dataclass(frozen=True)
class Ref:
    """The value number `of` of a `Formula`: first its leaves, then what its operations give."""

    of: int


@dataclass(frozen=True)
class Size:
    """A length among the arguments of an `Op` that changes with the input: of the axes "B", "T", or both ("BT").

    Args:
        axes: whose lengths; times: a number that they are multiplied by.
    """

    axes: str
    times: int = 1


@dataclass(frozen=True)
class Formula:
    """How a tensor that no module gives is made of tensors that can be seen, by the operations of the model itself.

    It is one term of the stream's equation: a leaf of the stream, or a write, times what it is scaled or mixed with.

    Args:
        leaves: places, and names of parameters or buffers.
        ops: in order; the last one gives the term.
        sizes: which leaf has the batch and the tokens, and on which of its axes.
        write: the leaf that a module adds; None for a term of the stream itself.
        words: what the term is times, as a reader would write it.
    """

    leaves: tuple[Place | str, ...]
    ops: tuple[Op, ...]
    sizes: tuple[int, int, int]
    write: int | None
    words: str


@dataclass(frozen=True)
class Place:
    """A tensor at the border of a module call.

    Args:
        module: dotted name inside the model ("" is the model itself).
        side: "in" (arguments) or "out" (return value).
        path: how to reach the tensor inside them; () is the value itself, a leading string a keyword.
        call: which call of that module in one forward pass (only shared modules have more than one).
        scale: factor between this tensor and the site (Granite-like residual multipliers), or the name
            of the parameter that multiplies it (a layer scale written inline).
        part: (axis, number) of one of several streams in that tensor.
        formula: how the site is made from this tensor and others of the pass, where a factor does not say it.
        layout: how the tensor lies where it is not (batch, tokens, width), which the site always is: `TURNED`;
            `GRID` and `CHANNELS`, whose tokens are counted row by row; `PIECES`, whose tokens are counted piece by
            piece (windows, frames); or `ONE_ROW`, which is seen as (tokens of all sequences, width).
        pieces: of a sequence, in `PIECES`.
    """

    module: str
    side: str
    path: tuple[int | str, ...] = ()
    call: int = 0
    scale: float | str = 1.0
    part: tuple[int, int] | None = None
    formula: Formula | None = None
    layout: str = ""
    pieces: int = 1

    def __str__(self) -> str:
        inside = "".join(f"[{step!r}]" for step in self.path)
        inside += f" stream {self.part[1]}" if self.part else ""
        nth = f" (call {self.call})" if self.call else ""
        factor = f" * {self.scale}" if self.scale != 1.0 else ""
        factor += f" * {self.formula.words}" if self.formula is not None else ""
        axes = f" {self.layout}" if self.layout else ""
        return f"{self.module or 'model'} {self.side}put{inside}{nth}{factor}{axes}"


@dataclass(frozen=True)
class AttentionPlace:
    """One attention call of a block.

    Args:
        module: dotted name of the innermost module that makes the call.
        number: which attention call of that module in one forward pass.
        via: how it is seen: "sdpa", "interface" (transformers' attention functions) or "softmax" (written out: no
            queries and keys, only logits).
        n_heads, n_kv_heads: H and K.
        forward: no query sees a key behind it.
        binary: the mask only hides keys, it adds no bias (ALiBi, relative positions); where queries and keys are seen.
        cross: the keys are another sequence.
        projection: what the output projection W_O reads, (B, T, H * F); None where it was not found.
        error: of the formula: greatest |P V - output| over max |output| on a short input.
        allowed: what of that rounding may explain: a mistake that changes the output by less is not seen.
        row_sum: mean sum of a row of P on a short input: below 1 with a learned sink.
        windows: of a call whose rows are windows of a sequence, where the rows of each window stand in it; () for a
            call with one row for each sequence.
    """

    module: str
    number: int
    via: str
    n_heads: int
    n_kv_heads: int
    forward: bool
    binary: bool
    cross: bool
    projection: Place | None = None
    error: float = 0.0
    allowed: float = 0.0
    row_sum: float = 1.0
    windows: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Sum:
    """One equation of a block: `start + sum(writes) = end`, all of them sites of that block."""

    start: str
    writes: tuple[str, ...]
    end: str


@dataclass(frozen=True)
class Change:
    """What happens to the stream where nothing is added to it, from one point to the next.

    Args:
        start, end: points of the block.
        how: "norm", "scale" (times constants, parameters or what the model computes) or "mix" (with other streams).
    """

    start: str
    end: str
    how: str


@dataclass(frozen=True)
class Block:
    """One block: its module, the place of every point, and the equations that must hold.

    Args:
        between: sites of this block that are added to the stream on its way from the block before:
            resid_post of that one + these = resid_pre of this one. With none the two are equal, bit by bit,
        changed: unless this says what else happens to the stream on that way.
        mixer: what mixes tokens in it: attention, ssm, linear_attn, conv, other, several with "+", or none.
        changes: norms, scales and mixings of the stream inside the block.
        cuts: points at which a clamp stands, with its lower and upper bound (NaN: not known). It cut nothing when the
            block was proved; where it does, less is added than what is written.
    """

    layer: int
    module: str
    call: int
    places: dict[str, Place]
    sums: tuple[Sum, ...]
    unavailable: dict[str, str] = field(default_factory=dict)
    between: tuple[str, ...] = ()
    changed: str = ""
    mixer: str = ""
    changes: tuple[Change, ...] = ()
    cuts: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """A row of blocks that share one residual stream.

    Args:
        name: "" when the model has one stack, else the word that tells it apart ("encoder", "vision_model").
        path: dotted path of the list of blocks.
        blocks: layers 1..L in the order they run.
        d_model: width of the residual stream.
        after: what happens to the stream behind the last block before a module or the output takes it; "" for nothing.
        skips: whether what a block gives is read by more than the next one (U-Net), so that no block can be left out
            when only the last of them is known.
        others: tensors of the stream's width that blocks hand on besides it (reversible blocks; images and text that
            attend to one another); they are not measured.
        streams: names of the stacks that hold the streams which this one is read from (hyper-connections): its hidden
            states are what each block reads of them together, and nothing is added to these.
        stream_of: name of the stack that reads this stream, of one of several.
    """

    name: str
    path: str
    blocks: tuple[Block, ...]
    d_model: int
    after: str = ""
    skips: bool = False
    others: int = 0
    streams: tuple[str, ...] = ()
    stream_of: str | None = None

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def other_mixers(self) -> dict[str, list[int]]:
        """What else than attention mixes tokens -> the layers in which it does."""
        found: dict[str, list[int]] = {}
        for block in self.blocks:
            others = [kind for kind in block.mixer.split("+") if kind not in ("", "attention", "none")]
            if others:
                found.setdefault("+".join(others), []).append(block.layer)
        return found

    @property
    def post_norm(self) -> bool:
        """Whether the blocks normalise after the addition (BERT), so that the sum is a site of its own."""
        return any("resid_post_prenorm" in b.places for b in self.blocks)

    def notes(self) -> list[str]:
        """What happens to the stream between its blocks and behind the last one, one sentence for each way."""
        ways: dict[str, list[str]] = {}
        for before, block in zip(self.blocks, self.blocks[1:], strict=False):
            if block.between:
                what = "modules between them add to the stream (sites between_out)"
            elif block.changed:
                what = f"{block.changed}, so that resid_pre of the one is not resid_post of the other"
            else:
                continue
            ways.setdefault(what, []).append(f"{before.layer} and {block.layer}")
        head = f"Stack {self.name!r}, between" if self.name else "Between"
        found = [f"{head} layers {'; '.join(where)}: {what}." for what, where in ways.items()]
        found += self._changes()
        if self.streams:
            found.append(
                f"The blocks of {self.path!r} carry {len(self.streams)} streams, stacks {self.streams[0]!r} to "
                f"{self.streams[-1]!r}. Hidden states of stack {self.name!r} are what blocks read of them together; "
                "nothing is added to these."
            )
        if self.others:
            measured = self.blocks[0].places["resid_post"]
            found.append(
                f"The blocks of {self.path!r} hand on {self.others + 1} streams of one width. Layers are {measured} "
                "and what goes on from it; of the other" + ("s" if self.others > 1 else "") + " nothing is measured."
            )
        if self.after:
            found.append(f"Behind the last layer of {self.path!r} {self.after}.")
        return found

    def _changes(self) -> list[str]:
        """How blocks change the stream itself, one sentence for each way."""
        layers: dict[str, list[int]] = {}
        by: dict[str, str] = {}
        for block in self.blocks:
            for change in block.changes:
                if change.end.startswith(("resid_normed", "resid_scaled")):
                    layers.setdefault(change.how, []).append(block.layer)
                    formula = block.places[change.end].formula
                    by.setdefault(change.how, f", the first time by {formula.words}" if formula is not None else "")

        def head(where: list[int]) -> str:
            word = "layer" if len(where) == 1 else "layers"
            return f"Stack {self.name!r}, {word} {ranges(where)}" if self.name else f"{word.title()} {ranges(where)}"

        told = [f"{head(where)}: the stream {_CHANGES[how]}{by[how]}." for how, where in layers.items()]
        cuts: dict[tuple[str, tuple[float, float]], list[int]] = {}
        for block in self.blocks:
            for cut in block.cuts.items():
                cuts.setdefault(cut, []).append(block.layer)
        for (point, bounds), where in cuts.items():
            limits = " to ".join("a bound that is computed" if x != x else f"{x:,.6g}" for x in bounds)
            told.append(
                f"{head(where)}: {point} is cut to {limits} (a clamp, which cut nothing when the model was "
                "proved): where it does, what is written is not what is added."
            )
        return told


_CHANGES = {
    "norm": "goes through a norm before anything is added to it (site resid_normed)",
    "scale": "is scaled where something is added to it (site resid_scaled)",
    "mix": "is mixed with other streams where something is added to it (site resid_scaled)",
}


@dataclass(frozen=True)
class Anatomy:
    """All stacks of a model, and the place of every site in it.

    Args:
        stacks: in the order they run.
        logits: where the language-model head gives its output, if there is one.
        left_out: lists of modules that look like blocks, are not named by the configuration and could not be
            read, each with the reason.
        attentions: attention calls, `layer.attention` and `layer.cross_attention`; empty until they are looked for
            (`massact.models.with_attention`).
        no_attention: where attention was looked for and cannot be seen, with the reason.
    """

    stacks: tuple[Stack, ...]
    logits: Place | None = None
    left_out: tuple[str, ...] = ()
    attentions: dict[Site, AttentionPlace] = field(default_factory=dict)
    no_attention: dict[Site, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Its stacks with their layers and width; those that are alike together."""
        alike: dict[tuple[int, int], list[str]] = {}
        for stack in self.stacks:
            alike.setdefault((len(stack.blocks), stack.d_model), []).append(stack.name)
        told = [f"{', '.join(runs_of(names))}: " * bool(any(names)) + f"{n} layers of width {width}"
                for (n, width), names in alike.items()]  # fmt: skip
        return f"Anatomy({'; '.join(told)})"

    @property
    def notes(self) -> list[str]:
        """What a reader of any number of this model must know: what was left out, what lies between blocks."""
        of: dict[str, list[str]] = {}  # what is the same of several streams is said once, with all their names
        for stack in self.stacks:
            head = f"Stack {stack.name!r}"
            for note in stack.notes():
                alike = stack.stream_of is not None and note.startswith(head)
                of.setdefault(note.removeprefix(head) if alike else note, []).extend([stack.name] * alike)
        told = [f"Stack{'s' * (len(names) > 1)} {', '.join(runs_of(names))}{note}" if names else note
                for note, names in of.items()]  # fmt: skip
        return [*self.left_out, *told]

    def stack(self, name: str) -> Stack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise UserError(f"The model has no stack {name!r}.", do=near(name, [s.name for s in self.stacks]))

    def together(self, name: str) -> tuple[str, ...]:
        """The stacks that hold one hidden state: of several streams all of them and what is read of them, else the one.

        The first is the one that has the sublayers.
        """
        stack = self.stack(self.stack(name).stream_of or name)
        return stack.name, *stack.streams

    def sites(self) -> dict[Site, Place]:
        """Every site that can be seen, with its place. Layer 0 is the input of the first block."""
        found: dict[Site, Place] = {}
        for stack in self.stacks:
            found[Site(stack.name, 0, "resid_post")] = stack.blocks[0].places["resid_pre"]
            for block in stack.blocks:
                for point in POINTS:
                    readers = [name for name in block.places if name.startswith(f"{point}{READER}")]
                    for name in (point, f"{point}_2", f"{point}_3", *readers):
                        if name in block.places:
                            found[Site(stack.name, block.layer, name)] = block.places[name]
        if self.logits is not None:
            found[Site("", 0, "logits")] = self.logits
        return found

    def unavailable(self) -> Iterator[tuple[Site, str]]:
        """Every site that the model does not offer, with the reason."""
        for stack in self.stacks:
            for block in stack.blocks:
                for point, reason in block.unavailable.items():
                    yield Site(stack.name, block.layer, point), reason

    def unseen_attention(self, stacks: Iterable[str]) -> list[str]:
        """Which layers' attention cannot be seen in some stacks, and why: a sentence for each reason.

        Nothing is said of one of several streams: sublayers, with their attention, are of the stack that reads these.
        """
        known = {(site.stack, site.layer) for site in self.attentions}
        mine = {stack.name for stack in self.stacks if stack.stream_of is None} & set(stacks)
        layers: dict[tuple[str, bool, str], list[tuple[int, str]]] = {}
        for site, reason in self.no_attention.items():
            if site.stack in mine:  # numbers that differ from layer to layer stand in brackets
                also = (site.stack, site.layer) in known
                layers.setdefault((site.stack, also, reason.partition(" (")[0]), []).append((site.layer, reason))
        told = []
        for (stack, also, _), found in layers.items():
            where = f"layer{'s' * (len({n for n, _ in found}) > 1)} {ranges(n for n, _ in found)}"
            where += f" of {stack}" * bool(stack)
            what = f"In {where} an attention call beside the measured one" if also else f"Attention of {where}"
            told.append(f"{what} could not be seen, and no number of attention counts "
                        f"{'it' if also or len(found) == 1 else 'them'}: {found[0][1]}.")  # fmt: skip
        return told

    def select_attention(self, pattern: str) -> dict[Site, AttentionPlace]:
        """The attention calls whose printed site matches a glob such as `*.attention`; {} if none does."""
        return {site: place for site, place in self.attentions.items() if _matches(site, pattern)}

    def select(self, pattern: str) -> dict[Site, Place]:
        """The sites whose printed name matches a glob such as `*.resid_post`, `3.mlp_*`, `encoder/*.attn_out`.

        In a model with several stacks a pattern without "/" means every stack.

        Raises:
            UserError: nothing matches; says which names are near, or why the site is unavailable.
        """
        sites = self.sites()
        chosen = {s: p for s, p in sites.items() if _matches(s, pattern)}
        if chosen:
            return chosen
        for site, reason in self.unavailable():
            if _matches(site, pattern):
                raise UserError(f"Site {pattern!r} is unavailable in this model.", f"{site}: {reason}.")
        raise UserError(f"No site matches {pattern!r}.", do=near(pattern, [str(s) for s in sites]))


def _matches(site: Site, pattern: str) -> bool:
    name = str(site)
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.split("/")[-1], pattern)
