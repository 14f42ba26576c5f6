"""What the inputs of a run are called: a prompt has tokens, an image patches, a recording frames."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar

R = TypeVar("R")

TOKEN = re.compile(r"(?<!class )\b(first )?([Tt])oken(s?)\b")  # a class token is one in an image, too
OF_DATA = {"said", "ticks", "columns", "whole", "id"}  # what was read and measured, not what that is called


@dataclass(frozen=True)
class Nouns:
    """What one sequence and one position are called."""

    sequence: str = "prompt"
    position: str = "token"

    def the(self) -> str:
        """What is looked at closely: 'the prompt', 'the first image'."""
        return "the prompt" if self.sequence == "prompt" else f"the first {self.sequence}"

    def plural(self) -> str:
        """Of positions."""
        return f"{self.position}{'es' if self.position.endswith('ch') else 's'}"

    def title(self) -> str:
        """Of a position, over an axis."""
        return self.position.capitalize()


OF_SOURCES = {"images": Nouns("image", "patch"), "recordings": Nouns("recording", "frame"),
              "pairs": Nouns("sequence", "position")}  # fmt: skip
OF_NAMES = {"patch (": "images", "frame ": "recordings"}


def nouns_of(corpus: Mapping[str, Any] | None, tokens: Iterable[Any] = ()) -> Nouns:
    """The nouns of a corpus.

    Args:
        corpus: its record in a run.
        tokens: names of positions of one sequence, which tell where the record does not say what was read.
    """
    record = corpus or {}
    source = record.get("source")
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind not in OF_SOURCES and record.get("kind") in ("tensors", None):
        names = [str(token) for token in tokens]
        kind = next((of for start, of in OF_NAMES.items() if any(name.startswith(start) for name in names)), None)
        return OF_SOURCES.get(str(kind), Nouns("sequence", "position") if record.get("kind") else Nouns())
    return OF_SOURCES.get(str(kind), Nouns())


def in_nouns(made_of: Callable[[Any], R]) -> Callable[[Any], R]:
    """What a result is drawn or told as, with patches, frames or positions where it read no text.

    Args:
        made_of: a result -> its sheet, or its sentences, in the words of text.
    """

    @wraps(made_of)
    def made(result: Any) -> R:
        words = nouns_of(result.info.corpus, getattr(result, "maps", {}).get("tokens", ()))
        shown = made_of(result)
        return shown if words.position == "token" else _called(shown, words)

    return made


def _called(part: Any, words: Nouns) -> Any:
    """A text, and any part of a figure that holds texts, in other nouns."""
    if isinstance(part, str):
        return TOKEN.sub(lambda found: _other(found, words), part)
    if isinstance(part, list | tuple):
        return type(part)(_called(one, words) for one in part)
    if is_dataclass(part) and not isinstance(part, type):
        kept = {field.name: getattr(part, field.name) for field in fields(part) if field.name not in OF_DATA}
        return replace(part, **{name: _called(value, words) for name, value in kept.items()})
    return part


def _other(found: re.Match[str], words: Nouns) -> str:
    first, letter, several = found.groups()
    singular = replace(words, position="position") if first else words  # what is first in an image may be no patch
    noun = singular.plural() if several else singular.position
    return (first or "") + (noun.capitalize() if letter.isupper() else noun)
