"""Files of tables say what their columns are, and read the same in pandas, polars and DuckDB."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from massact.records.kinds import tables
from massact.records.tables import columns_of, frame, read_table, with_columns, write_table
from massact.scans import scan


def meanings(file: Path) -> dict[str, str]:
    return {f.name: (f.metadata or {}).get(b"description", b"").decode() for f in pq.read_schema(file)}


def one_row(table: str) -> pd.DataFrame:
    values = {"string": "a", "int64": 1, "float64": math.pi, "bool": True, "boolean": True}
    return frame(table, [{c: values[dtype] for c, (dtype, _) in columns_of(table).items()}])


@pytest.mark.parametrize("table", tables())
def test_every_column_of_every_table_says_what_it_is(table: str, tmp_path: Path) -> None:
    declared = {c: meaning for c, (_, meaning) in columns_of(table).items()}
    assert all(declared.values())
    for rows in (frame(table), one_row(table)):
        write_table(tmp_path, table, rows)
        assert meanings(tmp_path / f"{table}.parquet") == declared
        pd.testing.assert_frame_equal(read_table(tmp_path, table), rows)


def test_columns_that_one_table_has_beside_the_declared_ones_say_it_too(tmp_path: Path) -> None:
    rows = with_columns(one_row("layers").assign(skew=0.5), {"skew": "third moment"})
    write_table(tmp_path, "layers", rows)
    assert meanings(tmp_path / "layers.parquet")["skew"] == "third moment"
    assert read_table(tmp_path, "layers").attrs["columns"] == {"skew": "third moment"}


def test_files_of_a_scan(tmp_path: Path) -> None:
    scan(out=tmp_path / "run", seq_len=16, n_sequences=2, null=False)
    files = sorted((tmp_path / "run").glob("*.parquet"))
    assert len(files) >= 8
    for file in files:
        assert all(meanings(file).values()), file.name
        assert file.stem in tables()


def test_polars_and_duckdb_read_what_pandas_reads(tmp_path: Path) -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    rows = one_row("layers")
    write_table(tmp_path, "layers", rows)
    file = str(tmp_path / "layers.parquet")
    assert polars.read_parquet(file).to_dicts() == rows.to_dict(orient="records")
    (found,) = duckdb.sql(f"select layer, top1 from '{file}'").fetchall()
    assert found == (1, math.pi)
