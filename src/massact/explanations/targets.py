"""Which tokens are looked at: all those with findings, as many random ordinary ones, and ordinary ones beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from massact.records.clusters import KEYS, passing
from massact.stats.heads import Targets

N_OTHERS = 32  # ordinary tokens of one sequence


def positions_of(rows: pd.DataFrame, n_sequences: int) -> dict[int, list[int]]:
    """Sequence -> positions of findings or near misses, at any layer."""
    known = rows[(rows.sequence >= 0) & (rows.pos >= 0) & (rows.sequence < n_sequences)]
    places = known[["sequence", "pos"]].drop_duplicates().sort_values(["sequence", "pos"])
    return {int(s): [int(p) for p in mine.pos] for s, mine in places.groupby("sequence")}


def main_findings(findings: pd.DataFrame, clusters: pd.DataFrame) -> pd.DataFrame:
    """The findings of the largest cluster of each stack and of those that are called as it is.

    Beside a massive activation of few tokens an outlier feature has findings on most tokens: these are no massive
    tokens, and without them little would be left of a sequence.
    """
    having = passing(clusters)
    mine = having[having["label"] == having.groupby("stack")["label"].transform("first")]
    return findings.merge(mine[KEYS].drop_duplicates(), on=KEYS)


def targets(
    found: Mapping[int, Sequence[int]], near: Mapping[int, Sequence[int]], kept: Sequence[Sequence[int]], seed: int
) -> Targets:
    """The tokens of every sequence.

    Random and other tokens are ordinary: no token with a finding or a near miss at any layer, nor the first one. The
    random ones are as many as those with findings, from the first half where it has as many (a key near the end is
    seen by few queries); a sequence with fewer ordinary tokens has none of them: fewer would be another null.

    Args:
        found: sequence -> positions with findings.
        near: sequence -> positions with near misses.
        kept: positions of every sequence that count, in order: no padding.
        seed: of the draw; a sequence's draw depends on nothing else.
    """
    random: dict[int, list[int]] = {}
    others: dict[int, list[int]] = {}
    for sequence, positions in enumerate(kept):
        mine = found.get(sequence, ())
        draw = np.random.default_rng((seed, sequence))
        taken = {*mine, *near.get(sequence, ())}
        free = [p for p in positions[1:] if p not in taken]
        early = [p for p in positions[1 : max(2, len(positions) // 2)] if p not in taken]
        if 0 < len(mine) <= len(free):
            pool = early if len(mine) <= len(early) else free
            random[sequence] = sorted(int(p) for p in draw.choice(pool, len(mine), replace=False))
        if free:
            others[sequence] = sorted(int(p) for p in draw.choice(free, min(N_OTHERS, len(free)), replace=False))
    return Targets(dict(found), random, others)


def counts(chosen: Targets, near: Mapping[int, Sequence[int]]) -> dict[str, int]:
    """How many tokens each group has, and in how many sequences: for the record of an explanation."""
    groups = {"findings": chosen.findings, "near_misses": near, "random": chosen.random, "others": chosen.others}
    tokens = {name: sum(map(len, of.values())) for name, of in groups.items()}
    return tokens | {f"{name}_sequences": sum(map(bool, of.values())) for name, of in groups.items()}


def reading_blocks(findings: pd.DataFrame, clusters: pd.DataFrame) -> set[tuple[str, int]]:
    """(stack, layer) of the blocks that read a hidden state with findings of the largest clusters.

    Those of the label of the largest one, from onset to offset: a stray finding or a hump in an early layer does
    not make the block behind it one that reads massive activations.
    """
    having = passing(clusters)
    mine = having[having["label"] == having.groupby("stack")["label"].transform("first")]
    both = findings[["stack", "layer"]].drop_duplicates().merge(mine[["stack", "onset", "offset"]], on="stack")
    inside = both[(both["layer"] >= both["onset"]) & (both["layer"] <= both["offset"])]
    return {(str(stack), int(layer) + 1) for stack, layer in inside[["stack", "layer"]].itertuples(index=False)}
