"""How a source becomes a corpus that fits a model: each source makes itself ready, what fits is looked at for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from massact.corpora.chat_templates import CHAT
from massact.corpora.preprocessing import checked
from massact.corpora.recordings import Prompt
from massact.records.errors import UserError, near

if TYPE_CHECKING:
    from massact.corpora.batch import Corpus


class Reader(Protocol):
    """What a source must know of a model: what it takes, and what prepares that (see `massact.models.Model`)."""

    name: str
    tokenizer: Any
    processor: Any
    example: dict[str, Any]

    @property
    def main_input(self) -> str: ...
    @property
    def image_input(self) -> str | None: ...
    @property
    def sound_input(self) -> str | None: ...
    @property
    def prompt(self) -> Prompt | None: ...
    @property
    def context(self) -> int | None: ...
    @property
    def vocabulary(self) -> int | None: ...
    @property
    def placeholders(self) -> dict[int, str]: ...
    def inputs_accepted(self) -> set[str]: ...


# Options of a scan: seq_len, n_sequences, bos, seed, chat_template, preprocess; None: what `corpus()` was given.
Wish = Any


def ready(model: Reader, source: Any, wish: Wish) -> Corpus:
    """A corpus that fits a model.

    Args:
        source: what has a method `ready(model, wish)`: text, images, images with text, sound, or a corpus.

    Raises:
        UserError: no tokenizer, another modality, or ids and lengths that the model does not take.
    """
    check_preprocess(source, wish.preprocess)
    text = (
        isinstance(getattr(source, "prompts", None), bool)
        or getattr(getattr(source, "origin", None), "bos", "") == CHAT
    )
    if wish.chat_template and not text:
        raise UserError("chat_template was given.", "The corpus is no text that waits for its tokens.", "Leave it out.")
    corpus, accepted = source.ready(model, wish), model.inputs_accepted()
    for name in corpus.inputs:
        if name not in accepted:
            raise UserError(
                f"The corpus holds {name!r}, which {model.name or 'the model'} does not take.", do=near(name, accepted)
            )
    corpus.require(model.vocabulary, model.context)
    return corpus.with_types(model)


def check_preprocess(source: Any, preprocess: Any) -> None:
    """Refuse a preprocessing where there are no images, or one with a step that there is not.

    Raises:
        UserError: says which are near.
    """
    checked(preprocess)
    if preprocess and getattr(source, "pictures", None) is None:
        raise UserError("preprocess was given.", "The corpus is not read from images.", "Leave it out.")


def refuse_text_options(kind: str, wish: Wish) -> None:
    """Refuse a length and a BOS policy where there is no text.

    Raises:
        UserError: one was asked for.
    """
    if wish.seq_len is not None or wish.bos not in (None, "auto"):
        raise UserError(f"seq_len and bos mean nothing for {kind}.", do="Leave them out.")


def how_many(asked: Any, otherwise: Any, have: int, kind: str, name: str) -> int:
    """How many of what a source holds are read, from the first one on.

    Args:
        asked, otherwise: a count, 'all', or None; `otherwise` is what `corpus()` was given.
        have: how many there are. kind, name: what they are called, for the error.

    Raises:
        UserError: more than there are.
    """
    n = otherwise if asked is None else asked
    if n in (None, "all"):
        return have
    if int(n) > have:
        raise UserError(f"{n} {kind} were asked for.", f"{name!r} has {have:,}.", "Use fewer.")
    return int(n)
