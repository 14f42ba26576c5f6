"""All that a run directory holds, opened; or one result that was just made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from massact.records.classics import Classics, open_classics
from massact.records.errors import UserError
from massact.records.explanation import Explanation, open_explanation
from massact.records.intervention import Intervention, open_intervention
from massact.records.lab import Lab, open_lab
from massact.records.reproduction import Reproduction, open_reproduction
from massact.records.results import ScanResult, open_run, read_info
from massact.records.shapes import ShapeLab, open_shapes
from massact.records.training import Trained, open_training
from massact.records.trajectory import Trajectory, open_trajectory
from massact.reports.legible import visible


@dataclass
class Held:
    """What a run directory holds; None for what it does not.

    Args:
        label: how the run is called beside others.
        directory: where it lies; None for a result that was not saved. Verbs of later versions find their files there.
        scan, explanation, intervention, classics, reproduction, training, trajectory, lab, shapes: results.
    """

    label: str
    directory: Path | None = None
    scan: ScanResult | None = None
    explanation: Explanation | None = None
    intervention: Intervention | None = None
    classics: Classics | None = None
    reproduction: Reproduction | None = None
    training: Trained | None = None
    trajectory: Trajectory | None = None
    lab: Lab | None = None
    shapes: ShapeLab | None = None

    @property
    def records(self) -> dict[str, Any]:
        """Verb -> its record, of those that are there."""
        held = {
            "scan": self.scan, "explain": self.explanation, "intervene": self.intervention, "classics": self.classics,
            "reproduce": self.reproduction, "train": self.training, "checkpoints": self.trajectory, "toy lab": self.lab,
            "vision toy lab": self.shapes,
        }  # fmt: skip
        return {verb: one.info for verb, one in held.items() if one is not None}

    @property
    def leads(self) -> str:
        """Name of the result whose words are the answer; "" for a run that holds nothing."""
        names = ("scan", "trajectory", "lab", "shapes", "training", "explanation", "intervention", "classics",
                 "reproduction")  # fmt: skip
        return next((name for name in names if getattr(self, name) is not None), "")

    @property
    def model(self) -> str:
        """Name of the model, for people."""
        for info in self.records.values():
            name = info.model.get("name") or info.model.get("id") or info.config.get("name")
            if isinstance(name, str) and name:
                return visible(name)
        labs = [verb for verb in self.records if verb.endswith("toy lab")]
        return f"the {labs[0]}" if labs else "unnamed model"

    @property
    def corpus(self) -> str:
        """Name of what it was measured on; "" where none is recorded."""
        for info in self.records.values():
            name = info.corpus.get("name")
            if isinstance(name, str) and name:
                return visible(name)
        return ""


_KINDS: dict[type, str] = {
    ScanResult: "scan", Explanation: "explanation", Intervention: "intervention", Classics: "classics",
    Reproduction: "reproduction", Trained: "training", Trajectory: "trajectory", Lab: "lab", ShapeLab: "shapes",
}  # fmt: skip


def hold(run: Any, label: str = "") -> Held:
    """Open a run directory, or take a result as it is.

    Args:
        run: a directory of a scan, a training (with its scan in the folder `scan`, where there is one), checkpoints or
            a toy lab; or a result of one of the verbs.
        label: how it is called; nothing: the name of the directory, or of the model.

    Raises:
        UserError: no run there, a damaged or an unfinished one, or nothing that massact gives.
    """
    for kind, name in _KINDS.items():
        if isinstance(run, kind):
            held = Held(label, **{name: run})  # type: ignore[arg-type]
            held.label = label or held.model
            return held
    if not isinstance(run, (str, os.PathLike)):
        raise UserError(f"A report is of run directories or results, not of {type(run).__name__}.",
                        do='For example: massact.report("runs/gpt2"), or report(scan, "gpt2.html")')  # fmt: skip
    path = Path(run)
    held = Held(label or Path(os.path.abspath(path)).name, path)
    if os.path.isdir(path):
        held.training, held.trajectory, held.lab = open_training(path), open_trajectory(path), open_lab(path)
        held.shapes = open_shapes(path)
    alone = held.records and not os.path.isfile(path / "run.json")
    place = path / "scan" if alone else path
    if alone and not _finished(place):
        return held
    held.scan = open_run(place)
    held.explanation, held.intervention = open_explanation(place), open_intervention(place)
    held.classics, held.reproduction = open_classics(place), open_reproduction(place)
    return held


def _finished(place: Path) -> bool:
    return os.path.isfile(place / "run.json") and read_info(place).status == "ok"
