"""The result of a training, in memory and as files of its run directory."""

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

TRAIN_VERSION = 1


@dataclass
class TrainInfo(Sidecar):
    """The record of a training: train.json.

    Args:
        status: running, ok, failed or interrupted. error: the message of a failed one.
        losses: step, tokens, train_loss (nats, last logged), eval_loss (nats, last measured), of the end.
        alarms: every first time that a layer met the warning or sun2024, see `massact.training.Alarm`.
        dynamics: the Hidden-Dynamics fit of every layer, see `massact.training.fit_dynamics`.
        device: what it ran on.
    """

    status: str = "running"
    error: str | None = None
    losses: dict[str, Any] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    dynamics: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    schema_version: int = TRAIN_VERSION


@dataclass(repr=False)
class Trained(ShownInNotebooks):
    """What a training gave.

    Args:
        info: what was asked, of what, and how it ended.
        training, monitor: see `massact.records.tables`.
        directory: of the run; the model is in its folder `model`, for `massact scan DIRECTORY/model`.
    """

    info: TrainInfo
    training: pd.DataFrame = field(default_factory=lambda: frame("training"))
    monitor: pd.DataFrame = field(default_factory=lambda: frame("monitor"))
    directory: Path | None = None

    def save(self, directory: str | Path) -> Path:
        """Write the tables, train.json last.

        Raises:
            OSError: the directory cannot be written.
        """
        path = Path(directory)
        write_table(path, "training", self.training)
        write_table(path, "monitor", self.monitor)
        write_sidecar(path / "train.json", self.info)
        return path

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able records."""
        tables = {name: getattr(self, name).to_dict(orient="records") for name in ("training", "monitor")}
        return jsonable(asdict(self.info) | tables)


def open_training(directory: str | Path) -> Trained | None:
    """Read the training in a run directory; None where there is none. Tables that were not yet written are empty.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    path = Path(directory)
    info = read_sidecar(path / "train.json", TrainInfo, TRAIN_VERSION, "Train again, or delete the directory.")
    if info is None:
        return None
    there = {n: (path / f"{n}.parquet").is_file() for n in ("training", "monitor")}
    tables = {n: read_table(path, n) if found else frame(n) for n, found in there.items()}
    if info.status == "ok" and not len(tables["training"]):
        raise UserError(f"{path} lacks training.parquet.", do="Train again, or delete the directory.")
    return Trained(info, **tables, directory=path)
