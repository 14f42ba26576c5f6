"""Errors that a user sees: what happened, why, what to do about it.

MassactError
├── UserError      bad usage or bad input        exit status 2
│   └── ProofError   the model could not be proved to be understood
└── WorkError      the work itself failed        exit status 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MassactError(Exception):
    """An error with three parts: what happened, why, and what to do.

    Args:
        what: one sentence, with the user's own value in it.
        why: the cause, where it is known.
        do: the next step for the user.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = what, why, do
        super().__init__("\n".join(part for part in (what, why, do) if part))


class UserError(MassactError, ValueError):
    """Bad usage or bad input."""

    exit_code = 2


class ProofError(UserError):
    """The model could not be proved to be understood, so nothing is measured on it."""


class WorkError(MassactError, RuntimeError):
    """The input was fine, the work failed."""

    exit_code = 1


def check_options(verb: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an option that a verb does not have.

    Raises:
        UserError: says which are near.
    """
    for name in given:
        if name not in known:
            raise UserError(f"{verb} has no option {name!r}.", do=near(name, known))


def causes(error: BaseException) -> list[BaseException]:
    """An exception and what it came from, the last one first; at most 10."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(cause)
    return chain


def first_line(error: BaseException, empty: str | None = None) -> str:
    """The first line of what an exception says; where it says nothing, `empty` or else its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if empty is None else empty


def class_and_line(error: BaseException) -> str:
    """What an exception of somebody else is, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error, '')}"


def near(name: str, names: Iterable[str], kind: str = "Known") -> str:
    """Say which known names resemble `name`, and list them all when they are few.

    Args:
        kind: what the names are of.
    """
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listing = ", ".join(known[:24]) + (f" and {len(known) - 24:,} more" if len(known) > 24 else "")
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}{kind}: {listing}."
