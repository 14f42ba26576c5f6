"""`massact intervene`: on a saved run, on its own text or, told by group, on the rows of a JSONL file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from massact.interventions.job import intervene
from massact.interventions.zero_shot import ZeroShot
from massact.records.errors import UserError, near
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult
from massact.records.user_files import read_given
from massact.scans import reopen, scanned_corpus
from massact.verbs import Call, Done
from massact.verbs.intervene import Heads


def run(call: Call) -> Done:
    """Intervene on the findings of a saved run, and add what is found to it."""
    given = call.inputs
    options = dict(call.options) | {"head": head_asked(given)}
    options |= {} if given.labels is None else {"labels": given.labels}
    done = intervene_run(call.scan, given, options, call.progress)
    return call.added(done, given.run)


def head_asked(given: Heads) -> ZeroShot | Path | None:
    """The head that was asked for; None: the model's own.

    Raises:
        UserError: options that exclude each other, or a file that cannot be read.
    """
    if not given.zero_shot and (given.classes is not None or given.prompts is not None):
        raise UserError("--classes and --prompts are of zero-shot classification.", do="Add --zero-shot.")
    if given.zero_shot and given.head is not None:
        raise UserError("--zero-shot and --head exclude each other.", do="Give one of them.")
    return ZeroShot.read(given.classes, given.prompts) if given.zero_shot else given.head


def intervene_run(result: ScanResult, given: Any, options: dict[str, Any], progress: Any) -> Intervention:
    """Intervene on the findings of a saved run.

    Args:
        result: of the run.
        given: see `massact.verbs.intervene.OnScan`; with a group each row of its JSONL file is a sequence of its own.
        options: see `intervene`.
        progress: called with (stage, sequences done, sequences in all).

    Raises:
        UserError: model, corpus or column cannot be found, or the model is another one.
    """
    corpus, evaluate_on, group = given.corpus, given.evaluate_on, given.group
    rows = evaluate_on if evaluate_on is not None else corpus
    groups: dict[str, list[str]] | None = None
    texts: Any = None
    if group is not None:
        if rows is None:
            raise UserError("--group needs rows with labels.", do="Give a JSONL file: --evaluate-on FILE.jsonl")
        texts, labels = _rows(Path(rows), group)
        groups = {group: labels}
        # Windows of a fixed length would run across rows.
        apart = result.info.config | {"seq_len": None, "n_sequences": None}
    here = texts is not None and evaluate_on is None
    if here:
        result = replace(result, info=replace(result.info, config=apart))
    opened = reopen(
        result, model=given.model, corpus=texts if here else corpus, device=given.device,
        load_options=given.load_options(), progress=progress,
    )  # fmt: skip
    other: Any = None
    if evaluate_on is not None:
        asked = opened.scan if texts is None else replace(opened.scan, info=replace(opened.scan.info, config=apart))
        other = scanned_corpus(opened.model, texts if texts is not None else evaluate_on, asked)
    n = (opened.corpus if other is None else other).n_sequences
    if groups is not None and len(labels) != n:
        raise UserError(f"{rows} has {len(labels)} rows, but {n} of them have tokens.")
    done: Intervention = opened.run(
        intervene, lambda now, all_: progress("intervene", now, all_), evaluate_on=other, groups=groups, **options
    )
    return done


def _rows(file: Path, column: str) -> tuple[Any, list[str]]:
    """Texts and labels of a JSONL file.

    Raises:
        UserError: it cannot be read, or a row lacks the column or its text.
    """
    try:
        rows = [json.loads(line) for line in read_given(file).decode("utf-8").splitlines() if line.strip()]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSONL.", str(error)) from None
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"Row {i} of {file} has no text.", do="Each row needs a column 'text'.")
        if column not in row:
            raise UserError(f"Row {i} of {file} has no column {column!r}.", do=near(column, row))
    if not rows:
        raise UserError(f"{file} is empty.", do="Each row needs a column 'text'.")
    return [row["text"] for row in rows], [str(row[column]) for row in rows]
