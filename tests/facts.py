"""Facts in a text, whatever the words around them: what tests demand of sentences instead of the sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from numbers import Integral

from massact.reports.spelling import number


def each(*facts: object) -> str:
    """A regular expression for texts that hold every fact, in any order, each as a whole word or a whole number.

    Args:
        facts: words as they stand in the text; whole numbers and floats, spelled as sentences do.
    """
    return "(?s)^" + "".join(f"(?=.*{_whole(fact)})" for fact in facts)


def tells(text: str | Iterable[str], *facts: object) -> list[str]:
    """The sentences that hold every fact.

    Args:
        text: a text, cut into its sentences here, or the sentences.
        facts: as in `each`.
    """
    parts = re.split(r"(?<=[.!?])\s+", _one_line(text)) if isinstance(text, str) else map(_one_line, text)
    return [part for part in parts if re.search(each(*facts), part)]


def _one_line(text: str) -> str:
    return " ".join(text.replace("│", " ").split())  # what the frame of a terminal cut is one text again


def _whole(fact: object) -> str:
    """1 is not in 12, 1.5, 1,000, -1, or 1-3, and bias is not in kv-bias."""
    spelled = fact if isinstance(fact, str) else f"{fact:,}" if isinstance(fact, Integral) else number(fact)
    left = r"(?<![\w-])(?<!\d[.,])" if spelled[0].isalnum() else ""
    right = r"(?!\w|[.,-]\d)" if spelled[-1].isalnum() else ""
    return left + re.escape(spelled) + right
