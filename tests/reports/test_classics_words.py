"""Sentences on the classic works: no number is lost, and what a rule picks is told of how many."""

from __future__ import annotations

import re
from typing import Any

import pytest

from massact.records.kinds.classics import Classics, ClassicsInfo
from massact.reports import classics_in_words
from massact.reports.spelling import number
from tests.facts import tells


def told(name: str, numbers: dict[str, Any]) -> str:
    """The sentence on one work."""
    return classics_in_words(Classics(ClassicsInfo(outcomes={name: {"": numbers}})))[1]


def features(n: int, n_dims: int | None, zeroed: dict[str, Any] | None = None) -> str:
    at = {"n": n, "n_dims": n_dims, "dims": list(range(n)), "massive": [0][:n], "n_massive": 2}
    return told("outlier-features", {"at": {"inputs": at}, "zeroed": zeroed})


@pytest.mark.parametrize("n", [0, 1, 2, 9, 31])
def test_outlier_features_are_told_of_how_many_dims(n: int) -> None:
    said = features(n, 64)
    assert f"{n} outlier feature{'s' * (n != 1)} of 64 dims" in said
    assert ("dim 0)" in said) == (n == 1) and (f"{n - 8} more" in said) == (n > 8)


@pytest.mark.parametrize("n", [33, 63, 64])
def test_most_dims_are_no_outliers(n: int) -> None:
    said = features(n, 64)
    assert tells([said], f"{n} of 64 dims", "not") and not re.search(r"outlier features? ", said)


def test_what_zeroing_does_is_told_in_numbers() -> None:
    """Each metric has two numbers, without and with the edit."""
    by = {"perplexity": [22.5, 511.0], "kl": [0.0, 2.74]}
    said = features(1, 64, {"random_dims": [3], "outlier dims to zero": by, "random dims to zero": {}})
    for before, after in by.values():
        assert f"{number(before)} to {number(after)} (+{number(after - before)})" in said
    assert ": ." not in said and not tells([said], "random dims")  # which have no numbers


def test_the_least_number_of_kept_tokens_is_no_bound_on_more() -> None:
    """Four kept tokens may be worse than one."""
    numbers = {"width": 32, "by_k": {"0": 287.0, "1": 37.6, "4": 40.7}, "smallest_k_near_best": 1, "dense": 22.7,
               "n_targets": 760}  # fmt: skip
    (least,) = tells(told("streaming", numbers), "k = 1", "1%")
    assert tells([least], "least", "best") and "4" not in least
    for largest in (None, 4):  # as it is recorded, and as it was: the largest alone is near itself
        numbers |= {"by_k": {"0": 287.0, "1": 37.6, "4": 30.7}, "smallest_k_near_best": largest}
        (said,) = tells(told("streaming", numbers), "k below 4", "1%")
        assert tells([said], "cannot be told") and "least" not in said
