"""`massact scan`: of one model, or of several checkpoints of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from massact.models import load
from massact.positions import ready_corpus
from massact.records.errors import UserError, WorkError
from massact.records.kinds.scan import ScanResult
from massact.records.run import check_out
from massact.scans.budget import within_a_minute
from massact.scans.checkpoint_names import checkpoints_in, revisions_of
from massact.scans.criteria import criterion
from massact.scans.job import Text, named, scan_text, source_of
from massact.scans.revisions import scan_checkpoints, told
from massact.verbs import Call, Done
from massact.verbs.scan import ScanConfig
from massact.verbs.verb import NOT_SAVED


def check(options: ScanConfig) -> None:
    """Refuse a rule that there is not, or a constant that it has not.

    Raises:
        UserError: says which are near.
    """
    criterion(options.criterion).resolved(options.thresholds)


def run(call: Call) -> Done:
    """Scan a model, or several checkpoints."""
    given = call.inputs
    if given.resume and given.out is None:
        raise UserError("--resume needs the run directory.", do="Add --out DIR.")
    loading: dict[str, Any] = {"device": given.device, "dtype": given.dtype, "options": given.load_options()}
    if given.revisions is not None or given.checkpoints:
        if given.revision is not None or (given.revisions is not None and given.checkpoints):
            raise UserError("--revision, --revisions and --checkpoints exclude each other.", do="Give one of them.")
        if call.options.generate is not None:
            raise UserError("--generate is for one model.", "Every checkpoint would read a text of its own, and their "
                            "numbers could not be compared.", "Leave it out, or scan each on its own.")  # fmt: skip
        if given.out is None:
            raise UserError("A scan of several checkpoints needs a directory.", do="Add --out DIR.")
        return _scan_all(call, loading)
    _no_folder_of_checkpoints(given.model)
    if given.out is not None:
        check_out(given.out, given.resume)
    config = ScanConfig.of(call.options.given())
    if given.resume and config.n_sequences is None:
        config = config.changed(n_sequences=_size_of(given.out))
    source = source_of(given.corpus, config)
    call.progress("load", 0, 1)
    loaded = load(given.model, revision=given.revision, **loading)
    call.progress("load", 1, 1)
    text = Text(source, ready_corpus(loaded, source, config), named(given.corpus))
    text, config = within_a_minute(loaded, text, config, call.say)
    result = scan_text(loaded, text, config, out=given.out, resume=given.resume, progress=call.progress, spend=True)
    if given.out is None:
        return Done(result, NOT_SAVED)
    drawn = ", figures/" if given.formats() else ""
    said = f"Saved in {given.out}: tables, run.json{drawn}. Print it again: massact show {given.out}"
    return Done(result, said, folder=given.out)


def _size_of(out: Path) -> int | None:
    """How many sequences the interrupted scan in a directory is of; None where that was not said."""
    try:
        found = json.loads((out / "run.json").read_text())["config"]["n_sequences"]
    except (OSError, ValueError, KeyError):
        return None
    return found if isinstance(found, int) else None


def _scan_all(call: Call, loading: dict[str, Any]) -> Done:
    """Scan several checkpoints; those that fail are told at the end."""
    given, out = call.inputs, call.inputs.out
    found = checkpoints_in(given.model) if given.revisions is None else revisions_of(given.model, given.revisions)
    names = [c.name for c in found]
    some = names if len(names) <= 12 else [*names[:6], "...", *names[-5:]]
    call.say(f"{len(names):,} checkpoint{'s' * (len(names) > 1)}: {', '.join(some)}")

    def each(result: ScanResult, folder: Path) -> None:
        if not (folder / "figures").is_dir():  # of a finished one they are there
            call.keep(result, folder)

    done = scan_checkpoints(
        found, given.corpus, out=out, resume=given.resume, progress=call.progress, each=each, load_options=loading,
        **call.options.given(),
    )  # fmt: skip
    said = (
        f"Saved in {out}: trajectory.json, revisions.parquet, figures/, and a run directory for each checkpoint. "
        f"Print it again: massact show {out}"
    )
    failed = told(done.info)
    error = WorkError(
        f"{len(done.info.having('failed')):,} of {len(found):,} checkpoints could not be scanned.",
        "\n".join(failed),
        "The others are finished: try these again with --resume.",
    )
    return Done(done, said, error if failed else None, folder=out)


def _no_folder_of_checkpoints(model: str | None) -> None:
    """A folder of checkpoints instead of a model: say how they are scanned."""
    if model is None or not os.path.isdir(model) or os.path.isfile(os.path.join(model, "config.json")):
        return
    try:
        found = checkpoints_in(model)
    except UserError:
        return
    raise UserError(f"{model} is no model folder, but it holds {len(found):,} checkpoint{'s' * (len(found) > 1)}.",
                    do="Scan them all: --checkpoints. Or name one of them.")  # fmt: skip
