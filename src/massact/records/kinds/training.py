"""What a training gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.result import Result, table
from massact.records.rules import WORDS
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

TABLES: dict[str, Columns] = {
    "training": {
        "step": ("int64", "optimizer steps done"),
        "tokens": ("int64", "tokens seen (of image models: images)"),
        "loss": ("float64", "cross-entropy in nats, mean over the steps since the row before; NaN: evaluation only"),
        "eval_loss": ("float64", "cross-entropy in nats on the held-out part; NaN where it was not evaluated"),
        "lr": ("float64", "learning rate of the step"),
        "grad_norm": ("float64", "norm of the gradient of the step, before it is clipped"),
        "step_s": ("float64", "seconds of a step, mean over the steps since the row before; waits included"),
    },
    "monitor": {
        "step": ("int64", "optimizer step, from 1, whose first forward pass was looked at"),
        "stack": ("string", "name of the stack of blocks; empty for a model with one"),
        "layer": ("int64", "1..L after block l; 0 the embedding output"),
        "top1": ("float64", "greatest |h|, mean over sequences"),
        "top2": ("float64", "second greatest |h|, mean over sequences"),
        "top3": ("float64", "third greatest |h|, mean over sequences"),
        "median": ("float64", "median |h| of a sequence's hidden state, mean over sequences"),
        "ratio": ("float64", "top1 / median of each sequence, mean over sequences"),
        "at_first": ("float64", "share of sequences whose top1 sits at position 0"),
        "massive": ("float64", f"share of sequences with {WORDS} (sun2024)"),
        "warned": ("float64", "share of sequences that meet the earlier warning"),
        "sink_mass": ("float64", "attention on position 0 of the queries behind it, mean over heads; NaN: not seen"),
        "value_drain": ("float64", "norm of the value of position 0 over the mean norm of the others; NaN: not seen"),
        "nonfinite": ("int64", "count of NaN and Inf values"),
        "n_sequences": ("int64", "sequences that were looked at, over all ranks"),
    },
}


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
    schema_version: int = 1


@dataclass(repr=False)
class Trained(Result):
    """What a training gave.

    Args:
        info: what was asked, of what, and how it ended.
        training, monitor: see `TABLES`.
        directory: of the run; the model is in its folder `model`, for `massact scan DIRECTORY/model`.
    """

    KIND: ClassVar[str] = "training"
    VERB: ClassVar[str] = "train"
    FILE: ClassVar[str] = "train.json"
    INFO: ClassVar[type[Any]] = TrainInfo
    TABLES: ClassVar = TABLES
    ALONE: ClassVar[bool] = True
    AGAIN: ClassVar[str] = "Train again, or delete the directory."
    PLACE: ClassVar[int] = 5

    info: TrainInfo
    training: pd.DataFrame = table("training")
    monitor: pd.DataFrame = table("monitor")
    directory: Path | None = None

    @classmethod
    def kept(cls, info: TrainInfo, path: Path) -> list[str]:
        """Those that are there: of a training that goes on, some are not yet."""
        return [n for n in cls.TABLES if (path / f"{n}.parquet").is_file() or (n == "training" and info.status == "ok")]
