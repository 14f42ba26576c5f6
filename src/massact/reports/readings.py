"""How each kind of result is read: its words, its tables in a terminal, its figures, its main table."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from massact.reports.kinds.classics import classics_in_words, draw_classics
from massact.reports.kinds.comparison.figures import COMPARE_FIGURES
from massact.reports.kinds.comparison.words import comparison_in_words, show_comparison
from massact.reports.kinds.explanation.attention import EXPLAIN_FIGURES
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.intervention import draw_effects, effects_in_words
from massact.reports.kinds.lab import lab_figure, lab_in_words, show_lab
from massact.reports.kinds.reproduction import reproduction_in_words
from massact.reports.kinds.scan.census import draw_census
from massact.reports.kinds.scan.curves import draw_headroom, draw_layers, draw_norms
from massact.reports.kinds.scan.patches import PATCH_FIGURES, draw_patch_attention
from massact.reports.kinds.scan.portrait import draw_magnitudes
from massact.reports.kinds.scan.words import answer_in_words
from massact.reports.kinds.training import show_training, trained_in_words
from massact.reports.kinds.trajectory.steps import draw_trajectory
from massact.reports.kinds.trajectory.words import show_trajectory, trajectory_in_words
from massact.reports.render.figures import USUAL, write_figures
from massact.reports.render.terminal import (
    noted,
    show_classics,
    show_explanation,
    show_intervention,
    show_other,
    show_reproduction,
    show_scan,
)


@dataclass(frozen=True)
class Reading:
    """How one kind of result is read.

    Args:
        words: its sentences, the answer first.
        show: prints words and tables.
        figures: name -> what draws it; None where there is nothing to show.
        table: the one whose first rows stand for it. by: the column whose greatest come first; "": as they lie.
    """

    words: Callable[[Any], list[str]]
    show: Callable[[Any, Console], None]
    figures: Mapping[str, Callable[[Any], Figure | None]] = field(default_factory=dict)
    table: str = ""
    by: str = ""

    def first_rows(self, result: Any) -> pd.DataFrame | None:
        """The rows of its main table, those first that a reader wants first."""
        if not self.table:
            return None
        rows: pd.DataFrame = getattr(result, self.table)
        return rows.sort_values(self.by, ascending=False, kind="stable") if self.by else rows


FIGURES: dict[str, Callable[[Any], Figure | None]] = {
    "layers": draw_layers, "magnitudes": draw_magnitudes, "census": draw_census, "headroom": draw_headroom,
    "norms": draw_norms, **PATCH_FIGURES,
}  # fmt: skip

READINGS: dict[str, Reading] = {
    "scan": Reading(answer_in_words, show_scan, FIGURES, "findings", "magnitude"),
    "explanation": Reading(story_in_words, show_explanation,
                           {**EXPLAIN_FIGURES, "attention_patches": draw_patch_attention}, "axes"),
    "intervention": Reading(effects_in_words, show_intervention, {"effects": draw_effects}, "effects"),
    "classics": Reading(classics_in_words, show_classics, {"classics": draw_classics}, "classics"),
    "reproduction": Reading(reproduction_in_words, show_reproduction),
    "training": Reading(trained_in_words, show_training, table="training"),
    "trajectory": Reading(trajectory_in_words, show_trajectory, {"trajectory": draw_trajectory}, "revisions"),
    "lab": Reading(lab_in_words, show_lab, {"lab": lab_figure}, "lab"),
    "comparison": Reading(comparison_in_words, show_comparison, COMPARE_FIGURES),
}  # fmt: skip


OTHER = Reading(noted, show_other)


def reading_of(kind: str) -> Reading:
    """How a kind is read; one of another package by its notes and tables."""
    return READINGS.get(kind, OTHER)


def show(result: Any, console: Console) -> None:
    """Print a result of any kind: its words, then its tables.

    Args:
        result: fresh, or of a run directory.
        console: where to; colours and width are its own. Nothing in a result is read as markup.
    """
    reading_of(result.KIND).show(result, console)


def draw(result: Any, directory: Path, formats: Sequence[str] = USUAL, only: Container[str] = ()) -> list[Path]:
    """Write every figure of a result of any kind into `figures/`.

    Args:
        result: fresh, or of a run directory.
        directory: the run directory; made if it is not there.
        formats: of png, svg, pdf.
        only: names of figures; nothing: all.

    Returns:
        The files, in the order of the figures; one without anything to show is missing.

    Raises:
        UserError: the directory cannot be written, or there is no such format.
    """
    figures = reading_of(result.KIND).figures
    return write_figures(result, {n: make for n, make in figures.items() if not only or n in only}, directory, formats)


def to_json(result: Any) -> str:
    """What `--json` prints: `result.as_dict()`; NaN and Inf are strings, and all is ASCII for any pipe."""
    return json.dumps(result.as_dict(), indent=2, allow_nan=False, default=_missing)


def _missing(value: Any) -> None:
    """Pandas' missing value is null; anything else that JSON lacks is a mistake of ours."""
    if value is pd.NA or value is pd.NaT:
        return None
    raise TypeError(f"{type(value).__name__} in a result cannot be JSON")
