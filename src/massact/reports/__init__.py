"""A scan or an explanation, readable: sentences, terminal tables, JSON and figures.

Takes a `ScanResult`, an `Explanation`, an `Intervention`, `Classics`, a `Reproduction`, a `Trained`, a `Lab`, a
`ShapeLab` or a `Trajectory`, fresh or of a run directory; or several runs, to put them side by side (`compare`). Gives
sentences (`answer_in_words`, ...), tables in a terminal (`show`, ...), JSON (`to_json`), the paper's figures (`draw`)
and one HTML page (`report`).
Knows how numbers and strange tokens are spelled, and what each figure of Sun 2024 looks like. Must not know torch,
models, or how anything was measured; it measures nothing, and nothing that it writes is read back.
"""

from massact.reports.classics import classics_in_words
from massact.reports.compare_figures import draw_comparison
from massact.reports.comparison import compare
from massact.reports.effects import effects_in_words, verdict
from massact.reports.figures import draw
from massact.reports.lab import draw_lab, lab_in_words, lab_verdict, show_lab
from massact.reports.page import notebook_html, report
from massact.reports.reproduction import findings_in_words, reproduction_in_words
from massact.reports.shape_figure import draw_shapes_lab
from massact.reports.shapes import shapes_in_words, shapes_verdict, show_shapes
from massact.reports.side_by_side import comparison_in_words, show_comparison
from massact.reports.story import story_in_words
from massact.reports.terminal import (
    show,
    show_classics,
    show_explanation,
    show_intervention,
    show_reproduction,
    to_json,
)
from massact.reports.training import show_training, training_in_words
from massact.reports.trajectory import show_trajectory, trajectory_in_words
from massact.reports.words import answer_in_words

__all__ = [
    "answer_in_words",
    "classics_in_words",
    "compare",
    "comparison_in_words",
    "draw",
    "draw_comparison",
    "draw_lab",
    "draw_shapes_lab",
    "effects_in_words",
    "findings_in_words",
    "lab_in_words",
    "lab_verdict",
    "reproduction_in_words",
    "notebook_html",
    "report",
    "shapes_in_words",
    "shapes_verdict",
    "show",
    "show_classics",
    "show_comparison",
    "show_explanation",
    "show_intervention",
    "show_lab",
    "show_reproduction",
    "show_shapes",
    "show_training",
    "show_trajectory",
    "story_in_words",
    "to_json",
    "training_in_words",
    "trajectory_in_words",
    "verdict",
]
