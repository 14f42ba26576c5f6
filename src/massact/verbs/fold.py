"""`massact fold`: its options."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, field_validator

from massact.records.errors import UserError
from massact.records.verdicts import MARGIN
from massact.verbs.inputs import OfScanOrModel
from massact.verbs.options import Options, option
from massact.verbs.verb import Verb

MOST_SLOTS = 4
AUTO = "auto"


def prefix_in(value: Any) -> Any:
    """A word, or token ids with commas."""
    if not isinstance(value, str):
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if value == AUTO:
        return value
    parts = [part.strip() for part in value.split(",")]
    if all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    raise UserError(f"--prefix {value!r} is no prefix.", do="Give auto, or token ids: --prefix 1 or --prefix 1,198.")


class FoldConfig(Options):
    """The options of a fold.

    The prefix is chosen on one part of the text and checked on another; effects are of that other part.
    """

    VERB: ClassVar[str] = "fold"

    prefix: Annotated[str | tuple[int, ...], BeforeValidator(prefix_in)] = option(
        AUTO, "Tokens whose keys and values become slots: auto (searched for), or ids with commas."
    )
    slots: int = option(1, f"Most tokens of a prefix that is searched for, 1 to {MOST_SLOTS}.", least=1)
    prune: bool = option(
        False, "Also set the super weights to zero, in the folded model too where it is shown that nothing changes."
    )
    batch_size: int = option(4, "Sequences per forward pass of the effects.", least=1)
    margin: float = option(MARGIN, "Nats of the log-perplexity within which nothing has happened.", least=0)

    @field_validator("slots")
    @classmethod
    def _few(cls, slots: int) -> int:
        if slots > MOST_SLOTS:
            raise UserError(f"--slots {slots} was asked for.", do=f"Give 1 to {MOST_SLOTS}.")
        return slots


VERB = Verb(
    "fold",
    "What if the massive activation were no token, but slots of keys and values?",
    OfScanOrModel,
    FoldConfig,
    job="massact.prefixes:fold",
    place=5,
)
