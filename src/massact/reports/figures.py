"""All figures of a scan, as PNG and SVG, or PDF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from massact.records.classics import Classics
from massact.records.errors import UserError, near
from massact.records.explanation import Explanation
from massact.records.intervention import Intervention
from massact.records.results import ScanResult
from massact.records.tables import write_atomic
from massact.records.trajectory import Trajectory
from massact.reports.attention import EXPLAIN_FIGURES
from massact.reports.census import draw_census
from massact.reports.classics import draw_classics
from massact.reports.curves import draw_headroom, draw_layers, draw_norms
from massact.reports.effects import draw_effects
from massact.reports.lettering import style
from massact.reports.portrait import draw_magnitudes
from massact.reports.steps import draw_trajectory

FIGURES: dict[str, Callable[[ScanResult], Figure | None]] = {
    "layers": draw_layers,
    "magnitudes": draw_magnitudes,
    "census": draw_census,
    "headroom": draw_headroom,
    "norms": draw_norms,
}
DPI = 160

# No dates and no versions: the same result gives the same bytes.
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None}, "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}  # fmt: skip
USUAL = ("png", "svg")


def draw(
    result: ScanResult | Explanation | Intervention | Classics | Trajectory,
    directory: Path,
    formats: Sequence[str] = USUAL,
) -> list[Path]:
    """Write every figure of a scan, an explanation, an intervention, the classics or a trajectory into `figures/`.

    Args:
        result: fresh, or of a run directory.
        directory: the run directory; made if it is not there.
        formats: of png, svg, pdf.

    Returns:
        The files, in the order of `FIGURES` or `EXPLAIN_FIGURES`; a figure without anything to show is missing.

    Raises:
        UserError: the directory cannot be written, or there is no such format.
    """
    return write_figures(result, _figures_of(result), directory, formats)


def write_figures(
    result: Any,
    figures: dict[str, Callable[[Any], Figure | None]],
    directory: Path,
    formats: Sequence[str] = USUAL,
) -> list[Path]:
    """Write named figures of a result into `figures/` of a directory, each in all the formats (png, svg, pdf).

    Raises:
        UserError: the directory cannot be written, or there is no such format.
    """
    for kind in formats:
        if kind not in METADATA:
            raise UserError(f"No figures in the format {kind!r}.", do=near(kind, METADATA))
    folder = Path(directory) / "figures"
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            for name, make in figures.items():
                figure = make(result)
                if figure is not None:
                    written += _save(figure, folder, name, formats)
    except OSError as error:
        raise UserError(
            f"Figures cannot be written to {folder}.", error.strerror or str(error), "Give another directory."
        ) from None
    return written


def _figures_of(result: Any) -> dict[str, Callable[[Any], Figure | None]]:
    if isinstance(result, Explanation):
        return dict(EXPLAIN_FIGURES)
    if isinstance(result, Classics):
        return {"classics": draw_classics}
    if isinstance(result, Trajectory):
        return {"trajectory": draw_trajectory}
    return {"effects": draw_effects} if isinstance(result, Intervention) else dict(FIGURES)


def _save(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Write one figure in every format; no window, no state of pyplot."""
    canvas, paths = FigureCanvasAgg(figure), []
    for kind in formats:
        metadata = METADATA[kind]
        path = folder / f"{name}.{kind}"
        write_atomic(
            path,
            lambda p, kind=kind, metadata=metadata: canvas.print_figure(
                p, format=kind, dpi=DPI, facecolor="white", metadata=metadata
            ),
        )
        paths.append(path)
    return paths
