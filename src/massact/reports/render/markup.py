"""Text that cannot become markup: in templates, which escape all that they show, Markdown, LaTeX, labels of figures."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from massact.reports.spelling import HIDDEN, NAMED, counted, escaped, shortened

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


def plain(value: Any) -> str:
    """Text on one line with hidden characters as escapes; unlike `visible` it leaves alone what is escaped already."""
    return "".join(
        NAMED.get(c) or escaped(c) if unicodedata.category(c) in HIDDEN else c
        for c in ("" if value is None else str(value))
    )


def prose(sentence: str, links: bool = False) -> Markup:
    """A sentence as HTML: right-to-left words are set apart; with `links`, arXiv numbers lead to arxiv.org."""
    out = _FROM_RIGHT.sub(lambda m: f"<bdi>{m.group()}</bdi>", escape(plain(sentence)))
    if links:
        out = _LINK.sub(lambda m: f'<a href="https://arxiv.org/abs/{m.group(1)}" rel="noreferrer">{m.group()}</a>', out)
    return Markup(out)


@cache
def environment() -> Environment:
    """The templates of this folder: what they show is one line of text, escaped; nothing in them is undefined."""
    made = Environment(
        loader=PackageLoader("massact.reports", "render"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"prose": prose, "inlined_json": inlined_json, "lines": _lines, "counted": counted}
    made.filters["kind"] = lambda part: type(part).__name__
    return made


def render_template(template: str, **given: Any) -> str:
    """A template with the values and functions that it is given."""
    return environment().get_template(template).render(**given).strip()


def _lines(text: str) -> Markup:
    return Markup("\n").join(escape(plain(line)) for line in text.split("\n"))


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
