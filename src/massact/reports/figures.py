"""All figures of a scan, as PNG and SVG, or PDF."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from massact.records.classics import Classics
from massact.records.explanation import Explanation
from massact.records.intervention import Intervention
from massact.records.results import ScanResult
from massact.records.trajectory import Trajectory
from massact.reports.attention import EXPLAIN_FIGURES
from massact.reports.census import draw_census
from massact.reports.classics import draw_classics
from massact.reports.curves import draw_headroom, draw_layers, draw_norms
from massact.reports.effects import draw_effects
from massact.reports.patches import PATCH_FIGURES, draw_patch_attention
from massact.reports.portrait import draw_magnitudes
from massact.reports.steps import draw_trajectory
from massact.reports.writing import USUAL, write_figures

FIGURES: dict[str, Callable[[ScanResult], Figure | None]] = {
    "layers": draw_layers,
    "magnitudes": draw_magnitudes,
    "census": draw_census,
    "headroom": draw_headroom,
    "norms": draw_norms,
    **PATCH_FIGURES,
}


def draw(
    result: ScanResult | Explanation | Intervention | Classics | Trajectory,
    directory: Path,
    formats: Sequence[str] = USUAL,
    only: Container[str] = (),
) -> list[Path]:
    """Write every figure of a scan, an explanation, an intervention, the classics or a trajectory into `figures/`.

    Args:
        result: fresh, or of a run directory.
        directory: the run directory; made if it is not there.
        formats: of png, svg, pdf.
        only: names of figures; nothing: all.

    Returns:
        The files, in the order of `FIGURES` or `EXPLAIN_FIGURES`; a figure without anything to show is missing.

    Raises:
        UserError: the directory cannot be written, or there is no such format.
    """
    figures = {name: make for name, make in _figures_of(result).items() if not only or name in only}
    return write_figures(result, figures, directory, formats)


def _figures_of(result: Any) -> dict[str, Callable[[Any], Figure | None]]:
    if isinstance(result, Explanation):
        return {**EXPLAIN_FIGURES, "attention_patches": draw_patch_attention}
    if isinstance(result, Classics):
        return {"classics": draw_classics}
    if isinstance(result, Trajectory):
        return {"trajectory": draw_trajectory}
    return {"effects": draw_effects} if isinstance(result, Intervention) else dict(FIGURES)
