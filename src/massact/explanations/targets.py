"""Which tokens are looked at: those with findings, as many random ones, and ordinary ones to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from massact.stats.heads import Targets

MOST_TOKENS = 8  # with findings, of one sequence: those with the greatest |h|
N_OTHERS = 32  # ordinary tokens of one sequence


def found_positions(findings: pd.DataFrame, n_sequences: int) -> dict[int, list[int]]:
    """Positions with findings of every sequence, at any layer, the greatest |h| first, at most `MOST_TOKENS`."""
    known = findings[(findings.sequence >= 0) & (findings.pos >= 0) & (findings.sequence < n_sequences)]
    greatest = known.groupby(["sequence", "pos"]).magnitude.max().sort_values(ascending=False, kind="stable")
    chosen: dict[int, list[int]] = {}
    for sequence, pos in greatest.index:
        here = chosen.setdefault(int(sequence), [])
        if len(here) < MOST_TOKENS:
            here.append(int(pos))
    return {s: sorted(p) for s, p in sorted(chosen.items())}


def targets(found: Mapping[int, Sequence[int]], lengths: Sequence[int], seed: int) -> Targets:
    """The tokens of every sequence.

    The random ones lie in the first half, as a key near the end is seen by few queries; a sequence without findings
    has none of them either.

    Args:
        found: sequence -> positions with findings.
        lengths: positions of every sequence.
        seed: of the draw; a sequence's draw depends on nothing else.
    """
    random: dict[int, list[int]] = {}
    others: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        mine = set(found.get(sequence, ()))
        draw = np.random.default_rng((seed, sequence))
        free = [p for p in range(1, length) if p not in mine]
        early = [p for p in free if p < max(2, length // 2)] or free
        n = min(len(mine), len(early))
        if n:
            random[sequence] = sorted(int(p) for p in draw.choice(early, n, replace=False))
        if free:
            others[sequence] = sorted(int(p) for p in draw.choice(free, min(N_OTHERS, len(free)), replace=False))
    return Targets(dict(found), random, others)
