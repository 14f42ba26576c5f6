"""`massact train --task bigram-backcopy`: the toy lab."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer

from massact.cli.options import printed, progress_bar, quiet_libraries
from massact.records.errors import UserError

TASKS = ("bigram-backcopy",)
NOT_HERE = {"data": "--data", "resume": "--resume"}


def toy_lab(
    task: str, preset: str | None, variants: list[str] | None, options: dict[str, Any], out: Path | None,
    json: bool, quiet: bool, **others: Any,
) -> None:  # fmt: skip
    """Train toy models side by side, print what they show, keep it where that is asked for.

    Raises:
        UserError: an unknown task, or an option of `massact train` that a toy lab does not have.
    """
    if task not in TASKS:
        raise UserError(f"There is no task {task!r}.", do=f"Known: {', '.join(TASKS)}.")
    for name, option in NOT_HERE.items():
        if others.get(name):
            raise UserError(f"{option} is not for --task {task}.", "A toy lab makes its own data, and takes minutes.")
    quiet_libraries()
    from transformers.utils import logging

    from massact.reports import draw
    from massact.training.lab import STORY, cores, run_lab

    logging.disable_progress_bar()
    try:
        with progress_bar(quiet or json) as progress:
            lab = run_lab(variants or STORY, preset or "story", out=out, workers=min(2, cores()), **options,
                          progress=lambda name, done, total, row: progress(name, done, total, _line(row)))  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("Interrupted. A toy lab keeps no half-done training: start it again.", err=True)
        raise SystemExit(130) from None
    if out is not None:
        draw(lab, out)
    printed(lab, json, quiet)
    if not json and not quiet:
        typer.echo("\nNot saved. Keep tables, figure and models with --out DIR." if out is None else _saved(lab, out))


def _line(row: dict[str, Any]) -> str:
    """The latest measurement on one line."""
    slot = "" if math.isnan(row["slot_mass"]) else f", slot {row['slot_mass']:.2f}"
    return (
        f"backcopy {row['backcopy_nats']:.2f}, bigram +{row['bigram_excess_nats']:.2f}, first "
        f"{row['first_attention']:.2f}{slot}"
    )


def _saved(lab: Any, out: Path) -> str:
    return (
        f"\nSaved in {out}: lab.json, tables, figures/, model-VARIANT/, held_out.jsonl. Scan a model: massact scan "
        f"{out / f'model-{lab.variants[0]}'} --corpus {out / 'held_out.jsonl'} --seq-len {lab.info.config['length']} "
        "--bos never"
    )
