"""What lies between the blocks of a stack: nothing, additions, or something else, which is said.

A block may give several tensors of the stream's shape, and a model may scale, normalise or add on the way to the next
block. Only the dataflow between the two tells what the stream is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from massact.anatomy.block_reader import BlockReader, Ends
from massact.records.anatomy import Block
from massact.records.errors import ProofError
from massact.trace.watch import Call, Key, Seen, Watch

_SCALES = {"mul", "div", "neg"}
_MOST = 3  # sites between two blocks that have names


def ends_of(watch: Watch, calls: Sequence[Call]) -> list[Ends]:
    """For every block call of a stack, which of its inputs and outputs run on to and from its neighbours."""
    taken = [_keys(watch, call.inputs) for call in calls]
    given = [_keys(watch, call.outputs) for call in calls]
    found = []
    for i in range(len(calls)):
        before, after = given[i - 1] if i else set(), taken[i + 1] if i + 1 < len(calls) else set()
        comes = {k for k in taken[i] if reached(watch, [k], before)}
        goes = reached(watch, after or _keys(watch, watch.calls[0].outputs), given[i])
        same = (taken[i] & before) | (given[i] & after)
        found.append(Ends(frozenset(comes), frozenset(goes), frozenset(same)))
    return found


def beside(watch: Watch, calls: Sequence[Call], blocks: Sequence[Block]) -> list[tuple[list[Call], list[Ends]]]:
    """Streams of other tokens that the blocks of a stack hand on beside it: text beside images, which attend to both.

    Returns:
        Of each the calls that hand it on, from the first block on, and which of their tensors it is.
    """
    stream = _seen(calls[0].inputs, blocks[0].places["resid_pre"].path)
    found = []
    for first in calls[0].inputs:
        if len(first.shape) != 3 or first.shape[::2] != stream.shape[::2] or first.shape[1] == stream.shape[1]:
            continue
        taken, chain, ends = first, list[Call](), list[Ends]()
        for call in calls:
            mine = next((s for s in call.inputs if watch.canon(s.key) == watch.canon(taken.key)), None)
            kept = _keys(watch, call.inputs)
            given = next((s for s in call.outputs if s.shape == first.shape and watch.canon(s.key) not in kept), None)
            if mine is None or given is None:
                break
            both = frozenset({watch.canon(mine.key)}), frozenset({watch.canon(given.key)})
            chain.append(call)
            ends.append(Ends(*both, both[0] | both[1]))
            taken = given
        if len(chain) > 1:
            found.append((chain, ends))
    return found


def _keys(watch: Watch, seen: Iterable[Seen]) -> set[Key]:
    return {watch.canon(s.key) for s in seen}


def reached(watch: Watch, made: Iterable[Key], sources: set[Key]) -> set[Key]:
    """Those of `sources` that some tensors were made from; the walk back ends at each of them."""
    found: set[Key] = set()
    seen: set[Key] = set()
    todo = list(made) if sources else []
    while todo:
        key = watch.canon(todo.pop())
        if key in seen:
            continue
        seen.add(key)
        if key in sources:
            found.add(key)
        elif key in watch.made:
            todo.extend(watch.made[key].inputs)
    return found


def joined(watch: Watch, calls: Sequence[Call], blocks: Sequence[Block], params: dict[int, str]) -> list[Block]:
    """The blocks of a stack, each with what happens to the stream on its way from the block before.

    Raises:
        ProofError: a block does not go on from what the one before gives.
    """
    found = list(blocks[:1])
    for before, call, giver, block in zip(calls, calls[1:], blocks, blocks[1:], strict=False):
        start = _seen(before.outputs, giver.places["resid_post"].path)
        end = _seen(call.inputs, block.places["resid_pre"].path)
        found.append(_Way(watch, before, call, params, (start, end)).read(giver, block))
    return found


def after_last(watch: Watch, call: Call, block: Block, params: dict[int, str]) -> str:
    """What happens to the stream behind the last block before a module or the output takes it; "" for nothing."""
    given = _seen(call.outputs, block.places["resid_post"].path)
    start = watch.canon(given.key)
    later = [c for c in watch.calls[watch.calls.index(call) + 1 :] if not c.inside(call)]
    borders = [c.inputs for c in later] + [c.outputs for c in watch.calls if call.inside(c)]
    if any(start in _keys(watch, border) for border in borders):
        return ""
    taken = next((s for border in borders for s in border if reached(watch, [s.key], {start})), None)
    if taken is None:
        return "nothing that the model gives is made from its stream"
    return f"the stream {_Way(watch, call, None, params, (given, taken)).words()}"


def other_streams(watch: Watch, calls: Sequence[Call], blocks: Sequence[Block]) -> int:
    """How many tensors of the stream's width blocks hand on besides it, made by the one and taken by the next.

    Of the same tokens (reversible blocks), or of others (images and text that attend to one another).
    """
    most = 0
    for before, call, block in zip(calls, calls[1:], blocks, strict=False):
        stream = _seen(before.outputs, block.places["resid_post"].path)
        alike = [s for s in before.outputs if len(s.shape) == len(stream.shape) and s.shape[::2] == stream.shape[::2]]
        made = _keys(watch, alike) - _keys(watch, before.inputs)
        most = max(most, len(reached(watch, _keys(watch, call.inputs), made) - {watch.canon(stream.key)}))
    return most


def has_skips(watch: Watch, calls: Sequence[Call]) -> bool:
    """Whether the output is made from what a block gives in a way that leads round the next block."""
    top = _keys(watch, watch.calls[0].outputs)
    for call, behind in zip(calls, calls[1:], strict=False):
        given, behind_given = _keys(watch, call.outputs), _keys(watch, behind.outputs)
        if reached(watch, top, given | behind_given) & (given - behind_given):
            return True
    return False


def _seen(border: Iterable[Seen], path: tuple[int | str, ...]) -> Seen:
    return next(s for s in border if s.path == path)


def other_shape(names: str, before: Sequence[int], after: Sequence[int], how: str = "") -> ProofError:
    """The refusal of a stream that has other tokens, another width or another number of streams from a block on.

    Args:
        names: of the blocks before and behind the change. how: what the stream goes through there, a sentence.
    """
    return ProofError(
        f"Between {names} the stream changes its shape, from {tuple(before)} to {tuple(after)}.",
        f"{how} Positions and dims would not name the same in all layers.".strip(),
        "In a model of your own put the blocks before it and behind it into two lists: each is then a stack of its "
        "own. A model that you cannot change so cannot be measured.",
    )


class _Way(BlockReader):
    """The way of the stream from what one block gives to what the next one takes."""

    def __init__(
        self, watch: Watch, before: Call, call: Call | None, params: dict[int, str], ends: tuple[Seen, Seen]
    ) -> None:
        ended = [c for c in watch.calls if call is None or not (call is c or call.inside(c) or c.inside(call))]
        self._look(watch, call or before, params, [c for c in ended if not before.inside(c)])
        self.start, self.end = ends
        self.before = before
        self.numel = math.prod(self.start.shape)
        self.tokens, self.n_tokens = -2, self.start.shape[-2]
        self._leads: dict[Key, bool] = {}

    def read(self, giver: Block, block: Block) -> Block:
        """The second block, with the sites and words of the way to it.

        Raises:
            ProofError: there is no such way, or other tokens arrive than set out.
        """
        start, end = self.canon(self.start.key), self.canon(self.end.key)
        if start == end:
            return block
        names = f"block {giver.module!r} (layer {giver.layer}) and block {block.module!r} (layer {block.layer})"
        if not reached(self.watch, [end], {start}):
            raise ProofError(
                f"The stream of {names} is not one.",
                f"What {block.module!r} takes in is not made from what {giver.module!r} gives.",
                "The children of the list do not run one after another, so they are no layers: "
                "give the list(s) of blocks with blocks='path'.",
            )
        if math.prod(self.end.shape) != self.numel:
            raise other_shape(names, self.start.shape, self.end.shape, f"It {self.words()}.")
        try:
            writes = [
                place
                for value in self._additions(start, end)
                for _, place in self.places_of_write(value.write, value.factor)
            ]
        except ProofError:
            writes = []
        if not 0 < len(writes) <= _MOST:
            return replace(block, changed=f"the stream {self.words()}")
        layout = block.places["resid_pre"].layout
        writes = [replace(place, layout=layout) for place in writes]
        sites = {f"between_out{f'_{i}' if i > 1 else ''}": place for i, place in enumerate(writes, 1)}
        return replace(block, places={**block.places, **sites}, between=tuple(sites))

    def _additions(self, start: Key, end: Key) -> list:
        """The additions on the way; [] where there is anything else on it."""
        values = self.stream()
        return [] if any(v.made_by == "norm" for v in values) else values[1:]

    def words(self) -> str:
        """What is done to the stream on the way: modules, then operations outside them."""
        start, end = self.canon(self.start.key), self.canon(self.end.key)
        on_way = self._on_way(start, end)
        modules = [
            c
            for c in self.inner
            if not self.before.inside(c)
            and c is not self.before
            and not c.inside(self.before)
            and any(self.canon(s.key) in on_way for s in c.outputs)
            and any(self.canon(s.key) in on_way | {start} for s in c.inputs)
        ]
        outer = [c for c in modules if not any(c.inside(d) for d in modules)]
        made = {self.canon(s.key) for c in outer for s in c.outputs}
        inside = {k for c in outer for s in c.outputs for k in self._on_way(start, self.canon(s.key))} | made
        ops = {self.watch.made[k].op for k in on_way - inside if k in self.watch.made}
        said = [f"goes through {c.name!r} ({type(c.module).__name__})" for c in outer]
        said += ["is scaled"] if ops & _SCALES else []
        said += ["has something added"] if ops & {"add", "sub"} else []
        rest = sorted(ops - _SCALES - {"add", "sub"})
        said += [f"goes through {', '.join(map(repr, rest))}"] if rest else []
        return " and ".join(dict.fromkeys(said)) or "is changed"

    def _on_way(self, start: Key, end: Key) -> set[Key]:
        """Every tensor that is made from `start` and that `end` is made from."""
        memo: dict[Key, bool] = {start: True}
        todo = [end]
        while todo:
            key = todo[-1]
            sources = [self.canon(k) for k in self.watch.made[key].inputs] if key in self.watch.made else []
            open_ = [k for k in sources if k not in memo and k != key]
            if key not in memo and open_:
                todo.extend(open_)
                continue
            memo.setdefault(key, any(memo.get(k, False) for k in sources))
            todo.pop()
        return {k for k, on in memo.items() if on and k != start}
