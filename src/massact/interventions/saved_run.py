"""Intervene on a saved run, on its own text or, told by group, on the rows of a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from massact.interventions.job import intervene
from massact.records.errors import UserError, near
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult
from massact.records.user_files import read_given
from massact.scans import reopen, scanned_corpus


def intervene_run(
    result: ScanResult,
    *,
    model: str | None = None,
    corpus: str | None = None,
    evaluate_on: str | None = None,
    group: str | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
    load_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Intervention:
    """Intervene on the findings of a saved run.

    Args:
        result: of the run.
        model, corpus, device, load_options: see `massact.scans.reopen`.
        evaluate_on: another text for the effects, see `intervene`.
        group: column of the JSONL file `evaluate_on` (or `corpus`) whose labels effects are broken down by; each of its
            rows is a sequence of its own then.
        progress: called with (stage, sequences done, sequences in all).
        options: see `InterveneConfig`; and labels and head, see `intervene`.

    Raises:
        UserError: model, corpus or column cannot be found, or the model is another one.
    """
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
    say = progress or (lambda *_: None)
    here = texts is not None and evaluate_on is None
    if here:
        result = replace(result, info=replace(result.info, config=apart))
    opened = reopen(
        result, model=model, corpus=texts if here else corpus, device=device, load_options=load_options,
        progress=progress,
    )  # fmt: skip
    other: Any = None
    if evaluate_on is not None:
        asked = opened.scan if texts is None else replace(opened.scan, info=replace(opened.scan.info, config=apart))
        other = scanned_corpus(opened.model, texts if texts is not None else evaluate_on, asked)
    n = (opened.corpus if other is None else other).n_sequences
    if groups is not None and len(labels) != n:
        raise UserError(f"{rows} has {len(labels)} rows, but {n} of them have tokens.")
    done = intervene(
        opened.model, opened.corpus, opened.scan, evaluate_on=other, groups=groups,
        progress=lambda now, all_: say("intervene", now, all_), **(options or {}),
    )  # fmt: skip
    done.info.notes += opened.notes
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
