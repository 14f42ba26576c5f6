"""How numbers and tokens are spelled."""

from __future__ import annotations

import re
import unicodedata

import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from massact.reports.spelling import (
    cell,
    counted,
    listed,
    number,
    numbered,
    percent,
    quoted,
    ranges,
    signed,
    spanned,
    token_list,
    visible,
)


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (2556.8, "2,560"),
        (0.0376, "0.0376"),
        (0, "0"),
        (65504.0, "65,500"),
        (999.6, "1,000"),
        (-1277.5, "-1,280"),
        (3.39e38, "3.39e38"),
        (1.5e-5, "1.5e-5"),
        (float("nan"), "NaN"),
        (float("inf"), "inf"),
        ("-inf", "-inf"),
        (None, "n/a"),
        ("nan", "NaN"),
        (1000.0, "1,000"),
        (0.2, "0.2"),
        (9999999.0, "10,000,000"),
    ],
)
def test_three_significant_digits(value: object, spelled: str) -> None:
    assert number(value) == spelled


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (2622.04, "2,622"),
        (123456.7, "123,457"),
        (0.2, "0.2000"),
        (29.4, "29.40"),
        (0, "0"),
        (float("nan"), "NaN"),
    ],
)
def test_tables_keep_all_digits_before_the_point(value: float, spelled: str) -> None:
    assert cell(value) == spelled


def test_signs_shares_and_lists() -> None:
    assert signed(3.0) == "+3" and signed(-3.0) == "-3" and signed(float("nan")) == "NaN"
    assert percent(0.055) == "5.5%" and percent(1) == "100%" and percent("nan") == "unavailable"
    assert ranges([4, 2, 3, 3, 9]) == "2-4, 9" and ranges([]) == ""
    assert listed([]) == "none" and listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(
    ("value", "spelled", "share"),
    [
        (0.9996, "0.9996", "99.96%"),
        (1.0004, "1.0004", "100.04%"),
        (-0.99997, "-0.99997", "-99.997%"),
        (1 - 2**-24, "1", "100%"),  # a float32 cosine of a vector with itself
        (1.0, "1", "100%"),
        (0.994, "0.994", "99.4%"),
    ],
)
def test_what_is_not_one_is_not_rounded_to_one(value: float, spelled: str, share: str) -> None:
    assert number(value) == spelled and percent(value) == share


@given(st.floats(allow_nan=False, min_value=1e-300, max_value=1e300))
def test_the_spelling_is_within_half_a_unit_of_its_last_digit(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.00501)
    assert float(cell(value).replace(",", "")) == pytest.approx(value, rel=0.000501)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", "'\\n'"),
        ("\\n", "'\\\\n'"),
        (" and", "' and'"),
        ("it's", '"it\'s"'),
        ("", "no token"),
        (None, "no token"),
        ("\x1b[31m", "'\\x1b[31m'"),
        ("\u202eabc", "'\\u202eabc'"),
        ("\\xe2\\x80", "'\\xe2\\x80'"),
        ("\u0301", "'\\u0301'"),
        ("\ud800", "'\\ud800'"),
        ("a" * 300, "'" + "a" * 21 + "...'"),
    ],
)
def test_tokens_show_what_they_are(token: object, shown: str) -> None:
    assert quoted(token) == shown


@given(st.text(st.characters(exclude_categories=[]), max_size=30))
def test_visible_text_has_nothing_hidden(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert visible(text, "ascii").isascii()


def test_a_newline_and_its_spelling_are_two_tokens() -> None:
    assert len({quoted(t) for t in synthetic.HOSTILE if t}) == len([t for t in synthetic.HOSTILE if t])


def test_token_lists_of_damaged_cells() -> None:
    assert token_list('["a", "\\n"]') == ["a", "\n"]
    assert token_list("not json") == ["not json"] and token_list(None) == [] and token_list("3") == ["3"]


# What every sentence about several things is made of: nothing is lost, and its noun has the number of what is said.
@given(st.lists(st.integers(0, 10**6), max_size=30), st.integers(1, 8), st.integers(0, 50))
def test_every_number_is_named_or_counted(numbers: list[int], most: int, also: int) -> None:
    said, total = numbered("dim", numbers, most, also), len(numbers) + also
    named = [int(x) for x in re.findall(r"\d+", re.sub(r"[\d,]+ more", "", said))]
    left = sum(int(x.replace(",", "")) for x in re.findall(r"([\d,]+) more", said))
    assert named == numbers[:most] and len(named) + left == total
    assert said.split()[:1] == (["no"] if not total else ["dim"] if total == 1 else ["dims"])


@given(st.sets(st.integers(0, 200), max_size=30))
def test_spans_hold_every_number_once(numbers: set[int]) -> None:
    said, held = spanned("layer", numbers), set()
    for low, high in re.findall(r"(\d+)(?:-(\d+))?", said):
        held |= set(range(int(low), int(high or low) + 1))
    assert held == numbers and said.split()[0] == {0: "no", 1: "layer"}.get(len(numbers), "layers")


@given(st.integers(0, 10**9))
def test_one_is_no_plural(n: int) -> None:
    assert counted(n, "finding").endswith("findings") == (n != 1)
    assert int(counted(n, "near miss", "near misses").split()[0].replace(",", "")) == n


@given(st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), max_size=20), st.none() | st.integers(0, 20))
def test_a_list_is_never_empty(items: list[str], most: int | None) -> None:
    said = listed(items, most)
    shown = items[:most]
    assert said.strip() and all(item in said for item in shown)
    assert (f"{len(items) - len(shown)} more" in said) == (len(items) > len(shown))
    assert said == "none" or items
