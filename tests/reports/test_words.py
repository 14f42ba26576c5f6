"""The answer in English: golden sentences, and that their numbers are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import synthetic

from massact.records.kinds.scan import ScanResult
from massact.records.tables import frame
from massact.reports import answer_in_words
from massact.reports.kinds.scan.opening import opening
from massact.reports.kinds.scan.views import rule_of
from massact.reports.spelling import number, percent
from tests.facts import tells


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


def test_the_first_sentences_say_what_is_largest_what_it_does_and_what_it_costs(tmp_path: Path) -> None:
    """Of the largest cluster, from the tables; what was not measured names the verb that measures it."""
    scan = synthetic.massive()
    main = scan.clusters[scan.clusters["n_findings"] > 0].iloc[0]
    what, without, cost = opening(scan)
    assert tells([what], f"dim {main['dim']}", number(main["ratio"]), f"layer {main['onset']} to {main['offset']}")
    assert tells([without], "intervene") and tells([cost], "quantise", "fold")
    assert opening(synthetic.quiet()) == []
    measured = opening(scan, "Set to zero, ...", "Costs ...")
    assert measured == [what, "Set to zero, ...", "Costs ..."]


def test_each_stack_answers_for_itself() -> None:
    result = synthetic.two_stacks()
    verdict, _, _, counts, *words = answer_in_words(result)
    assert tells([verdict], "Yes", "acme/t5", "in encoder")
    assert tells([counts], "in encoder", "not in decoder", len(result.findings))
    of = {stack: [w for w in words if w.startswith(f"{stack}: ")] for stack in ("encoder", "decoder")}
    assert set(result.findings["stack"]) == {"encoder"}
    assert tells(of["encoder"], f"layers {result.findings['layer'].min()} to 11 of 12")
    assert tells(of["decoder"], "ratio", result.near_misses.query("stack == 'decoder'")["ratio"].max())


def thresholds_failed(words: str) -> dict[str, list[str]]:
    """Threshold -> its value and what it needs, as the sentence has them in brackets."""
    brackets = re.findall(r"(magnitude|ratio) \(([^)]*)\)", words)
    return {name: re.findall(r"\d[\d,.]*\d|\d", numbers) for name, numbers in brackets}


def test_which_threshold_fails() -> None:
    def with_largest(magnitude: float, ratio: float) -> str:
        result = synthetic.quiet()
        result.info.answer["stacks"][0]["largest"] |= {"magnitude": magnitude, "ratio": ratio}
        return answer_in_words(result)[1]

    assert thresholds_failed(with_largest(101.0, 999.0)) == {"ratio": ["999", "1,000"]}
    assert thresholds_failed(with_largest(100.0, 1000.0)) == {"magnitude": ["100", "100"]}
    passing = with_largest(101.0, 1000.0)  # every threshold, and yet no finding: the rule alone is named
    assert thresholds_failed(passing) == {} and tells([passing], "not", "sun2024")


def test_thresholds_in_force_are_the_ones_named() -> None:
    result = synthetic.quiet()
    result.info.criterion["thresholds"] = {"magnitude": 10.0, "ratio": 50.0}
    words = answer_in_words(result)
    assert tells(words[:1], "|h| > 10", "|h| >= 50 x median|h|")
    assert thresholds_failed(words[1])["ratio"] == ["44", "50"]


def test_a_threshold_that_the_formula_does_not_name_is_added() -> None:
    result = synthetic.quiet()
    result.info.criterion |= {
        "name": "heretic2025",
        "formula": "sun2024 and its dim in >= layers of the layers, by median",
        "thresholds": {"magnitude": 100.0, "layers": 0.25},
    }
    told = rule_of(result).in_words()
    assert told.startswith("heretic2025 (sun2024 ") and tells([told], ">= 0.25 of", "magnitude 100")
    assert told.count("0.25") == 1  # what the formula names is not added


def test_a_ratio_to_something_else_than_the_median_is_not_compared() -> None:
    result = synthetic.quiet()
    result.info.criterion |= {
        "name": "an2025",
        "formula": "|h| > ratio x mean|h| of that hidden state",
        "thresholds": {"ratio": 10.0},
    }
    words = answer_in_words(result)[1]
    assert tells([words], "not", "an2025") and thresholds_failed(words) == {}


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
    return synthetic.clustered(result)


def test_criteria_of_whole_tokens() -> None:
    result = whole_tokens()
    words = answer_in_words(result)
    assert tells(words[:1], "Yes", "acme/tiny-llama", "outlier tokens", len(result.findings), "L2 norm > 150")
    assert not tells(words[:1], "massive")
    top = result.findings.loc[result.findings["magnitude"].idxmax()]
    where = (f"layer {top['layer']}", f"position {top['pos']}", f"'{top['token']}'", f"sequence {top['sequence']}")
    (largest,) = tells(words, f"+{number(top['value'])}", *where, top["position_class"])
    assert "median" not in largest  # there is none to compare with
    assert tells(words, "Outlier tokens", "at delimiters", "layers 2 to 30 of 32")
    assert not any("dim -1" in w or "NaN" in w for w in words)


def test_positions_are_those_that_there_are() -> None:
    """Two dims at positions 0 and 3 of 8 sequences, all of one class: two tokens each."""
    result = synthetic.massive()
    result.findings["position_class"], result.findings["token"] = "other", "x"
    words = answer_in_words(synthetic.clustered(result))
    for dim in result.findings["dim"].unique():
        assert tells(words, f"dim {dim} at other tokens")
        (told,) = tells([w for w in words if f"dim {dim} " in w and "Massive" in w], "2 tokens each", "'x'")
        assert tells([told], "all 8 sequences", "positions 0 and 3") and "start" not in told


def test_how_many_of_those_that_have_it_pass() -> None:
    """Of 8 sequences with dim 2533 at the start 5 pass at its peak, 3 nearly do; after layer 20 one passes."""
    result = synthetic.massive(span=(2, 21))
    mine = (result.findings["dim"] == 2533) & (result.findings["position_class"] == "start")
    result.findings = result.findings[mine].reset_index(drop=True)
    few = (result.findings["sequence"] >= 5) | (result.findings["layer"] == 21) & (result.findings["sequence"] > 0)
    result.near_misses, result.findings = result.findings[few], result.findings[~few]
    words = answer_in_words(synthetic.clustered(result))
    (told,) = [w for w in words if w.startswith("Massive activation")]
    assert tells([told], "layers 2 to 20 of 32", "passing in 5", "all 8 sequences", "under half", "layer 21")


def test_a_dim_on_most_tokens_is_one_sentence_of_an_outlier_feature() -> None:
    """Dim 7 at all 12 tokens of 2 sequences: the start, ten others and a delimiter; nothing is massive."""
    result = synthetic.massive()
    rows = [
        synthetic.finding(layer, s, pos, 7, 500.0 + s, 0.2, f"t{pos}", "start" if not pos else "other", "", 1)
        for layer in (2, 3) for s in range(8) for pos in range(12)
    ]  # fmt: skip
    result.findings, result.near_misses = frame("findings", rows), frame("near_misses")
    headline, told, *_ = answer_in_words(synthetic.clustered(result))
    assert tells([headline], "No", "outlier features") and not headline.startswith("Yes")
    facts = ("dim 7", "at the start of the sequence", "at other tokens", "layers 2 to 3", "+504 ± 2.29 at layer 2")
    assert tells([told], "Outlier feature", *facts)


def test_why_a_value_no_longer_passes() -> None:
    """Where the median alone took the ratio below the threshold, it is named; else that the value itself fell."""
    for growth, told in ((20.0, True), (1.01, False)):
        result = synthetic.massive(span=(2, 30))
        dim = result.findings["dim"] == 2533
        result.findings = result.findings[dim].reset_index(drop=True)
        late = result.findings["layer"] > 25
        result.near_misses, result.findings = result.findings[late].copy(), result.findings[~late]
        before = result.layers.loc[result.layers["layer"] == 25, "median"].iloc[0]
        result.layers.loc[result.layers["layer"] == 30, "median"] = before * growth
        words = answer_in_words(synthetic.clustered(result))
        (of,) = [w for w in words if w.startswith("Massive activation") and "delimiters" in w]
        assert tells([of], "layers 2 to 25 of 32", "layer 30", "no longer passes")
        assert bool(tells([of], "median", before * growth)) == told


def test_overflow_is_said_as_it_is() -> None:
    result = synthetic.broken()
    words = answer_in_words(result)
    bad = result.layers.query("nonfinite > 0")
    layers, values = f"{bad['layer'].min()}-{bad['layer'].max()}", int(bad["nonfinite"].sum())
    assert not tells(words, "are finite")
    (formats,) = tells(words, "fp16", "bf16")
    assert tells([formats.split("; ")[0]], "fp16 overflows", f"{len(bad)} layers", layers, "Inf (layer 20)")
    assert tells(words, values, "NaN or Inf", layers)
    assert words[-1].startswith("Note: ") and tells(words[-1:], values)


def test_nothing_measured_and_no_answer() -> None:
    nothing = answer_in_words(synthetic.empty())[0]
    assert tells([nothing], "Nothing", "acme/tiny-llama", "no sequences") and "No:" not in nothing
    (unanswered,) = answer_in_words(synthetic.unanswered())
    assert tells([unanswered], "no answer", synthetic.unanswered().info.status)


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
    assert tells([twin], "1 finding (0.5 per sequence)", "2 sequences")
    assert tells([twin], f"{ours} findings ({number(ours / 2)} per sequence)") and ours < len(result.findings)
    with_, without = (next(w for w in words if w.startswith(side)) for side in ("With BOS", "Without BOS"))
    assert tells([with_], "7 findings (3.5 per sequence)", "2 sequences")
    assert tells([without], "9 findings (4.5 per sequence)", "2 sequences")


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
    assert 2048 <= largest < 4096 and tells([bf16], "steps of 16", largest)
    assert "times" not in bf16 and "e3" not in bf16  # no head-room of 1e35
    assert "steps of 2 there" in fp16 and "steps" not in fp8  # what overflows has none
