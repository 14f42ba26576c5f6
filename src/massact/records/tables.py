"""The tables of a run directory by name, and safe reading and writing. Their columns stand in `records/kinds`.

Every file is written under a temporary name and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from massact.records.disk import write_atomic
from massact.records.errors import UserError, class_and_line, first_line
from massact.records.user_files import refuse_special

Columns = dict[str, tuple[str, str]]  # column -> (dtype, meaning), in the order of the file

_DECLARED: dict[str, Columns] = {}

# Columns that older runs do not have, with what stands there when they are opened: not known, never made up.
ADDED_LATER = {
    "modality": "",
    "mixer": "",
    **dict.fromkeys(("mass_first_uniform", "mass_findings_uniform", "mass_random_uniform"), math.nan),
    **dict.fromkeys(("concentration_uniform", "concentration_first_uniform"), math.nan),
    **dict.fromkeys(("n_targets", "found_tokens", "random_tokens", "other_tokens"), math.nan),
    **dict.fromkeys(("cosine_low", "cosine_high", "n_folds"), math.nan),
    **dict.fromkeys(("mass_diagonal", "mass_diagonal_uniform", "diagonal", "diagonal_uniform"), math.nan),
    "sink_type": "",
    "origin": "",
    "median_so_far": math.nan,
    "n_generated": 0,
}
_OF_EFFECTS = ("n_needed", "delta_nats", "nats_low", "nats_high", "share_of_zero", "share_low", "share_high",
               "random_low", "random_high", "gap", "gap_low", "gap_high", "change")  # fmt: skip
ADDED_TO_EFFECTS = {"verdict": "", "cluster": "", **dict.fromkeys(_OF_EFFECTS, math.nan)}


def declare(tables: Mapping[str, Columns]) -> None:
    """Make tables known by name.

    Raises:
        ValueError: another one has that name.
    """
    for name, columns in tables.items():
        if _DECLARED.setdefault(name, columns) != columns:
            raise ValueError(f"two tables are called {name!r}")


def columns_of(table: str) -> Columns:
    """The columns of a table of any kind of result."""
    if table not in _DECLARED:
        importlib.import_module("massact.records.kinds").kinds()
    return _DECLARED[table]


def frame(table: str, rows: pd.DataFrame | dict[str, object] | list[dict[str, object]] | None = None) -> pd.DataFrame:
    """A data frame with exactly the declared columns and types, empty when there are no rows."""
    columns = columns_of(table)
    empty = rows is None or len(rows) == 0
    given = rows if isinstance(rows, dict) and not empty else pd.DataFrame({c: [] for c in columns} if empty else rows)
    missing = set(columns) - set(given)
    if missing:
        raise KeyError(f"table {table} lacks {sorted(missing)}")
    made = {
        c: pd.array(given[c], dtype=dtype) if dtype == "string" else np.array(given[c], dtype)
        for c, (dtype, _) in columns.items()
    }
    return pd.DataFrame(made, index=getattr(given, "index", None), copy=False)


def with_columns(data: pd.DataFrame, meanings: Mapping[str, str]) -> pd.DataFrame:
    """A table that knows what its columns beside the declared ones are; they are kept with it, as float64."""
    data.attrs["columns"] = dict(meanings)
    return data


def all_columns(table: str, data: pd.DataFrame) -> Columns:
    """The declared columns of a table, and those that this one has beside them."""
    others = data.attrs.get("columns")
    known = others.items() if isinstance(others, dict) else ()
    return columns_of(table) | {c: ("float64", str(meaning)) for c, meaning in known if c in data.columns}


def described(table: str, data: pd.DataFrame) -> pa.Schema:
    """The schema of a table as a file, each column with its meaning as metadata (b"description")."""
    meanings = {c: meaning for c, (_, meaning) in all_columns(table, data).items()}
    schema = pa.Schema.from_pandas(data, preserve_index=False)
    fields = [f.with_metadata({"description": meanings[f.name]}) if f.name in meanings else f for f in schema]
    return pa.schema(fields, schema.metadata)


def write_table(directory: Path, table: str, data: pd.DataFrame) -> None:
    """Write one table of a run as parquet, whose columns say what they are."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # pyarrow itself opens only paths that are Unicode
            data.to_parquet(file, index=False, schema=described(table, data))

    write_atomic(directory / f"{table}.parquet", write)


def read_table(directory: Path, table: str, again: str = "Scan again.") -> pd.DataFrame:
    """Read one table of a run.

    Args:
        again: what to do where it is damaged or missing.

    Raises:
        UserError: the file is missing, is not parquet, lacks a column, or holds another type in one.
    """
    path, columns = directory / f"{table}.parquet", columns_of(table)
    refuse_special(path)
    if not path.is_file():
        raise UserError(f"{directory} has no {path.name}.", "It was not finished, or is damaged.", again)
    try:
        with open(path, "rb") as file:
            data = pd.read_parquet(file)
    except Exception as error:
        raise UserError(f"{path} cannot be read.", f"It is damaged ({class_and_line(error)}).", again) from None
    later = ADDED_LATER | (ADDED_TO_EFFECTS if "delta_nats" in columns else {})
    data = data.assign(**{c: v for c, v in later.items() if c in columns and c not in data.columns})
    missing = [c for c in columns if c not in data.columns]
    if missing:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}.", "It is damaged.", again)
    every = all_columns(table, data)
    try:
        data = data.reset_index(drop=True)
        typed = pd.DataFrame({c: data[c].astype(dtype) for c, (dtype, _) in every.items()})
        others = {c: meaning for c, (_, meaning) in every.items() if c not in columns}
        return with_columns(typed, others) if others else typed
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} does not hold numbers where it should.", f"It is damaged: {error}.", again) from None


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as one .npz file."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomic(path, write)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read arrays written by `save_arrays`; never unpickles.

    Raises:
        UserError: the file is damaged.
    """
    refuse_special(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except Exception as error:
        raise UserError(
            f"{path} cannot be read.",
            first_line(error),
            "The file is damaged: scan again.",
        ) from None
