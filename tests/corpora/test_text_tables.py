"""CSV, TSV and parquet as text: the rows that a reader of the same file sees, one message for every bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import massact as ma
from massact.corpora import ImageSource, corpus
from massact.records.errors import UserError

TEXTS = ["The kettle sings.", 'He said "no",\nand left.', "Änderungen, überall", "x" * 200_000, "one\ttab"]


def written(place: Path, kind: str, column: str = "text", texts: list[Any] = TEXTS) -> Path:
    """A table with a column before the text and one behind it."""
    rows = pd.DataFrame({"id": range(len(texts)), column: texts, "source": ["web"] * len(texts)})
    file = place / f"a.{kind}"
    if kind == "parquet":
        rows.to_parquet(file)
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows.to_dict("records"))))
    else:
        rows.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
    return file


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_rows_are_documents(kind: str, column: str, tmp_path: Path) -> None:
    file = written(tmp_path, kind, column)
    named = {} if column == "text" else {"text_column": column}
    source: Any = corpus(file, **named)
    assert source.documents() == TEXTS
    if column != "text":
        with pytest.raises(UserError, match="body") as told:
            corpus(file)
        assert "--text-column" in told.value.do


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_without_text_are_left_out(kind: str, tmp_path: Path) -> None:
    source: Any = corpus(written(tmp_path, kind, texts=["a b", None, "  ", "c"]))
    assert source.documents() == ["a b", "c"]


def test_categories_of_parquet_are_text(tmp_path: Path) -> None:
    pd.DataFrame({"text": pd.Categorical(["a", "b", "a"])}).to_parquet(tmp_path / "a.parquet")
    source: Any = corpus(tmp_path / "a.parquet")
    assert source.documents() == ["a", "b", "a"]


def test_a_folder_of_tables_is_read_where_it_has_no_texts(tmp_path: Path) -> None:
    written(tmp_path, "csv", texts=["two"]).rename(tmp_path / "b.csv")
    written(tmp_path, "parquet", texts=["one"])
    source: Any = corpus(tmp_path)
    assert source.documents() == ["one", "two"]
    (tmp_path / "c.txt").write_text("three")
    source = corpus(tmp_path)
    assert source.documents() == ["three"]


def test_what_lists_images_stays_one(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,text\na.png,a dog\n")
    (tmp_path / "a.png").write_bytes(b"")
    assert isinstance(corpus(tmp_path / "list.csv"), ImageSource)
    source: Any = corpus(tmp_path / "list.csv", text_column="text")
    assert source.documents() == ["a dog"]
    (tmp_path / "code.csv").write_text("file,text\na.py,print(1)\n")
    source = corpus(tmp_path / "code.csv")
    assert source.documents() == ["print(1)"]


@pytest.mark.parametrize(
    "name, data, told",
    [("a.csv", b"text,id\nx\n", "row 2"), ("a.csv", b'text\n"x\n', "quote"), ("a.csv", b"text\n\n \n", "no text"),
     ("a.csv", b"text\n\xff\n", "UTF-8"), ("a.parquet", b"PAR1 and then nothing", "parquet"), ("a.tsv", b"", "empty"),
     ("a.csv", b"body;id\nx;1\n", "body;id")],
    ids=str,
)  # fmt: skip
def test_a_bad_table_is_told(name: str, data: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told):
        corpus(tmp_path / name)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int64"):
        corpus(written(tmp_path, "parquet"), text_column="id")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_scan_of_a_table_is_that_of_its_text(kind: str, tmp_path: Path) -> None:
    words = "The kettle sings and the lamp is low. " * 40
    (tmp_path / "a.txt").write_text(words)
    options: dict[str, Any] = dict(null=False, bos_contrast=False, n_sequences=2, seq_len=32)
    plain = ma.scan(None, tmp_path / "a.txt", **options)
    table = ma.scan(None, written(tmp_path, kind, "body", [words]), text_column="body", out=tmp_path / "run", **options)
    assert table.findings.equals(plain.findings) and len(plain.findings)
    again = ma.explain(None, None, ma.open_run(tmp_path / "run"))  # finds file and column by the record
    assert again.info.corpus["sha256"] == table.info.corpus["sha256"]
