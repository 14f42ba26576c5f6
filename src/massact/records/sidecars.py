"""Records that a later verb puts beside run.json: explain.json, intervene.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd

from massact.records.answer import read_as
from massact.records.disk import all_or_nothing, leftovers, write_atomic
from massact.records.errors import UserError
from massact.records.runinfo import RunInfo, git_state, jsonable, versions
from massact.records.tables import save_arrays, write_table
from massact.records.user_files import read_given, refuse_special

Info = TypeVar("Info", bound="Sidecar")


@dataclass
class Sidecar:
    """What every later verb records.

    Args:
        config: options as they were resolved.
        model, corpus: id and hash of what was run.
        notes: what a reader must know, one sentence each.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    wall_s: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scan: RunInfo, config: dict[str, Any], corpus: Any, n_sequences: int, **more: Any) -> Self:
        """The record of a verb on a scan.

        Args:
            scan: the record of the scan; config: options as they were resolved.
            corpus: what was run, with name and hash; n_sequences: of it.
            **more: further fields.
        """
        model = {k: scan.model.get(k) for k in ("id", "name", "weights_sha256")}
        model |= {"streams": scan.model["streams"]} if scan.model.get("streams") else {}
        source = scan.corpus.get("source")
        read = {"name": corpus.name, "sha256": corpus.sha256, "n_sequences": n_sequences,
                "kind": scan.corpus.get("kind"),
                "source": {"kind": source.get("kind")} if isinstance(source, dict) else None}  # fmt: skip
        return cls(config=config, model=model, corpus=read, git=git_state(), **more)


def write_sidecar(file: Path, info: Sidecar) -> None:
    """Write a record; last of a verb's files, so that its presence speaks for the rest."""
    text = json.dumps(jsonable(asdict(info)), indent=2, ensure_ascii=False) + "\n"
    write_atomic(file, lambda p: p.write_text(text, "utf-8", "backslashreplace"))


def save_beside(
    directory: str | Path,
    name: str,
    info: Sidecar,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, dict[str, np.ndarray]] | None = None,
) -> Path:
    """Add the files of a verb to a run directory: all of them, or none; its record comes last.

    Args:
        name: file name of the record.
        tables: name -> table, see `massact.records.tables`.
        arrays: file name -> arrays by name.

    Raises:
        UserError: the directory cannot be written.
        WorkError: the disk is full; the directory is as it was.
    """
    path = Path(directory)
    try:
        for left in leftovers(path, (name, *(f"{table}.parquet" for table in tables), *(arrays or {}))):
            left.unlink(missing_ok=True)
        with all_or_nothing(path / name):
            for table, data in tables.items():
                write_table(path, table, data)
            for file, held in (arrays or {}).items():
                save_arrays(path / file, held)
            write_sidecar(path / name, info)
    except OSError as error:
        raise UserError(f"{path} cannot be written.", error.strerror or str(error)) from None
    return path


def read_sidecar(file: Path, kind: type[Info], version: int, again: str) -> Info | None:
    """Read a record; None where there is none.

    Args:
        file: of the record.
        kind: its dataclass, with a field `schema_version`.
        version: the newest that this massact reads.
        again: what to do if it is damaged.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    refuse_special(file)
    if not file.is_file():
        return None
    try:
        data = json.loads(read_given(file).decode("utf-8"))
        found = data["schema_version"]
        if not isinstance(found, int) or not 1 <= found <= version:
            raise UserError(f"{file} has schema version {found!r}; this massact reads up to {version}.", do=again)
        known = {f.name for f in fields(kind)}
        return read_as(kind, {k: v for k, v in data.items() if k in known})
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged.", f"{error}.", again) from None
