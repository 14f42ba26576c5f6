"""A model over its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.kinds.scan import TABLES as SCANNED
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

TABLES: dict[str, Columns] = {
    "revisions": {
        "revision": ("string", "name of the checkpoint: revision of a Hub model, or name of a folder"),
        "step": ("float64", "training step, as its name says; NaN where the name says none"),
        **{c: SCANNED["layers"][c] for c in ("stack", "site", "layer", "top1", "top2", "top3", "median", "ratio",
                                             "ratio_max", "norm_first", "norm_rest", "n_findings")},
        "share": ("float64", "share of sequences with findings at this layer; NaN for rules of whole dims or layers"),
        "found": ("bool", "whether anything at this layer meets the criterion"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class StackSummary:
    """What the scan of one checkpoint says about one stack.

    Args:
        stack, site: what was looked at.
        n_findings: over all sequences and layers.
        onset, offset: of its largest cluster; None without findings.
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
    schema_version: int = 1

    def having(self, status: str) -> list[CheckpointRecord]:
        """The checkpoints of a status."""
        return [c for c in self.checkpoints if c.status == status]

    def has_steps(self) -> bool:
        """Whether the names of all scanned checkpoints say a step."""
        return all(c.step == c.step for c in self.having("ok"))


@dataclass(repr=False)
class Trajectory(Result):
    """A model over its checkpoints.

    Args:
        info: what was asked, of which checkpoints, and how it ended.
        revisions: a row for each checkpoint and layer, see `TABLES`.
        directory: of the trajectory; each checkpoint has a run directory in it.
    """

    KIND: ClassVar[str] = "trajectory"
    VERB: ClassVar[str] = "checkpoints"
    FILE: ClassVar[str] = "trajectory.json"
    INFO: ClassVar[type[Any]] = TrajectoryInfo
    TABLES: ClassVar = TABLES
    ALONE: ClassVar[bool] = True
    AGAIN: ClassVar[str] = "Scan again with --resume."
    PLACE: ClassVar[int] = 6

    info: TrajectoryInfo
    revisions: pd.DataFrame = table("revisions")
    directory: Path | None = None
