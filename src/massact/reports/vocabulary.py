"""What is read of images speaks of images and patches: one place for every sentence, title and legend of every kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from massact.reports.kinds.scan.nouns import Nouns, nouns_of
from massact.reports.panels import Axis, Bars, Gallery, Heat, Limit, Line, Note, Panel, Scene, Scenes, Sheet
from massact.reports.parts import Section, Strip, Table, Words
from massact.reports.readings import Reading

Say = Callable[[str], str]

# What has a name of its own in a vision transformer too stays: [CLS] is no patch, and neither is a register.
_KEPT = r"(?<!class )(?<!class_)(?<!CLS\] )(?<!CLS )(?<!register )(?<!text )(?<!special )"
_TOKEN = re.compile(rf"{_KEPT}\b(first |initial )?token(s?)\b", re.I)
_PROMPT = re.compile(r"\bprompt(s?)\b", re.I)
# Texts that we write, by what they stand in; what a user named (ticks, labels, paths) stands in others.
_OURS: dict[type, tuple[str, ...]] = {
    Panel: ("title", "caption", "note", "sees", "empty"), Scene: ("title", "caption", "note", "sees", "empty", "sides"),
    Scenes: ("title", "caption", "note", "sees", "empty"), Gallery: ("title", "caption", "note", "sees"),
    Axis: ("title",), Line: ("name",), Bars: ("name", "what", "groups"), Heat: ("what",), Limit: ("name",),
    Note: ("text",), Words: ("sentences",), Table: ("title", "notes"), Strip: ("title", "sees"), Section: ("title",),
    Sheet: ("title",),
}  # fmt: skip
_INSIDE = {Panel: ("series", "x", "y", "limits", "notes"), Scenes: ("scenes",), Section: ("parts",), Sheet: ("parts",)}


def speaking_of(nouns: Nouns) -> Say:
    """How a sentence about text is said of what has such nouns: its tokens and prompts are called by them."""

    def cased(word: str, like: str) -> str:
        return word.capitalize() if like[:1].isupper() else word

    def position(found: re.Match[str]) -> str:
        first, many = found[1], bool(found[2])
        if first:  # the first position of an image is as a rule its class token
            return cased(f"{first.lower()}position{'s' * many}", found[0])
        return cased(nouns.plural() if many else nouns.position, found[0])

    def say(text: str) -> str:
        text = _PROMPT.sub(lambda found: cased(f"{nouns.sequence}{found[1]}", found[0]), text)
        return _TOKEN.sub(position, text)

    return say


def said(thing: Any, say: Say) -> Any:
    """A sentence, a part of a page, a section or a sheet, with every text of ours in it said so."""
    if isinstance(thing, str):
        return say(thing)
    if isinstance(thing, list | tuple):
        return type(thing)(said(one, say) for one in thing)
    changed = {name: said(getattr(thing, name), say) for name in _OURS.get(type(thing), ())}
    changed |= {name: [said(one, say) for one in value] if isinstance(value, list | tuple) else said(value, say)
                for name in _INSIDE.get(type(thing), ()) for value in [getattr(thing, name)]}  # fmt: skip
    return replace(thing, **changed) if changed else thing


def say_of(result: Any) -> Say | None:
    """How sentences about a result are said where it is of images; None: as they are."""
    corpus = getattr(getattr(result, "info", None), "corpus", None)
    held = next((held for name in ("maps", "portrait") if isinstance(held := getattr(result, name, None), Mapping)), {})
    nouns = nouns_of(corpus if isinstance(corpus, Mapping) else None, held.get("tokens", ()))
    return speaking_of(nouns) if nouns.sequence == "image" else None


def spoken(reading: Reading) -> Reading:
    """A reading whose words, sections and figures call what a model reads by its name."""

    def of(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def made(result: Any) -> Any:
            found, say = make(result), say_of(result)
            return found if say is None or found is None else said(found, say)

        return made

    return replace(
        reading, words=of(reading.words), sections=tuple(map(of, reading.sections)), brief=of(reading.brief),
        definition=of(reading.definition), in_brief=of(reading.in_brief),
        figures={name: of(draw) for name, draw in reading.figures.items()},
    )  # fmt: skip
