"""Memory that is free goes back to the system, and only then when there is much of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from massact.models import heap

# Holders lie between the pieces that are freed, so that the heap cannot shrink by itself.
FRAGMENTED = """
import gc
from massact.models import heap

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

freed, held = [], []
for _ in range(6000):
    freed.append(bytearray(64 << 10))
    held.append(bytearray(1 << 10))
del freed
gc.collect()
before = resident()
heap.give_back()
print(before - resident())
"""


class Library:
    """A C library with so much free memory."""

    def __init__(self, free: int) -> None:
        self.free, self.trims = free, 0

    def mallinfo2(self) -> heap._Info:
        return heap._Info(fordblks=self.free)

    def malloc_trim(self, _pad: int) -> None:
        self.trims += 1


@pytest.mark.parametrize(("free", "trims"), [(0, 0), (heap.TRIMMED_FROM - 1, 0), (heap.TRIMMED_FROM, 1), (8 << 30, 1)])
def test_trims_from_a_bound_on(monkeypatch, free, trims):
    library = Library(free)
    monkeypatch.setattr(heap, "_LIBRARY", library)
    heap.give_back()
    assert library.trims == trims


def test_a_system_without_glibc_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_LIBRARY", None)
    assert heap.give_back() is None


@pytest.mark.skipif(heap._LIBRARY is None, reason="needs glibc")
def test_a_fragmented_heap_shrinks():
    said = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True).stdout
    assert float(said) > 200  # of 375 MiB
