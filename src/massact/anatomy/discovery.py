"""Find the anatomy of a model nobody has seen before, by watching one short forward pass.

`stacks` says which lists hold blocks, `blocks` reads each of them, `roles` checks by experiment which
writes carry something from token to token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from massact.anatomy.block_reader import Ends
from massact.anatomy.blocks import read_block
from massact.anatomy.passage import after_last, beside, ends_of, has_skips, joined, other_streams
from massact.anatomy.roles import TokensFirst, mixing_writes
from massact.anatomy.several_streams import NoStreams, read_streams
from massact.anatomy.stacks import (
    NO_BLOCKS,
    Listed,
    find_stacks,
    is_of_several,
    layer_counts,
    lists_inside,
    no_stack,
    stack_names,
    unnamed_lists,
)
from massact.records.anatomy import CHANNELS, GRID, TURNED, Anatomy, Block, Place, Stack
from massact.records.errors import MassactError, ProofError, UserError, class_and_line
from massact.records.sites import mixes
from massact.trace.watch import Call, Watch


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
    try:
        with watch.watching():
            model(**inputs)
    except Exception as error:
        run_example(model, inputs)
        raise ProofError(
            f"{type(model).__name__} runs, but not while every operation of it is watched.",
            class_and_line(error),
            "Take away what does not run under a dispatch mode (compiled or traced parts), then load it again.",
        ) from error
    counts = layer_counts(getattr(model, "config", None))
    candidates = find_stacks(watch, blocks, counts)
    params = {id(p): name for name, p in model.named_parameters()} | watch.brought
    found: list[tuple[str, Callable[[str], list[Stack]]]] = []
    refused: list[ProofError] = []
    unnamed = [] if blocks is not None else unnamed_lists(watch, candidates)
    left_out: list[str] = []
    tried: set[str] = set()
    lost: list[str] = []  # lists of a length that the configuration names, which could not be read

    def run() -> Any:
        return model(**inputs)

    def leave_out(path: str, calls: list[Call], error: ProofError) -> None:
        if blocks is not None:
            raise error
        refused.append(error)
        lost.extend([path] * (len(calls) in counts))
        left_out.append(f"{path} was left out. {error.what} {error.why}")

    while candidates:
        path, calls = candidates.pop(0)
        tried.add(path)
        if is_of_several(calls):
            try:
                found.append((path, _several(watch, path, calls, params, run)))
                continue
            except NoStreams as error:
                no_streams = error
            read = _rows_apart(watch, calls, params, run)
            if read is None:  # of the other lists, and of those inside it, some may be stacks
                if blocks is not None:
                    raise no_streams
                refused.append(no_streams)
                candidates = [c for c in find_stacks(watch, None, counts, tried) if c[0] not in tried]
                unnamed = unnamed_lists(watch, [*((p, []) for p, _ in found), *candidates])
                continue
        else:
            try:
                read = _read_stack(watch, calls, params, run)
            except ProofError as error:
                leave_out(path, calls, error)
                continue
        inside = lists_inside(watch, path) if blocks is None else []
        stages = any(map(_is_stage, read))
        if any(stages or all(map(_is_whole, theirs)) for theirs in _read_lists(watch, inside, params)):
            candidates = inside + candidates
            continue
        try:
            _check_few(read)
            pair = [(calls, joined(watch, calls, read, params))]
        except ProofError as error:
            leave_out(path, calls, error)
            continue
        for theirs, ends in beside(watch, calls, read):
            try:
                other = _read_stack(watch, theirs, params, run, ends)
                pair.append((theirs, joined(watch, theirs, other, params)))
            except ProofError as error:
                left_out.append(f"A second stream of {path} was left out. {error.what} {error.why}")
        found.append((path, partial(_together, watch, path, pair, params)))
    if refused and (not found or _size(model, lost) > _size(model, [path for path, _ in found]) / 2):
        raise refused[0]
    if not found:
        raise no_stack(watch)
    names = stack_names([path for path, _ in found])
    stacks = tuple(stack for name, (_, made) in zip(names, found, strict=True) for stack in made(name))
    return Anatomy(stacks, _logits_place(watch), tuple(unnamed + left_out))


def _size(model: nn.Module, paths: Iterable[str]) -> int:
    """How many parameters some lists of blocks hold: what holds many of those that are read is no part to leave out."""
    return sum(p.numel() for path in paths for p in model.get_submodule(path).parameters())


def _together(
    watch: Watch, path: str, pair: list[tuple[list[Call], list[Block]]], params: dict[int, str], name: str
) -> list[Stack]:
    """The stack of a list of blocks, and those of streams of other tokens beside it, called as the blocks take them."""
    stacks = []
    for calls, blocks in pair:
        after, skips = after_last(watch, calls[-1], blocks[-1], params), has_skips(watch, calls)
        others = max(0, other_streams(watch, calls, blocks) - len(pair) + 1)
        word = str(blocks[0].places["resid_pre"].path[0])
        word = f"input_{word}" if word.isdigit() else word
        own = name if len(pair) == 1 else ".".join(filter(None, (name, word)))
        width = _width(calls[0], blocks[0].places["resid_pre"])
        stacks.append(Stack(own, path, tuple(blocks), width, after, skips, others))
    return stacks


def _several(
    watch: Watch, path: str, calls: list[Call], params: dict[int, str], run: Callable[[], Any]
) -> Callable[[str], list[Stack]]:
    """The stacks of a list of blocks that hand on several streams."""
    several = read_streams(watch, calls, params, path)
    read = several.collapsed({})
    mixing = mixing_writes(watch.root, read, run, lambda place: [place])
    return lambda name: several.stacks(name, mixing)


def run_example(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run the model once on an example.

    Raises:
        UserError: it does not run on it; says what the model objected to.
    """
    try:
        return model(**inputs)
    except MassactError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" if isinstance(v, Tensor) else f"{k}={v}" for k, v in inputs.items())
        raise UserError(
            f"{type(model).__name__} does not run on the example input ({shapes or 'empty'}).",
            class_and_line(error),
            "Give one short example that it runs on: load(model, inputs={'name': tensor, ...}).",
        ) from error


def _read_stack(
    watch: Watch, calls: list[Call], params: dict[int, str], run: Callable[[], Any], given: list[Ends] | None = None
) -> list[Block]:
    """All blocks of a stack; read once more where the experiment and the dataflow do not agree on a write."""
    by_number = {(call.name, call.number): call for call in watch.calls}

    def same(place: Place) -> list[Place]:
        seen = by_number[place.module, place.call].inputs if place.side == "in" else []
        keys = {watch.canon(s.key) for s in seen if s.path == place.path}
        return [replace(place, path=s.path) for s in seen if watch.canon(s.key) in keys] or [place]

    ends = ends_of(watch, calls) if given is None else given

    def all_read(mixing: dict[tuple[str, int], int] | None = None) -> list[Block]:
        found = [read_block(watch, call, i + 1, params, mixing, ends[i]) for i, call in enumerate(calls)]
        return [_lying(b, e.layout, by_number) for b, e in zip(found, ends, strict=True)]

    read = all_read()
    try:
        mixing = mixing_writes(watch.root, read, run, same)
    except TokensFirst:
        ends = [replace(e, layout=TURNED) for e in ends]
        read = all_read()
        mixing = mixing_writes(watch.root, read, run, same)
    told = {(p.module, p.call): n for b in read for n, p in b.places.items() if "_out" in n}
    if any(
        mixes(told[write]) != bool(reach) or (reach and "attn" not in told[write]) for write, reach in mixing.items()
    ):
        read = all_read(mixing)
    return read


def _rows_apart(watch: Watch, calls: list[Call], params: dict[int, str], run: Callable[[], Any]) -> list[Block] | None:
    """All blocks of a stack of images that keep rows and columns apart; None where they cannot be read."""
    for layout in (GRID, CHANNELS):
        try:
            return _read_stack(watch, calls, params, run, [replace(e, layout=layout) for e in ends_of(watch, calls)])
        except ProofError:
            continue
    return None


def _lying(block: Block, layout: str, calls: Mapping[tuple[str, int], Call]) -> Block:
    """The same block, whose tensors lie otherwise than (batch, tokens, width): sites are them laid out so."""
    if not layout:
        return block

    def shape(place: Place) -> tuple[int, ...]:
        call = calls[place.module, place.call]
        return next(s.shape for s in (call.inputs if place.side == "in" else call.outputs) if s.path == place.path)

    stream = shape(block.places["resid_pre"])
    if layout == CHANNELS:  # inside, sublayers may see (batch, rows, columns, width)
        lie = {(stream[0], *stream[2:]): GRID, stream[:3]: CHANNELS}
    else:
        lie = {stream[:-1]: layout}
    mine = {n: layout if p.formula is not None else lie.get(shape(p)[:-1], "") for n, p in block.places.items()}
    return replace(block, places={n: replace(p, layout=mine[n]) for n, p in block.places.items()})


def _is_stage(block: Block) -> bool:
    """Whether a block attends and feeds forward more than once: a stage of a pyramid, which holds blocks."""
    return "mlp_out_2" in block.places and any(mixes(point) and point.endswith("_2") for point in block.places)


def _is_whole(block: Block) -> bool:
    """Whether it has attention and an MLP of its own."""
    return "mlp_out" in block.places and any(map(mixes, block.places))


def _read_lists(watch: Watch, lists: list[Listed], params: dict[int, str]) -> Iterator[list[Block]]:
    """The lists whose children add to a stream, as blocks: sublayers that stand in a list only write to it."""
    for _, calls in lists:
        with suppress(ProofError):
            yield [read_block(watch, call, i + 1, params) for i, call in enumerate(calls)]


def _check_few(blocks: list[Block]) -> None:
    for block in blocks:
        many = next((name for name in block.places if "_out" in name and name.endswith("_4")), None)
        if many is not None:
            raise ProofError(
                f"Block {block.module!r} is not understood.",
                f"It has more than three sublayers of one kind ({many}), so it is a stack of blocks rather than one.",
                NO_BLOCKS,
            )


def _width(call: Call, place: Place) -> int:
    shape = next(s.shape for s in call.inputs if s.path == place.path)
    return shape[1 if place.layout == CHANNELS else -1]


def _logits_place(watch: Watch) -> Place | None:
    head = getattr(watch.root, "get_output_embeddings", lambda: None)()
    top = watch.calls[0]
    if head is None:
        return None
    return next((Place("", "out", s.path) for s in top.outputs if s.path and s.path[-1] == "logits"), None)
