"""An explanation in English: what was measured side by side, in the order of the paper. It never names a cause."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.records.rules import BROADCAST, NOP
from massact.reports.kinds.explanation.collapse import collapse_in_words
from massact.reports.kinds.explanation.spectrum import dark_in_words, spectrum_in_words
from massact.reports.kinds.explanation.states import states_in_words
from massact.reports.kinds.explanation.writer_words import writers_in_words
from massact.reports.kinds.scan.nouns import in_nouns
from massact.reports.spelling import (
    counted,
    listed,
    noted,
    number,
    numbered,
    percent,
    quoted,
    real,
    spanned,
    visible,
)
from massact.reports.stack_words import said_once, stream_sets

RANDOM = " (random tokens: {})"
UNIFORM = "; a head that looks at all alike would give {}"
CAUSES = "Measured side by side: none of these numbers says what causes what."


@in_nouns
def story_in_words(e: Explanation) -> list[str]:
    """Put an explanation into sentences, stack by stack.

    Args:
        e: fresh, or read from a run directory.
    Source: the questions of Sun 2024, Section 4; Gu 2025; Yu 2024; Kovaleva 2021; Cancedda 2024; Fesser 2026.
    """
    sets = stream_sets(e.info.model)
    streams = {name for of in sets.values() for name in of}
    stacks = list(dict.fromkeys([*e.heads["stack"], *e.norm_weights["stack"], *e.writers["stack"], *e.states["stack"],
                                *e.spectrum["stack"]]))  # fmt: skip
    several, told = len(stacks) > 1, list[tuple[str, list[str]]]()
    for stack in stacks:
        mine, name = _of(e, stack), str(stack) if several else ""
        told.append((name, [
            *_unseen(e, stack), *_concentration(mine), *_sinks(mine), *_trajectory(mine), *_bias(mine),
            *collapse_in_words(mine), *spectrum_in_words(mine), *dark_in_words(mine), *states_in_words(mine),
        ]))  # fmt: skip
        together = [[stack]] if stack not in streams else [s for s in sets.values() if stack == s[0]]
        told += [(who if several else "", said) for of in together for who, said in writers_in_words(e, of)]
        told.append((name, _weights(mine, stack)))
    return [*said_once(told), *noted(e.info.notes), CAUSES]


def _of(e: Explanation, stack: str) -> Explanation:
    tables = {
        name: table[table["stack"] == stack].reset_index(drop=True)
        for name, table in vars(e).items()
        if isinstance(table, pd.DataFrame)
    }
    return Explanation(e.info, **tables)


def _mean(table: pd.DataFrame, column: str) -> float:
    values = table[column].to_numpy(float)
    return float(np.nanmean(values)) if len(values) and not np.isnan(values).all() else math.nan


def _unseen(e: Explanation, stack: str) -> list[str]:
    """Which layers the sentences about attention are about, and which not."""
    layers = e.info.unseen_layers(stack)
    mine = e.heads[(e.heads["stack"] == stack) & (e.heads["kind"] == "attention")]
    if not layers or not len(mine):  # where nothing is said of attention, there is nothing to limit
        return []
    return [f"What is said of attention is about {_layers_of(mine)}, not about {spanned('layer', layers)}, where it "
            "could not be seen (the notes say why)."]  # fmt: skip


def _concentration(e: Explanation) -> list[str]:
    axes = e.axes
    if not len(axes):
        return []
    after, before = axes[axes["after_onset"]], axes[~axes["after_onset"]]
    if not len(after) or np.isnan(_mean(after, "concentration")):
        first = axes.loc[axes["concentration_first"].astype(float).idxmax()] if axes[
            "concentration_first"].notna().any() else None  # fmt: skip
        if first is None:
            return []
        return [
            "No block reads a hidden state with findings. Position 0 gets "
            f"{percent(_mean(axes, 'concentration_first'))} of the attention on average over layers, most in layer "
            f"{int(first['layer'])} "
            f"({percent(first['concentration_first'])})"
            f"{_beside(_mean(axes, 'concentration_first_uniform'), UNIFORM)}."
        ]
    told = [
        f"Attention: the tokens with findings get {percent(_mean(after, 'concentration'))} of it, on average over "
        f"heads, in the blocks that read them ({_layers_of(after)})"
        + (
            f", and {percent(_mean(before, 'concentration'))} in the others ({_layers_of(before)})"
            if not math.isnan(_mean(before, "concentration"))
            else ""
        )
        + _beside(_mean(after, "concentration_uniform"), UNIFORM)
        + _beside(_mean(after, "concentration_null"), "; as many random tokens get {}")
        + "."
    ]
    if not math.isnan(_mean(after, "concentration_first")):
        told.append(
            f"Position 0 gets {percent(_mean(after, 'concentration_first'))} of it in these blocks"
            f"{_beside(_mean(after, 'concentration_first_uniform'), UNIFORM)}."
        )
    told += [*_own_key(after), *_ordinary(e)]
    drain, norm = _mean(after, "value_drain"), _mean(after, "residual_norm")
    if not math.isnan(drain) or not math.isnan(norm):
        known = [(what, x) for what, x in (("value vectors", drain), ("hidden states", norm)) if not math.isnan(x)]
        said = [f"their {what}{'' if i else ' are'} {number(x)} times{'' if i else ' as long as those of other tokens'}"
                for i, (what, x) in enumerate(known)]  # fmt: skip
        told.append(f"In the same blocks {listed(said)}.")
    return told


def _own_key(after: pd.DataFrame) -> list[str]:
    """What a query gives to its own key where it could give it to a sink."""
    own = _mean(after, "diagonal")
    if math.isnan(own):
        return []
    return [f"A query gives {percent(own)} of it to its own key in these blocks"
            f"{_beside(_mean(after, 'diagonal_uniform'), UNIFORM)}."]  # fmt: skip


def _ordinary(e: Explanation) -> list[str]:
    """Where too few tokens are left that have neither findings nor near misses."""
    n = e.info.tokens.get(str(e.axes["stack"].iloc[0])) if isinstance(e.info.tokens, dict) else None
    if not isinstance(n, dict):
        return []
    found, random, others = (real(n.get(name)) for name in ("findings_sequences", "random_sequences", "others"))
    if others == 0:
        return ["No token behind position 0 is left that has neither a finding nor a near miss "
                f"({counted(int(real(n.get('findings', 0))), 'token')} with findings): there is no ordinary one to "
                "compare with."]  # fmt: skip
    if random < found:
        return [f"In {int(found - random):,} of {counted(int(found), 'sequence')} fewer ordinary tokens are left than "
                "there are with findings: random ones are not compared with there."]  # fmt: skip
    return []


def _layers_of(rows: pd.DataFrame) -> str:
    """'layer 3', 'layers 2-4, 6'."""
    return spanned("layer", [int(x) for x in rows["layer"]])


def _beside(value: float, words: str, spell: Callable[[float], str] = percent) -> str:
    """A number to compare with, where there is one."""
    return "" if math.isnan(real(value)) else words.format(spell(value))


def _sinks(e: Explanation) -> list[str]:
    heads = e.heads[e.heads["kind"] == "attention"]
    eps = real(e.info.config.get("eps"))
    told: list[str] = []
    if len(heads) and heads["sink_rate"].notna().any():
        always, known = int((heads["sink_rate"] > 0.5).sum()), int(heads["sink_rate"].notna().sum())
        told.append(
            f"{always:,} of {counted(known, 'head')} {'has' if always == 1 else 'have'} position 0 as a sink in "
            f"most sequences (alpha_0 > {'eps' if math.isnan(eps) else number(eps)}, over all queries, the one at "
            "position 0 among them; Gu 2025)."
        )
        later = e.sinks[(e.sinks["pos"] > 0) & (e.sinks["heads"] > 0)]
        if len(later):
            tokens = later.groupby(["token", "position_class"]).size().sort_values(ascending=False, kind="stable")
            named = [f"{quoted(t)} ({visible(c)}, {n:,})" for (t, c), n in tokens.items()]
            at = _layers_of(later)
            # Every token with findings has its row.
            some = bool((e.sinks["finding"] & (e.sinks["pos"] > 0)).any())
            on = (f"{percent(later['finding'].mean())} of them are on tokens with findings" if some else
                  "no token behind position 0 has findings")  # fmt: skip
            told.append(
                f"Secondary sinks, not at position 0 (a token that is a sink of at least one head counts once for each "
                f"layer): {len(later):,} at {at}, on {listed(named, 5)}; {on}."
            )
        else:
            told.append("No head has a sink at any later position that enough queries see.")
    told += _types(heads)
    slot = heads["slot_mass"].dropna() if len(heads) else heads
    if len(slot):
        told.append(f"Learned sinks take {percent(slot.mean())} of the attention, on average over heads.")
    return told


def _types(heads: pd.DataFrame) -> list[str]:
    """What heads with a sink at position 0 get from it (Fesser 2026)."""
    counts = heads.loc[heads["sink_type"].fillna("") != "", "sink_type"].value_counts()
    words = {"nop": f"no-op (its value norm is below {NOP:g} times that of others)",
             "broadcast": f"broadcast (at least {BROADCAST:g} times)", "between": "between the two"}  # fmt: skip
    kinds = [f"{counts[name]:,} {of}" for name, of in words.items() if counts.get(name, 0)]
    return (
        [f"Of {counted(int(counts.sum()), 'head')} with that sink, by what it gives: {listed(kinds)}."] if kinds else []
    )


def _trajectory(e: Explanation) -> list[str]:
    t = e.trajectory
    after = e.axes.loc[e.axes["after_onset"], "layer"]
    if not len(after) or not len(t):
        return []
    layer = int(after.min())
    here = t[t["layer"] == layer].set_index(["stage", "group"])
    parts = []
    for stage, name in (("hidden", "hidden state"), ("normed", "after the norm"), ("q", "q"), ("k", "k"), ("v", "v")):
        if (stage, "findings") in here.index and (stage, "others") in here.index:
            mine, rest = here.loc[(stage, "findings"), "cosine"], here.loc[(stage, "others"), "cosine"]
            if not math.isnan(real(mine)):
                parts.append(f"{name} {number(mine)}{_beside(rest, ' ({})', number)}")
    if not parts:
        return []
    said = [
        f"Likeness in layer {layer}, mean cosine of two tokens with findings, and in brackets of two others: "
        f"{', '.join(parts)}."
    ]
    if ("normed", "findings") in here.index and ("normed", "others") in here.index:
        mine, rest = here.loc[("normed", "findings")], here.loc[("normed", "others")]
        if math.isnan(real(mine["sparsity"])):
            said.append(
                "After the norm of that layer their sparsity is undefined: no entry is left, or one is not finite."
            )
        else:
            said.append(
                f"After the norm of that layer the tokens with findings have a sparsity of {number(mine['sparsity'])} "
                "(Hoyer's: 1 where one entry is all, less the more even they are"
                f"{_beside(rest['sparsity'], '; others {}', number)})"
                f"{_beside(mine['massive_share'], ', with {} of their squared norm in the massive dims')}"
                f"{_beside(rest['massive_share'], ' (others {})')}."
            )
    return said


def _bias(e: Explanation) -> list[str]:
    d = e.decomposition
    after = set(e.axes.loc[e.axes["after_onset"], "layer"])
    d = d[d["layer"].isin(after)]
    if not len(d):
        return []
    part = "projected" if d.loc[d["part"] == "projected", "energy_share"].notna().any() else "concat"
    where = "after W_O" if part == "projected" else "of the heads side by side"
    rows = d[d["part"] == part]
    rows = rows[rows["energy_share"].notna()]
    if not len(rows):
        return []
    told = [
        f"What these tokens add to the others ({where}, {_layers_of(rows)}, medians): it {_constant(rows)} and "
        f"{_energy(rows['energy_share'].median())}{_beside(rows['null_energy_share'].median(), RANDOM)}."
    ]
    if rows["between"].notna().any():
        told.append(
            f"Between sequences these updates have a mean cosine of {number(rows['between'].median())}"
            f"{_beside(rows['null_between'].median(), RANDOM, number)}."
        )
    if rows["residual_error"].notna().any():
        off = number(rows["residual_error"].max())
        told.append(f"These updates and what all other tokens add sum to the attention output within {off} of it.")
    return told


def _constant(rows: pd.DataFrame) -> str:
    """How alike the updates of two queries are; where no two are known, that: one alone is no constant."""
    cosine, spread = rows["cosine"].median(), rows["constancy"].median()
    if math.isnan(cosine) or math.isnan(spread):
        return "is of too few queries to say how it differs between them"
    null = _beside(rows["null_constancy"].median(), RANDOM)
    differs = f"differs between queries by {percent(spread)} of its mean{null}"
    return f"{differs}, has a mean cosine of {number(cosine)} between queries"


def _energy(share: float) -> str:
    """The updates' squared norm over that of the whole output: more than it where other tokens cancel a part."""
    if math.isnan(share):
        return "is an unavailable part of the energy of the attention output"
    if share <= 1:
        return f"makes up {percent(share)} of the energy of the attention output"
    return (f"has {number(share)} times the energy of the attention output, since what other tokens add cancels a part "
            "of it")  # fmt: skip


def _weights(e: Explanation, stack: str) -> list[str]:
    told = []
    w = e.norm_weights
    if len(w):
        outliers = sorted({int(d) for d in w.loc[w["outlier"], "dim"]})
        dims = sorted({int(d) for d in w.loc[w["finding"], "dim"]})
        both = sorted(set(outliers) & set(dims))
        rule = "beyond 3 standard deviations in at least half of the layers (Kovaleva 2021)"
        told.append(
            f"Norm weights {rule}: {numbered('dim', outliers)}"
            + (f"; of the dims of the findings, {numbered('dim', both) if both else 'none'}." if dims else ".")
            if outliers
            else f"No dim has norm weights {rule}."
        )
    s = e.info.spectrum.get(stack, {})
    if not math.isnan(real(s.get("findings"))) and not math.isnan(real(s.get("others"))):
        told.append(
            f"At layer {int(s['layer'])}, {percent(s['findings'])} of the mean state of the tokens with findings lies "
            f"in the weakest {percent(s['bottom'])} of the unembedding's directions (others: {percent(s['others'])})."
        )
    return told
