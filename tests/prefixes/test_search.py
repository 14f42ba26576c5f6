"""The search by what it is given: planted readings, classes of tokens, halves of a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import massact as ma
from massact.corpora import Corpus
from massact.corpora.token_strings import Spelling
from massact.prefixes import search
from massact.prefixes.search import Judge, Reading, best_of, judged, search_prefix
from massact.prefixes.starts import Texts, class_of, lead_of, parts_of_corpus, rows_of, together, without_lead
from massact.records.errors import WorkError


@pytest.fixture(scope="module")
def model() -> ma.Model:
    return ma.load(None)


@pytest.fixture(scope="module")
def corpus(model: ma.Model) -> Corpus:
    made = ma.corpus(None, tokenizer=model.tokenizer, n_sequences=6, seq_len=64)
    assert isinstance(made, Corpus)
    return made


CLASSES = ("text", "text", "text", "word", "','")


def reading(massive: tuple[int, ...], nll: tuple[float, ...] = (4.0, 4.1, 4.2, 5.0, 6.0), top: float = 10) -> Reading:
    return Reading(np.array(massive), np.full(5, top), np.array(nll), (7,) * bool(sum(massive)))


def texts_of(corpus: Corpus) -> Texts:
    return Texts(together(rows_of(corpus)[:5], corpus), CLASSES)


# -------------------------------------------------------------------------------------------- which is best
def test_what_leaves_least_comes_before_what_costs_least(corpus: Corpus) -> None:
    cheap, clears = reading((0, 0, 0, 0, 3), (1.0,) * 5), reading((0, 0, 0, 0, 0))
    assert best_of({(1,): cheap, (2,): clears}, texts_of(corpus)) == (2,)
    assert best_of({(1,): reading((9, 0, 0, 0, 0)), (2,): reading((1, 1, 0, 0, 0))}, texts_of(corpus)) == (1,)


def test_of_those_that_clear_the_loss_of_the_text_decides(corpus: Corpus) -> None:
    """Of the text alone: the last two texts are there for their starts."""
    worse = reading((0,) * 5, (4.5, 4.6, 4.7, 0.0, 0.0), top=1)
    assert best_of({(1,): worse, (2,): reading((0,) * 5)}, texts_of(corpus)) == (2,)


def test_losses_that_are_not_told_apart_leave_it_to_the_size(corpus: Corpus) -> None:
    noisy = reading((0,) * 5, (4.3, 3.9, 4.2, 5.0, 6.0), top=1)
    assert best_of({(1,): reading((0,) * 5), (2,): noisy}, texts_of(corpus)) == (2,)


@dataclass
class Planted:
    """Readings by prefix, for both parts."""

    readings: dict[tuple[int, ...], Reading]
    model: Any
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def reading(self, ids: tuple[int, ...], texts: Texts) -> Reading:
        self.asked.append(ids)
        return self.readings.get(ids, self.readings[()])


def searched(plan: Planted, corpus: Corpus, slots: int, monkeypatch: pytest.MonkeyPatch) -> search.Search:
    monkeypatch.setattr(search, "candidate_ids", lambda *_: [1, 2, 3])
    texts = texts_of(corpus)
    other = Texts(texts.corpus, CLASSES)
    return search_prefix(plan, (texts, other), None, slots, lambda *_: None)  # type: ignore[arg-type]


def test_a_second_token_where_one_is_not_enough(
    model: ma.Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Planted({(): reading((2, 2, 2, 2, 2)), (2,): reading((0, 0, 0, 0, 2)), (2, 7): reading((0,) * 5)}, model)
    one = searched(plan, corpus, 1, monkeypatch)
    assert one.ids == (2,) and not one.cleared
    assert [pair[1] for pair in one.fails] == ["','"]
    two = searched(plan, corpus, 2, monkeypatch)  # 7 is what is massive behind the first
    assert two.ids == (2, 7) and two.cleared
    assert len(searched(plan, corpus, 4, monkeypatch).ids) == 2  # it is clear: no third token


def test_a_token_that_adds_nothing_is_not_added(
    model: ma.Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Planted({(): reading((2, 2, 2, 2, 2)), (3,): reading((0, 0, 0, 0, 2))}, model)
    for i in (1, 2, 3, 7):
        plan.readings[3, i] = reading((0, 0, 0, 0, 2))
    assert searched(plan, corpus, 3, monkeypatch).ids == (3,)


def test_where_nothing_helps_nothing_is_folded(
    model: ma.Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkError, match="3 candidates|4 candidates"):
        searched(Planted({(): reading((2, 2, 2, 2, 2))}, model), corpus, 1, monkeypatch)


def test_a_prefix_that_fails_on_held_out_text_is_not_clear(model: ma.Model, corpus: Corpus) -> None:
    texts, held = texts_of(corpus), Texts(texts_of(corpus).corpus, CLASSES)

    class Parted(Planted):
        def reading(self, ids: tuple[int, ...], texts: Texts) -> Reading:
            clear = bool(ids) and texts is not held
            return reading((0,) * 5 if clear else (0, 0, 0, 3, 0) if ids else (2,) * 5)

    found = judged(Parted({}, model), (texts, held), (1,), [(1,)])  # type: ignore[arg-type]
    assert not found.cleared and [pair[1] for pair in found.fails] == ["word"]


def test_the_next_that_clears_both_takes_the_place_of_one_that_fails(
    model: ma.Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 is better by its loss, and fails on held-out text; 3 clears both."""
    chosen, held = texts_of(corpus), texts_of(corpus)
    cheap = reading((0,) * 5, (1.0, 1.1, 1.2, 1.0, 1.0))
    plan = {(): reading((2,) * 5), (1,): reading((1,) * 5), (2,): cheap, (3,): reading((0,) * 5)}

    class Parted(Planted):
        def reading(self, ids: tuple[int, ...], texts: Texts) -> Reading:
            return reading((0, 0, 0, 0, 1)) if texts is held and ids == (2,) else self.readings.get(ids, plan[()])

    monkeypatch.setattr(search, "candidate_ids", lambda *_: [1, 2, 3])
    found = search_prefix(Parted(plan, model), (chosen, held), None, 1, lambda *_: None)  # type: ignore[arg-type]
    assert found.ids == (3,) and found.cleared
    assert {r["ids"] for r in found.rows if r["part"] == "held out"} == {"", "2", "3"}
    assert [pair[1] for pair in found.fails] == ["','"]


def test_an_outlier_feature_is_not_counted_wherever_it_is(model: ma.Model) -> None:
    """Up to twice its size, on any token: the first of a text is as any other behind a slot."""
    scan = ma.scan(model, None, null=False, bos_contrast=False, rank_sequences=0, n_sequences=2, seq_len=32)
    first = scan.clusters.iloc[:1]
    feature = first.assign(dim=7, label="outlier feature", max=300.0, position_class="other")
    scan.clusters = pd.concat([first, feature], ignore_index=True)
    judge = Judge.of(scan)
    assert judge.limits == {7: 600.0} and judge.rule.name == "sun2024"
    rows = pd.DataFrame({"dim": [7, 7, 99, 99], "magnitude": [599.0, 601.0, 110.0, 5000.0], "pos": 0})
    assert judge.massive(rows).index.tolist() == [1, 2, 3]


# -------------------------------------------------------------------------------------------- texts
class Tokens:
    """A tokenizer of whole strings."""

    names = (" ", "\n", "\n\n", ".", " ,", "12", "word", " two", "река", "a1", "(")

    def convert_ids_to_tokens(self, i: int) -> str:
        return self.names[i]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.names[i] for i in ids)


def test_classes_of_tokens() -> None:
    spelling = Spelling(Tokens())
    found = [class_of(spelling, i) for i in range(len(Tokens.names))]
    assert found == ["space", "newline", "newline", "'.'", "','", "digit", "word", "word", "script", "other", "'('"]


def test_halves_share_no_text(model: ma.Model, corpus: Corpus) -> None:
    first, second = parts_of_corpus(model, corpus)
    rows = [{tuple(row.tolist()) for row in rows_of(texts.corpus)} for texts in (first, second)]
    assert not rows[0] & rows[1]
    assert first.classes.count("text") == 3 == second.classes.count("text")
    for texts in (first, second):
        for row, name in zip(rows_of(texts.corpus), texts.classes, strict=True):
            if name not in ("text", "code", "script", "space"):  # of which there are only texts of ours
                assert corpus.spelling is not None
                assert class_of(corpus.spelling, int(row[0])) in (name, "other", "space"), (name, row[:3])


def test_one_sequence_is_cut_in_two(model: ma.Model, corpus: Corpus) -> None:
    first, second = parts_of_corpus(model, corpus.head(1))
    assert torch.equal(torch.cat([first.rows()[0], second.rows()[0]]), rows_of(corpus)[0])


def test_what_stands_in_front_is_taken_away(model: ma.Model, corpus: Corpus) -> None:
    class Special:
        all_special_ids = (2,)

    class Other:
        tokenizer = Special()

    led = together([torch.cat([torch.tensor([2]), row]) for row in rows_of(corpus)], corpus)
    assert lead_of(Other(), led) == (2,) and lead_of(model, corpus) == ()  # type: ignore[arg-type]
    assert torch.equal(without_lead(led, (2,)).inputs["input_ids"], corpus.inputs["input_ids"])


def test_texts_of_different_length_are_padded_behind(corpus: Corpus) -> None:
    made = together([torch.tensor([1, 2, 3]), torch.tensor([4])], corpus)
    assert made.mask is not None and made.mask.tolist() == [[True] * 3, [True, False, False]]
    assert [row.tolist() for row in rows_of(made)] == [[1, 2, 3], [4]]
