"""`massact show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from massact.cli.options import Json
from massact.cli.output import print_result


def show(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    json: Json = False,
) -> None:
    """Print a saved run again; needs neither the model nor torch."""
    from massact.records.kinds import results_in
    from massact.reports import to_json

    first, *added = results_in(run)
    if not json:
        for one in (first, *added):
            print_result(one, False, False)
        return
    more = "".join(f',\n"{one.KIND}": {to_json(one)}' for one in added)
    typer.echo(f"{to_json(first).rstrip()[:-1].rstrip()}{more}}}" if added else to_json(first))
