"""Blocks whose stream is no plain sum: scaled, normalised first, or several streams that are mixed.

Walking backwards from what a block gives, every stretch between two values of the stream that pass the border of a
module is one equation, `end = A(start) + sum of B_i(write_i)` (`terms.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from massact.anatomy.terms import NoTerms, Terms
from massact.records.anatomy import Place
from massact.trace.watch import Call, Key, Seen

if TYPE_CHECKING:
    from massact.anatomy.block_reader import BlockReader

Axes = tuple[int, int, int | None]


@dataclass(frozen=True)
class Stretch:
    """From one value of the stream that is seen to the next.

    Args:
        start, end: their keys and places.
        norm: a norm lies between, and nothing is added.
        kept: where what goes on of the stream is seen; None where it goes on as it is.
        writes: what is added: its key, and where it is seen.
    """

    start: Key
    end: Key
    norm: bool = False
    kept: Place | None = None
    writes: tuple[tuple[Key, Place], ...] = ()


class Stretches:
    """Reads the stretches of a block.

    Args:
        reader: of the block.
        start, end: what it takes and gives, of one shape.
        axes: which axes of these are batch, tokens and streams.
    """

    def __init__(self, reader: BlockReader, start: Seen, end: Seen, axes: Axes) -> None:
        self.reader, self.start, self.end, self.axes = reader, start, end, axes
        self.watch = reader.watch
        self.borders = _borders(reader)
        shape = start.shape
        named = {**reader.params, **{id(b): name for name, b in reader.watch.root.named_buffers()}}
        self.terms = Terms(self.watch, start.key, shape, axes, self.borders, named)
        self.terms.stream = {start.key}
        n = math.prod(shape) // (1 if axes[2] is None else shape[axes[2]])
        self.terms.writes = self._writes(shape[-1], n)
        given = self._norms()
        # Where nothing else leads back to the start, the stream goes through norms: what they give are values of it.
        self.normed: dict[Key, Key] = {}
        while not self.terms.leads(end.key):
            reached = [k for k in given if k not in self.normed and not self.terms.leads(k)]
            found = {k: given[k] for k in reached if self.terms.leads(given[k])}
            if not found:
                raise NoTerms(self.terms.obstacle(end.key))
            self.normed |= found
            self.terms.since(self.terms.stream | set(found))
        self.seen = {k for k in self.borders if self.watch.shape(k) == shape and k != start.key and self.terms.leads(k)}

    def _writes(self, D: int, n: int) -> set[Key]:
        """What modules inside give in the width of the stream, for most tokens; windows may overhang."""
        return {
            key
            for key, place in self.borders.items()
            if place.side == "out" and (s := self.watch.shape(key))[-1:] == (D,) and 2 * math.prod(s) > n
        }

    def _norms(self) -> dict[Key, Key]:
        """What norms give in the shape of the stream -> what they read."""
        found: dict[Key, Key] = {}
        for call in self.reader.inner:
            if call.inputs and call.outputs and self.reader.is_norm(call.module):
                given, read = call.outputs[0].key, call.inputs[0].key
                if self.watch.shape(given) == self.start.shape and given != read:
                    found[given] = read
        return found

    def read(self, part: tuple[int, int] | None = None) -> list[Stretch]:
        """All stretches from the start of the block to its end, of one of its streams.

        Raises:
            NoTerms: what stands in the way.
        """
        found: list[Stretch] = []
        key = self.end.key
        while key != self.start.key:
            if key in self.normed:
                found.append(Stretch(self.normed[key], key, norm=True))
                key = self.normed[key]
                continue
            stretch = self._stretch(key, part)
            if stretch.writes or stretch.kept is not None:
                found.append(stretch)
            elif found:  # the same values under another name: nothing happens between
                found[-1] = replace(found[-1], start=stretch.start)
            else:
                self.end = replace(self.end, key=stretch.start)
            key = stretch.start
        return found[::-1]

    def _stretch(self, end: Key, part: tuple[int, int] | None) -> Stretch:
        """The equation of one value of the stream: the nearest earlier value that alone it is made from."""
        order = {k: i for i, k in enumerate(self.watch.steps)}
        earlier = {k for k in self.seen if order.get(k, -1) < order.get(end, -1)}
        base = {self.start.key, *self.normed} - {end}
        ends = base | earlier
        while True:
            self.terms.since(ends)
            streams, writes, constant = self.terms.leaves(end)
            if len(streams) <= 1 or not set(streams) & earlier:
                break
            ends = ends - {max(set(streams) & earlier, key=lambda k: order.get(k, -1))}
        if len(streams) != 1:
            raise NoTerms(self.terms.obstacle(end) if not streams else "several sums of the stream meet in it")
        start = streams[0]
        kept = self.terms.formula(end, start, False, part)
        made = [(key, self._write(end, key, part)) for key in writes]
        if constant:
            formula = self.terms.formula(end, None, False, part)
            assert formula is not None
            made.append((end, replace(self.place(end), part=None, formula=formula)))
        self.terms.since(base)
        at = replace(self.place(start), part=None, formula=kept) if kept is not None else None
        return Stretch(start, end, False, at, tuple(made))

    def _write(self, end: Key, key: Key, part: tuple[int, int] | None) -> Place:
        place = self.borders[key]
        return replace(place, formula=self.terms.formula(end, key, True, part))

    def place(self, key: Key) -> Place:
        """Where a value of the stream is seen."""
        if key == self.start.key:
            return Place(self.reader.call.name, "in", self.start.path, self.reader.call.number)
        if key == self.end.key:
            return Place(self.reader.call.name, "out", self.end.path, self.reader.call.number)
        return self.borders[key]


def _borders(reader: BlockReader) -> dict[Key, Place]:
    """Where each tensor is seen inside a block: at the outermost module that gives it, else where one takes it."""
    found: dict[Key, Place] = {}
    own = {s.key for s in reader.call.inputs}
    for seen in reader.call.inputs:
        found.setdefault(seen.key, Place(reader.call.name, "in", seen.path, reader.call.number))
    for call in sorted(reader.inner, key=lambda c: c.depth):
        for seen in call.outputs:
            if seen.key not in own:
                found.setdefault(seen.key, Place(call.name, "out", seen.path, call.number))
    for call in reader.inner:
        for seen in call.inputs:
            found.setdefault(seen.key, Place(call.name, "in", seen.path, call.number))
    return found


def axes_of_streams(calls: Sequence[Call], shape: tuple[int, ...]) -> Axes | None:
    """Which axes of a tensor of several streams are batch, tokens and streams: told by what norms inside read."""
    inside: Counter[tuple[int, ...]] = Counter(
        s.shape
        for call in calls
        for s in (*call.inputs, *call.outputs)
        if len(s.shape) == 3 and s.shape[-1] == shape[-1]
    )
    for (b, t, _), _n in inside.most_common(3):
        for axes in ((0, 1, 2), (1, 2, 0)):
            if shape[axes[0]] == b and shape[axes[1]] == t and shape[axes[2]] > 1:
                return axes
    return None
