"""Figures as files: PNG, SVG and PDF, the same bytes for the same result."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from massact.records.disk import leftovers, write_atomic
from massact.records.errors import UserError
from massact.records.figure_files import FORMATS, check_formats, check_style
from massact.reports.panels import Sheet, slides_of
from massact.reports.render.lettering import style
from massact.reports.render.sheets import figure_of

DPI = 160
SLIDE = (6.4, 3.6)  # inches: letters of the usual size are large on it
SLIDE_WIDTH = 1920  # pixels


class ShownFigure(Figure):
    """A figure that a notebook shows as it is, without pyplot."""

    def _repr_png_(self) -> bytes:
        return png_of(self)


def shown_figure(sheet: Sheet) -> Figure:
    """A sheet as a figure of matplotlib, which its owner may change and save; nothing of pyplot is touched."""
    with style():
        figure = figure_of(sheet)
    figure.__class__ = ShownFigure
    return figure


def png_of(figure: Figure, dpi: int = DPI) -> bytes:
    """The bytes of a PNG file of a figure."""
    out = io.BytesIO()
    with style():
        FigureCanvasAgg(figure).print_figure(out, format="png", dpi=dpi, facecolor="white", metadata=FORMATS["png"])
    return out.getvalue()


def write_figures(
    result: Any,
    figures: Mapping[str, Callable[[Any], Sheet | None]],
    directory: Path,
    formats: Sequence[str],
    look: str = "paper",
) -> list[Path]:
    """Write named figures of a result into `figures/` of a directory, each in all the formats (png, svg, pdf).

    Args:
        look: paper, or lecture: slides, of which the second of a figure is called name-2.

    Raises:
        UserError: the directory cannot be written, or there is no such format or style.
    """
    check_style(look)
    check_formats(formats)
    if not figures or not formats:
        return []
    folder = Path(directory) / "figures"
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            for name, make in figures.items():
                sheet = make(result)
                slides = [] if sheet is None else [sheet] if look == "paper" else slides_of(sheet)
                size, dpi = (None, DPI) if look == "paper" else (SLIDE, SLIDE_WIDTH / SLIDE[0])
                for i, slide in enumerate(slides):
                    written += _save(figure_of(slide, size), folder, f"{name}-{i + 1}" if i else name, formats, dpi)
                _forget(folder, name, len(slides))
        for left in leftovers(folder, tuple(path.name for path in written)) if written else ():
            left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"Figures cannot be written to {folder}.", error.strerror or str(error), "Give another directory."
        ) from None
    return written


def _forget(folder: Path, name: str, n: int) -> None:
    """Delete slides of an earlier drawing beyond the n that there are now."""
    for path in folder.glob(f"{name}-*.*"):
        number = path.stem.removeprefix(f"{name}-")
        if path.suffix[1:] in FORMATS and number.isdecimal() and int(number) > max(n, 1):
            path.unlink()


def _save(figure: Figure, folder: Path, name: str, formats: Sequence[str], dpi: float) -> list[Path]:
    """Write one figure in every format; no window, no state of pyplot."""
    canvas, paths = FigureCanvasAgg(figure), []
    for kind in formats:
        path = folder / f"{name}.{kind}"
        draw = partial(canvas.print_figure, format=kind, dpi=dpi, facecolor="white", metadata=FORMATS[kind])
        write_atomic(path, draw)
        figure.set_layout_engine("none")  # as it was laid out for the first; once more takes as long as to draw it
        paths.append(path)
    return paths
