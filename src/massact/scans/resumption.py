"""The run directory while a scan goes on: run.json says how it stands, state.npz holds what is finished."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from massact.records.disk import leftovers
from massact.records.errors import UserError, WorkError
from massact.records.run import claim, read_info, write_info
from massact.records.runinfo import RunInfo, jsonable
from massact.records.tables import load_arrays, save_arrays
from massact.stats import Resumable
from massact.trace import Measurements

SAVE_EVERY_S = 30.0


class Saved:
    """The run directory of one scan.

    Args:
        out: the directory, or None for a scan that leaves nothing behind.
        info: the record of this scan.
        resume: go on with the run of the same inputs and options that `out` may hold.

    Raises:
        UserError: `out` cannot be written, holds another run, or another process is at work in it.
    """

    def __init__(self, out: str | os.PathLike[str] | None, info: RunInfo, resume: bool) -> None:
        self.path = None if out is None else Path(out)
        self.info, self.earlier_s = info, 0.0
        self.is_done = False
        self._lock: int | None = None
        self._last = time.monotonic()
        self._measured: Measurements | None = None
        if self.path is None:
            return
        if resume and (self.path / "run.json").is_file():
            self._take_over(read_info(self.path))
            if self.is_done:
                return
        self.path = claim(self.path, info)
        self._lock = _locked(self.path)
        try:
            claim(self.path, info)  # again: another process may have been here before the lock was ours
            write_info(self.path, info)
        except BaseException:
            self.release()
            raise

    def _take_over(self, other: RunInfo) -> None:
        for what in ("verb", "config", "model", "corpus", "criterion"):
            ours, theirs = (_same_everywhere(jsonable(getattr(i, what))) for i in (self.info, other))
            if ours != theirs:
                raise UserError(
                    f"The run in {self.path} has another {what}; it cannot be resumed with this one.",
                    _difference(ours, theirs),
                    "Use the same options, or another --out.",
                )
        self.is_done = other.status == "ok"
        self.info.started, self.earlier_s = other.started, float(other.wall_s or 0)

    def restore(self, fresh: Measurements) -> Measurements:
        """Measurements of an earlier, interrupted run, or the fresh ones.

        Raises:
            UserError: what was kept is damaged, or of another version.
        """
        file = self.path / "state.npz" if self.path is not None else None
        if file is None or not file.is_file():
            return fresh
        arrays = load_arrays(file)
        try:
            for i, ((name, site), empty) in enumerate(fresh.statistics.items()):
                mine = {k.split(":", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{i}:")}
                if not isinstance(empty, Resumable):
                    raise TypeError(f"{name} cannot be resumed")
                fresh.statistics[name, site] = type(empty).from_state(mine)
                seen = mine.get("sequence")
                if seen is not None and len(seen) != int(arrays["n_sequences"]):
                    raise ValueError(f"{site} has seen {len(seen)} of {arrays['n_sequences']} sequences")
            fresh.n_sequences, fresh.batch_size = int(arrays["n_sequences"]), int(arrays["batch_size"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{file} cannot be gone on from.", f"{type(error).__name__}: {error}", "Remove it, or scan again."
            ) from None
        return fresh

    def keep(self, measured: Measurements) -> None:
        """Remember finished work; write it now and then.

        `measured` is the live record: where an interrupt hit it half-way (`whole` is False), what was written
        before stands.
        """
        self._measured = measured
        if self.path is not None and time.monotonic() - self._last > SAVE_EVERY_S:
            self._write()
            self._last = time.monotonic()

    def _write(self) -> None:
        assert self.path is not None and self._measured is not None
        statistics = [s for s in self._measured.statistics.values() if isinstance(s, Resumable)]
        if len(statistics) < len(self._measured.statistics):  # the scan begins again
            return
        arrays = {f"{i}:{k}": v for i, s in enumerate(statistics) for k, v in s.state().items()}
        arrays |= {
            "n_sequences": np.array(self._measured.n_sequences),
            "batch_size": np.array(self._measured.batch_size),
        }
        save_arrays(self.path / "state.npz", arrays)

    def stop(self, status: str, error: str | None, seconds: float) -> None:
        if self.path is None:
            return
        self.info.status, self.info.error, self.info.wall_s = status, error, self.earlier_s + seconds
        full_disk = suppress(OSError, WorkError)  # it may be why the scan ended, and that is told
        if self._measured is not None and self._measured.whole:
            with full_disk:
                self._write()
        with full_disk:
            write_info(self.path, self.info)

    def forget(self) -> None:
        """Remove what a finished run no longer needs, and what a killed one left half-written."""
        assert self.path is not None
        for file in [self.path / "state.npz", *leftovers(self.path)]:
            file.unlink(missing_ok=True)

    def release(self) -> None:
        """Let other processes at the directory."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def _locked(path: Path) -> int | None:
    """Hold a directory until the result is closed or this process ends; None where the system cannot.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl

        folder = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder
    except OSError as error:
        os.close(folder)
        if not isinstance(error, BlockingIOError):  # a file system without locks
            return None
    raise UserError(f"Another massact is at work in {path}.", do="Wait until it is done, or give another directory.")


def _same_everywhere(record: Any) -> Any:
    """A record without the rounding errors of the proof and the name of the corpus, which differ between machines.

    Nor what is None, so that the record of an earlier version, which lacks a newer field, is the same.
    """
    if not isinstance(record, dict):
        return record
    return {k: v for k, v in record.items() if k not in ("proof", "corpus", "asked") and v is not None}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    changed = (
        [k for k in sorted(set(ours) | set(theirs)) if ours.get(k) != theirs.get(k)] if isinstance(theirs, dict) else []
    )
    return "; ".join(f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in changed[:3])
