"""Inputs of the claims beyond the paper: for each verdict some that give it."""

from __future__ import annotations

from typing import Any

from massact.records.kinds.reproduction import FAILS, HOLDS, UNTOLD
from massact.reproductions.entries import Finished
from tests.reproductions.tables import DIM, L, explanation, planted


def norms(least: float = 0.99, random: float = 0.7, n: int = 8, **more: Any) -> Finished:
    """Two norms of the block that reads them first (3), of which the second switches the dim off; one before it."""
    row = {"dim": DIM, "position_class": "start", "onehot": 0.8, "min_cosine_random": random,
           "onehot_before": 0.98, "min_cosine": least, "bound": 0.5, "n_sequences": n,
           "n_dims": 32, "gain_rank": 30.0}  # fmt: skip
    rows = [row | {"layer": 3, "norm": "mlp_in", "role": "off", "onehot": 0.0, "min_cosine": 0.1},
            row | {"layer": 3, "norm": "attn_in", "role": "on"},
            row | {"layer": 2, "norm": "attn_in", "role": "", "onehot": 0.0}]  # fmt: skip
    return Finished(planted(n=n, **more), explanation(collapse=rows))


def looking(on_them: float, on_self: float, n: int = 8) -> Finished:
    """Attention of n sequences in the blocks that read them (3 to 11); the other way round in the others."""
    rows = [{"layer": layer, "sequence": s, "concentration": (on_them if 2 < layer <= 11 else on_self) + 0.001 * s,
             "diagonal": on_self if 2 < layer <= 11 else on_them}
            for layer in range(1, L + 1) for s in range(n)]  # fmt: skip
    axes = [{"layer": layer, "after_onset": 2 < layer <= 11, "concentration": on_them, "diagonal": on_self}
            for layer in range(1, L + 1)]  # fmt: skip
    heads = [{"layer": 3, "head": h, "sink_type": kind} for h, kind in enumerate(("nop", "nop", "between"))]
    return Finished(planted(n=n), explanation(per_sequence=rows, axes=axes, heads=heads))


def ranks(whole: float = 1.1, without: float = 15.0, p1: float = 0.99, bound: float = 0.985, n: int = 8) -> Finished:
    """Spectra whose valley is at layer 6; there is a lower one before the onset, which is none of theirs."""
    rows = []
    for layer in range(1, L + 1):
        for tokens, rank in (
            ("all", whole + abs(layer - 6) if layer > 1 else 1.0),
            ("without", without),
            ("centred", 60.0),
        ):
            rows.append({"layer": layer, "tokens": tokens, "scope": "sequence", "effective_rank": rank, "p1": p1,
                         "effective_rank_low": 0.95 * rank, "effective_rank_high": 1.05 * rank, "p1_low": p1 - 0.001,
                         "p1_high": p1 + 0.001, "bound": bound, "n_sequences": n})  # fmt: skip
    rows += [r | {"scope": "null"} for r in rows]
    return Finished(planted(n=n), explanation(spectrum=rows))


CASES: Any = {
    "X1": {HOLDS: [norms], FAILS: [lambda: norms(0.5, 0.3), lambda: norms(0.95, 0.97)],
           UNTOLD: [lambda: norms(n=3), lambda: norms(random=float("nan")), lambda: norms(spread=0.0),
                    lambda: norms(least=float("nan")),
                    lambda: Finished(planted()), lambda: Finished(planted(), explanation())]},
    "X2": {HOLDS: [lambda: looking(0.5, 0.05)], FAILS: [lambda: looking(0.05, 0.5)],
           UNTOLD: [lambda: looking(0.5, 0.5035), lambda: looking(0.5, 0.05, n=3), lambda: looking(0.5, float("nan")),
                    lambda: Finished(planted())]},
    "X3": {HOLDS: [ranks], FAILS: [lambda: ranks(whole=8.0), lambda: ranks(bound=0.8)],
           UNTOLD: [lambda: ranks(whole=3.0), lambda: ranks(n=3), lambda: ranks(whole=float("nan")),
                    lambda: Finished(planted())]},
}  # fmt: skip
