"""X1 to X3, beyond the paper: norm collapse, sinks beside the diagonal, and the spectrum of hidden states."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.records.kinds.reproduction import BEYOND
from massact.reproductions.claims import Claim, Part, averaged, bounded, untold
from massact.reproductions.entries import Entry, Finished, Nothing, Row, at, massive, row
from massact.reproductions.main_cluster import main, same_by_construction
from massact.stats.intervals import Interval

ALIKE = 0.9  # least cosine of two massive tokens behind a norm
SHRINKS = 5.0  # times: the effective rank without massive tokens over that of all
EXPLAINED = 0.05  # of p_1, more than its bound by one token
OLDER = "The explanation is older than this experiment: massact explain RUN writes it anew."


def _explained(f: Finished, table: str) -> Explanation:
    """The explanation, with rows in a table.

    Raises:
        Nothing: there are none, with the reason.
    """
    if f.explanation is None:
        raise Nothing("It was not explained.")
    massive(f.scan)
    if not len(getattr(f.explanation, table)):
        old = f.explanation.info.schema_version < 6
        raise Nothing(OLDER if old else "It is unavailable; the notes of the explanation say why.")
    return f.explanation


# ---- X1
def _first_norm(f: Finished) -> pd.Series:
    """The norm that reads the main massive activation first; of one block the first that lets it through."""
    c = main(f.scan)
    rows = at(_explained(f, "collapse").collapse, stack=c.stack, dim=c.dim, position_class=c.position_class)
    rows = rows[rows["layer"] > c.onset]
    if not len(rows):
        raise Nothing("No norm reads the main massive activation.")
    here = rows[rows["layer"] == rows["layer"].min()]
    on = here[here["role"] == "on"]
    return (on if len(on) else here).iloc[0]


def collapse(f: Finished) -> list[Row]:
    """X1: one-hot share, least cosine beside its bound, entry beside its bound, and the gain, of every norm."""
    rows, first = [], _first_norm(f)
    for r in _explained(f, "collapse").collapse.itertuples():
        line = partial(row, stack=str(r.stack), layer=int(r.layer), place=f"{r.norm}, dim {r.dim}, {r.position_class}")
        told = r.Index == first.name
        values = (
            ("one-hot share before the gain", r.onehot_before, "share"), ("one-hot share", r.onehot, "share"),
            ("least cosine", r.min_cosine, "cosine"), ("bound of the cosine", r.bound, "cosine"),
            ("least cosine of random tokens", r.min_cosine_random, "cosine"),
            ("greatest entry", r.entry, "|x|"), ("bound of the entry", r.entry_bound, "|x|"),
            ("rank of the gain", r.gain_rank, f"of {r.n_dims}"),
        )  # fmt: skip
        spoken = {"one-hot share", "least cosine", "bound of the cosine", "rank of the gain"}
        rows += [line(what, x, unit=unit, headline=told and what in spoken) for what, x, unit in values
                 if not math.isnan(x)]  # fmt: skip
    return rows


def collapsing(f: Finished) -> list[Part]:
    """Whether the first norm makes the massive tokens nearly one vector, and not just any tokens."""
    c, first = main(f.scan), _first_norm(f)
    n, why = int(first["n_sequences"]), same_by_construction(f.scan, c)
    least, random = float(first["min_cosine"]), float(first["min_cosine_random"])
    parts = []
    for name, value, edge in (("least cosine of two of them behind the norm", least, ALIKE),
                              ("more than of random tokens", least - random, 0.0)):  # fmt: skip
        if why:
            parts.append(untold(name, why, n=n, stack=c.stack))
        else:
            found = Interval(value, value, value)  # of all that were looked at: the least one has no interval
            parts.append(bounded(name, found, n, least=edge, unit="cosine", stack=c.stack))
    return parts


# ---- X2
def diagonal(f: Finished) -> list[Row]:
    """X2: attention on the massive tokens and on the own key, and what heads with a sink get from it."""
    e, rows = _explained(f, "axes"), []
    if e.axes["diagonal"].isna().all():
        raise Nothing(OLDER if e.info.schema_version < 6 else "The diagonal of attention is not seen.")
    for name, mine in (("that read them", e.axes[e.axes["after_onset"]]), ("others", e.axes[~e.axes["after_onset"]])):
        for what, column in (("massive tokens", "concentration"), ("the own key", "diagonal"),
                             ("the own key, uniform head", "diagonal_uniform")):  # fmt: skip
            if mine[column].notna().any():
                told = column != "diagonal_uniform"
                rows.append(
                    row(f"attention on {what}, layers {name}", mine[column].mean(), unit="share", headline=told)
                )
    kinds = e.heads.loc[e.heads["sink_type"] != "", "sink_type"].value_counts()
    rows += [
        row(f"heads with a sink at position 0: {name}", n, unit="count", headline=True) for name, n in kinds.items()
    ]
    for r in e.axes[e.axes["diagonal"].notna()].itertuples():
        rows.append(row("attention on the own key", r.diagonal, stack=str(r.stack), layer=r.layer, unit="share"))
    return rows


def parking(f: Finished) -> list[Part]:
    """Whether the blocks that read massive tokens look at these more than queries look at themselves."""
    c = main(f.scan)
    rows = at(_explained(f, "per_sequence").per_sequence, stack=c.stack)
    rows = rows[(rows["layer"] > c.onset) & (rows["layer"] <= c.offset + 1)]
    by = rows.groupby("sequence")[["concentration", "diagonal"]].mean()
    name = "attention on massive tokens, more than on the own key"
    if by["diagonal"].isna().all():
        return [untold(name, "The diagonal of attention is not seen.", stack=c.stack)]
    return [averaged(name, by["concentration"] - by["diagonal"], least=0.0, unit="share", stack=c.stack)]


# ---- X3
def _valley(f: Finished) -> tuple[pd.Series, pd.Series]:
    """The rows of all tokens and of those that are not massive, where the former have the least effective rank."""
    c = main(f.scan)
    rows = at(_explained(f, "spectrum").spectrum, stack=c.stack, scope="sequence")
    rows = rows[(rows["layer"] >= c.onset) & (rows["layer"] <= c.offset)]
    whole, without = (at(rows, tokens=t).set_index("layer") for t in ("all", "without"))
    known = whole["effective_rank"].dropna()
    if not len(known) or not len(without):
        raise Nothing("No spectrum is known where they are massive.")
    layer = known.astype(float).idxmin()
    return whole.loc[layer], without.loc[layer]


def spectrum(f: Finished) -> list[Row]:
    """X3: effective rank, p_1 with its bound, and anisotropy of every layer, for three sets of tokens and the null."""
    rows, least = [], _valley(f)[0]
    for r in _explained(f, "spectrum").spectrum.itertuples():
        if r.scope == "corpus":
            continue
        null = ", random directions" if r.scope == "null" else ""
        line = partial(row, stack=str(r.stack), layer=int(r.layer), place=f"{r.tokens}{null}")
        told = r.layer == least.name and r.scope == "sequence" and r.stack == least["stack"]
        values = (("effective rank", r.effective_rank, "directions"), ("p_1", r.p1, "share"),
                  ("bound of p_1", r.bound, "share"), ("anisotropy", r.anisotropy, "cosine"))  # fmt: skip
        spoken = {"effective rank"} | ({"p_1", "bound of p_1"} if r.tokens == "all" else set())
        rows += [line(what, x, unit=unit, headline=told and what in spoken) for what, x, unit in values
                 if not math.isnan(x)]  # fmt: skip
    return rows


def compressing(f: Finished) -> list[Part]:
    """Whether the effective rank is low where massive tokens are, and they alone make it so."""
    whole, without = _valley(f)
    n, stack = int(whole["n_sequences"]), str(whole["stack"])
    # The ends that are nearest to, and farthest from, one another: wider than an interval of the ratio.
    ratio = Interval(without["effective_rank"] / whole["effective_rank"],
                     without["effective_rank_low"] / whole["effective_rank_high"],
                     without["effective_rank_high"] / whole["effective_rank_low"])  # fmt: skip
    more = Interval(*(whole[name] - whole["bound"] for name in ("p1", "p1_low", "p1_high")))
    return [
        bounded("effective rank without them over that of all", ratio, n, least=SHRINKS, unit="times", stack=stack),
        bounded("p_1, more than its bound by one token", more, n, most=EXPLAINED, unit="share", stack=stack),
    ]


THEORY = (
    Entry("X1", BEYOND, "Norm collapse", "any", ("scan", "explain"),
          "One-hot share, least cosine with cos(theta_1 + theta_2), greatest entry with sqrt(D) |g|, rank of the gain.",
          "A norm makes massive tokens nearly one vector, whatever their magnitude.", collapse,
          Claim("Behind the first norm two of them have a cosine below 0.9, or below the least of random tokens.",
                collapsing), ("figures/collapse.png",)),
    Entry("X2", BEYOND, "Sink against diagonal", "any", ("scan", "explain"),
          "Attention on massive tokens and on a query's own key; value norms of sinks (no-op below 0.2).",
          "Heads with nothing to fetch look at a sink rather than at their own token.", diagonal,
          Claim("In the blocks that read them queries look at themselves more than at massive tokens.", parking),
          ("figures/attention_own.png",)),
    Entry("X3", BEYOND, "Compression valley", "any", ("scan", "explain"),
          "Effective rank, p_1 with (c + alpha) / (c + 1), anisotropy: all tokens, without massive ones, and centred.",
          "Low effective rank in the middle layers is the massive tokens: without them there is no valley.", spectrum,
          Claim("Without them the effective rank is less than 5 times as large, or p_1 is 0.05 above its bound.",
                compressing), ("figures/spectrum.png",)),
)  # fmt: skip
