"""The experiments beyond the paper: their rows on planted tables, and how they are told from those of the paper."""

from __future__ import annotations

import pytest

from massact.records.kinds.reproduction import BEYOND
from massact.reports import reproduction_in_words
from massact.reproductions import ENTRIES
from massact.reproductions.entries import Finished, Nothing
from massact.reproductions.job import told
from massact.verbs.reproduce import ReproduceConfig
from tests.facts import tells
from tests.reproductions.tables import explanation, planted
from tests.reproductions.theory_cases import looking, norms, ranks

X = ("X1", "X2", "X3")


def test_they_are_beyond_the_paper() -> None:
    for name, entry in ENTRIES.items():
        assert (entry.section == BEYOND) == name.startswith("X")


def test_rows_of_the_first_norm_are_told() -> None:
    rows = [r for r in ENTRIES["X1"].run(norms()) if r["headline"]]
    assert sorted(r["ours"] for r in rows) == [0.5, 0.8, 0.99, 30.0]
    assert all(r["layer"] == 3 and "attn_in" in r["place"] for r in rows)


def test_types_of_sinks_are_counted() -> None:
    rows = {r["quantity"]: r["ours"] for r in ENTRIES["X2"].run(looking(0.5, 0.05)) if r["headline"]}
    assert {n for q, n in rows.items() if q.startswith("heads")} == {2, 1}
    assert rows["attention on massive tokens, layers that read them"] == pytest.approx(0.5)


def test_the_valley_is_where_they_are() -> None:
    rows = [r for r in ENTRIES["X3"].run(ranks()) if r["headline"]]
    assert {r["layer"] for r in rows} == {6}
    assert {r["place"]: r["ours"] for r in rows if r["quantity"] == "effective rank"} == {
        "all": pytest.approx(1.1), "without": 15.0, "centred": 60.0}  # fmt: skip


@pytest.mark.parametrize("name", X)
def test_what_is_not_there_has_its_reason(name: str) -> None:
    for f, word in ((Finished(planted()), "explained"), (Finished(planted(), explanation()), "unavailable"),
                    (Finished(planted(offset=1), explanation()), "passes")):  # fmt: skip
        with pytest.raises(Nothing) as nothing:
            ENTRIES[name].run(f)
        assert word in nothing.value.reason
    old = explanation()
    old.info.schema_version = 5
    with pytest.raises(Nothing) as nothing:
        ENTRIES[name].run(Finished(planted(), old))
    assert tells([nothing.value.reason], "older", "anew")


def test_words_tell_them_apart() -> None:
    config = ReproduceConfig.of({"only": ("E5", *X)})
    done = told(norms(), [ENTRIES[n] for n in ("E5", *X)], config)
    said = reproduction_in_words(done)
    assert tells(said[0], 1, "Sun 2024", 3, "beyond")
    assert tells(said, "X1", "beyond", "Expected", "99%") or tells(said, "X1", "beyond", "Expected", 0.99)
    assert not tells(said, "X1", "Paper:") and tells(said, "E5", "Paper:")
