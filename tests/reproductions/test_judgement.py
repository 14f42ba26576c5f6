"""Which published values count, and whether a number agrees: made-up values beside made-up rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from massact.records.errors import UserError
from massact.reproductions import ENTRIES, KNOWN, PUBLISHED, Published, judged
from massact.reproductions.entries import Row, row
from massact.reproductions.job import verdict_of
from massact.reproductions.judgement import ANY, known_as
from tests.facts import tells

LLAMA = {"id": "someone/Llama-2-7b-hf", "model_type": "llama", "n_layers": {"": 32}, "d_model": {"": 4096}}


def one(r: Row, p: Published, model: str | None = "M", seq_len: int | None = 64) -> Row:
    (found,) = judged([r], "E4", model, seq_len, [p])
    return found


def made(**more: Any) -> Published:
    return Published("M", "E4", "top 1", **({"value": 100.0, "tag": "memory", "source": "Fig. 4"} | more))


# ---- which model it is
def test_name_and_shape_together_are_a_model() -> None:
    assert known_as(LLAMA)["name"] == "LLaMA2-7B"
    assert known_as(LLAMA | {"id": "/models/LLAMA-2-7B-HF/"})["name"] == "LLaMA2-7B"
    chat = known_as(LLAMA | {"id": "meta-llama/Llama-2-7b-chat-hf"})
    assert chat["name"] == "LLaMA2-7B-chat" and "32 layers" in chat["by"]


@pytest.mark.parametrize("change", [
    {"n_layers": {"": 31}}, {"d_model": {"": 4097}}, {"model_type": "mistral"}, {"id": "my-llama-2-7b-hf-tuned"},
    {"id": "embedded", "model_type": "gpt2", "n_layers": {"": 6}, "d_model": {"": 128}}, {"model_type": None},
])  # fmt: skip
def test_neither_alone_is(change: dict[str, Any]) -> None:
    known = known_as(LLAMA | change)
    assert "name" not in known and known["unavailable"]


def test_the_shape_alone_says_what_it_may_be_and_the_user_decides() -> None:
    huggyllama = LLAMA | {"id": "huggyllama/llama-7b"}  # LLaMA-1 has the same shape
    known = known_as(huggyllama)
    assert "LLaMA2-7B" in known["shape_of"] and "--as" in known["unavailable"]
    assert known_as(huggyllama, "LLaMA2-7B")["name"] == "LLaMA2-7B"
    with pytest.raises(UserError, match="another shape"):
        known_as(huggyllama, "LLaMA2-13B")
    with pytest.raises(UserError, match=r"Did you mean 'LLaMA2-7B'"):
        known_as(huggyllama, "LLaMA2_7B")


def test_the_stack_that_sees_is_the_one_of_a_model_with_two() -> None:
    clip = {"id": "openai/clip-vit-large-patch14", "model_type": "clip", "n_layers": {"text": 12, "vision": 24},
            "d_model": {"text": 768, "vision": 1024}}  # fmt: skip
    assert known_as(clip)["name"] == "CLIP ViT-L"
    assert "name" not in known_as(clip | {"d_model": {"text": 1024, "vision": 768}})


# ---- verdicts
@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(100, "agrees"), (109.9, "agrees"), (110.2, "differs"), (-100, "differs"), (math.inf, "differs")],
)
def test_near_is_within_the_tolerance(ours: float, verdict: str) -> None:
    assert one(row("top 1", ours), made())["verdict"] == verdict


def test_a_published_zero_has_an_absolute_tolerance() -> None:
    assert one(row("top 1", 0.0), made(value=0.0, tolerance=0))["verdict"] == "agrees"
    assert one(row("top 1", 1.0), made(value=0.0, tolerance=0))["verdict"] == "differs"
    assert one(row("top 1", 0.4), made(value=0.0, tolerance=0.5))["verdict"] == "agrees"


@pytest.mark.parametrize(("ours", "verdict"), [(5e6, "agrees"), (math.inf, "agrees"), (12.0, "differs")])
def test_an_explosion_is_at_least(ours: float, verdict: str) -> None:
    found = one(row("top 1", ours), made(value=1000.0, least=True))
    assert found["verdict"] == verdict and found["published_text"] == "at least 1000"


@pytest.mark.parametrize(("ours", "verdict"), [
    ("1415, 2533", "agrees"), ("1415, 1512, 2533", "agrees"), ("1415", "differs"), ("1415, 7, 2533", "differs"),
    ("start", "differs"), ("", "nothing to show"),
])  # fmt: skip
def test_dims_are_these_but_for_those_that_may_be(ours: str, verdict: str) -> None:
    p = made(value=math.nan, text=("1415, 2533",), maybe="1512")
    assert one(row("top 1", text=ours), p)["verdict"] == verdict


def test_both_the_place_and_the_value_count_where_both_are_published() -> None:
    p = made(value=-475.0, text=("reg3, dim 179", "reg3, dim 196"))
    for text, value, verdict in (("reg3, dim 196", -470, "agrees"), ("reg2, dim 196", -470, "differs"),
                                 ("reg3, dim 179", 470, "differs")):  # fmt: skip
        assert one(row("top 1", value, text=text), p)["verdict"] == verdict


def test_only_the_row_that_is_meant_is_compared() -> None:
    rows = [row("top 1", 100.0, layer=1), row("top 1", 100.0, layer=2), row("top 2", 100.0, layer=2)]
    found = judged(rows, "E4", "M", 64, [made(layer=2), made(layer=3)])
    assert [r["verdict"] for r in found] == ["no published value", "agrees", "no published value", "differs"]
    assert all(math.isnan(r["published"]) and r["tag"] == "" for r in found if r["verdict"] == "no published value")
    assert judged(rows, "E4", "another", 64, [made()])[0]["verdict"] == "no published value"
    assert judged(rows, "E5", "M", 64, [made()])[0]["verdict"] == "no published value"


def test_what_was_published_and_is_not_here_differs_or_was_not_run() -> None:
    r = row("top 1", 5.0, place="embedded")
    found = judged([r], "E4", "M", 64, [made(place="wikitext-2", needs="--evaluate-on wikitext-2")])
    assert [x["verdict"] for x in found] == ["no published value", "not run"]
    assert found[1]["reason"] == "--evaluate-on wikitext-2" and math.isnan(found[1]["ours"])
    found = judged([r], "E4", "M", 64, [made(place="wikitext-2")])
    assert [x["verdict"] for x in found] == ["no published value", "differs"]
    assert len(judged([row("", reason="nothing")], "E4", "M", 64, [made()])) == 1  # nothing was measured at all


def test_a_value_for_another_length_is_told_but_not_compared() -> None:
    for seq_len, verdict in ((2048, "agrees"), (4096, "no published value"), (None, "no published value")):
        found = one(row("top 1", 100.0), made(seq_len=2048), seq_len=seq_len)
        assert found["verdict"] == verdict and found["published"] == 100
        assert (verdict == "agrees") != ("--seq-len 2048" in found["reason"])


def test_a_row_without_a_number_is_never_zero() -> None:
    found = one(row("top 1", reason="why"), made())
    assert math.isnan(found["ours"]) and found["verdict"] == "nothing to show"


def test_the_verdict_of_an_experiment() -> None:
    def of(*verdicts: str) -> tuple[str, str]:
        return verdict_of([{"quantity": "", "verdict": v, "reason": f"because {v}"} for v in verdicts])

    for verdicts, verdict, share in ((("agrees", "no published value", "agrees"), "agrees", "2 of 2"),
                                     (("agrees", "differs", "not run"), "differs", "1 of 2")):  # fmt: skip
        said, reason = of(*verdicts)
        assert said == verdict and tells([reason], share)
    assert of("no published value", "not run")[0] == "no published value"
    nothing = "nothing to show"
    assert of(nothing, "no published value") == (nothing, f"because {nothing}")
    assert of("not run") == ("not run", "because not run") and of("failed")[0] == "failed"


# ---- the values themselves
def test_every_published_value_says_how_it_is_known() -> None:
    for p in PUBLISHED:
        assert p.model in {*KNOWN, ANY} and p.experiment in ENTRIES and p.source
        assert p.tag in ("confirmed", "replicated", "memory", "derived")
        assert bool(p.text) or math.isfinite(p.value)
    keys = [(p.model, p.experiment, p.quantity, p.layer, p.place, p.seq_len) for p in PUBLISHED]
    assert len(set(keys)) == len(keys)


def test_a_run_with_the_numbers_of_the_paper_agrees_with_all_of_them() -> None:
    """LLaMA2-7B as the paper has it: every value finds its row, and each of them agrees; one changed, it differs."""
    mine = [p for p in PUBLISHED if p.model == "LLaMA2-7B"]
    assert {p.experiment for p in mine} >= {"E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "E10", "E11", "E12"}
    for experiment in {p.experiment for p in mine}:
        here = [p for p in mine if p.experiment == experiment]
        rows = [row(p.quantity, 1e6 if p.least else p.value, text=p.text[0] if p.text else "", place=p.place or "",
                    layer=-1 if p.layer is None else p.layer) for p in here]  # fmt: skip
        found = judged(rows, experiment, "LLaMA2-7B", 2048, PUBLISHED)
        assert [r["verdict"] for r in found] == ["agrees"] * len(here)
        rows[0] = rows[0] | {"ours": rows[0]["ours"] * 5 + 10 if not here[0].least else 3.0, "ours_text": "0"}
        assert judged(rows, experiment, "LLaMA2-7B", 2048, PUBLISHED)[0]["verdict"] == "differs"
