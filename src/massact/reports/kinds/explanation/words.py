"""An explanation in English: what was measured side by side, in the order of the paper. It never names a cause."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reports.kinds.explanation.states import states_in_words
from massact.reports.spelling import (
    counted,
    listed,
    noted,
    number,
    numbered,
    percent,
    quoted,
    real,
    signed,
    spanned,
    visible,
)

MOST_COORDINATES = 4  # told one by one
RANDOM = " (random tokens: {})"
UNIFORM = "; a head that looks at all alike would give {}"
SUPER = 0.5  # a weight that carries this share of a step up is named; with more than twice the step, others cancel it
CAUSES = "Measured side by side: none of these numbers says what causes what."


def story_in_words(e: Explanation) -> list[str]:
    """Put an explanation into sentences, stack by stack.

    Args:
        e: fresh, or read from a run directory.
    Source: the questions of Sun 2024, Section 4; Gu 2025; Yu 2024; Kovaleva 2021; Cancedda 2024.
    """
    stacks = list(dict.fromkeys([*e.heads["stack"], *e.norm_weights["stack"], *e.writers["stack"], *e.states["stack"]]))
    said: list[str] = []
    for stack in stacks:
        mine = _of(e, stack)
        sentences = [
            *_unseen(e, stack), *_concentration(mine), *_sinks(mine), *_trajectory(mine), *_bias(mine),
            *states_in_words(mine), *_writers(mine), *_weights(mine, stack),
        ]  # fmt: skip
        said += [f"{visible(stack)}: {s}" if stack and len(stacks) > 1 else s for s in sentences]
    return [*said, *noted(e.info.notes), CAUSES]


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
    """Which layers the sentences about attention are not about."""
    layers = e.info.unseen_layers(stack)
    if not layers:
        return []
    rest = counted(e.heads.loc[(e.heads["stack"] == stack) & (e.heads["kind"] == "attention"), "layer"].nunique(),
                   "other layer")  # fmt: skip
    return [f"What is said of attention is about {rest}, not about {spanned('layer', layers)}, where it "
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
            if len(before)
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
    told += _ordinary(e)
    drain, norm = _mean(after, "value_drain"), _mean(after, "residual_norm")
    if not math.isnan(drain) or not math.isnan(norm):
        known = [(what, x) for what, x in (("value vectors", drain), ("hidden states", norm)) if not math.isnan(x)]
        said = [f"their {what}{'' if i else ' are'} {number(x)} times{'' if i else ' as long as those of other tokens'}"
                for i, (what, x) in enumerate(known)]  # fmt: skip
        told.append(f"In the same blocks {listed(said)}.")
    return told


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
        always = int((heads["sink_rate"] > 0.5).sum())
        told.append(
            f"{always:,} of {counted(len(heads), 'head')} {'has' if always == 1 else 'have'} position 0 as a sink in "
            f"most sequences (alpha_0 > {number(eps)}, over all queries, the one at position 0 among them; Gu 2025)."
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
    slot = heads["slot_mass"].dropna() if len(heads) else heads
    if len(slot):
        told.append(f"Learned sinks take {percent(slot.mean())} of the attention, on average over heads.")
    return told


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
                f"{_beside(rest['sparsity'], '; others {}', number)}), with {percent(mine['massive_share'])} of their "
                f"squared norm in the massive dims{_beside(rest['massive_share'], ' (others {})')}."
            )
    return said


def _bias(e: Explanation) -> list[str]:
    d = e.decomposition
    after = set(e.axes.loc[e.axes["after_onset"], "layer"])
    d = d[d["layer"].isin(after)]
    if not len(d):
        return []
    part = "projected" if d.loc[d["part"] == "projected", "constancy"].notna().any() else "concat"
    where = "after W_O" if part == "projected" else "of the heads side by side"
    rows = d[d["part"] == part]
    rows = rows[rows["constancy"].notna()]
    if not len(rows):
        return []
    spread, null = rows["constancy"].median(), rows["null_constancy"].median()
    told = [
        f"What these tokens add to the others ({where}, {_layers_of(rows)}, medians): it "
        f"differs between queries by {percent(spread)} of its mean{_beside(null, RANDOM)}, has a mean cosine "
        f"of {number(rows['cosine'].median())} between queries and makes up {percent(rows['energy_share'].median())} "
        f"of the energy of the attention output{_beside(rows['null_energy_share'].median(), RANDOM)}."
    ]
    if rows["between"].notna().any():
        told.append(
            f"Between sequences these updates have a mean cosine of {number(rows['between'].median())}"
            f"{_beside(rows['null_between'].median(), RANDOM, number)}."
        )
    off = number(rows["residual_error"].max())
    told.append(f"These updates and what all other tokens add sum to the attention output within {off} of it.")
    return told


def _writers(e: Explanation) -> list[str]:
    told: list[str] = []
    named: set[tuple[str, int, int]] = set()
    groups = sorted(e.writers.groupby(["dim", "position_class"], sort=False), key=_size, reverse=True)
    for (dim, where), rows in groups[:MOST_COORDINATES]:
        ups = [_write(r) for r in rows[rows["role"] == "up"].itertuples()]
        downs = [_write(r) for r in rows[rows["role"] == "down"].itertuples()]
        name = f"Dim {int(dim)} ({visible(where)}, {counted(int(rows['n_tokens'].iloc[0]), 'token')})"
        up = f"is written by {listed(ups)}" if ups else "is written in no single step of a quarter of its peak"
        down = f"taken away by {listed(downs)}" if downs else "no single step takes a quarter of it away"
        told.append(f"{name} {up}; {down}.")
        told += _neurons(e, int(dim), str(where), named)
    if len(groups) > MOST_COORDINATES:
        told.append(f"{counted(len(groups) - MOST_COORDINATES, 'more coordinate')} in writers.parquet.")
    return told


def _size(group: tuple[Any, pd.DataFrame]) -> tuple[int, float]:
    """Tokens of a coordinate, and its peak: that of most tokens is told first, of two as frequent the larger."""
    rows = group[1]
    return int(rows["n_tokens"].iloc[0]), real(rows["after"].abs().max()) if rows["after"].notna().any() else 0.0


def _write(row: Any) -> str:
    share = f"{percent(row.share)} of the peak"
    return f"{row.submodule} of layer {row.layer} ({signed(row.write)}, {share})"


def _neurons(e: Explanation, dim: int, where: str, named: set[tuple[str, int, int]]) -> list[str]:
    """What carries the steps up of one coordinate; a weight in `named` was told of another class of positions."""
    told = []
    mine = e.neurons[(e.neurons["dim"] == dim) & (e.neurons["position_class"] == where) & (e.neurons["rank"] == 1)]
    for row in mine.itertuples():
        module = visible(row.module)
        if row.expert >= 0:
            told.append(f"Of the routed experts of {module}, {row.expert} carries most: {percent(row.share)} of it.")
            continue
        if (module, dim, int(row.neuron)) in named:
            told.append(f"In {module} it is the same weight, [{dim}, {row.neuron}], with {percent(row.share)} of it.")
            continue
        named.add((module, dim, int(row.neuron)))
        leads = f"neuron {row.neuron} leads {row.fan_out} coordinates of that layer"
        shared = f"; {leads}" if row.fan_out > 1 else ""
        what = (
            f"one weight, [{dim}, {row.neuron}] = {number(row.weight)} (input {number(row.activation)}), carries "
            f"{percent(row.share)} of it: the place of a super weight (Yu 2024){shared}"
            if SUPER <= row.share <= 1 / SUPER
            else f"the leading neuron, {row.neuron}, carries {percent(row.share)} of it{shared}"
        )
        told.append(f"In {module} {what}.")
    return told


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
            + (f"; of the dims of the findings, {numbered('dim', both)}." if dims else ".")
        )
    s = e.info.spectrum.get(stack, {})
    if "findings" in s and "others" in s:
        told.append(
            f"At layer {int(s['layer'])}, {percent(s['findings'])} of the mean state of the tokens with findings lies "
            f"in the weakest {percent(s['bottom'])} of the unembedding's directions (others: {percent(s['others'])})."
        )
    return told
