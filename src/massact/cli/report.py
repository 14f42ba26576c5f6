"""`massact report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from massact.records.errors import UserError
from massact.records.figure_files import formats_of


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are put side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file; nothing: report.html (.md, .tex, model_card.md) in the run directory."),
    ] = None,
    kind: Annotated[
        str,
        typer.Option("--format", help="html, md, latex (the main tables) or card (a model card: YAML and Markdown)."),
    ] = "html",
    figures: Annotated[
        str, typer.Option(help="Also the figures, into figures/ beside the file, with commas: png,svg,pdf; or none.")
    ] = "none",
    style: Annotated[
        str, typer.Option(help="Of the page and the figures: paper, or lecture (large type, 16:9).")
    ] = "paper",
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also put the page and a model card into this repository of the Hub; of a card that is there only our "
            "section is written anew.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, where it is new.")] = False,
) -> None:
    """One self-contained page of a run, or of several side by side; needs neither models nor torch."""
    from massact.reports import publish
    from massact.reports import report as write_report

    if push_to_hub is None and private:
        raise UserError("--private is of the repository of --push-to-hub.", do="Leave it out.")
    if push_to_hub is not None:
        from massact.reports.publication import check_repository

        if kind != "html":
            raise UserError("--push-to-hub sends the page and the model card.", do="Leave out --format.")
        check_repository(push_to_hub)
    formats = formats_of(figures)
    path = write_report(list(runs), out, kind, formats, style)
    size = path.stat().st_size
    typer.echo(f"Written: {path} ({f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'})")
    if push_to_hub is not None:
        typer.echo(f"Sent to the Hub: {publish(list(runs), path, push_to_hub, private or None)}")
