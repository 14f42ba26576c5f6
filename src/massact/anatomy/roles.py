"""Which writes mix tokens: turn some tokens round where a sublayer reads them, and look at the others.

The dataflow cannot tell in every case (a kernel of its own, a recurrence made of additions, as many tokens
as features), and it says nothing about which axis holds the tokens. The experiment says both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.anatomy import Block, Place
from massact.records.errors import ProofError
from massact.trace.conformance import BATCH_FIRST
from massact.trace.hooks import AllSeen, Tap, tapped

Write = tuple[str, int]  # (module, which call of it)
Same = Callable[[Place], list[Place]]


@dataclass
class _Trial:
    """One write under test: what its sublayer read and wrote as it was, and what changed when tokens were turned."""

    block: Block
    name: str
    stream_BTD: Tensor
    read: Tensor
    write: Tensor
    coarse: bool  # quantised as it runs, with one step for all tokens
    reach: int = 0
    sequences: bool = False
    broken: bool = False
    seen: list[Tensor] = field(default_factory=list)

    @property
    def place(self) -> Place:
        return raw(self.block.places[self.name])

    @property
    def source(self) -> Place:
        return self.block.places[_source(self.name)]

    def turned(self, turn_BT: Tensor) -> Tensor:
        """What the sublayer reads, some tokens turned round.

        Features are moved rather than negated: gated convolutions and linear attention keep products of two features,
        where signs cancel. Half of them are halved, for what reads only the norm or the mean of a token.
        """
        moved = self.read.reshape(self.stream_BTD.shape)
        other = moved.roll(1, dims=-1)
        other[..., ::2] *= 0.5
        return torch.where(turn_BT[..., None], other, moved).reshape(self.read.shape)

    def look(self, turn_BT: Tensor) -> None:
        """Note whether tokens that were not turned changed: in sequences with turned ones, in others."""
        still = self.write.reshape(self.stream_BTD.shape).double()
        change = (self.seen.pop().reshape(still.shape).double() - still).abs()
        if not bool(change.isfinite().all()):
            self.broken = True
            return
        eps = max(torch.finfo(h.dtype).eps for h in (self.read, self.write))
        # Rounding alone: experts see groups of other sizes when a token moves, and sum in another order.
        beyond = 0.02 if self.coarse else 32 * eps if eps < 1e-6 else 4 * eps
        changed_BT = change.amax(-1) > beyond * still.abs().amax(-1)
        if not self.coarse and eps >= 1e-6:  # a coarse dtype hides a small change of each; rounding hits few of them
            changed_BT |= (change > 0).double().mean(-1) > 0.05
        mixed = turn_BT.any(1, keepdim=True)
        if bool((changed_BT & mixed & ~turn_BT).any()):
            # How far is a matter of bits: what is carried far may have decayed below what rounding explains elsewhere.
            felt_BT = (change.amax(-1) > 0) & ~turn_BT
            self.reach = max(self.reach, 1, *(_distance(a, b) for a, b in zip(turn_BT, felt_BT, strict=True)))
        self.sequences |= bool((changed_BT & ~mixed).any())


def _distance(turn_T: Tensor, felt_T: Tensor) -> int:
    """How far from the one token that was turned the farthest lies that changed; 0 where several were turned."""
    if int(turn_T.sum()) != 1 or not bool(felt_T.any()):
        return 0
    return int((felt_T.nonzero() - turn_T.nonzero()).abs().max())


def mixing_writes(model: nn.Module, blocks: Iterable[Block], run: Callable[[], Any], same: Same) -> dict[Write, int]:
    """Find out by experiment which writes carry something from one token to another.

    One forward pass as it is, then a few in each of which every sublayer reads some tokens turned round, and what it
    writes is put back to what it was: every write of every block is tested, and none sees what another made of it.

    Args:
        model: the module.
        blocks: as the dataflow tells them.
        run: runs the model on one example; always the same one.
        same: every argument of the same call that is the tensor at a place (query, key and value, say).

    Returns:
        For the writes where the experiment could be made: how many tokens away what they read is felt; 0 where they
        mix no tokens. Told by turning the first token alone, and the last one.

    Raises:
        TokensFirst: a write mixes sequences of the batch and not tokens, so the first axis is that of tokens.
    """
    trials = _trials(model, list(blocks), run)
    shapes = {t.stream_BTD.shape[:2] for t in trials}
    for shape in sorted(shapes):
        mine = [t for t in trials if t.stream_BTD.shape[:2] == shape]
        for turn_BT in _turns(mine[0].stream_BTD):
            _try_all(model, run, same, mine, turn_BT)
            for trial in mine:
                # of rows of one token nothing else can be felt than other rows
                alone = trial.coarse or not any(t.reach for t in mine)  # else rows that attend to one another
                if trial.sequences and not trial.reach and turn_BT.shape[1] > 1 and alone:
                    raise _first_axis(trial)
        far = [t for t in mine if t.reach and not t.name.startswith("attn")]  # of attention it tells nothing
        for turn_BT in _ends(mine[0].stream_BTD) if far else ():
            _try_all(model, run, same, far, turn_BT)
    found: dict[Write, int] = {}
    for t in trials:
        if t.reach or (not t.broken and t.stream_BTD.shape[1] > 1):
            write = t.place.module, t.place.call
            found[write] = max(t.reach, found.get(write, 0))  # one that is added twice is put back before it is seen
    return found


class TokensFirst(ProofError):
    """A write mixes the entries of the first axis and none of the second: (tokens, batch, width)."""


def _first_axis(trial: _Trial) -> ProofError:
    if trial.coarse:
        return ProofError(
            f"{trial.name} of block {trial.block.module!r} changes with the other sequences beside it.",
            "Activations of this model are quantised with one step for the whole batch.",
            "Quantise with a step for each token, or the weights alone; or load the model as it was before that.",
        )
    return TokensFirst(
        f"{trial.name} of block {trial.block.module!r} mixes the entries of the first axis, and none of the second: "
        f"its {tuple(trial.stream_BTD.shape)} tensors are (tokens, batch, width).",
        "massact counts positions along the second axis, so every position it reported would be wrong.",
        BATCH_FIRST,
    )


def raw(place: Place) -> Place:
    """What a module gives, before it is scaled or mixed with what else passes."""
    return replace(place, formula=None) if place.formula is not None and place.formula.write is not None else place


def _source(name: str) -> str:
    return name.replace("_out", "_in")


def _trials(model: nn.Module, blocks: Sequence[Block], run: Callable[[], Any]) -> list[_Trial]:
    """Every write that can be tested, with what passes its places as the model is."""
    tests = [(b, n) for b in blocks for n in b.places if "_out" in n and _source(n) in b.places]
    places = {p for b, n in tests for p in (b.places["resid_pre"], b.places[_source(n)], raw(b.places[n]))}
    seen: dict[Place, Tensor] = {}

    def keep(place: Place) -> Tap:
        return lambda h: seen.__setitem__(place, h.detach().clone())

    _run(model, run, [(place, keep(place)) for place in places])
    quantised = {b.module: _quantised(model.get_submodule(b.module)) for b, _ in tests}
    found = []
    for block, name in tests:
        parts = [
            seen.get(p) for p in (*(block.places[n] for n in ("resid_pre", _source(name))), raw(block.places[name]))
        ]
        if any(part is None for part in parts):
            continue
        stream, read, write = (part for part in parts if part is not None)
        alike = stream.ndim in (2, 3) and stream.numel() == write.numel() == read.numel()
        if alike and bool(write.any()):  # nothing can be seen of a write that is zero
            stream = stream[None] if stream.ndim == 2 else stream
            found.append(_Trial(block, name, stream, read, write, quantised[block.module]))
    return found


def _quantised(block: nn.Module) -> bool:
    """Whether a block holds weights that are packed, so that its activations may be quantised with one step for all."""
    if any(callable(getattr(m, "weight", None)) for m in block.modules()):  # torch.ao
        return True
    weights = [*block.named_parameters(), *block.named_buffers()]
    return any(
        "weight" in name and t.ndim > 1 and (not t.is_floating_point() or type(t.data) is not Tensor)
        for name, t in weights
    )


def _turns(stream_BTD: Tensor) -> Iterator[Tensor]:
    """Which tokens to turn (B, T), in each pass: of any two tokens each is turned once while the other is not.

    First every second token of the first sequence only, so that the others tell whether sequences are mixed.
    """
    n_sequences, n_tokens = stream_BTD.shape[:2]
    pos_T = torch.arange(n_tokens, device=stream_BTD.device)
    first = torch.zeros(n_sequences, n_tokens, dtype=torch.bool, device=stream_BTD.device)
    first[0] = pos_T % 2 == 0
    yield first
    for bit in range(max(n_tokens - 1, 0).bit_length()):
        on_T = (pos_T >> bit) % 2 == 1
        if n_sequences > 1:
            yield torch.stack([on_T if i % 2 == 0 else ~on_T for i in range(n_sequences)])
        else:
            yield from (on_T[None], ~on_T[None])


def _ends(stream_BTD: Tensor) -> Iterator[Tensor]:
    """The first token alone, and the last one, which tell how far something is carried (B, T)."""
    n_sequences, n_tokens = stream_BTD.shape[:2]
    pos_T = torch.arange(n_tokens, device=stream_BTD.device)
    for pos in {0, n_tokens - 1} if n_tokens > 2 else ():
        yield (pos_T == pos)[None].expand(n_sequences, -1)


def _try_all(model: nn.Module, run: Callable[[], Any], same: Same, trials: Sequence[_Trial], turn_BT: Tensor) -> None:
    """All at once; where the model objects to such a tensor, each write for itself."""
    if not _tried(model, run, same, trials, turn_BT):
        for trial in trials:
            _tried(model, run, same, [trial], turn_BT)


def _tried(model: nn.Module, run: Callable[[], Any], same: Same, trials: Sequence[_Trial], turn_BT: Tensor) -> bool:
    """One pass with tokens turned in what some writes read; False where the model objects to such a tensor."""
    taps: dict[Place, Tap] = {}

    def put(tensor: Tensor) -> Tap:
        return lambda h: tensor.clone() if h.numel() == tensor.numel() else None  # cloned: it may be written in place

    def see(trial: _Trial) -> Tap:
        def look(h: Tensor) -> Tensor | None:
            trial.seen.append(h.detach().clone())
            undone = trial.place.scale == 1.0 and trial.place.formula is None  # a scale of 0 cannot be
            return trial.write.clone() if undone else None

        return look

    for trial in trials:
        for place in same(trial.source):
            taps[place] = put(trial.turned(turn_BT))
    for trial in trials:
        taps[trial.place] = see(trial)
        before = trial.block.places["resid_pre"]
        taps.setdefault(before, put(trial.stream_BTD))
    try:
        _run(model, run, list(taps.items()))
    except Exception:
        for trial in trials:
            trial.seen.clear()
            trial.broken = trial.broken or len(trials) == 1
        return False
    for trial in trials:
        if trial.seen:
            trial.look(turn_BT)
    return True


def _run(model: nn.Module, run: Callable[[], Any], taps: list[tuple[Place, Tap]]) -> None:
    """One forward pass with taps, up to the last of them."""
    try:
        with torch.no_grad(), tapped(model, taps, stop=True) as state:
            state.begin()
            run()
    except AllSeen:
        pass
