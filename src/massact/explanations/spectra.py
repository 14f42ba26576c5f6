"""Singular values of the hidden states: how many directions they take up, with massive tokens and without.

Always three sets of tokens: all; without the massive ones; without these and with the mean taken off. A massive token
makes the first singular value by its length alone: what random directions of the same norms give stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from massact.records.anatomy import Stack
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats.gram import METRICS, SETS, GramResult
from massact.stats.intervals import UNKNOWN, mean_interval

WIDEST_BYTES = 1 << 28  # of the matrices of a corpus, of all layers of a stack


def too_wide(stack: Stack) -> str:
    """Why the sequences cannot also be seen as one matrix, D x D for every layer; empty where they can."""
    size = (stack.n_layers + 1) * stack.d_model**2 * 8
    if size <= WIDEST_BYTES:
        return ""
    of = f" of stack {stack.name!r}" * bool(stack.name)
    return (f"The spectrum{of} of all sequences as one matrix is not measured: its {stack.n_layers + 1:,} matrices "
            f"would take {size / 1e9:.1f} GB.")  # fmt: skip


def spectrum_table(
    measured: Mapping[Site, GramResult], found: Mapping[str, Mapping[int, Sequence[int]]]
) -> tuple[pd.DataFrame, list[str]]:
    """Rows of every layer: means over sequences, the corpus as one matrix, and the null; and what is unavailable.

    Args:
        found: stack -> sequence -> positions of the massive tokens. Of a stack without any, nothing can be left out:
            there are no rows `without`, and `centred` is of all tokens.
    """
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    for stack in dict.fromkeys(site.stack for site in measured):
        mine = {site: r for site, r in measured.items() if site.stack == stack}
        of = f" of stack {stack!r}" * bool(stack)
        if not any(np.isfinite(r.values).any() for r in mine.values()):
            notes.append(f"Spectra{of} are unavailable: a sequence has fewer than two tokens, or values that are not "
                         "finite.")  # fmt: skip
            continue
        some = bool(found.get(stack))
        for site, r in mine.items():
            rows += _layer_rows(site, r, some)
    return frame("spectrum", rows), notes


def _layer_rows(site: Site, r: GramResult, some: bool) -> list[dict[str, object]]:
    rows = []
    scopes = [("sequence", r.values), *([("corpus", _as_one(r.corpus))] if r.corpus is not None else []),
              ("null", r.null[~np.isnan(r.null).all((1, 2))])]  # fmt: skip
    for scope, values_NSM in scopes:
        for i, tokens in enumerate(SETS):
            if tokens == "without" and not some:
                continue
            of = dict(zip(METRICS, values_NSM[:, i].T, strict=True))
            known = {name: x[~np.isnan(x)] for name, x in of.items()}
            mean = {name: float(x.mean()) if len(x) else np.nan for name, x in known.items()}
            around = {name: mean_interval(known[name]) if scope == "sequence" and len(known[name]) > 1 else UNKNOWN
                      for name in ("p1", "effective_rank")}  # fmt: skip
            bound = r.bound[~np.isnan(r.bound).any(1)] if (scope, tokens) == ("sequence", "all") else np.zeros((0, 3))
            told = bound.mean(0) if len(bound) else np.full(3, np.nan)
            rows.append({
                "stack": site.stack, "layer": site.layer, "tokens": tokens, "scope": scope, **mean,
                "p1_low": around["p1"].low, "p1_high": around["p1"].high,
                "effective_rank_low": around["effective_rank"].low,
                "effective_rank_high": around["effective_rank"].high,
                "bound": told[0], "c": told[1], "alpha": told[2],
                "left_out": 0 if tokens == "all" or not some else int(r.left_out.sum()),
                "n_sequences": len(r.sequence) if scope == "corpus" else len(known["p1"]),
            })  # fmt: skip
    return rows


def _as_one(corpus_SM: np.ndarray) -> np.ndarray:
    """The numbers of a corpus as those of one sequence: pairs of tokens of all sequences have no mean cosine here."""
    return np.pad(corpus_SM, ((0, 0), (0, 1)), constant_values=np.nan)[None]
