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
from massact.scans import Reopened, reopen, scan_first, scanned_corpus
from massact.verbs import Call, Done
from massact.verbs.intervene import Heads


def run(call: Call) -> Done:
    """Intervene on the findings of a saved run, and add what is found to it."""
    given = call.inputs
    options = dict(call.options) | {"head": head_asked(given)}
    options |= {} if given.labels is None else {"labels": given.labels}
    if call.scan is not None:
        return call.added(intervene_run(call.scan, given, options, call.progress), Path(given.run))
    done, scan = intervene_model(given, options, given.scan_options(call.options), call.progress)
    if given.out is not None:
        call.keep(scan, given.out)
    return call.added(done, given.out)


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
    texts, labels = _labelled(given)
    here = texts is not None and given.evaluate_on is None
    opened = reopen(
        _row_by_row(result) if here else result, model=given.model, corpus=texts if here else given.corpus,
        device=given.device, load_options=given.load_options(), progress=progress,
    )  # fmt: skip
    return _intervened(opened, given, (texts, labels), options, progress)


def intervene_model(
    given: Any, options: dict[str, Any], asked: dict[str, Any], progress: Any
) -> tuple[Intervention, ScanResult]:
    """Scan a model, then intervene on its findings.

    Args:
        given, options, progress: see `intervene_run`. asked: options of the scan.

    Raises:
        UserError: model, corpus or column cannot be found.
    """
    texts, labels = _labelled(given)
    here = texts is not None and given.evaluate_on is None
    asked |= dict.fromkeys(("seq_len", "n_sequences", "text_column")) if here else {}  # each row is a sequence
    opened = scan_first(
        given.run, texts if here else given.corpus, asked=asked, device=given.device,
        load_options=given.load_options(), place=given.out, progress=progress,
    )  # fmt: skip
    return _intervened(opened, given, (texts, labels), options, progress), opened.scan


def _labelled(given: Any) -> tuple[list[str] | None, list[str]]:
    """With --group the rows of its file, each a sequence of its own, and their labels; None and nothing without."""
    rows = given.evaluate_on if given.evaluate_on is not None else given.corpus
    if given.group is None:
        return None, []
    if rows is None:
        raise UserError("--group needs rows with labels.", do="Give a JSONL file: --evaluate-on FILE.jsonl")
    return _rows(Path(rows), given.group, given.text_column or "text")


def _row_by_row(result: ScanResult) -> ScanResult:
    """A scan by whose options windows of a fixed length do not run across rows."""
    return replace(
        result, info=replace(result.info, config=result.info.config | {"seq_len": None, "n_sequences": None})
    )


def _intervened(
    opened: Reopened, given: Any, rows: tuple[list[str] | None, list[str]], options: dict[str, Any], progress: Any
) -> Intervention:
    """The edits on an opened scan, with the effects on another text where one was given."""
    (texts, labels), other = rows, None
    if given.evaluate_on is not None:
        asked = opened.scan if texts is None else _row_by_row(opened.scan)
        other = scanned_corpus(opened.model, given.evaluate_on if texts is None else texts, asked)
    n = (opened.corpus if other is None else other).n_sequences
    if texts is not None and len(labels) != n:
        where = given.evaluate_on if given.evaluate_on is not None else given.corpus
        raise UserError(f"{where} has {len(labels)} rows, but {n} of them have tokens.")
    groups = None if texts is None else {given.group: labels}
    done: Intervention = opened.run(
        intervene, lambda now, all_: progress("intervene", now, all_), evaluate_on=other, groups=groups, **options
    )
    return done


def _rows(file: Path, column: str, text: str = "text") -> tuple[Any, list[str]]:
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
        if not isinstance(row, dict) or not isinstance(row.get(text), str):
            raise UserError(f"Row {i} of {file} has no text.", do=f"Each row needs a column {text!r}.")
        if column not in row:
            raise UserError(f"Row {i} of {file} has no column {column!r}.", do=near(column, row))
    if not rows:
        raise UserError(f"{file} is empty.", do=f"Each row needs a column {text!r}.")
    return [row[text] for row in rows], [str(row[column]) for row in rows]
