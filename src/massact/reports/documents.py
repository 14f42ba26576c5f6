"""From run directories to files: `report` and `draw`; one figure of a result: `plot`."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from massact.records.disk import write_atomic
from massact.records.errors import UserError, near
from massact.records.figure_files import check_formats, check_style
from massact.records.kinds.comparison import Comparison, labels_of, open_compared
from massact.records.user_files import refuse_special
from massact.reports.contents import Contents, contents_of
from massact.reports.kinds import reading_of
from massact.reports.kinds.comparison.table import compare
from massact.reports.model_cards import model_card
from massact.reports.pages import Page, page_of, page_of_several
from massact.reports.render.html import html
from massact.reports.render.latex import latex
from massact.reports.render.markdown import markdown
from massact.reports.spelling import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL = ("png",)
# Name of a format -> name of the file in the run directory, and who writes a page so.
FORMATS: dict[str, tuple[str, Callable[[Page], str] | None]] = {
    "html": ("report.html", html), "md": ("report.md", markdown), "latex": ("report.tex", latex),
    "card": ("model_card.md", None),
}  # fmt: skip


def report(
    runs: Any,
    out: str | Path | None = None,
    kind: str = "html",
    figures: Sequence[str] = (),
    style: str = "paper",
) -> Path:
    """Write the report of a run: one self-contained HTML file, which opens from disk with no network.

    Args:
        runs: a run directory, a result (of `scan`, `explain`, ...), or a list of run directories to put side by side.
        out: the file; nothing: report.html (.md, .tex, or model_card.md) in the run directory.
        kind: html, md, latex (the main tables), or card (a model card: YAML front matter and Markdown).
        figures: also write the figures into `figures/` beside the file: png, svg, pdf.
        style: of the HTML page and of the figures: paper, or lecture, with large type for a wall.

    Returns:
        The file. It is a function of the run alone: the same run gives the same bytes.

    Raises:
        UserError: no run there, a damaged one, an unknown format or style, no `out` where one is needed, or one that
            cannot be written.
    """
    if kind not in FORMATS:
        raise UserError(f"No format {kind!r}.", do=near(kind, FORMATS))
    check_style(style)
    check_formats(figures)
    given, opened = _opened(runs)
    comparison = _compared(given) if len(opened) > 1 else None
    path = _place(opened, out, FORMATS[kind][0])
    said = _said(opened, comparison, kind, style)
    refuse_special(path)  # renaming a file over a device would take its place
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda p: p.write_text(said, encoding="utf-8", errors="backslashreplace", newline="\n"))
    except OSError as error:
        raise UserError(f"{path} cannot be written.", error.strerror or str(error), "Give another --out.") from None
    for result in ([comparison] if comparison is not None else opened[0].results.values()) if figures else ():
        draw(result, path.parent, tuple(figures), style=style)
    return path


def publish(runs: Any, page: str | Path, repository: str, private: bool | None = None) -> str:
    """Put a written report and a model card into a repository of models on the Hub, in one commit.

    Args:
        runs: as `report` was given.
        page: the file that it wrote.
        repository: OWNER/NAME; made where there is none. Of a card that is there only our section is written anew.
        private: of a new repository; None: as its owner has it by default.

    Returns:
        The address of the commit.

    Raises:
        UserError: no such name, no network, nobody is logged in, or it may not be written to.
        WorkError: the Hub failed.
    """
    from massact.reports.publication import check_repository, push

    check_repository(repository)
    return push(Path(page), _opened(runs)[1], repository, private)


def _opened(runs: Any) -> tuple[list[Any], list[Contents]]:
    """What was given, as a list, and the contents of each."""
    given = list(runs) if isinstance(runs, (list, tuple)) else [runs]
    if not given:
        raise UserError("No run was given.", do="Give a run directory.")
    names = labels_of([Path(x) for x in given]) if len(given) > 1 and all(map(_is_path, given)) else [""] * len(given)
    return given, [contents_of(run, name) for run, name in zip(given, names, strict=True)]


def _is_path(run: Any) -> bool:
    return isinstance(run, (str, os.PathLike))


def _compared(runs: Sequence[Any]) -> Comparison:
    if not all(map(_is_path, runs)):
        raise UserError("Only run directories can be put side by side.", do="Save each result first, and give paths.")
    return compare(open_compared(runs))


def _place(opened: Sequence[Contents], out: str | Path | None, name: str) -> Path:
    if out is not None:
        path = Path(out)
        if path.is_dir():
            raise UserError(f"--out {path} is a directory.", do=f"Give a file, for example {path / name}")
        return path
    directory = opened[0].directory if len(opened) == 1 else None
    if directory is None:
        raise UserError("There is no directory to put the report into.", "It is of several runs, or was not saved.",
                        f"Say where: --out {name} (in Python out={name!r}).")  # fmt: skip
    return directory / name


def _said(opened: Sequence[Contents], comparison: Comparison | None, kind: str, style: str) -> str:
    write = FORMATS[kind][1]
    if write is None:
        return model_card(opened)
    page = page_of(opened[0]) if comparison is None else page_of_several(opened, comparison)
    return write(replace(page, style=style))


def draw(
    result: Any, directory: Path, formats: Sequence[str] = USUAL, only: Container[str] = (), style: str = "paper"
) -> list[Path]:
    """Write every figure of a result of any kind into `figures/`.

    Args:
        result: fresh, or of a run directory.
        directory: the run directory; made if it is not there.
        formats: of png, svg, pdf.
        only: names of figures; nothing: all.
        style: paper, or lecture: slides of 16 to 9 with large type, one for each part of a figure (name, name-2, ...).

    Returns:
        The files, in the order of the figures; one without anything to show is missing.

    Raises:
        UserError: the directory cannot be written, or there is no such format or style.
    """
    if not formats:
        return []
    from massact.reports.render.figures import write_figures  # nothing else needs matplotlib, which is slow to import

    figures = reading_of(result.KIND).figures
    chosen = {name: make for name, make in figures.items() if not only or name in only}
    return write_figures(result, chosen, directory, formats, style)


def plot(result: Any, name: str | None = None) -> Figure:
    """One figure of a result of any kind, as matplotlib has it; see `massact.records.display.Display.plot`.

    Raises:
        UserError: there is none, or none of this name.
    """
    drawings = reading_of(result.KIND).drawings(result)
    wanted = drawings if name is None else {name: drawings[name]} if name in drawings else {}
    sheet = next((sheet for make in wanted.values() if (sheet := make(result))), None)
    if sheet is None:
        there = [n for n, make in drawings.items() if make(result)]
        what = f"This {result.KIND} has no figure" + ("." if name is None else f" {visible(name)!r}.")
        raise UserError(what, "It has no values to draw in one." * (name in drawings or not there),
                        near(str(name), there) if there else "Look at its tables.")  # fmt: skip
    from massact.reports.render.figures import shown_figure  # nothing else needs matplotlib, which is slow to import

    return shown_figure(sheet)
