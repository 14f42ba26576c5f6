"""One self-contained HTML page of a run, or of several side by side; also as Markdown and LaTeX.

`held` opens a run directory, `assembled` says which sections a page has, `parts` what a section is made of, `written`
and `plain` write it. To add a section write one function of a `Held` that gives a `Section`, and name it in
`assembled.SECTIONS`.
"""

from massact.reports.page.reported import FORMATS, report
from massact.reports.page.shown import notebook_html

__all__ = ["FORMATS", "notebook_html", "report"]
