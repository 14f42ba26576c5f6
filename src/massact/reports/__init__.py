"""A scan or an explanation, readable: sentences, terminal tables, JSON and figures.

Takes a `ScanResult`, an `Explanation`, an `Intervention`, `Classics`, a `Reproduction`, a `Trained`, a `Lab` or a
`Trajectory`, fresh or of a run directory; or several runs, to put them side by side (`compare`). Gives
sentences (`answer_in_words`, ...), tables in a terminal (`show`, ...), JSON (`to_json`), the paper's figures (`draw`)
one HTML page (`report`), and what a prompt or a notebook shows (`answer`, `summary`, `plot`, `notebook_html`).
Knows how numbers and strange tokens are spelled, and what each figure of Sun 2024 looks like. Must not know torch,
models, or how anything was measured; it measures nothing, and nothing that it writes is read back.
"""

from massact.reports.documents import draw, plot, publish, report
from massact.reports.kinds import READINGS
from massact.reports.kinds.classics import classics_in_words
from massact.reports.kinds.comparison.table import compare
from massact.reports.kinds.comparison.words import comparison_in_words
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.intervention import effects_in_words, verdict
from massact.reports.kinds.lab import lab_in_words, lab_verdict
from massact.reports.kinds.reproduction import claim_in_words, findings_in_words, reproduction_in_words
from massact.reports.kinds.scan.words import answer_in_words
from massact.reports.kinds.training import training_in_words
from massact.reports.kinds.trajectory.words import trajectory_in_words
from massact.reports.readings import Reading
from massact.reports.render.json import to_json
from massact.reports.render.notebook import answer, notebook_html, summary
from massact.reports.render.terminal import show

__all__ = [
    "READINGS",
    "Reading",
    "answer",
    "answer_in_words",
    "classics_in_words",
    "compare",
    "comparison_in_words",
    "draw",
    "effects_in_words",
    "claim_in_words",
    "findings_in_words",
    "lab_in_words",
    "lab_verdict",
    "notebook_html",
    "plot",
    "publish",
    "report",
    "reproduction_in_words",
    "show",
    "story_in_words",
    "summary",
    "to_json",
    "training_in_words",
    "trajectory_in_words",
    "verdict",
]
