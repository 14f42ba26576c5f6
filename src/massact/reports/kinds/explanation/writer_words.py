"""Who writes what findings are made of, in English: a sentence or two for each coordinate, several streams at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reports.spelling import between, counted, listed, number, portion, real, signed, visible
from massact.reports.stack_words import called

MOST_COORDINATES = 4  # told one by one
SUPER = 0.5  # a weight that carries this share of a step up is named; with more than twice the step, others cancel it


def writers_in_words(e: Explanation, stacks: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Who writes each coordinate, and who takes it away: names of stacks, and what is said of them.

    Args:
        stacks: one, or the streams that the blocks carry: those which the same steps write are told together, with
            the least and the greatest of their numbers.
    """
    told: list[tuple[str, list[str]]] = []
    named: set[tuple[str, int, int]] = set()
    writers = e.writers[e.writers["stack"].isin(stacks)]
    groups = sorted(writers.groupby(["dim", "position_class"], sort=False), key=_size, reverse=True)
    for (dim, where), rows in groups[:MOST_COORDINATES]:
        alike: dict[Any, list[str]] = {}
        for stack, mine in rows.groupby("stack", sort=False):
            steps = mine.loc[mine["role"] != "", ["submodule", "layer", "role"]]
            alike.setdefault(tuple(steps.itertuples(index=False, name=None)), []).append(str(stack))
        for steps, having in alike.items():
            mine = rows[rows["stack"].isin(having)]
            said = _sentence(f"Dim {int(dim)} ({visible(where)}, {_tokens(mine)})", mine, steps)
            neurons = e.neurons[e.neurons["stack"].isin(having) & (e.neurons["rank"] == 1)]
            neurons = neurons[(neurons["dim"] == dim) & (neurons["position_class"] == where)]
            told.append((called(having), [said, *_neurons(neurons, int(dim), named)]))
    if len(groups) > MOST_COORDINATES:
        left = counted(len(groups) - MOST_COORDINATES, "more coordinate")
        told.append((called(list(dict.fromkeys(writers["stack"]))), [f"{left} in writers.parquet."]))
    return told


def _size(group: tuple[Any, pd.DataFrame]) -> tuple[int, float]:
    """Tokens of a coordinate, and its peak: that of most tokens is told first, of two as frequent the larger."""
    rows = group[1]
    return int(rows["n_tokens"].max()), real(rows["after"].abs().max()) if rows["after"].notna().any() else 0.0


def _tokens(rows: pd.DataFrame) -> str:
    numbers = [int(n) for n in rows["n_tokens"]]
    return f"{between(numbers, '{:,.0f}'.format)} token{'s' * (max(numbers) != 1)}"


def _sentence(name: str, rows: pd.DataFrame, steps: Sequence[tuple[str, int, str]]) -> str:
    """'Dim 5 (start, 4 tokens) is written by attn_out of layer 2 (+102 to +115, 93% to 98% of the peak); ...'."""
    of = {role: [_write(rows, *step) for step in steps if step[-1] == role] for role in ("up", "down")}
    up = f"is written by {listed(of['up'])}" if of["up"] else "is written in no single step of a quarter of its peak"
    down = f"taken away by {listed(of['down'])}" if of["down"] else "no single step takes a quarter of it away"
    return f"{name} {up}; {down}."


def _write(rows: pd.DataFrame, submodule: str, layer: int, role: str) -> str:
    mine = rows[(rows["submodule"] == submodule) & (rows["layer"] == layer) & (rows["role"] == role)]
    share = portion(list(mine["share"]), "the peak")
    return f"{visible(submodule)} of layer {layer} ({between(list(mine['write']), signed)}, {share})"


def _neurons(mine: pd.DataFrame, dim: int, named: set[tuple[str, int, int]]) -> list[str]:
    """What carries the steps up of one coordinate; a weight in `named` was told of another class of positions."""
    told = []
    for (_, expert, neuron), rows in mine.groupby(["module", "expert", "neuron"], sort=False):
        row = next(rows.itertuples())
        module, share = visible(row.module), portion(list(rows["share"]), "it")
        if expert >= 0:
            told.append(f"Of the routed experts of {module}, {expert} carries most: {share}.")
            continue
        if (module, dim, int(neuron)) in named:
            told.append(f"In {module} it is the same weight, [{dim}, {neuron}], with {share}.")
            continue
        named.add((module, dim, int(neuron)))
        shared = f"; neuron {neuron} leads {row.fan_out} coordinates of that layer" if row.fan_out > 1 else ""
        what = (
            f"one weight, [{dim}, {neuron}]{_known(' = {}', row.weight)}{_known(' (input {})', row.activation)}, "
            f"carries {share}: the place of a super weight (Yu 2024){shared}"
            if SUPER <= row.share <= 1 / SUPER
            else f"the leading neuron, {neuron}, carries {share}{shared}"
        )
        told.append(f"In {module} {what}.")
    return told


def _known(words: str, value: float) -> str:
    return "" if math.isnan(real(value)) else words.format(number(value))
