"""Patterns of module names: regular expressions that match the modules that are meant, and none beside."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def patterns_of(meant: Iterable[str], names: Iterable[str], always_regex: bool = False) -> list[str]:
    r"""Dotted names and patterns "re:...$" that match `meant` among `names`, from the first letter on.

    Names that differ in their first number (the block) are one pattern; `\d+` where every block has one that is meant.
    Where few blocks are left out, the pattern says these.

    Args:
        meant: dotted names, all of them in `names`.
        names: of all modules that could be matched.
        always_regex: a single name is a pattern, too.
    """
    blocks: dict[str, set[str]] = {}
    known = _by_frame(names)
    for frame, numbers in known.items():
        blocks.setdefault(frame.partition("*")[0], set()).update(numbers)
    made = []
    for frame, chosen in _by_frame(meant).items():
        before, _, behind = frame.partition("*")
        if len(chosen) == 1 and not always_regex:
            made.append(before + chosen[0] + behind)
            continue
        every = set(known[frame]) == blocks[before] and behind.startswith(".")
        made.append(f"re:{re.escape(before)}{_slot(chosen, known[frame], every)}{re.escape(behind)}$")
    return made


def _slot(chosen: list[str], numbers: list[str], every: bool) -> str:
    """The pattern of the number: those chosen; or any but those left out, where every block has such a module."""
    left = [n for n in numbers if n not in chosen]
    if every and len(chosen) > max(1, len(left)):
        return rf"(?!(?:{'|'.join(left)})\.)\d+" if left else r"\d+"
    return f"({'|'.join(chosen)})" if len(chosen) > 1 else chosen[0]


def frame_of(name: str) -> str:
    """A dotted name with `*` for its first number."""
    return _NUMBER.sub("*", name, count=1)


def _by_frame(names: Iterable[str]) -> dict[str, list[str]]:
    """Frames -> the first numbers of their names, in order; "" where there is none."""
    found: dict[str, list[str]] = {}
    for name in names:
        number = _NUMBER.search(name)
        found.setdefault(frame_of(name), []).append(number[0] if number else "")
    return found
