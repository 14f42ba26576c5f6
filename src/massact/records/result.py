"""What every kind of result is: a record and declared tables, saved, opened and told as JSON the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from massact.records.arrays import read_arrays
from massact.records.display import Display
from massact.records.errors import UserError
from massact.records.runinfo import jsonable
from massact.records.sidecars import Sidecar, read_sidecar, save_beside
from massact.records.tables import Columns, declare, frame, read_table


def table(name: str) -> Any:
    """A field of a result that holds one of its tables, empty where none is given."""
    return field(default_factory=partial(frame, name))


@dataclass(repr=False)
class Result(Display):
    """What a verb found, in memory and as files of a run directory.

    A kind is a subclass: a file of its own in `records/kinds`, or of another package (entry point `massact.results`).

    Args:
        info: what was asked, of what, and how it went.

    What a kind declares:
        KIND: its name, and key in --json beside a scan.
        VERB: the verb that gives it, as it is named on a page.
        FILE: name of its record; INFO: the dataclass of it, whose `schema_version` is the newest that is read.
        TABLES: name -> {column: (dtype, meaning)}; each is a field of the class.
        SOME: those of them that are missing where they have no rows.
        UNTOLD: those that are too long for --json.
        ARRAYS: field -> (file, shapes as in `massact.records.arrays`); never in --json.
        ALONE: True for one with a directory of its own, False for one that is added to a scan's.
        AGAIN: what to do where its files are damaged.
        PLACE: in the order in which a page tells of kinds.
    """

    KIND: ClassVar[str] = ""
    VERB: ClassVar[str] = ""
    FILE: ClassVar[str] = ""
    INFO: ClassVar[type[Any]] = Sidecar
    TABLES: ClassVar[Mapping[str, Columns]] = {}
    SOME: ClassVar[frozenset[str]] = frozenset()
    UNTOLD: ClassVar[frozenset[str]] = frozenset()
    ARRAYS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {}
    ALONE: ClassVar[bool] = False
    AGAIN: ClassVar[str] = ""
    PLACE: ClassVar[int] = 100

    info: Any

    def __init_subclass__(cls) -> None:
        """Declare the tables, so that they can be made and read by name."""
        if "TABLES" in cls.__dict__:
            declare(cls.TABLES)

    @classmethod
    def version(cls) -> int:
        """Newest schema version of its record that is read: the one that is written."""
        return cls.INFO.schema_version

    @property
    def notes(self) -> list[str]:
        """What a reader must know, a sentence each: what was left out, what is unavailable, and why."""
        return list(self.info.notes)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Its tables by name, without those that are left out where they are empty."""
        held = {name: getattr(self, name) for name in self.TABLES}
        return {name: rows for name, rows in held.items() if len(rows) or name not in self.SOME}

    def __repr__(self) -> str:
        """Its tables that have rows: what a prompt shows."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = [f"{name}: {len(t):,} rows" for name, t in held.items() if isinstance(t, pd.DataFrame) and len(t)]
        return f"{type(self).__name__}({', '.join(rows)})"

    def save(self, directory: str | Path) -> Path:
        """Write its files into a directory; the record last, so that its presence speaks for the rest.

        Raises:
            UserError: the directory cannot be written.
            WorkError: the disk is full; the directory is as it was.
        """
        path = Path(directory)
        if self.ALONE:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path} cannot be written.", error.strerror or str(error)) from None
        elif not path.is_dir():
            raise UserError(
                f"{path} cannot be written: it is no run directory.",
                do="Save the scan there first: scan.save(directory)",
            )
        arrays, tables = {file: getattr(self, name) for name, (file, _) in self.ARRAYS.items()}, self.tables()
        saved = save_beside(path, self.FILE, self.info, tables, arrays)
        for name in self.SOME - set(tables):  # of an earlier one of its kind: what speaks of this must be of this
            (path / f"{name}.parquet").unlink(missing_ok=True)
        return saved

    @classmethod
    def open(cls, directory: str | Path) -> Self | None:
        """Read it from a directory; None where there is none.

        Raises:
            UserError: it is damaged, or written by a newer massact.
        """
        path = Path(directory)
        info = cls.read(path)
        if info is None:
            return None
        held: dict[str, Any] = {name: read_table(path, name, cls.AGAIN) for name in cls.kept(info, path)}
        held |= {name: read_arrays(path / file, shapes) for name, (file, shapes) in cls.ARRAYS.items()}
        if any(f.name == "directory" for f in fields(cls)):
            held["directory"] = path
        result = cls(info, **held)
        result.check(path)
        return result

    @classmethod
    def read(cls, path: Path) -> Any:
        """Read its record from a directory; None where there is none."""
        return read_sidecar(path / cls.FILE, cls.INFO, cls.version(), cls.AGAIN)

    @classmethod
    def kept(cls, info: Any, path: Path) -> list[str]:
        """Names of the tables that a directory must have."""
        return [name for name in cls.TABLES if name not in cls.SOME or (path / f"{name}.parquet").is_file()]

    def check(self, path: Path) -> None:
        """Refuse what was read where its parts do not fit together."""

    def as_dict(self) -> dict[str, Any]:
        """Its record and tables, as JSON-able records: what --json prints."""
        tables = {n: rows.to_dict(orient="records") for n, rows in self.tables().items() if n not in self.UNTOLD}
        record: dict[str, Any] = jsonable(asdict(self.info) | tables)
        return record
