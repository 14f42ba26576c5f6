"""The vision toy lab in words, tables and figure: a sentence says no more than its interval."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
import shape_labs
from PIL import Image
from rich.console import Console

from massact.records.errors import UserError
from massact.records.kinds.shapes import ShapeLab
from massact.reports import draw, shapes_in_words, shapes_verdict, show, to_json


def printed(lab: ShapeLab, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show(lab, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_was_found_is_told() -> None:
    lab = shape_labs.shape_lab()
    first, softmax, registers, kv, last = shapes_in_words(lab)
    assert "100 steps of adamw" in first and "512 held-out images; 60% of their patches" in first
    assert "it is right in 56% of the images (loss 0.8 nats)" in softmax
    assert "1.6 x the median norm, after block 4" in softmax
    assert "registers" not in softmax and "slot" not in softmax and "everywhere alike: 0.015" in softmax
    assert "The registers after block 2 set to zero: loss +0.4000 (+0.3800 to +0.4200)" in registers
    assert "zero hurts, the mean does not: a bias" in registers and "The registers take 0.25" in registers
    assert "not seen to hurt more than elsewhere" in kv and "The slot takes 0.25" in kv
    assert "the greatest |h| is 17, the greatest ratio 5" in last and "largest has 1.6 x" in last


@pytest.mark.parametrize(
    ("zero", "mean", "other", "verdict", "said"),
    [
        ((0.15, 0.02), (0.10, 0.02), (0.02, 0.01), "content", "the mean does not undo that"),
        ((0.15, 0.40), (0.00, 0.01), (0.02, 0.01), "free", "not seen to hurt more"),
        ((0.15, 0.02), (0.00, 0.01), (0.15, 0.02), "free", "not seen to hurt more"),
        ((0.15, 0.02), (0.00, 0.01), (0.02, 0.01), "bias", "a bias"),
    ],
)
def test_a_verdict_needs_its_whole_interval(
    zero: tuple[float, float], mean: tuple[float, float], other: tuple[float, float], verdict: str, said: str
) -> None:
    told = {("registers", "zero"): zero, ("registers", "mean"): mean, ("other patches", "zero"): other}
    lab = shape_labs.shape_lab(told)
    assert shapes_verdict(lab, "softmax+registers", "registers") == verdict
    assert said in shapes_in_words(lab)[2].split("most attended patch after")[0]
    assert shapes_verdict(lab, "softmax", "registers") == "unseen"


def test_what_is_massive_or_an_outlier_is_not_denied() -> None:
    massive = shapes_in_words(shape_labs.shape_lab(massive=0.5))[-1]
    assert "massive" not in massive and "outlier patches" in massive
    outliers = shapes_in_words(shape_labs.shape_lab(outliers=0.1))[-1]
    assert "massive" in outliers and "outlier patches" not in outliers
    assert shapes_in_words(shape_labs.shape_lab(massive=0.5, outliers=0.1))[-1].startswith("Intervals are over")


def test_attention_that_is_not_there_is_said_and_dashed() -> None:
    lab = shape_labs.shape_lab()
    attention = [c for c in lab.shapes_layers.columns if "_to_" in c]
    lab.shapes_layers[attention] = float("nan")
    lab.shapes_effects = lab.shapes_effects[lab.shapes_effects["target"] == "none"]
    assert "Its attention cannot be seen." in shapes_in_words(lab)[1]
    text = printed(lab)
    assert "Change of the loss" not in text
    row = next(line for line in text.split("Attention at the end")[1].splitlines() if line.startswith("softmax "))
    assert row.split()[2:6] == ["-"] * 4


def test_tables_hold_the_numbers() -> None:
    text = printed(shape_labs.shape_lab())
    ends = next(line for line in text.split("At the end")[1].splitlines() if line.startswith("softmax ")).split()
    assert ends[1:] == ["0.8000", "56%", "17.00", "5.000", "1.600", "-", "1.100", "0%"]
    assert "+0.4000 [+0.3800,+0.4200]" in text and "-20.0%" in text


def test_saved_opened_and_drawn_alike(tmp_path: Path) -> None:
    lab = shape_labs.shape_lab()
    lab.save(tmp_path / "lab")
    again = ShapeLab.open(tmp_path / "lab")
    assert again is not None
    for name in ("shapes", "shapes_layers", "shapes_effects"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(lab, name))
    assert printed(again) == printed(lab) and to_json(again) == to_json(lab)
    assert json.loads(to_json(lab))["shapes_layers"][0]["class_to_slot"] == "nan"
    png, svg = draw(again, tmp_path / "lab")
    assert Image.open(png).size[0] > 1000 and png.name == "shapes.png"
    assert draw(lab, tmp_path / "other")[1].read_bytes() == svg.read_bytes()
    assert ShapeLab.open(tmp_path / "other") is None
    assert len(draw(shape_labs.shape_lab(layers=1), tmp_path / "one")) == 2


def test_damage_is_one_message(tmp_path: Path) -> None:
    lab = shape_labs.shape_lab()
    lab.save(tmp_path)
    (tmp_path / "shapes_layers.parquet").unlink()
    with pytest.raises(UserError, match="shapes_layers.parquet"):
        ShapeLab.open(tmp_path)
    lab.shapes = lab.shapes[lab.shapes["arm"] != "kv-bias"]
    lab.save(tmp_path)
    with pytest.raises(UserError, match="no rows of 'kv-bias'"):
        ShapeLab.open(tmp_path)
    (tmp_path / "shapes.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        ShapeLab.open(tmp_path)


def test_intervals_are_whole_at_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    show(shape_labs.shape_lab(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+0.4000 [+0.3800,+0.4200]" in text and "-20.0%" in text
