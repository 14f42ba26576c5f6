"""Blocks that carry several streams and read them together (hyper-connections, alternating updates).

Each stream becomes a stack of its own, whose equations are proved with the mixing matrices of the pass. What blocks
read of the streams together is one more stack, which has the sublayers, and no equations: nothing is added to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from massact.anatomy.block_reader import BlockReader
from massact.anatomy.blocks import Reaches, Reading, mixing_at, note_missing, place_writes, read_values
from massact.anatomy.mixers import Mixing
from massact.anatomy.passage import other_shape, reached
from massact.anatomy.stretches import Axes, Stretches, axes_of_streams
from massact.anatomy.terms import NoTerms
from massact.records.anatomy import Block, Place, Stack
from massact.records.errors import ProofError
from massact.trace.watch import Call, Key, Watch

COLLAPSED = "collapsed"  # the stack of what blocks read of all streams


class NoStreams(ProofError):
    """Tensors of four axes none of which holds streams: images that keep rows and columns apart, or windows."""


def read_streams(watch: Watch, calls: Sequence[Call], params: dict[int, str], path: str) -> SeveralStreams:
    """The streams of a list of blocks that take and give tensors of four axes.

    Raises:
        NoStreams: which axis holds the streams is not seen.
        ProofError: a block is not linear in them.
    """
    shape = next(
        s.shape for s in calls[0].inputs if len(s.shape) == 4 and s.shape in [o.shape for o in calls[0].outputs]
    )
    axes = axes_of_streams([c for c in watch.calls if c.inside(calls[0])], shape)
    if axes is None:
        raise NoStreams(
            f"The blocks in {path!r} take and give {shape} tensors, and are not understood.",
            "No module inside them takes a (batch, tokens, width) tensor that is a part of these.",
            "Images that keep rows and columns apart, or windows, are no streams: give others with blocks='path'.",
        )
    return SeveralStreams(watch, calls, params, axes)


def _as_read(kinds: Mapping[tuple[str, int], str], key: Key, place: Place, stop: set[Key]) -> Mixing:
    """What a write is called in the stack that reads the streams."""
    return Mixing(kinds[place.module, place.call])


class SeveralStreams:
    """The blocks of a stack of several streams.

    Args:
        watch, calls, params: a watched pass, the calls of the blocks in it, the names of the model's parameters.
        axes: which axes of what they take are batch, tokens and streams.
    """

    def __init__(self, watch: Watch, calls: Sequence[Call], params: dict[int, str], axes: Axes) -> None:
        self.watch, self.calls, self.axes = watch, calls, axes
        self.readers = [BlockReader(watch, call, params, ranks=(4,)) for call in calls]
        self.stretches = [self._stretches(reader) for reader in self.readers]
        for before, after in zip(self.readers, self.readers[1:], strict=False):
            if before.end.shape != after.start.shape:
                names = f"blocks {before.call.name!r} and {after.call.name!r}"
                raise other_shape(names, before.end.shape, after.start.shape)
            if before.canon(before.end.key) != after.canon(after.start.key):
                raise after.fail(f"It does not take the streams that {before.call.name!r} gives as they are.")
        shape = self.stretches[0].start.shape
        assert axes[2] is not None
        self.n, self.width = shape[axes[2]], shape[-1]
        self.token_shape = (shape[axes[0]], shape[axes[1]], shape[-1])
        for reader in self.readers:  # what sublayers read and write has one row for each token
            reader.numel, reader.n_tokens = shape[axes[0]] * shape[axes[1]] * shape[-1], shape[axes[1]]

    def _stretches(self, reader: BlockReader) -> Stretches:
        try:
            return Stretches(reader, reader.start, reader.end, self.axes)
        except NoTerms as error:
            raise self._refusal(reader, error) from error

    def _refusal(self, reader: BlockReader, error: NoTerms) -> ProofError:
        return reader.fail(f"What it gives is no sum of its {self.axes} streams and of what modules add: {error}.")

    def stream(self, k: int, read: Sequence[Block]) -> list[Block]:
        """The blocks of one stream: its values, and what is added to it, called as in the blocks that are read."""
        found = []
        for i, (reader, stretches) in enumerate(zip(self.readers, self.stretches, strict=True)):
            assert self.axes[2] is not None
            try:
                values = reader.values_of(stretches, (self.axes[2], k))
            except NoTerms as error:
                raise self._refusal(reader, error) from error
            kinds = {(p.module, p.call): n.partition("_out")[0] for n, p in read[i].places.items() if "_out" in n}
            block = read_values(reader, values, i + 1, partial(_as_read, kinds), "mix")
            places = {n: p for n, p in block.places.items() if n.startswith("resid") or "_out" in n}
            inside = [n for n in read[i].places if not n.startswith("resid") and "_out" not in n]
            why = "it is a site of the stack that reads the streams"
            found.append(replace(block, places=places, unavailable=dict.fromkeys(inside, why), mixer=read[i].mixer))
        return found

    def collapsed(self, mixing: Reaches) -> list[Block]:
        """The blocks of what sublayers read of all streams together."""
        found = []
        for i, (reader, stretches) in enumerate(zip(self.readers, self.stretches, strict=True)):
            reading = Reading({})
            before: Key | None = None
            for key, place in (w for s in stretches.read((self.axes[2] or 0, 0)) for w in s.writes):
                if place.formula is not None and place.formula.write is None:
                    continue  # a constant
                read = self._read_of(reader, stretches, key) or before
                if read is None:
                    raise reader.fail(f"What {place.module!r} adds is not made from one tensor of {self.token_shape}.")
                if read != before:
                    reading.put("resid_pre" if before is None else "resid_mid", stretches.borders[read])
                    before = read
                write, value = (key, replace(place, formula=None)), reader.value(read, stretches.borders[read])
                place_writes(reader, [value], (write,), reading, partial(mixing_at, reader, mixing), value)
            note_missing(reading)
            found.append(reading.block(i + 1, reader.call))
        after = [block.places["resid_pre"] for block in found[1:]] + [self._behind()]
        for block, place in zip(found, after, strict=True):
            block.places["resid_post"] = place
        return found

    def _read_of(self, reader: BlockReader, stretches: Stretches, write: Key) -> Key | None:
        """What a sublayer reads: the last tensor before it that it is made from alone, as a norm or module takes it."""
        canon, norms = self.watch.canon, [c for c in reader.inner if reader.is_norm(c.module)]
        of_norms = {s.key for c in norms for s in c.inputs}
        own = {s.key for c, _ in reader.makers.get(reader.canon(write), ()) for s in c.inputs}
        passed_over = {write, *own, *(s.key for c in norms for s in c.outputs)}
        order = {k: i for i, k in enumerate(self.watch.steps)}
        start = canon(stretches.start.key)
        taken = {s.key for c in reader.inner for s in c.inputs if s.shape == self.token_shape}
        for known in (taken - passed_over, taken & own - {s.key for c in norms for s in c.outputs}):
            good = [
                k
                for k in known & set(stretches.borders)
                if start not in reached(self.watch, [write], {canon(k), start})
                and reached(self.watch, [write], {canon(k)})
            ]
            if good:  # only where the norm is inside the module that writes, that takes it itself
                return max(good, key=lambda k: (k in of_norms, order.get(k, -1)))
        return None

    def _behind(self) -> Place:
        """What is read of the streams behind the last block: the first tensor that the output is made from alone."""
        end = self.watch.canon(self.stretches[-1].end.key)
        last = self.calls[-1]
        later = [c for c in self.watch.calls[self.watch.calls.index(last) + 1 :] if not c.inside(last)]
        top = [self.watch.canon(s.key) for s in self.watch.calls[0].outputs]
        for call in [*later, self.watch.calls[0]]:
            for side, seen in (("in", call.inputs if call.name else []), ("out", call.outputs)):
                for s in seen:
                    if s.shape != self.token_shape or not reached(self.watch, [s.key], {end}):
                        continue
                    if not reached(self.watch, top, {self.watch.canon(s.key), end}) & {end}:
                        return Place(call.name, side, s.path, call.number)
        raise ProofError(
            f"What the model makes of the streams of {last.name!r} is not seen.",
            "Behind the last block no module takes or gives a (batch, tokens, width) tensor that is made from them.",
            "Hand what is read of the streams at the end to a module (nn.Identity will do).",
        )

    def stacks(self, name: str, mixing: Reaches) -> list[Stack]:
        """One stack for each stream, then that of what blocks read of them together."""
        path, head = self.calls[0].name.rpartition(".")[0], f"{name}." if name else ""
        names = tuple(f"{head}stream_{k}" for k in range(self.n))
        read = self.collapsed(mixing)
        found = [
            Stack(n, path, tuple(self.stream(k, read)), self.width, stream_of=f"{head}{COLLAPSED}")
            for k, n in enumerate(names)
        ]
        return [*found, Stack(f"{head}{COLLAPSED}", path, tuple(read), self.width, streams=names)]
