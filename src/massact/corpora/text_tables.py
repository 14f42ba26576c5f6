"""CSV, TSV and parquet files whose rows are documents: one column holds the text."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from massact.corpora.plain_files import MOST_BYTES, read_text
from massact.records.errors import UserError, first_line, near
from massact.records.user_files import read_given

PARQUET = ".parquet"
TABLE_SUFFIXES = (".csv", ".tsv", PARQUET)


def csv_rows(file: Path) -> list[list[str]]:
    """The rows of a CSV file (of a TSV file, between tabs), blank ones as well.

    Raises:
        UserError: it cannot be read, or is no CSV.
    """
    text, most, tabs = read_text(file), csv.field_size_limit(), file.suffix.lower() == ".tsv"
    try:
        csv.field_size_limit(MOST_BYTES)  # a document may be longer than the 128 KiB that Python takes for a cell
        return list(csv.reader(io.StringIO(text), delimiter="\t" if tabs else ",", strict=True))
    except csv.Error as error:
        raise UserError(f"{str(file)!r} cannot be read as CSV.", f"{error}.", "Is a quote left open?") from error
    finally:
        csv.field_size_limit(most)


def is_table(file: Path) -> bool:
    """Whether a file is a table by its name."""
    return file.suffix.lower() in TABLE_SUFFIXES


def table_texts(file: Path, column: str) -> list[str]:
    """The documents of a table, in the order of its rows; those without text are empty.

    Args:
        file: CSV or TSV with a header, or parquet.
        column: the one that holds the text.

    Raises:
        UserError: it cannot be read, has no such column, or that holds no text.
    """
    return _of_parquet(file, column) if file.suffix.lower() == PARQUET else _of_csv(file, column)


def _of_csv(file: Path, column: str) -> list[str]:
    rows = csv_rows(file)
    head = [cell.strip() for cell in rows[0]] if rows else []
    if column not in head:
        raise _no_column(file, column, head)
    at, texts = head.index(column), []
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(head):
            raise UserError(
                f"In row {number} of {str(file)!r} {len(row)} cells stand under {len(head)} columns.",
                do="Put quotes around texts with commas, quotes or line breaks in them.",
            )
        texts += row[at : at + 1]
    return texts


def _of_parquet(file: Path, column: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(io.BytesIO(read_given(file, MOST_BYTES)))
        names = list(opened.schema_arrow.names)
        if column not in names:
            raise _no_column(file, column, names)
        kind = opened.schema_arrow.field(column).type
        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        types = pa.types
        if not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
            raise UserError(f"The column {column!r} of {str(file)!r} holds no text.", f"It is {kind}.",
                            "Name a column of strings (--text-column, in Python text_column).")  # fmt: skip
        values: list[str | None] = opened.read(columns=[column]).column(column).to_pylist()
    except UserError:
        raise
    except OSError as error:  # pyarrow's own among them
        raise UserError(f"The file {str(file)!r} cannot be read.", error.strerror or first_line(error),
                        "Check its permissions, or copy it again.") from error  # fmt: skip
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read as parquet.", first_line(error), "Copy it again.") from error
    return [value or "" for value in values]


def _no_column(file: Path, column: str, head: list[str]) -> UserError:
    what = f"{str(file)!r} has no column {column!r}."
    if not head:
        return UserError(what, "It is empty.", "It needs a header: text")
    return UserError(
        what,
        "It would hold the text; images and recordings stand in a column 'path' of a CSV.",
        f"Name it (--text-column, in Python text_column). {near(column, head, 'Its columns')}",
    )
