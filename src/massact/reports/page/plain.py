"""A page as Markdown and as LaTeX: the words and the main tables."""

from __future__ import annotations

from massact.reports.page.assembled import Page
from massact.reports.page.markup import md, plain, tex
from massact.reports.page.parts import Facts, Section, Table, Words


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
        elif isinstance(part, Table) and part.open and part.columns:
            lines += [f"**{md(part.title)}**", "", "| " + " | ".join(md(c.name) for c in part.columns) + " |"]
            lines += ["|" + "".join("---:|" if c.numeric else "---|" for c in part.columns)]
            rows = zip(*(c.shown for c in part.columns), strict=True)
            lines += ["| " + " | ".join(md(cell) for cell in row) + " |" for row in rows]
            lines += ["", *(f"{md(note)}\n" for note in part.notes)]
    return [f"## {md(section.title)}", "", *lines] if lines else []


def latex(page: Page) -> str:
    """The main tables of the page in LaTeX, for `\\usepackage{booktabs,longtable}`, under the answer as a comment."""
    lines = [f"% {plain(page.title)}: {plain(page.subtitle)}", "% \\usepackage{booktabs,longtable}"]
    for section in page.sections:
        lines += [f"% {plain(s)}" for p in section.parts if isinstance(p, Words) and p.lead for s in p.sentences]
        lines += [x for p in section.parts if isinstance(p, Table) and p.open and p.columns for x in _latex_table(p)]
    return "\n".join(lines) + "\n"


def _latex_table(table: Table) -> list[str]:
    """One longtable, the names of its columns as in the files."""
    form = "".join("r" if c.numeric else "l" for c in table.columns)
    head = " & ".join(tex(c.name) for c in table.columns)
    rows = [
        " & ".join(tex(cell) for cell in row) + r" \\" for row in zip(*(c.shown for c in table.columns), strict=True)
    ]
    notes = " ".join(tex(note) for note in table.notes)
    return ["", rf"\begin{{longtable}}{{{form}}}", rf"\caption{{{tex(table.title)}. {notes}}} \\".replace(". }", ".}"),
            r"\toprule", head + r" \\", r"\midrule", r"\endhead", *rows, r"\bottomrule", r"\end{longtable}",
            ]  # fmt: skip
