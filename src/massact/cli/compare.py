"""`massact compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from massact.cli.options import Json, Quiet
from massact.cli.output import print_result
from massact.verbs.verb import NOT_SAVED


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of trainings or scans, two or more.")],
    label: Annotated[
        list[str] | None,
        typer.Option(help="Name of a run, in the order of the runs; nothing: the names of the directories."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for compare.parquet and figures.")] = None,
    by_seed: Annotated[
        bool, typer.Option(help="Also mean and range over trainings that differ by their seed only.")
    ] = True,
    style: Annotated[str, typer.Option(help="Of the figures: paper, or lecture (large type, 16:9).")] = "paper",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs side by side: loss, massive activations, sinks, slots, a model and its quantised forms; needs no models."""
    from massact.records.kinds.comparison import TABLES, open_compared
    from massact.reports import compare as compare_runs
    from massact.reports import draw

    result = compare_runs(open_compared(runs, label or ()), by_seed=by_seed)
    if out is not None:
        result.save(out)
        draw(result, out, style=style)
    print_result(result, json, quiet)
    if not json and not quiet:
        files = [f"{name}.parquet" for name in TABLES if name != "survival" or len(result.survival)]
        said = NOT_SAVED if out is None else f"Saved in {out}: {', '.join(files)}, figures/."
        typer.echo(f"\n{said}")
