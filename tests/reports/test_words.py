"""The answer in English: golden sentences, and that their numbers are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import synthetic

from massact.records.kinds.scan import ScanResult
from massact.reports import answer_in_words
from massact.reports.kinds.scan.views import rule_of
from massact.reports.spelling import number, percent


def golden(name: str) -> list[str]:
    """The committed sentences, one a line."""
    return (Path(__file__).parent / f"words_{name}.txt").read_text(encoding="utf-8").splitlines()


def test_golden_words_of_a_massive_run() -> None:
    assert answer_in_words(synthetic.massive()) == golden("massive")


def test_golden_words_of_a_quiet_run() -> None:
    assert answer_in_words(synthetic.quiet()) == golden("quiet")


def test_numbers_in_words_are_those_of_the_tables() -> None:
    result = synthetic.massive()
    text = " ".join(answer_in_words(result))
    top = result.findings.loc[result.findings["magnitude"].idxmax()]
    for value in (top["value"], top["ratio"], top["median"]):
        assert number(value) in text
    peak = result.coordinates[
        (result.coordinates["layer"] == top["layer"])
        & (result.coordinates["dim"] == top["dim"])
        & (result.coordinates["position_class"] == top["position_class"])
    ].iloc[0]
    assert f"+{number(peak['mean'])} ± {number(peak['std'])}" in text and percent(peak["spread"]) in text
    assert number(result.layers["headroom_fp16"].min()) in text
    assert f"{len(result.findings):,} findings" in text


def test_each_stack_answers_for_itself() -> None:
    words = answer_in_words(synthetic.two_stacks())
    assert words[0].startswith("Yes: acme/t5 has massive activations in encoder, not in decoder: 288 findings")
    assert any(w.startswith("encoder: They appear at layer 3 of 12") for w in words)
    assert any(w.startswith("decoder: The largest ratio is 44") for w in words)


def test_which_threshold_fails() -> None:
    def with_largest(magnitude: float, ratio: float) -> str:
        result = synthetic.quiet()
        result.info.answer["stacks"][0]["largest"] |= {"magnitude": magnitude, "ratio": ratio}
        return answer_in_words(result)[1]

    assert "fails on ratio (999, needs 1,000)." in with_largest(101.0, 999.0)
    assert "fails on magnitude (100, needs more than 100)." in with_largest(100.0, 1000.0)
    assert "does not pass sun2024" in with_largest(101.0, 1000.0)


def test_thresholds_in_force_are_the_ones_named() -> None:
    result = synthetic.quiet()
    result.info.criterion["thresholds"] = {"magnitude": 10.0, "ratio": 50.0}
    words = answer_in_words(result)
    assert "|h| > 10 and |h| >= 50 x median|h|" in words[0] and "(44, needs 50)" in words[1]


def test_a_threshold_that_the_formula_does_not_name_is_added() -> None:
    result = synthetic.quiet()
    result.info.criterion |= {
        "name": "heretic2025",
        "formula": "sun2024 and its dim in >= layers of the layers, by median",
        "thresholds": {"magnitude": 100.0, "layers": 0.25},
    }
    said = rule_of(result).in_words()
    assert said == "heretic2025 (sun2024 and its dim in >= 0.25 of the layers, by median; magnitude 100)"


def test_a_ratio_to_something_else_than_the_median_is_not_compared() -> None:
    result = synthetic.quiet()
    result.info.criterion |= {
        "name": "an2025",
        "formula": "|h| > ratio x mean|h| of that hidden state",
        "thresholds": {"ratio": 10.0},
    }
    assert "does not pass an2025" in answer_in_words(result)[1]


def whole_tokens() -> ScanResult:
    """A run under a criterion of whole tokens: no dim, no median, no ratio."""
    result = synthetic.massive()
    result.info.criterion = {
        "name": "darcet2024",
        "kind": "token",
        "formula": "tokens with L2 norm > norm",
        "thresholds": {"norm": 150.0},
    }
    for table in (result.findings, result.coordinates, result.near_misses):
        table["dim"] = -1
    result.findings[["median", "ratio"]] = np.nan
    stack = result.info.answer["stacks"][0]
    stack["dims"], stack["peak"] = [[-1, 1.0]], stack["peak"] | {"dim": -1, "median": "nan", "ratio": "nan"}
    return result


def test_criteria_of_whole_tokens() -> None:
    words = answer_in_words(whole_tokens())
    assert words[0].startswith("Yes: acme/tiny-llama has outlier tokens: 928 findings")
    assert "tokens with L2 norm > 150" in words[0]
    assert any(
        w == "The largest finding is +2,760 at layer 30, position 3, on '.' (delimiter) of sequence 7." for w in words
    )
    assert not any("dim -1" in w or "They sit in" in w or "NaN" in w for w in words)


def test_positions_are_those_that_there_are() -> None:
    result = synthetic.massive()
    result.info.answer["stacks"][0] |= {
        "group": "start, delimiters and others",
        "tokens": [["x", "other", 3]],
    }
    result.findings["position_class"], result.findings["token"] = "other", "x"
    at_peak = result.findings[result.findings["layer"] == 30]
    tokens = len(set(zip(at_peak["sequence"], at_peak["pos"], strict=True)))  # 2 dims each
    assert (len(at_peak), tokens) == (32, 16)
    said = ("At layer 30 they are at other tokens: 32 findings (4 per sequence) on 16 tokens (2 per sequence): 'x' "
            "(other, 16).")  # fmt: skip
    assert answer_in_words(result)[3] == said


def test_overflow_is_said_as_it_is() -> None:
    words = answer_in_words(synthetic.broken())
    assert not any("All measured values are finite" in w for w in words)
    assert any("fp16 overflows at 13 layers (20-32), the largest |h| being Inf (layer 20)" in w for w in words)
    assert "53,248 values are NaN or Inf, at layers 20-32." in words
    assert words[-1].startswith("Note: 53,248 values")


def test_nothing_measured_and_no_answer() -> None:
    assert answer_in_words(synthetic.empty())[0] == "Nothing was measured on acme/tiny-llama: no sequences."
    assert answer_in_words(synthetic.unanswered()) == ["This run holds no answer (status: failed)."]


def test_every_word_is_one_line_and_names_no_cause(every: ScanResult) -> None:
    for sentence in answer_in_words(every):
        assert sentence.isprintable(), sentence
        assert not re.search(r"\b(because|due to|caused?|leads? to|explains?|serves?)\b", sentence)
        assert sentence.endswith(".") or sentence.startswith("Note:")


def test_controls_are_counted_over_the_same_sequences() -> None:
    """The scan has 8 sequences, its controls 2: each count has its own unit, and the model's is of the same two."""
    result = synthetic.massive()
    answer = result.info.answer
    answer["null"] |= {"n_sequences": 2, "n_findings": 1}
    for side, n in (("with", 7), ("without", 9)):
        answer["bos"][side] |= {"n_sequences": 2, "n_findings": n}
    ours = int((result.findings["sequence"] < 2).sum())
    words = answer_in_words(result)
    twin = next(w for w in words if "random-init twin" in w)
    assert "1 finding (0.5 per sequence) in the first 2 sequences" in twin
    assert f"the model has {ours} findings ({number(ours / 2)} per sequence)" in twin and ours < len(result.findings)
    with_, without = (next(w for w in words if w.startswith(side)) for side in ("With BOS", "Without BOS"))
    assert "7 findings (3.5 per sequence) in the first 2 sequences" in with_
    assert "9 findings (4.5 per sequence) in the first 2 sequences" in without


def test_findings_of_no_sequence_are_not_counted_in_some() -> None:
    result = synthetic.massive()
    result.info.answer["null"] |= {"n_sequences": 2}
    result.findings["sequence"] = -1
    assert not any("the model has" in w for w in answer_in_words(result))


def test_a_wide_format_is_told_by_its_step() -> None:
    """2 ** 11 <= 2,760 < 2 ** 12, and bf16 has 7 bits behind the point: 2 ** (11 - 7)."""
    words = next(w for w in answer_in_words(synthetic.massive()) if w.startswith("Without scaling"))
    fp16, bf16, fp8 = words.split("; ")
    largest = synthetic.massive().layers["max"].max()
    assert 2048 <= largest < 4096 and f"steps of 16 at the largest |h|, {number(largest)}" in bf16
    assert "times" not in bf16 and "e3" not in bf16  # no head-room of 1e35
    assert "steps of 2 there" in fp16 and "steps" not in fp8  # what overflows has none
