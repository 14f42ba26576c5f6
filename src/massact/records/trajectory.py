"""The trajectory of a model over its checkpoints, in memory and as files of its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from massact.records.errors import UserError
from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import jsonable
from massact.records.sidecars import Sidecar, read_sidecar, write_sidecar
from massact.records.tables import frame, read_table, write_table

TRAJECTORY_VERSION = 1
SIDECAR = "trajectory.json"


@dataclass(frozen=True)
class StackSummary:
    """What the scan of one checkpoint says about one stack.

    Args:
        stack, site: what was looked at.
        n_findings: over all sequences and layers.
        onset, offset: first and last layer with findings; None without findings.
        dims: dims of the findings, the most frequent first.
        peak_layer: the layer with the greatest ratio, mean over sequences; None where none is finite.
        top1, median, ratio: of that layer. ratio_max: greatest of any layer and sequence.
    """

    stack: str
    site: str
    n_findings: int
    onset: int | None
    offset: int | None
    dims: list[int]
    peak_layer: int | None
    top1: float
    median: float
    ratio: float
    ratio_max: float


@dataclass
class CheckpointRecord:
    """One checkpoint of a trajectory.

    Args:
        name: as it was asked for. step: which its name says; NaN where it says none.
        folder: name of its run directory.
        status: waiting, ok or failed. error: why it failed.
        model: architecture, layers, width, dtype and hash of the weights; {} before it was read.
        stacks: what its scan says.
    """

    name: str
    step: float
    folder: str
    status: str = "waiting"
    error: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    stacks: list[StackSummary] = field(default_factory=list)


@dataclass(frozen=True)
class Emergence:
    """Where in a training findings first appear in one stack, and whether they stay.

    Args:
        stack, site: where.
        first: the first checkpoint with findings; before: the one before it, None where the first one has them.
        layer: onset at the first. dims: at the first, the most frequent first. dims_last: at the last that has any.
        without: later checkpoints that have none.
        gone: the checkpoint from which on there are none to the end; None where the last one has them.
    """

    stack: str
    site: str
    first: str
    before: str | None
    layer: int
    dims: list[int]
    dims_last: list[int]
    without: list[str]
    gone: str | None


@dataclass
class TrajectoryInfo(Sidecar):
    """The record of a trajectory: trajectory.json.

    Args:
        status: running, ok, interrupted, or failed (no checkpoint could be scanned).
        criterion: name, formula, thresholds and source of the rule.
        checkpoints: in the order of training. emergence: of every stack that has findings at any of them.
        dynamics: the Hidden-Dynamics fit of every layer, see `massact.stats.fit_dynamics`.
    """

    status: str = "running"
    criterion: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    emergence: list[Emergence] = field(default_factory=list)
    dynamics: list[dict[str, Any]] = field(default_factory=list)
    schema_version: int = TRAJECTORY_VERSION

    def having(self, status: str) -> list[CheckpointRecord]:
        """The checkpoints of a status."""
        return [c for c in self.checkpoints if c.status == status]

    def has_steps(self) -> bool:
        """Whether the names of all scanned checkpoints say a step."""
        return all(c.step == c.step for c in self.having("ok"))


@dataclass(repr=False)
class Trajectory(ShownInNotebooks):
    """A model over its checkpoints.

    Args:
        info: what was asked, of which checkpoints, and how it ended.
        revisions: a row for each checkpoint and layer, see `massact.records.tables`.
        directory: of the trajectory; each checkpoint has a run directory in it.
    """

    info: TrajectoryInfo
    revisions: pd.DataFrame = field(default_factory=lambda: frame("revisions"))
    directory: Path | None = None

    def save(self, directory: str | Path) -> Path:
        """Write the table, then trajectory.json.

        Raises:
            UserError: the directory cannot be written.
        """
        path = Path(directory)
        try:
            write_table(path, "revisions", self.revisions)
            write_sidecar(path / SIDECAR, self.info)
        except OSError as error:
            raise UserError(f"{path} cannot be written.", error.strerror or str(error), "Make room, then go on with "
                            "--resume: finished checkpoints are kept.") from error  # fmt: skip
        return path

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able records."""
        return jsonable(asdict(self.info) | {"revisions": self.revisions.to_dict(orient="records")})


def open_trajectory(directory: str | Path) -> Trajectory | None:
    """Read the trajectory in a directory; None where there is none.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    path = Path(directory)
    info = read_sidecar(path / SIDECAR, TrajectoryInfo, TRAJECTORY_VERSION, "Scan again with --resume.")
    return None if info is None else Trajectory(info, read_table(path, "revisions"), path)
