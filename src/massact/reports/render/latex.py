"""The main tables of a page as LaTeX, under its answer and what its figures show as comments."""

from __future__ import annotations

from massact.reports.pages import Page
from massact.reports.panels import Drawn, caption_of
from massact.reports.parts import Table, Words
from massact.reports.render.markup import plain, tex


def latex(page: Page) -> str:
    """The main tables of the page in LaTeX, for `\\usepackage{booktabs,longtable}`, under the answer as a comment."""
    lines = [f"% {plain(page.title)}: {plain(page.subtitle)}", "% \\usepackage{booktabs,longtable}"]
    for section in page.sections:
        lines += [f"% {plain(s)}" for p in section.parts if isinstance(p, Words) and p.lead for s in p.sentences]
        drawn = [p for p in section.parts if isinstance(p, Drawn)]
        lines += [f"% Figure. {plain(' '.join(caption_of(p)))}" for p in drawn]
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
