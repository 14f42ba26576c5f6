"""Clusters against planted ones of every label: found, named, with their layers, class, size and constancy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from massact.records.clusters import HUMP, MASSIVE, OUTLIER, clusters_table
from massact.records.rules import RATIO
from massact.records.tables import columns_of, frame

N, T, MEDIAN = 8, 64, 1.0  # sequences, tokens of each, median |h|


def rows(
    dim: int,
    where: str,
    layers: range | list[int],
    size: float,
    at: list[int],
    sequences: Any = range(N),
    spread: float = 0.0,
) -> list[dict[str, Any]]:
    """Entries of one size at some positions of some sequences, at every layer; every second one smaller by `spread`."""
    return [
        {"layer": layer, "sequence": s, "pos": p, "dim": dim, "value": (size if s % 2 else size * (1 - spread)),
         "position_class": where, "token": f"t{p}", "token_id": p, "median": MEDIAN}
        for layer in layers for s in sequences for p in at
    ]  # fmt: skip


def tables(*parts: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Findings and near misses under sun2024, of entries with a known value."""
    blank: dict[str, Any] = {"string": "", "float64": 0.0, "int64": 0, "bool": False}
    empty = {c: blank[dtype] for c, (dtype, _) in columns_of("findings").items()} | {"site": "resid_post"}
    whole = [empty | row for part in parts for row in part]
    every = frame("findings", whole) if whole else frame("findings")
    magnitude = every["value"].abs()
    every = every.assign(magnitude=magnitude, ratio=magnitude / MEDIAN)
    return every[every.ratio >= RATIO], every[(every.ratio < RATIO) & (every.ratio >= RATIO / 2)]


def found(*parts: list[dict[str, Any]], **more: Any) -> pd.DataFrame:
    findings, near = tables(*parts)
    return clusters_table(findings, near, n_sequences=N, n_tokens={"": T}, **more)


MAIN = rows(507, "start", range(12, 29), 23_000.0, [0], spread=0.1)
BESIDE = rows(247, "start", range(12, 29), 1_700.0, [0])
BUMP = rows(507, "start", range(3, 10), 800.0, [0])
STRAY = rows(507, "other", [3], 1_017.0, [3], [0]) + rows(507, "other", [3], 1_091.0, [10], [1])
STRAY += rows(507, "other", range(3, 9), 650.0, [17], [2, 3, 4, 5, 6])
FEATURE = rows(400, "other", range(1, 4), 1_200.0, list(range(1, 57)))


def test_every_label_at_its_place() -> None:
    made = found(MAIN, BESIDE, BUMP, STRAY, FEATURE)
    keys = ["cluster", "label", "dim", "position_class", "onset", "offset"]
    assert made[keys].to_numpy().tolist() == [
        [1, MASSIVE, 507, "start", 12, 28],
        [2, MASSIVE, 247, "start", 12, 28],
        [3, OUTLIER, 400, "other", 1, 3],
        [4, HUMP, 507, "start", 3, 9],
        [5, HUMP, 507, "other", 3, 8],
    ]
    main = made.iloc[0]
    values = np.array([23_000.0 * (1 if s % 2 else 0.9) for s in range(N)])
    assert (main["mean"], main["std"]) == (values.mean(), pytest.approx(values.std()))
    assert main["spread"] == pytest.approx(values.std() / values.mean()) and main["max"] == 23_000
    assert (main["share"], main["per_sequence"], main["n_findings"], main["n_near"]) == (1.0, 1.0, 17 * N, 0)
    assert made["token_share"].tolist() == pytest.approx([1 / T, 1 / T, 56 / T, 15 / N / T, 15 / N / T])


def test_a_stray_finding_moves_nothing() -> None:
    """Two findings on other tokens at layer 3, of 147: the onset of the massive activation stays 12."""
    with_, without = found(MAIN, STRAY), found(MAIN)
    pd.testing.assert_series_equal(with_.iloc[0], without.iloc[0], check_names=False)
    same_class = found(MAIN, rows(507, "start", [5], 1_100.0, [0], [0, 1]))  # of the same class, in 2 of 8 sequences
    assert same_class[["label", "onset"]].to_numpy().tolist() == [[MASSIVE, 12], [HUMP, 5]]


def test_positions_of_a_hump_are_told() -> None:
    bump = found(MAIN, BUMP, STRAY).query("label == 'hump' and position_class == 'other'").iloc[0]
    assert (bump["n_findings"], bump["n_near"]) == (2, 30)
    assert json.loads(bump["positions"])[0] == [17, 5] and json.loads(bump["tokens"])[0] == "t17"


def test_a_value_may_persist_where_it_no_longer_passes() -> None:
    """As ViT-Ti: 540 at layers 8 to 12, of which the criterion sees layer 8, as the median grows."""
    passing = rows(41, "other", [8], 1_010.0, [5])
    later = rows(41, "other", range(9, 12), 990.0, [5])  # near misses
    findings, near = tables(passing, later)
    kept = pd.concat([findings, near, near[near.layer == 9].assign(layer=12, magnitude=380.0, value=380.0)])
    short, longer = found(passing, later), found(passing, later, kept=kept)
    assert short[["onset", "offset", "last"]].to_numpy().tolist() == [[8, 8, 11]]
    assert longer[["onset", "offset", "last"]].to_numpy().tolist() == [[8, 8, 12]]
    gone = found(passing, later, kept=kept.assign(magnitude=kept["magnitude"].where(kept["layer"] < 12, 300.0)))
    assert gone["last"].tolist() == [11]  # less than a third is another value


def test_what_stands_on_most_tokens_is_no_massive_activation_even_on_the_first() -> None:
    made = found(FEATURE, rows(400, "start", range(1, 4), 1_300.0, [0]))
    assert set(made["label"]) == {OUTLIER}
    apart = found(FEATURE, rows(400, "start", range(1, 4), 40_000.0, [0]))  # another phenomenon of the same dim
    assert apart[["label", "position_class"]].to_numpy().tolist() == [[MASSIVE, "start"], [OUTLIER, "other"]]


@pytest.mark.parametrize(("per_sequence", "width", "label"), [
    (8, 100, MASSIVE), (9, 100, OUTLIER), (9, 1000, MASSIVE), (2, 3, MASSIVE), (3, 5, OUTLIER), (4, 9, MASSIVE),
])  # fmt: skip
def test_how_many_tokens_are_many(per_sequence: int, width: int, label: str) -> None:
    """More than eight of a sequence and 6 % of it, or half of it and more than two."""
    findings, near = tables(rows(3, "other", [2], 2_000.0, list(range(1, per_sequence + 1))))
    assert clusters_table(findings, near, n_sequences=N, n_tokens={"": width})["label"].tolist() == [label]


def test_of_several_stacks_each_has_its_first() -> None:
    findings, near = tables(MAIN, BUMP)
    other = findings.assign(stack="decoder", value=-findings["value"] / 2, magnitude=findings["magnitude"] / 2)
    made = clusters_table(pd.concat([findings, other]), near, n_sequences=N)
    assert made[["stack", "cluster", "label"]].to_numpy().tolist() == [
        ["", 1, MASSIVE], ["", 2, HUMP], ["decoder", 1, MASSIVE]
    ]  # fmt: skip
    assert made["mean"].iloc[2] < 0 and np.isnan(made["token_share"]).all()


def test_what_few_sequences_have_is_not_the_main_cluster() -> None:
    """A value of 90,000 in one sequence of eight stands behind 23,000 in all: it says little of the model."""
    made = found(MAIN, rows(9, "other", range(12, 20), 90_000.0, [5], [6]))
    assert made[["label", "dim", "share"]].to_numpy().tolist() == [[MASSIVE, 507, 1.0], [MASSIVE, 9, 1 / N]]
    halves = found(MAIN, rows(9, "other", range(12, 20), 90_000.0, [5], range(N // 2)))
    assert halves["dim"].tolist() == [9, 507]


def test_nothing_gives_no_clusters() -> None:
    assert len(found()) == 0 and list(found()) == list(columns_of("clusters"))


def test_values_of_both_signs_are_as_large_as_they_are() -> None:
    """Their mean is near zero; they stand before a smaller one, and are a phenomenon of their own beside others."""
    signed = [r | {"value": r["value"] * (-1) ** r["sequence"]} for r in rows(3, "start", [2], 20_000.0, [0])]
    beside = rows(3, "other", [2], 1_100.0, list(range(1, 40)))
    made = found(signed, beside, rows(4, "start", [2], 1_500.0, [0]))
    assert made[["label", "dim", "position_class"]].to_numpy().tolist() == [
        [MASSIVE, 3, "start"], [MASSIVE, 4, "start"], [OUTLIER, 3, "other"],
    ]  # fmt: skip
    assert made["mean"].iloc[0] == 0 and made["max"].iloc[0] == 20_000
