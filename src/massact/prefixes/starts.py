"""Texts that begin with every class of token: of the corpus, and short ones of ours.

Shapes: N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.corpora.packing import token_ids
from massact.corpora.token_strings import DELIMITERS, Spelling
from massact.models import Model

LENGTH = 16  # tokens of a text that is there for its start
TEXTS, TEXT_LENGTH, MOST_HELD = 4, 128, 8  # of the corpus: to choose by, their length, held out
TEXT = "text"  # the class of what was scanned, as it begins
_TAILS = ("and the road goes on along the river", "then it was late and the lamps were lit in the street")
_OURS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "word": (["Rivers carry fine sand down to the sea in spring"], ["Most winters are mild where hills keep the wind"]),
    "digit": (["1984 was a dry year in the upper valley"], ["37 boats had left the harbour before dawn"]),
    "space": (["   an indented line begins with some spaces"], ["  so does this other one, after two of them"]),
    "newline": (["\nAfter an empty line the letter begins"], ["\n\nTwo of them stand before this paragraph"]),
    "code": (["def area(width, height):\n    return width * height\n"],
             ["for (int i = 0; i < n; i++) { sum += a[i]; }\n"]),
    "script": (["Реки несут песок к самому морю", "水は低い所へ流れていく"],
               ["Τα ποτάμια κυλούν προς τη θάλασσα", "تحمل الأنهار الرمل إلى البحر"]),
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Texts without anything in front, each with its class.

    Args:
        corpus: the texts, those of different length padded on the right.
        classes: (N,) of each.
        lead: what stood in front of every text when it was scanned (BOS, or nothing).
    """

    corpus: Corpus
    classes: tuple[str, ...]
    lead: tuple[int, ...] = ()
    missing: tuple[str, ...] = field(default=(), compare=False)

    def rows(self, name: str = TEXT) -> list[Tensor]:
        """The ids (T,) of the texts of one class."""
        return [row for row, mine in zip(rows_of(self.corpus), self.classes, strict=True) if mine == name]


def rows_of(corpus: Corpus) -> list[Tensor]:
    """The ids of every sequence that count."""
    ids_NT = corpus.inputs["input_ids"]
    return list(ids_NT) if corpus.mask is None else [ids[mask] for ids, mask in zip(ids_NT, corpus.mask, strict=True)]


def together(rows: Sequence[Tensor], like: Corpus, name: str = "") -> Corpus:
    """Texts as a corpus, padded on the right where they differ in length."""
    width = max(map(len, rows))
    ids_NT, mask_NT = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)], mask_NT[i, : len(row)] = row, True
    whole = bool(mask_NT.all())
    return replace(like, name=name or like.name, inputs={"input_ids": ids_NT}, mask=None if whole else mask_NT,
                   modalities=None, counts=())  # fmt: skip


def lead_of(model: Model, corpus: Corpus) -> tuple[int, ...]:
    """The special token that stands in front of every sequence, if one does."""
    first = {int(row[0]) for row in rows_of(corpus)}
    special = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    alone = len(first) == 1 and first <= special and all(len(row) > 2 for row in rows_of(corpus))
    return tuple(first) if alone else ()


def without_lead(corpus: Corpus, lead: Sequence[int]) -> Corpus:
    """The same texts without what stands in front of each."""
    return together([row[len(lead) :] for row in rows_of(corpus)], corpus) if lead else corpus


def class_of(spelling: Spelling, token: int) -> str:
    """The class of a token: newline, space, digit, word, script (letters beyond ASCII), the delimiter, or other."""
    text = spelling.string(token)
    bare = text.strip(" ")
    if not bare:
        return "space" if text else "other"
    if set(bare) <= {"\n", "\r"}:
        return "newline"
    if bare in DELIMITERS:
        return repr(bare)
    kinds = {"digit": bare.isdecimal(), "word": bare.isascii() and bare.isalpha(), "script": bare.isalpha()}
    return next((name for name, is_one in kinds.items() if is_one), "other")


def parts_of_corpus(model: Model, corpus: Corpus) -> tuple[Texts, Texts]:
    """The texts to choose by, and those held out: of the corpus, from its first half and its second, and ours.

    Args:
        model: with its tokenizer; without one there are no classes but the text itself.
        corpus: what was scanned.
    """
    lead = lead_of(model, corpus)
    rows = [row[len(lead) :] for row in rows_of(corpus)]
    if len(rows) > 1:
        halves = rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]
    else:
        middle = max(1, len(rows[0]) // 2)
        halves = [rows[0][:middle]], [rows[0][middle:]]
    made = []
    for part, (mine, most) in enumerate(zip(halves, (TEXTS, MOST_HELD), strict=True)):
        named = [(row[:TEXT_LENGTH], TEXT) for row in mine[:most]]
        starts, missing = _starts(model, corpus, mine, part)
        named += starts
        classes = tuple(name for _, name in named)
        made.append(Texts(together([row for row, _ in named], corpus), classes, lead, missing))
    return made[0], made[1]


def _starts(
    model: Model, corpus: Corpus, rows: Sequence[Tensor], part: int
) -> tuple[list[tuple[Tensor, str]], tuple[str, ...]]:
    """Texts that begin with a token of each class, and the classes of which there is none."""
    if model.tokenizer is None:
        return [], tuple(_OURS)
    spelling = corpus.spelling or Spelling(model.tokenizer)
    ours = {name: both[part] for name, both in _OURS.items()}
    ours |= {repr(mark): [f"{mark} {_TAILS[part]}"] for mark in sorted(DELIMITERS)}
    found: list[tuple[Tensor, str]] = []
    known = set(range(model.vocabulary or 0))
    for name, texts in ours.items():
        for text in texts:
            ids = token_ids(model.tokenizer, text)[:LENGTH]
            if len(ids) > 1 and set(ids) <= known:
                found.append((torch.tensor(ids), name))
    found += _of_rows(spelling, rows)
    has = {name for _, name in found}
    return found, tuple(name for name in ours if name not in has)


def _of_rows(spelling: Spelling, rows: Sequence[Tensor]) -> list[tuple[Tensor, str]]:
    """Of the corpus, for each class the first place at which a text could begin so."""
    first: dict[str, Tensor] = {}
    for row in rows:
        for pos in range(1, len(row) - LENGTH // 2):
            first.setdefault(class_of(spelling, int(row[pos])), row[pos : pos + LENGTH])
    return [(row, name) for name, row in first.items()]
