"""`massact reproduce`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from massact.interventions.verb import head_asked
from massact.records.errors import WorkError
from massact.records.kinds.comparison import open_compared
from massact.reports import compare
from massact.reproductions import listing, reproduce
from massact.verbs import Call, Done
from massact.verbs.verb import NOT_SAVED

OF_PROMPTS = ("magnitudes", "attention_maps", "trajectory")


def run(call: Call) -> Done:
    """Redo the experiments of the paper on a run, or on a model, which is scanned first."""
    given = call.inputs
    loading: dict[str, Any] = {"device": given.device, "options": given.load_options()}
    loading |= {} if given.dtype is None else {"dtype": given.dtype}

    def keep(result: Any, folder: Path) -> None:
        of_prompt = folder.parent.name == "prompts"  # of each prompt what the paper draws of it
        call.keep(result, folder, **({"only": OF_PROMPTS} if of_prompt else {}))

    nowhere = call.scan is None and given.out is None
    with tempfile.TemporaryDirectory() if nowhere else nullcontext() as scratch:
        done = reproduce(
            given.target,
            out=Path(scratch) / "run" if scratch else given.out,
            model=given.model,
            corpus=given.corpus,
            trained=compare(open_compared(given.trained)) if given.trained else None,
            scan_options=None if call.scan is not None else given.scan_options(call.options),
            loading=loading,
            watch=(call.progress, keep),
            **_options(call),
        )
    where = given.target if call.scan is not None else given.out
    said = f"In {where}: reproduced.parquet, reproduce.json, and the tables and figures of every step. "
    said = NOT_SAVED if nowhere else f"{said}Print it again: massact show {where}"
    failed = done.info.having("failed")
    error = WorkError(
        f"{len(failed)} of {len(done.info.steps)} steps failed.",
        "\n".join(f"{name}: {done.info.steps[name].get('why', '')}" for name in failed),
        "The others are finished.",
    )
    return Done(done, said, error if failed else None)


def _options(call: Call) -> dict[str, Any]:
    return call.options.given() | {"labels": call.inputs.labels, "head": head_asked(call.inputs)}


def listed(call: Call) -> Iterator[str]:
    """All experiments, and what each still needs."""
    for entry, lacks in listing(_options(call) | {"trained": bool(call.inputs.trained)}, call.scan):
        needs = ", ".join(entry.needs)
        yield f"{entry.id:<4} {entry.title} ({entry.section}; steps: {needs})" + (f": {lacks}" if lacks else "")
