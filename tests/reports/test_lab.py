"""The toy lab in words, tables and figure: a sentence says no more than its interval."""

from __future__ import annotations

import io
import json
from pathlib import Path

import labs
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from massact.records.errors import UserError
from massact.records.kinds.lab import Lab
from massact.records.tables import frame
from massact.reports import draw, lab_in_words, lab_verdict, show, to_json
from massact.reports.spelling import number, percent
from tests.facts import tells


def printed(lab: Lab, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show(lab, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_story_is_told_where_the_numbers_tell_it() -> None:
    lab = labs.lab()
    assert [lab_verdict(lab, v) for v in lab.variants] == ["bias", "free", "free"]
    first, softmax, kv, one, last = lab_in_words(lab)
    config, ends = lab.info.config, lab.lab.drop_duplicates("variant", keep="last").set_index("variant")
    assert tells([first], f"{config['steps']} steps", config["optimiser"], percent(config["share"]))
    assert tells([first], lab.info.corpus["looked_at"])
    assert tells(softmax, "a sink", ends["first_attention"]["softmax"]) and tells(softmax, "zero", "mean", "bias")
    assert tells(kv, "slot", ends["slot_mass"]["kv-bias"], "more") and tells(kv, "no sink") and not tells(kv, "bias")
    zero = lab.lab_effects.query("edit == 'zero' and position == 0").set_index("variant")["delta_nats"]
    for name, words in (("kv-bias", kv), ("softmax-off-by-one", one)):
        assert tells(words, percent(zero[name] / zero["softmax"], 2), "softmax")
    assert tells(last, "not", "massive activations") and tells(last, f"|h| is {number(lab.lab['top1'].max())}")


@pytest.mark.parametrize(
    ("zero", "mean", "ordinary", "verdict", "word"),
    [
        ((0.15, 0.02), (0.10, 0.02), (0.02, 0.01), "content", "undo"),
        ((0.15, 0.14), (0.00, 0.01), (0.02, 0.01), "free", "not seen"),  # too wide
        ((0.02, 0.03), (0.00, 0.01), (-0.2, 0.01), "free", "not seen"),  # holds 0
        ((0.05, 0.01), (0.00, 0.02), (0.02, 0.01), "content", "undo"),  # mean: too wide
        ((0.05, 0.01), (-0.01, 0.003), (0.02, 0.01), "bias", "bias"),
    ],
)
def test_a_verdict_needs_its_whole_interval(
    zero: tuple[float, float], mean: tuple[float, float], ordinary: tuple[float, float], verdict: str, word: str
) -> None:
    lab = labs.lab({"softmax": {("zero", 0): zero, ("mean", 0): mean, ("zero", 9): ordinary, ("mean", 9): ordinary}})
    assert lab_verdict(lab, "softmax") == verdict
    assert [w for w in ("undo", "not seen", "bias") if tells([lab_in_words(lab)[1]], w)] == [word]


def test_the_same_state_in_every_sequence_is_no_evidence() -> None:
    lab = labs.lab()
    assert not any("nothing" in words for words in lab_in_words(lab))
    lab.lab_effects["cosine"] = 1.0
    assert tells(lab_in_words(lab)[1], "nothing", "same", "every sequence")
    assert not tells(lab_in_words(lab)[1], "a bias")


def test_a_massive_activation_is_not_denied() -> None:
    lab = labs.lab()
    lab.lab[["top1", "ratio"]] = [500.0, 2000.0]
    assert "does not show" not in lab_in_words(lab)[-1] and "Intervals are over" in lab_in_words(lab)[-1]


def test_tables_hold_the_numbers_and_dashes_where_there_are_none() -> None:
    text = printed(labs.lab())
    ends = next(line for line in text.split("At the end")[1].splitlines() if line.startswith("softmax ")).split()
    assert ends[1:] == ["3.000", "1.000", "0.5000", "0.3500", "0.7000", "-", "1.500"]
    assert "+0.1500 [+0.1300,+0.1700]" in text and "-0.0020 [-0.0050,+0.0010]" in text


def test_a_model_of_one_block_has_no_effects(tmp_path: Path) -> None:
    lab = labs.lab()
    lab.lab_effects = frame("lab_effects")
    assert lab_verdict(lab, "softmax") == "unseen" and "not measured" in lab_in_words(lab)[1]
    assert "set to" in printed(labs.lab()) and "set to" not in printed(lab)
    assert len(draw(lab, tmp_path)) == 1


def test_saved_opened_and_drawn_alike(tmp_path: Path) -> None:
    lab = labs.lab()
    lab.save(tmp_path / "lab")
    again = Lab.open(tmp_path / "lab")
    pd.testing.assert_frame_equal(again.lab, lab.lab)
    pd.testing.assert_frame_equal(again.lab_effects, lab.lab_effects)
    assert printed(again) == printed(lab) and to_json(again) == to_json(lab)
    assert json.loads(to_json(lab))["lab"][0]["slot_mass"] == "nan"
    png, svg = draw(again, tmp_path / "lab", ("png", "svg"))
    assert Image.open(png).size[0] > 1000 and png.name == "lab.png"
    assert draw(lab, tmp_path / "other", ("png", "svg"))[1].read_bytes() == svg.read_bytes()
    assert Lab.open(tmp_path / "other") is None


def test_damage_is_one_message(tmp_path: Path) -> None:
    lab = labs.lab()
    lab.save(tmp_path)
    (tmp_path / "lab.parquet").unlink()
    with pytest.raises(UserError, match="lab.parquet"):
        Lab.open(tmp_path)
    lab.lab = lab.lab[lab.lab["variant"] != "kv-bias"]
    lab.save(tmp_path)
    with pytest.raises(UserError, match="no rows of 'kv-bias'"):
        Lab.open(tmp_path)
    (tmp_path / "lab.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Lab.open(tmp_path)


def test_at_eighty_columns_names_of_variants_are_whole() -> None:
    console = Console(file=io.StringIO(), width=80)
    lab = labs.lab()
    show(lab, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(line.split()[:1] == ["kv-bias"] for line in lines)
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("set to"))
    names = [line.split()[0] for line in lines[start + 2 : start + 5]]
    assert names == [lab.variants[0], "zero", "mean"]
