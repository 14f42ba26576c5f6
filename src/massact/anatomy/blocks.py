"""The sites and equations of one block: its residual stream, what is written to it, and where each is seen.

A write is attention if it mixes tokens (a product contracted over token positions), an MLP if it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from massact.anatomy.block_reader import BlockReader, Ends, Value
from massact.anatomy.mixers import WORDS, Mixing, mixer_of, mixing_of
from massact.anatomy.projections import attention_projection, down_projection
from massact.records.anatomy import Block, Change, Place, Sum
from massact.records.errors import ProofError
from massact.trace.watch import Call, Key, Watch

NO_SUBLAYER = "the block has no such sublayer"
Reaches = Mapping[tuple[str, int], int]  # write (module, call) -> how many tokens away what it reads is felt
Tell = Callable[[Key, Place, set[Key]], Mixing]  # of a write, its place, and what ends the way back from it


def read_block(
    watch: Watch,
    call: Call,
    layer: int,
    params: dict[int, str],
    mixing: Reaches | None = None,
    ends: Ends | None = None,
) -> Block:
    """The anatomy of one block call.

    Args:
        watch: a watched forward pass.
        call: of the block.
        layer: its number, from 1.
        params: names of the model's parameters, by identity.
        mixing: what an experiment said about writes (module, call): how many tokens away they carry something, 0 where
            they mix none. Goes before what the dataflow says.
        ends: what runs on from block to block; None where it does not matter.

    Raises:
        ProofError: the residual stream cannot be followed through it.
    """
    reader = BlockReader(watch, call, params, ends)
    tell = partial(mixing_at, reader, mixing or {})
    try:
        return read_values(reader, reader.stream(), layer, tell)
    except ProofError as refused:
        return read_values(reader, reader.scaled_stream(refused), layer, tell)


def mixing_at(reader: BlockReader, mixing: Reaches, key: Key, place: Place, stop: set[Key]) -> Mixing:
    """What mixes the tokens of the write at a place; `mixing` is what an experiment said, see `read_block`."""
    return mixing_of(reader, key, stop, mixing.get((place.module, place.call)))


@dataclass
class Reading:
    """What is read of a block so far."""

    places: dict[str, Place]
    sums: list[Sum] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    mixers: list[str] = field(default_factory=list)

    def put(self, point: str, place: Place) -> str:
        """Note a place under a name that is free: `point`, or `point_2`, ... where there are several of a kind."""
        name = self.fresh(point)
        self.places[name] = place
        return name

    def fresh(self, point: str) -> str:
        return next(n for n in (point, *(f"{point}_{i}" for i in range(2, 99))) if n not in self.places)

    def block(self, layer: int, call: Call) -> Block:
        """The record of it."""
        sums, changes = tuple(self.sums), tuple(self.changes)
        mixer = mixer_of(self.mixers)
        return Block(layer, call.name, call.number, self.places, sums, self.unavailable, changes=changes, mixer=mixer)


def read_values(reader: BlockReader, values: list[Value], layer: int, tell: Tell, how: str = "scale") -> Block:
    """The sites and equations of a block along the values of its stream.

    Args:
        reader, values: of the block.
        layer: its number.
        tell: what mixes the tokens of a write.
        how: what is done to a stream that does not go into a sum as it is.

    Raises:
        ProofError: the last of them is not what the block gives, or a write passes no module.
    """
    call, first = reader.call, reader.place_of_value(values[0])
    assert first is not None  # what the block takes
    found = Reading({"resid_pre": first})
    points = {values[0].key: "resid_pre"} if layer == 1 else {}  # of others it is what the block before gives
    start, pending, normed_point = "resid_pre", list[str](), ""
    before = values[0]
    for i, value in enumerate(values[1:], 1):
        place = reader.place_of_value(value)
        if value.made_by == "norm":
            assert place is not None  # the output of a norm module
            once = i + 1 == len(values) or values[i + 1].made_by != "norm"
            point = found.fresh(normed_point if once and normed_point else "resid_normed")
            found.places[point] = place
            found.changes.append(Change(start, point, "norm"))
            start, before = point, value
            continue
        writes = list(reader.writes_of(value))
        names = place_writes(reader, [*values[: i + 1]], writes, found, tell, before)
        points |= {reader.canon(key): name for (key, _), name in zip(writes, names, strict=True)}
        pending += names
        if value.kept is not None:
            found.changes.append(Change(start, kept := found.put("resid_scaled", value.kept), how))
            start = kept
        normed = i + 1 < len(values) and values[i + 1].made_by == "norm"
        crosses = names[-1:] and names[-1].startswith("cross")
        last = all(v.made_by == "norm" for v in values[i + 1 :])
        normed_point = point = "resid_post" if last else "resid_cross" if crosses else "resid_mid"
        # A block with more than two sublayers has several middles: resid_mid, resid_mid_2, ...
        points[value.key] = end = found.fresh(f"{point}_prenorm" if normed else point)
        if place is not None:
            found.places[end] = place
            found.sums.append(Sum(start, tuple(pending), end))
            start, pending = end, []
        else:
            found.unavailable[end] = "the sum passes no module of its own (attention and MLP run in parallel)"
        before = value
    if start != "resid_post" or pending:
        raise reader.fail("The last sum of it is not what it gives back.")
    if "resid_mid" not in found.places:
        found.unavailable.setdefault(
            "resid_mid", "attention and MLP run in parallel, or the block has only one of them"
        )
    note_missing(found)
    return replace(found.block(layer, call), cuts=reader.cuts(points))


def note_missing(found: Reading) -> None:
    """Say which sublayers a block does not have."""
    for point, projected in (("attn_out", "o_in"), ("mlp_out", "mlp_act")):
        if point not in found.places:
            others = [WORDS[kind] for kind in found.mixers if kind != "attn"] if point == "attn_out" else []
            found.unavailable[point] = f"tokens are mixed by {' and '.join(others)}" if others else NO_SUBLAYER
            found.unavailable.setdefault(projected, found.unavailable[point])


def place_writes(
    reader: BlockReader,
    values: list[Value],
    writes: Iterable[tuple[Key, Place]],
    found: Reading,
    tell: Tell,
    before: Value,
) -> list[str]:
    """Name and place what is added to the stream at once, with what it reads; gives the names."""
    names = []
    for key, place in writes:
        if place.formula is not None and place.formula.write is None:
            names.append(found.put("bias_out", place))
            continue
        cone = reader.cone(key, {v.key for v in values})
        mixed = tell(key, place, {v.key for v in values})
        found.mixers += mixed.all
        name = found.put(f"{mixed.kind}_out", place)
        names.append(name)
        source = reader.sublayer_input(cone, reader.read_by(cone, values, before))
        if source is not None:
            found.places[name.replace("_out", "_in")] = source
        if mixed.kind == "mlp":
            read, why = down_projection(reader, place)
            _add_projection(read, name.replace("_out", "_act"), found, why)
        elif mixed.kind in ("attn", "cross_attn"):
            read, why = attention_projection(reader, place, {v.key for v in values})
            _add_projection(read, name.replace("attn_out", "o_in"), found, why)
    return names


def _add_projection(place: Place | None, name: str, found: Reading, why: str) -> None:
    """The site that a last projection reads, or why there is none."""
    if place is None:
        found.unavailable[name] = why
    else:
        found.places[name] = place
