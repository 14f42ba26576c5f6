"""What a token leaves in the state of a mixer that is no attention, and how it decays: by experiment, for any mixer.

A recurrent mixer has no attention to look at; what can be seen of its state is what a token changes later. With x what
a mixer reads and y what it adds to the stream, x_j is set to zero and all else is left as it is. Then

    influence of j at distance d = |y'_(j+d) - y_(j+d)| / root mean square over tokens of |y_t|.

All mixers of a stack are looked at in one pass: every row of a batch is one sequence, the first as it is, the second
once more (what differs between these two is noise), each other one with its own token set to zero; behind each block
every row is put back to what the first one is, so that no mixer sees what another made of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.models import Model
from massact.records.anatomy import Place, Stack
from massact.records.sites import mixes
from massact.records.tables import frame
from massact.trace import tapped
from massact.trace.hooks import AllSeen

N_SEQUENCES = 4
PER_CLASS = 4  # tokens of one class of one sequence
AT_ONCE = 4  # tokens of one pass
RANDOM = "random"

Token = tuple[int, str]  # position, class


@dataclass
class _Seen:
    """Influences of one mixer: (class, distance) -> one for each token; and what differs without any change."""

    influence: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    noise: float = 0.0


def other_mixers(stack: Stack) -> dict[tuple[int, str], tuple[Place, Place]]:
    """(layer, write) -> places of what it reads and adds, of every mixer of tokens that is no attention."""
    return {
        (block.layer, point): (block.places[source], place)
        for block in stack.blocks
        for point, place in block.places.items()
        if mixes(point) and not point.startswith("attn") and (source := point.replace("_out", "_in")) in block.places
    }


def chosen_tokens(
    findings: pd.DataFrame, text: Corpus, kept: Sequence[Sequence[int]], seed: int
) -> dict[int, list[Token]]:
    """sequence -> tokens to look at: the first one, delimiters, other ones with findings, random ordinary ones.

    Args:
        findings: of one stack; text: as that stack reads it.
        kept: positions of every sequence that count.
        seed: of the draw of random tokens, from the first half of a sequence where there is room.
    """
    found = findings[["sequence", "pos"]].drop_duplicates()
    chosen: dict[int, list[Token]] = {}
    for sequence, positions in enumerate(kept[:N_SEQUENCES]):
        if len(positions) < 2:
            continue
        massive = {int(p) for p in found.loc[found["sequence"] == sequence, "pos"]}
        classes: dict[str, list[int]] = {"start": [positions[0]], "delimiter": [], "other": [], RANDOM: []}
        for p in positions[1:]:
            delimits = text.position_class(sequence, p) == "delimiter"
            classes["delimiter" if delimits else "other" if p in massive else RANDOM].append(p)
        free = classes[RANDOM]
        early = [p for p in free if p < positions[len(positions) // 2]]
        pool = early if len(early) >= PER_CLASS else free
        drawn = np.random.default_rng((seed, sequence)).choice(pool, min(PER_CLASS, len(pool)), replace=False)
        classes[RANDOM] = sorted(int(p) for p in drawn)
        chosen[sequence] = [(p, kind) for kind, mine in classes.items() for p in mine[:PER_CLASS]]
    return chosen


def states_table(
    model: Model,
    corpus: Corpus,
    stack: Stack,
    tokens: Mapping[int, Sequence[Token]],
    kept: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[pd.DataFrame, list[str]]:
    """The table `states` of one stack, and notes on what could not be seen.

    Args:
        tokens: of `chosen_tokens`.
        kept: positions of every sequence that count.
    """
    mixers = other_mixers(stack)
    if not mixers:
        return frame("states"), []
    hidden = [key for key, pair in mixers.items() if any(place.formula is not None for place in pair)]
    notes = [f"The state of layer {layer} ({point}) is unavailable: it is no tensor of one place." for layer, point in
             hidden]  # fmt: skip
    mixers = {key: pair for key, pair in mixers.items() if key not in hidden}
    seen: dict[tuple[int, str], _Seen] = {key: _Seen() for key in mixers}
    for done, (sequence, mine) in enumerate(tokens.items()):
        progress(done, len(tokens))
        for i in range(0, len(mine), AT_ONCE):
            run = _Pass(model, stack, mixers, list(mine[i : i + AT_ONCE]), kept[sequence], seen)
            if not run.through(corpus, sequence):
                where = f" of stack {stack.name!r}" * bool(stack.name)
                why = "its rows are not the sequences of a batch"
                return frame("states"), [f"States{where} are unavailable: {why}."]
    progress(len(tokens), len(tokens))
    return frame("states", _rows(stack, mixers, seen)), notes


@dataclass
class _Pass:
    """One pass with some tokens of one sequence set to zero, each in its own row."""

    model: Model
    stack: Stack
    mixers: Mapping[tuple[int, str], tuple[Place, Place]]
    tokens: list[Token]
    kept: Sequence[int]
    seen: dict[tuple[int, str], _Seen]
    fits: bool = True

    def through(self, corpus: Corpus, sequence: int) -> bool:
        """Run it; whether every tensor has one row for each row of the batch."""
        batch = next(iter(corpus.batches(1, start=sequence)))
        n = 2 + len(self.tokens)
        inputs = {name: x.repeat_interleave(n, 0) if x.ndim else x for name, x in batch.inputs.items()}
        taps: dict[Place, Callable[[Tensor], Tensor | None]] = {}
        for block in self.stack.blocks:
            if block.places["resid_pre"].formula is None:
                taps[block.places["resid_pre"]] = self.as_first
        taps |= {read: self.without for read, _ in self.mixers.values()}
        looks = [(write, self.look(key)) for key, (_, write) in self.mixers.items()]
        places = [*taps, *(place for place, _ in looks)]
        with (
            torch.inference_mode(),
            tapped(self.model.module, [*taps.items(), *looks], stop=True) as state,
            suppress(AllSeen),
        ):
            state.begin()
            self.model.run(inputs, places=places)
        return self.fits

    def ok(self, h: Tensor) -> bool:
        self.fits &= h.ndim == 3 and h.shape[0] == 2 + len(self.tokens) and h.shape[1] > max(self.kept)
        return self.fits

    def as_first(self, h: Tensor) -> Tensor | None:
        return h[:1].expand_as(h).clone() if self.ok(h) else None

    def without(self, h: Tensor) -> Tensor | None:
        """What a mixer reads: the first row, of which each row has its own token set to zero."""
        if not self.ok(h):
            return None
        new = h[:1].expand_as(h).clone()
        for row, (pos, _) in enumerate(self.tokens, 2):
            new[row, pos] = 0
        return new

    def look(self, key: tuple[int, str]) -> Callable[[Tensor], None]:
        def see(y: Tensor) -> None:
            if not self.ok(y):
                return
            rows = torch.as_tensor(list(self.kept), device=y.device)
            y_RTD = y.detach().double()[:, rows]
            size = float(y_RTD[0].norm(dim=-1).square().mean().sqrt())
            change_RT = ((y_RTD - y_RTD[:1]).norm(dim=-1) / max(size, 1e-300)).cpu().numpy()
            seen, at = self.seen[key], {pos: i for i, pos in enumerate(self.kept)}
            seen.noise = max(seen.noise, float(change_RT[1].max()))
            for row, (pos, kind) in enumerate(self.tokens, 2):
                for d in distances(len(self.kept)):
                    if at[pos] + d < len(self.kept):
                        seen.influence[kind, d].append(float(change_RT[row, at[pos] + d]))

        return see


def distances(n_tokens: int) -> list[int]:
    """1, 2, 4, ... tokens later."""
    return [2**k for k in range(max(n_tokens - 1, 0).bit_length())]


def _rows(
    stack: Stack, mixers: Mapping[tuple[int, str], tuple[Place, Place]], seen: Mapping[tuple[int, str], _Seen]
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for (layer, point), one in seen.items():
        mean = {key: float(np.mean(values)) for key, values in one.influence.items()}

        def left(kind: str, d: int, mean: dict[tuple[str, int], float] = mean) -> float:
            first = mean.get((kind, 1), np.nan)
            return mean.get((kind, d), np.nan) / first if first > 0 else np.nan

        for kind, d in sorted(key for key in mean if key[0] != RANDOM):
            null = mean.get((RANDOM, d), np.nan)
            rows.append({
                "stack": stack.name, "layer": layer, "submodule": point, "module": mixers[layer, point][1].module,
                "position_class": kind, "distance": d, "influence": mean[kind, d], "influence_random": null,
                "ratio": mean[kind, d] / null if null > 0 else np.nan, "left": left(kind, d),
                "left_random": left(RANDOM, d), "noise": one.noise, "n_tokens": len(one.influence[kind, d]),
                "n_random": len(one.influence.get((RANDOM, d), ())),
            })  # fmt: skip
    return rows
