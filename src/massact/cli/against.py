"""`massact scan`: of a model; with --against of two, which are put side by side."""

from __future__ import annotations

import re
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from massact.models.names import short_name
from massact.records.errors import UserError
from massact.records.kinds.comparison import open_compared
from massact.scans import verb
from massact.verbs import Call, Done
from massact.verbs.verb import NOT_SAVED


def run(call: Call) -> Done:
    """Scan a model, several checkpoints of it, or two models over the same text."""
    given, out = call.inputs, call.inputs.out
    if given.against is None:
        return verb.run(call)
    if given.revision is not None or given.revisions is not None or given.checkpoints:
        raise UserError("--against is for two models.", "Revisions and checkpoints are of one.",
                        "Leave --revision, --revisions and --checkpoints out.")  # fmt: skip
    if out is not None and (out / "run.json").is_file():
        raise UserError(f"{out} holds a run of one model.", do="Give another --out: each model gets a folder in it.")
    from massact.reports import compare

    one, other = _names(given.model, given.against, call.options.chat_template)
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as place:
        folders = [Path(place) / _plain(one), Path(place) / _plain(other)]
        first = _scan(call, given.model, folders[0], chat_template=False)
        n = call.options.n_sequences or first.info.corpus["n_sequences"]  # of both, also where time decides how many
        _scan(call, given.against, folders[1], chat_template=call.options.chat_template, n_sequences=n)
        done = compare(open_compared(folders, [one, other]))
    if out is None:
        return Done(done, NOT_SAVED)
    done.save(out)
    again = " ".join(map(str, folders))
    said = f"Saved in {out}: both runs, compare.parquet, figures/. Compare again: massact compare {again}"
    return Done(done, said, folder=out)


def _scan(call: Call, model: str | None, folder: Path, **options: Any) -> Any:
    """Scan one of the two into its folder."""
    asked = call.options.given() | options
    inputs: Any = call.inputs.changed(model=model, out=folder, against=None)
    done = verb.run(replace(call, inputs=inputs, options=type(call.options).of(asked)))
    if call.inputs.out is not None:
        call.keep(done.result, folder)
    return done.result


def _plain(name: str) -> str:
    """A name as a folder is called."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"


def _names(one: str | None, other: str, chat_template: bool) -> list[str]:
    """What the two are called, and told apart by."""
    names = ["embedded" if one is None else short_name(one), short_name(other) + " chat" * chat_template]
    same = _plain(names[0]) == _plain(names[1])
    return [f"{name} {i}" if same else name for i, name in enumerate(names, start=1)]
