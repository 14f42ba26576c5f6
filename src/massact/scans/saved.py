"""The run directory while a scan goes on: run.json says how it stands, state.npz holds what is finished."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from massact.records.errors import UserError
from massact.records.results import claim, read_info, write_info
from massact.records.runinfo import RunInfo, jsonable
from massact.records.tables import load_arrays, save_arrays
from massact.trace import Measurements

SAVE_EVERY_S = 30.0


class Saved:
    """The run directory while the work goes on: run.json says how it stands, state.npz what is finished."""

    def __init__(self, out: str | os.PathLike[str] | None, info: RunInfo, resume: bool) -> None:
        self.path = None if out is None else Path(out)
        self.info, self.earlier_s = info, 0.0
        self._last = time.monotonic()
        self._measured: Measurements | None = None
        if self.path is None:
            return
        if resume and (self.path / "run.json").is_file():
            self._take_over(read_info(self.path))
        self.path = claim(self.path, info)
        write_info(self.path, info)

    def _take_over(self, other: RunInfo) -> None:
        for what in ("verb", "config", "model", "corpus", "criterion"):
            ours, theirs = getattr(self.info, what), getattr(other, what)
            if jsonable(ours) != theirs:
                raise UserError(
                    f"The run in {self.path} has another {what}; it cannot be resumed with this one.",
                    _difference(jsonable(ours), theirs),
                    "Use the same options, or another --out.",
                )
        self.info.started, self.earlier_s = other.started, float(other.wall_s or 0)

    def restore(self, fresh: Measurements, kinds: dict[str, type]) -> Measurements:
        """Measurements of an earlier, interrupted run, or the fresh ones."""
        file = self.path / "state.npz" if self.path is not None else None
        if file is None or not file.is_file():
            return fresh
        arrays = load_arrays(file)
        for i, (name, site) in enumerate(fresh.statistics):
            mine = {k.split(":", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{i}:")}
            fresh.statistics[name, site] = kinds[name].from_state(mine)
        fresh.n_sequences, fresh.batch_size = int(arrays["n_sequences"]), int(arrays["batch_size"])
        return fresh

    def keep(self, measured: Measurements) -> None:
        """Remember finished work; write it now and then."""
        self._measured = measured
        if self.path is not None and time.monotonic() - self._last > SAVE_EVERY_S:
            self._write()
            self._last = time.monotonic()

    def _write(self) -> None:
        assert self.path is not None and self._measured is not None
        arrays = {f"{i}:{k}": v for i, s in enumerate(self._measured.statistics.values()) for k, v in s.state().items()}
        arrays |= {
            "n_sequences": np.array(self._measured.n_sequences),
            "batch_size": np.array(self._measured.batch_size),
        }
        save_arrays(self.path / "state.npz", arrays)

    def stop(self, status: str, error: str | None, seconds: float) -> None:
        if self.path is None:
            return
        if self._measured is not None:
            self._write()
        self.info.status, self.info.error, self.info.wall_s = status, error, self.earlier_s + seconds
        write_info(self.path, self.info)

    def forget(self) -> None:
        assert self.path is not None
        (self.path / "state.npz").unlink(missing_ok=True)


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    changed = (
        [k for k in sorted(set(ours) | set(theirs)) if ours.get(k) != theirs.get(k)] if isinstance(theirs, dict) else []
    )
    return "; ".join(f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in changed[:3])
