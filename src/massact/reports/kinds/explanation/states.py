"""What tokens leave in the states of mixers that are no attention, in words and as a section."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reports.kinds.scan.cluster_words import CLASSES
from massact.reports.parts import Section, Words, parts_of, table_of
from massact.reports.spelling import counted, number, portion, real, visible

HALF = 0.5
TITLE = "What a token changes in the outputs of mixers d tokens later, beside random tokens"


def half_after(rows: pd.DataFrame, column: str) -> float:
    """The first measured distance at which at most half is left of the influence at distance 1; Inf where it is not.

    Args:
        rows: of one mixer and class; column: left or left_random. NaN where nothing is known beyond distance 1.
    """
    known = rows[(rows["distance"] > 1) & rows[column].notna()].sort_values("distance")
    if not len(known):
        return math.nan
    gone = known.loc[known[column] <= HALF, "distance"]
    return float(gone.iloc[0]) if len(gone) else math.inf


def states_in_words(e: Explanation) -> list[str]:
    """A sentence for each class of tokens: where its influence is greatest beside random ones, and how it decays."""
    said = []
    for kind, mine in e.states.groupby("position_class", sort=False):
        near = mine[(mine["distance"] == 1) & mine["ratio"].notna()]
        if not len(near):
            said += _alone(str(kind), mine[(mine["distance"] == 1) & mine["influence"].notna()])
            continue
        top = near.loc[near["ratio"].astype(float).idxmax()]
        rows = mine[(mine["layer"] == top["layer"]) & (mine["submodule"] == top["submodule"])]
        typical = number(near["ratio"].astype(float).median())
        said.append(
            f"States: setting to zero what a mixer reads of the tokens {_where(str(kind))} changes what it adds one "
            f"token later {number(top['ratio'])} times as much as for random tokens at layer {int(top['layer'])} "
            f"({visible(top['submodule'])}), where it is most ({typical} times in the median of "
            f"{counted(len(near), 'mixer')}); {_decay(rows)}."
        )
    return said


def _alone(kind: str, near: pd.DataFrame) -> list[str]:
    """What is known where there is no random token to compare with, or the mixers pass nothing of it on."""
    if not len(near):
        return [f"States: what tokens {_where(kind)} leave in them is not known: no token follows these."]
    top = near.loc[near["influence"].astype(float).idxmax()]
    why = "no ordinary token is left to compare with" if not near["n_random"].any() else (
        "random tokens change nothing there")  # fmt: skip
    return [
        f"States: setting to zero what a mixer reads of the tokens {_where(kind)} changes what it adds one token later "
        f"by up to {portion([top['influence']], 'its size')} (layer {int(top['layer'])}, {visible(top['submodule'])}). "
        f"Whether that is much is not known: {why}."
    ]


def _where(kind: str) -> str:
    return "with findings elsewhere" if kind == "other" else CLASSES.get(kind, visible(kind))


def _decay(rows: pd.DataFrame) -> str:
    """'half of that is gone after 8 tokens (random tokens: 2)'."""
    mine, null = half_after(rows, "left"), half_after(rows, "left_random")
    if math.isnan(mine):
        return "how it decays is not known"
    far = int(rows["distance"].max())
    said = f"half of that is gone after {int(mine)} tokens" if math.isfinite(mine) else (
        f"more than half of that is left at every distance measured, up to {far} tokens")  # fmt: skip
    if math.isnan(real(null)):
        return said
    return said + f" (random tokens: {int(null) if math.isfinite(null) else f'more than {far}'})"


def left_in_states(e: Explanation) -> Section | None:
    """The state-space counterpart of attention on first tokens and delimiters."""
    if not len(e.states):
        return None
    return Section("states", "What tokens leave in states", parts_of(
        Words(states_in_words(e)),
        table_of("states", e.states[e.states["distance"] == 1], "One token later, by layer", shown_first=True),
        table_of("states", e.states, TITLE, most=600),
    ))  # fmt: skip
