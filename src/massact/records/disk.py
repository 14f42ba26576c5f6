"""A full disk: known however it is told, and nothing is left half-written because of it."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from massact.records.errors import WorkError

# EFBIG: beyond what a file may hold here (ulimit -f, the file system).
# What torch and safetensors say of a failed write follows below; they do not hand on the error of the system.
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAID = r"no space left|disk quota|file too large|os error 2[78]\b|PytorchStreamWriter failed|inline_container"


def disk_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk, or a quota, is full; libraries wrap it in errors of their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if re.search(_SAID, str(error), re.I):
            return True
        error = error.__cause__ or error.__context__
    return False


def full(path: Path, error: BaseException) -> WorkError:
    """The message of a file that a full disk has no room for."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return WorkError(f"The disk is full: {path} could not be written.",
                     f"{getattr(error, 'strerror', None) or said}. What was there before is as it was.",
                     "Make room, then run the command again.")  # fmt: skip
