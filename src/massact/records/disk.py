"""Files that are written whole or not at all, also on a full disk, which is known however it is told."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from massact.records.errors import WorkError, causes, first_line

# EFBIG: beyond what a file may hold here (ulimit -f, the file system).
# What torch and safetensors say of a failed write follows below; they do not hand on the error of the system.
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAID = r"no space left|disk quota|file too large|os error 2[78]\b|PytorchStreamWriter failed|inline_container"


def disk_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk, or a quota, is full; libraries wrap it in errors of their own."""
    said = [] if error is None else causes(error)
    return any((isinstance(e, OSError) and e.errno in _NUMBERS) or re.search(_SAID, str(e), re.I) for e in said)


def full(path: Path, error: BaseException) -> WorkError:
    """The message of a file that a full disk has no room for."""
    said = first_line(error)
    return WorkError(f"The disk is full: {path} could not be written.",
                     f"{getattr(error, 'strerror', None) or said}. What was there before is as it was.",
                     "Make room, then run the command again (a scan with --resume).")  # fmt: skip


# Files under their temporary names, and the names that they are to get; None: each gets it at once.
_waiting: ContextVar[list[tuple[Path, Path]] | None] = ContextVar("waiting", default=None)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it.

    Raises:
        WorkError: the disk is full; what was there before is as it was.
    """
    temporary, waiting = path.with_name(f".{path.name}.{os.getpid()}.tmp"), _waiting.get()
    try:
        write(temporary)
        if waiting is None:
            os.replace(temporary, path)
        else:
            waiting.append((temporary, path))
    except Exception as error:  # pyarrow and matplotlib have errors of their own
        if disk_full(error):
            raise full(path, error) from error
        raise
    finally:
        if (temporary, path) not in (waiting or ()):
            temporary.unlink(missing_ok=True)


@contextmanager
def all_or_nothing(record: Path) -> Iterator[None]:
    """Within it, written files keep their temporary names; they are renamed at its end, and not after an error.

    Args:
        record: the file that speaks for the others: it goes before any of them is replaced, and comes last.
    """
    token = _waiting.set([])
    try:
        yield
        written = _waiting.get() or []
        if any(path != record for _, path in written):
            record.unlink(missing_ok=True)
        for temporary, path in sorted(written, key=lambda pair: pair[1] == record):
            os.replace(temporary, path)
    finally:
        for temporary, _ in _waiting.get() or []:
            temporary.unlink(missing_ok=True)
        _waiting.reset(token)


def leftovers(directory: Path, of: tuple[str, ...] = ()) -> list[Path]:
    """Temporary files that a killed process left behind: all, or those of files of these names."""
    return sorted(p for p in directory.glob(".*.tmp") if not of or p.name.startswith(tuple(f".{x}." for x in of)))
