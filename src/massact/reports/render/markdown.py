"""A page as Markdown: the words, what the figures show, and the main tables."""

from __future__ import annotations

from massact.reports.pages import Page
from massact.reports.panels import Drawn, caption_of
from massact.reports.parts import Facts, Section, Table, Words
from massact.reports.render.markup import md


def markdown(page: Page) -> str:
    """The page in Markdown."""
    lines = [f"# {md(page.title)}", "", md(page.subtitle), ""]
    for section in page.sections:
        lines += _markdown_section(section)
    return "\n".join(lines).rstrip() + "\n"


def _markdown_section(section: Section) -> list[str]:
    lines: list[str] = []
    for part in section.parts:
        if isinstance(part, Words):
            lead = [md(s) for s in part.sentences[:1]] if part.lead else []
            lines += [*lead, *([""] if lead else []), *(f"- {md(s)}" for s in part.sentences[len(lead) :]), ""]
        elif isinstance(part, Facts):
            lines += [f"**{md(part.title)}**", ""] if part.title else []
            lines += [*(f"- {md(name)}: {md(value)}" for name, value in part.pairs), ""]
        elif isinstance(part, Drawn):
            lines += [f"*Figure.* {' '.join(md(text) for text in caption_of(part))}", ""]
        elif isinstance(part, Table) and part.open and part.columns:
            lines += [f"**{md(part.title)}**", "", "| " + " | ".join(md(c.name) for c in part.columns) + " |"]
            lines += ["|" + "".join("---:|" if c.numeric else "---|" for c in part.columns)]
            rows = zip(*(c.shown for c in part.columns), strict=True)
            lines += ["| " + " | ".join(md(cell) for cell in row) + " |" for row in rows]
            lines += ["", *(f"{md(note)}\n" for note in part.notes)]
    return [f"## {md(section.title)}", "", *lines] if lines else []
