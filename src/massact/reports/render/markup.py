"""Text that cannot become markup: HTML made of pieces that escape themselves, Markdown, LaTeX, labels of figures."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

from massact.reports.spelling import HIDDEN, NAMED, escaped, shortened

VOID = {"meta", "input", "br", "hr"}
# Runs of letters that are written from the right; each is kept apart, so that it turns nothing else round.
_FROM_RIGHT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]+")
_LINK = re.compile(r"(?<![\w.])(?:arXiv[: ])?(\d{4}\.\d{5})(?!\d)")
_MARKS = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "±": r"$\pm$", "…": r"\ldots{}",
    "“": "``", "”": "''",
}  # fmt: skip


class Markup(str):
    """A string that is HTML already."""


def plain(value: Any) -> str:
    """Text on one line with hidden characters as escapes; unlike `visible` it leaves alone what is escaped already."""
    return "".join(
        NAMED.get(c) or escaped(c) if unicodedata.category(c) in HIDDEN else c
        for c in ("" if value is None else str(value))
    )


def text(value: Any) -> Markup:
    """Anything as HTML text: `plain`, and escaped; `None` is nothing."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(plain(value), quote=True))


def prose(sentence: str, links: bool = False) -> Markup:
    """A sentence as HTML: right-to-left words are set apart; with `links`, arXiv numbers lead to arxiv.org."""
    out = _FROM_RIGHT.sub(lambda m: f"<bdi>{m.group()}</bdi>", text(sentence))
    if links:
        out = _LINK.sub(lambda m: f'<a href="https://arxiv.org/abs/{m.group(1)}" rel="noreferrer">{m.group()}</a>', out)
    return Markup(out)


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Children that are no `Markup` are escaped; `class_` is class, `data_x` data-x; None is left out."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inside = "".join(text(child) for child in children if child is not None)
    return Markup(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{inside}</{name}>")


def join(parts: Any) -> Markup:
    """Pieces one after the other."""
    return Markup("".join(text(part) for part in parts))


def inlined_json(value: Any) -> Markup:
    """JSON for inside a script element: ASCII, and with nothing in it that could end the element."""
    dumped = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return Markup(dumped)


def figure_text(value: Any, limit: int = 60) -> str:
    """Text for a figure: plotly reads some tags, entities and $formulas$ in it, so these are escaped once more."""
    return html.escape(shortened(plain(value), limit), quote=False).replace("$", "&#36;")


def cut(shown: str, limit: int = 60) -> str:
    """At most about `limit` characters; what is longer says how long it is."""
    return shown if len(shown) <= limit else f"{shown[:limit]}\u2026 ({len(shown):,} characters)"


def md(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKS.sub(r"\\\1", plain(text))


def tex(text: str) -> str:
    """Text that LaTeX (XeLaTeX or LuaLaTeX, for letters beyond Latin) shows as it is."""
    return "".join(_LATEX.get(c, c) for c in plain(text))
