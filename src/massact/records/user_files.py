"""Files that a user names: pipes and devices are refused before they are opened, and no more is read than a limit."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from massact.records.errors import UserError

MOST_RECORD = 1 << 28  # bytes of a record, a configuration or a list: real ones have kilobytes

_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe", "Reading it would wait for whoever writes into it"),
    (stat.S_ISCHR, "a device", "It may have no end"),
    (stat.S_ISBLK, "a device", "It is a disk, not a file on one"),
    (stat.S_ISSOCK, "a socket", "Nothing can be read from it"),
)


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Refuse what is there but is neither a file nor a folder: opening it could wait for ever.

    Raises:
        UserError: says what it is.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, or no path at all: whoever opens it says so
        return
    for is_such, name, why in _SPECIAL:
        if is_such(mode):
            raise UserError(f"{os.fspath(path)!r} is {name}, not a file.", f"{why}, so it is not opened.",
                            "Write what it gives into a file, and name that.")  # fmt: skip


def refuse_special_in(folder: str | os.PathLike[str]) -> None:
    """The same of everything right inside a folder, whose files a library will open.

    Raises:
        UserError: names the first.
    """
    refuse_special(folder)
    for name in sorted(_names(folder)):
        refuse_special(os.path.join(folder, name))


def read_given(path: Path, most: int = MOST_RECORD) -> bytes:
    """The bytes of a file that a user named.

    Args:
        path: of the file.
        most: bytes that are read; a larger file is refused, whatever its size is said to be.

    Raises:
        UserError: a pipe, a device, or too large.
        OSError: it cannot be opened or read.
    """
    refuse_special(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if size > most or len(data) > most:
        raise UserError(f"{str(path)!r} is larger than {_size(most)}.",
                        f"It holds {_size(max(size, len(data)))}; so much is read at most.",
                        "Give a part of it.")  # fmt: skip
    return data


def _size(n: int) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 1 << 30 else f"{n / 2**20:,.0f} MiB"


def _names(folder: str | os.PathLike[str]) -> Iterable[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return ()
