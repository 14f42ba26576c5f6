"""Attention between groups of tokens, under masks as without, against sums written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from massact.stats import Where
from massact.stats.attention_call import Attended
from massact.stats.shares import AttentionShares

H, T, E = 3, 12, 4
GROUPS = {"class": [0], "registers": [1, 2]}
PATCHES, MASSIVE = list(range(3, T)), {0: [5, 11], 1: [4]}


def near(width: int) -> np.ndarray:
    return np.array([[abs(t - k) < width for k in range(T)] for t in range(T)])


SIGHTS = {"all": np.ones((T, T), bool), "window": near(4), "halves": np.kron(np.eye(2), np.ones((6, 6))) > 0}


def call(seed: int, seen_TS: np.ndarray, logits: bool) -> tuple[Attended, np.ndarray]:
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(H, T, E, generator=rng) for _ in range(2))
    mask = torch.zeros(1, T, T).masked_fill(~torch.from_numpy(seen_TS), -math.inf)
    s = q @ k.mT + mask
    p = s.double().softmax(-1).numpy()
    if logits:
        return Attended(None, None, None, None, scores_HTS=s), p
    return Attended(q, k, None, None, mask_HTS=None if seen_TS.all() else mask), p


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("sight", SIGHTS)
def test_masses_of_groups(sight: str, logits: bool) -> None:
    """Mean over the queries of a group that can see a key of the other; a pair that no query can see has no row."""
    seen_TS, shares = SIGHTS[sight], AttentionShares(GROUPS, PATCHES, MASSIVE)
    wanted: dict[tuple[str, str], list[float]] = {}
    for image in MASSIVE:
        a, p = call(image, seen_TS, logits)
        other: Any = AttentionShares(GROUPS, PATCHES, MASSIVE)
        other.update(a, Where(image))
        shares.merge(other)
        groups = shares.groups_of(image)
        for query, rows in groups.items():
            for key, keys in groups.items():
                mine = [p[:, t, keys].sum(-1).mean() for t in rows if seen_TS[t, keys].any()]
                if mine:
                    wanted.setdefault((query, key), []).append(float(np.mean(mine)))
    got = {(query, key): (mass, n) for query, key, mass, n, _ in shares.result()}
    assert got.keys() == wanted.keys()
    for pair, masses in wanted.items():
        assert got[pair] == (pytest.approx(np.mean(masses), abs=1e-6), len(masses))
    if sight == "window":  # the registers and a massive patch at the end of the picture cannot see each other
        assert got["class", "registers"][0] > 0 and ("class", "massive") not in got
