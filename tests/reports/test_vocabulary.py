"""What is read of images says image and patch, in every sentence, title and legend."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

import massact as ma
from massact.classics import classics
from massact.reports import READINGS
from massact.reports.kinds.scan.nouns import Nouns
from massact.reports.panels import Axis, Line, Panel, Sheet
from massact.reports.parts import Words
from massact.reports.vocabulary import _INSIDE, _OURS, said, speaking_of
from tests.families import build

OF_TEXT = re.compile(r"(?<!class )(?<!register )\b(tokens?|prompts?)\b", re.I)


def texts_of(thing: Any) -> list[str]:
    """Every text of ours in a part, a section, a sheet."""
    if isinstance(thing, str):
        return [thing]
    if isinstance(thing, list | tuple):
        return [text for one in thing for text in texts_of(one)]
    names = (*_OURS.get(type(thing), ()), *_INSIDE.get(type(thing), ()))
    return [text for name in names for text in texts_of(getattr(thing, name))]


@pytest.fixture(scope="module")
def results() -> list[Any]:
    model = ma.load(build("vit"))
    random = np.random.default_rng(0)
    pictures = ma.corpus([Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(4)],
                         preprocess={"mean": 0.5, "std": 0.5, "resize": 20, "crop": 20})  # fmt: skip
    scan = ma.scan(model, pictures, thresholds={"magnitude": 0, "ratio": 2.5}, null=False)
    return [scan, ma.explain(model, pictures, scan), classics(model, pictures, scan)]


def test_nothing_of_images_is_a_token(results: list[Any]) -> None:
    patches = 0
    for result in results:
        reading = READINGS[result.KIND]
        sheets = [sheet for draw in reading.drawings(result).values() if (sheet := draw(result)) is not None]
        texts = texts_of([*reading.words(result), *reading.sections_of(result), *sheets, *reading.definition(result)])
        assert [text for text in texts if OF_TEXT.search(text)] == [], result.KIND
        patches += sum("patch" in text.lower() for text in texts)
    assert patches > 10


@pytest.mark.parametrize(("text", "of_images"), [
    ("Mean cosine of two tokens", "Mean cosine of two patches"), ("random tokens: 3%", "random patches: 3%"),
    ("Sparsity of a token (1: a single entry)", "Sparsity of a patch (1: a single entry)"),
    ("the first token is longer", "the first position is longer"), ("Tokens of it", "Patches of it"),
    ("the class token and a register token", "the class token and a register token"),
    ("model.embed_tokens.weight", "model.embed_tokens.weight"), ("Logits of the prompt", "Logits of the image"),
])  # fmt: skip
def test_how_a_sentence_is_said(text: str, of_images: str) -> None:
    assert speaking_of(Nouns("image", "patch"))(text) == of_images


def test_what_a_user_named_stays() -> None:
    panel = Panel("a token", [Line([1], [2], "tokens", said=["token"])], Axis("Token", ticks=[(1.0, "token")]))
    made = said([Sheet([panel]), Words(["No token."])], speaking_of(Nouns("image", "patch")))
    drawn = made[0].parts[0]
    assert (drawn.title, drawn.series[0].name, drawn.x.title) == ("a patch", "patches", "Patch")
    assert list(drawn.series[0].said) == ["token"] and drawn.x.ticks == [(1.0, "token")]
    assert list(made[1].sentences) == ["No patch."]
