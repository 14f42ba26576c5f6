"""The free memory that the C library keeps: what short-lived activations leave between long-lived statistics."""

from __future__ import annotations

import ctypes

TRIMMED_FROM = 128 << 20  # bytes that are free: less is not worth the page faults


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Info
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):  # another allocator, or another system
        return None
    return library


_LIBRARY = _glibc()


def give_back() -> None:
    """Give free memory back to the system.

    A statistic that is allocated while activations are alive lies between them, so that glibc cannot join the holes:
    the heap grows by up to 90 MB a pass of SmolLM2-135M while what is in use stays the same.
    """
    if _LIBRARY is not None and _LIBRARY.mallinfo2().fordblks >= TRIMMED_FROM:
        _LIBRARY.malloc_trim(0)
