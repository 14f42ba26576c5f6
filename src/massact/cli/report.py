"""`massact report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are put side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file; nothing: report.html (.md, .tex, model_card.md) in the run directory."),
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", help="html, md, latex (the main tables) or card (a section for a model card).")
    ] = "html",
    figures: Annotated[
        str, typer.Option(help="Also the figures, into figures/ beside the file, with commas: png,svg,pdf.")
    ] = "",
    style: Annotated[
        str, typer.Option(help="Of the page and the figures: paper, or lecture (large type, 16:9).")
    ] = "paper",
) -> None:
    """One self-contained page of a run, or of several side by side; needs neither models nor torch."""
    from massact.reports import report as write_report

    formats = [name.strip() for name in figures.split(",") if name.strip() not in ("", "none")]
    path = write_report(list(runs), out, kind, formats, style)
    size = path.stat().st_size
    typer.echo(f"Written: {path} ({f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'})")
