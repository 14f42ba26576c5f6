"""Text, Markdown and JSONL files and tables as documents."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from massact.corpora.plain_files import read_text
from massact.corpora.text_tables import TABLE_SUFFIXES, is_table, table_texts
from massact.records.errors import UserError, near
from massact.records.presets import named_corpora
from massact.records.user_files import refuse_special

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
AUDIO_SUFFIXES = (".wav", ".flac")
# How files end that are a corpus of text, images or sound.
CORPUS_SUFFIXES = (*JSONL_SUFFIXES, *TEXT_SUFFIXES, *TABLE_SUFFIXES, *IMAGE_SUFFIXES, *AUDIO_SUFFIXES)
# A name that ends so is a path, also when nothing is there: the message is then about a missing file.
PATH_SUFFIXES = (*CORPUS_SUFFIXES, ".json", ".gz", ".zst", ".pdf", ".html")


def at_home(path: Path | str) -> Path:
    """A path with ~ written out; one of nobody's home stays as it is, and is not there."""
    return Path(os.path.expanduser(path))


def files_in(folder: Path) -> list[Path]:
    """Files of a folder and of those below it, in no order; hidden ones, and those in hidden folders, are left out."""
    inside = [f for f in folder.rglob("*") if f.is_file()]
    # Hidden files and folders (.git, .DS_Store) are not part of anybody's corpus.
    return [f for f in inside if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def named_file(kind: str, path: Path, where: str) -> Path:
    """A file that must be there.

    Args:
        kind: what it is called in the message: image, recording.
        where: who names it.

    Raises:
        UserError: there is none.
    """
    path = at_home(path)
    refuse_special(path)
    if not os.path.isfile(path):
        raise UserError(f"There is no {kind} {str(path)!r}.", f"It is {where}.", "Check the path.")
    return path


def named(path: Path) -> str:
    """The name of a file or folder behind links, also of links that go round in a circle."""
    return os.path.basename(os.path.realpath(path))


def looks_like_path(spec: str) -> bool:
    """Say whether a name can only be meant as a path: a Hub name has one slash at most, no such ending."""
    lowered = spec.lower()
    return (
        spec.startswith((".", "~", "/", "\\"))
        or spec.endswith(("/", "\\"))
        or spec.count("/") > 1
        or "\\" in spec
        or lowered.endswith(PATH_SUFFIXES)
    )


def read_path(path: Path, text_column: str | None = None) -> list[str]:
    """Read a file, or every text file below a folder in the order of their names, as documents.

    Args:
        path: a text, Markdown or JSONL file, a CSV, TSV or parquet table, or a folder of such.
        text_column: the JSONL key or the column that holds the text; 'text' if None.

    Raises:
        UserError: nothing there, unreadable, not text, no text, a broken JSONL line, or no such column.
    """
    if not path.exists():
        raise _missing(path)
    files = text_files(path) if path.is_dir() else [path]
    if text_column is not None and not any(has_columns(file) for file in files):
        raise UserError(
            f"The text column {text_column!r} was asked for.",
            f"{str(path)!r} holds plain text, which has no columns.",
            "Leave it out, or give a JSONL file or a table.",
        )
    documents: list[str] = []
    for file in files:
        if is_table(file):
            documents += table_texts(file, text_column or "text")
            continue
        text = read_text(file)
        documents += _jsonl(file, text, text_column or "text") if has_columns(file) else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(
            f"There is no text in {str(path)!r}.",
            "It is empty, or holds only white space.",
            "Give a file with some text in it.",
        )
    return documents


def has_columns(file: Path) -> bool:
    """Whether the text of a file stands in one of several columns: JSONL and tables."""
    return file.suffix.lower() in JSONL_SUFFIXES or is_table(file)


def text_files(folder: Path) -> list[Path]:
    """Every text, Markdown and JSONL file below a folder, where there is none every table, in the order of their names.

    Raises:
        UserError: there is none.
    """
    shown = files_in(folder)
    texts = [file for file in shown if file.suffix.lower() in (*TEXT_SUFFIXES, *JSONL_SUFFIXES)]
    texts = texts or [file for file in shown if is_table(file)]
    if not texts:
        found = sorted({file.suffix.lower() or "(no ending)" for file in shown})
        raise UserError(
            f"There are no text files and no images or recordings in the folder {str(folder)!r}.",
            f"It holds {len(shown)} files" + (f", ending in {', '.join(found[:8])}." if found else "."),
            f"A folder is searched for {' '.join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, *TABLE_SUFFIXES))}, images, or "
            "wav and flac; else name one file.",
        )
    # As text with forward slashes, so that the order is the same on every system.
    return sorted(texts, key=lambda file: file.relative_to(folder).as_posix())


def _jsonl(file: Path, text: str, column: str) -> list[str]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    lines = enumerate(text.split("\n"), start=1)
    return [_jsonl_text(file, number, line, column) for number, line in lines if line.strip()]


def _jsonl_text(file: Path, number: int, line: str, column: str) -> str:
    where = f"Line {number} of {str(file)!r}"
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = str(error).replace("line 1 ", "")
        raise UserError(f"{where} is not JSON.", f"{what}.", "Each line is one JSON object.") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is no JSON object.",
            f"It is {_kind(record)}.",
            f'Each line looks like {{"{column}": "some text"}}.',
        )
    if column not in record:
        raise UserError(
            f"{where} has no column {column!r}.",
            f"Its columns: {', '.join(map(repr, record)) or 'none'}.",
            "Name the one that holds the text (--text-column, in Python text_column).",
        )
    if not isinstance(record[column], str):
        raise UserError(
            f"{where} has no text in column {column!r}.",
            f"It is {_kind(record[column])}.",
            "Give a column of strings.",
        )
    return record[column]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _missing(path: Path) -> UserError:
    parent = path.parent
    what = f"There is no file or folder {str(path)!r}."
    if not parent.is_dir():
        return UserError(what, f"The folder {str(parent)!r} does not exist either.", "Check the path.")
    inside: list[Path] = []
    with suppress(OSError):
        inside = list(parent.iterdir())
    fit = [f.name for f in inside if f.suffix.lower() in CORPUS_SUFFIXES and f.is_file() and f.name[0] != "."]
    none = f"The folder {str(parent)!r} {'holds no text, images or sound' if inside else 'is empty'}."
    there = near(path.name, fit, "Files there that can be one") if fit else none
    return UserError(what, f"It was looked for in {os.path.abspath(parent)!r}.", f"{there} {named_corpora()}")
