"""An explanation of images or recordings speaks of patches or frames, wherever it speaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from massact.records.kinds.explanation import Explanation
from massact.reports import READINGS
from massact.reports.contents import contents_of
from massact.reports.kinds.scan.nouns import Nouns, in_nouns
from massact.reports.panels import Panel, Sheet

GOLDEN = Path(__file__).parents[1] / "golden" / "explained_6"


def explained(kind: str) -> Explanation:
    (found,) = [r for r in contents_of(GOLDEN).results.values() if isinstance(r, Explanation)]
    source = {} if kind == "text" else {"source": {"kind": kind}}
    return replace(found, info=replace(found.info, corpus=source, notes=[]))


def texts(part: Any) -> Iterator[str]:
    """Every text of a figure or section but for the tables, whose columns are as in the file."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, list | tuple):
        for one in part:
            yield from texts(one)
    elif is_dataclass(part):
        for field in fields(part):
            if field.name not in ("said", "ticks", "columns", "whole"):
                yield from texts(getattr(part, field.name))


def shown(result: Explanation) -> list[str]:
    reading = READINGS[result.KIND]
    made = [*(draw(result) for draw in reading.figures.values()), *reading.sections_of(result), *reading.brief(result)]
    return [*texts(made), *reading.words(result)]


def having(word: str, said: list[str]) -> list[str]:
    return [text for text in said if re.search(rf"(?<!class )\b{word}\b", text, re.IGNORECASE)]


@pytest.mark.parametrize(
    ("kind", "noun"), [("images", "patch(es)?"), ("recordings", "frames?"), ("pairs", "positions?")]
)
def test_what_is_no_text_has_no_tokens(kind: str, noun: str) -> None:
    before, after = shown(explained("text")), shown(explained(kind))
    assert len(having("tokens?", before)) > 20 and len(before) == len(after)
    assert not having("tokens?", after) and len(having(noun, after)) >= len(having("tokens?", before))


def test_only_what_is_ours_is_renamed() -> None:
    class Result:
        class info:
            corpus = {"source": {"kind": "images"}}  # noqa: RUF012

    panel = Panel("Tokens", [], caption="first tokens, class token, tokenizer", notes=[], sees="a token")
    made = in_nouns(lambda result: Sheet([panel]))(Result())
    assert made == Sheet([replace(panel, title="Patches", caption="first positions, class token, tokenizer",
                                  sees="a patch")])  # fmt: skip
    assert Nouns("image", "patch").plural() == "patches"
