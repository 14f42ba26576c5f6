"""One file of text: UTF-8, or refused."""

from __future__ import annotations

from pathlib import Path

from massact.records.errors import UserError
from massact.records.user_files import read_given

MOST_BYTES = 2 << 30  # of one text: it is held in memory, several times over


def read_text(file: Path) -> str:
    """Read one UTF-8 file, with every line ending as a newline.

    Raises:
        UserError: unreadable, a pipe, too large, binary, or not UTF-8 (with the offset of the first bad byte).
    """
    try:
        data = read_given(file, MOST_BYTES)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(f"The file {str(file)!r} cannot be read.", f"{why}.", "Check its permissions.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            f"The file {str(file)!r} is not UTF-8 text.",
            "It starts with the mark of UTF-16.",
            "Save it as UTF-8.",
        )
    if (offset := data.find(b"\0")) >= 0:
        raise UserError(
            f"The file {str(file)!r} is not text.",
            f"It is binary: byte {offset} is zero.",
            "Give a text, Markdown or JSONL file, or a table (.csv, .tsv, .parquet).",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The file {str(file)!r} is not UTF-8 text.",
            f"Byte {error.start} (0x{data[error.start]:02x}) is not valid there: {error.reason}.",
            "Save it as UTF-8.",
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
