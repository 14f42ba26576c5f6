"""`massact show`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from massact.cli.options import (
    Json,
    printed,
)


def show(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    json: Json = False,
) -> None:
    """Print a saved run again; needs neither the model nor torch."""
    from massact.records.classics import open_classics
    from massact.records.explanation import open_explanation
    from massact.records.intervention import open_intervention
    from massact.records.lab import open_lab
    from massact.records.reproduction import open_reproduction
    from massact.records.results import open_run
    from massact.records.shapes import open_shapes
    from massact.records.training import open_training
    from massact.records.trajectory import open_trajectory

    alone = {"train.json": open_training, "trajectory.json": open_trajectory, "lab.json": open_lab,
             "shapes.json": open_shapes}  # fmt: skip
    if not os.path.isfile(run / "run.json"):
        for name, read in alone.items():
            if os.path.isfile(run / name):
                printed(read(run), json, quiet=False)
                return
    result = open_run(run)
    later = {
        "explanation": open_explanation(run), "intervention": open_intervention(run), "classics": open_classics(run),
        "reproduction": open_reproduction(run),
    }  # fmt: skip
    added = {name: one for name, one in later.items() if one is not None}
    if json and added:
        from massact.reports import to_json

        more = "".join(f',\n"{name}": {to_json(one)}' for name, one in added.items())
        typer.echo(f"{to_json(result).rstrip()[:-1].rstrip()}{more}}}")
        return
    for one in (result, *added.values()):
        printed(one, json, quiet=False)
