"""`massact train --task bigram-backcopy`: the toy lab."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from massact.cli.interrupts import Interrupted
from massact.records.errors import UserError
from massact.verbs import Call, Done

TASKS = ("bigram-backcopy",)


def toy_lab(call: Call, options: dict[str, Any]) -> Done:
    """Train toy models side by side, print what they show, keep it where that is asked for.

    Args:
        call: of `massact train`.
        options: of the lab.

    Raises:
        UserError: an unknown task, or an option of `massact train` that a toy lab does not have.
    """
    asked, out = call.options, call.inputs.out
    if asked.task not in TASKS:
        raise UserError(f"There is no task {asked.task!r}.", do=f"Known: {', '.join(TASKS)}.")
    for given, option in ((asked.data, "--data"), (call.inputs.resume, "--resume")):
        if given:
            raise UserError(
                f"{option} is not for --task {asked.task}.", "A toy lab makes its own data, and takes minutes."
            )
    from transformers.utils import logging

    from massact.labs.job import STORY, cores, run_lab

    logging.disable_progress_bar()
    try:
        lab = run_lab(
            asked.attention or STORY, asked.config or "story", out=out, workers=min(2, cores()), **options,
            progress=lambda name, done, total, row: call.progress(name, done, total, _line(row)),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("Interrupted. A toy lab keeps no half-done training: start it again.") from None
    if out is None:
        return Done(lab, "Not saved. Keep tables, figure and models with --out DIR.")
    return Done(lab, _saved(lab, out), folder=out)


def _line(row: dict[str, Any]) -> str:
    """The latest measurement on one line."""
    slot = "" if math.isnan(row["slot_mass"]) else f", slot {row['slot_mass']:.2f}"
    return (
        f"backcopy {row['backcopy_nats']:.2f}, bigram +{row['bigram_excess_nats']:.2f}, first "
        f"{row['first_attention']:.2f}{slot}"
    )


def _saved(lab: Any, out: Path) -> str:
    return (
        f"Saved in {out}: lab.json, tables, figures/, model-VARIANT/, held_out.jsonl. Scan a model: massact scan "
        f"{out / f'model-{lab.variants[0]}'} --corpus {out / 'held_out.jsonl'} --seq-len {lab.info.config['length']} "
        "--bos never"
    )
