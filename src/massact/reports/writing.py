"""Figures as files: PNG and SVG, the same bytes for the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from massact.records.errors import UserError
from massact.records.tables import write_atomic
from massact.reports.lettering import style

DPI = 160

# No dates and no versions: the same result gives the same bytes.
METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def write_figures(result: Any, figures: dict[str, Callable[[Any], Figure | None]], directory: Path) -> list[Path]:
    """Write named figures of a result as PNG and SVG into `figures/` of a directory.

    Raises:
        UserError: the directory cannot be written.
    """
    folder = Path(directory) / "figures"
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            for name, make in figures.items():
                figure = make(result)
                if figure is not None:
                    written += _save(figure, folder, name)
    except OSError as error:
        raise UserError(
            f"Figures cannot be written to {folder}.", error.strerror or str(error), "Give another directory."
        ) from None
    return written


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write one figure in both formats; no window, no state of pyplot."""
    canvas, paths = FigureCanvasAgg(figure), []
    for kind, metadata in METADATA.items():
        path = folder / f"{name}.{kind}"
        write_atomic(
            path,
            lambda p, kind=kind, metadata=metadata: canvas.print_figure(
                p, format=kind, dpi=DPI, facecolor="white", metadata=metadata
            ),
        )
        paths.append(path)
    return paths
