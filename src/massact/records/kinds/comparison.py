"""Runs side by side: the directories that are compared, opened, and what comes of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.display import Display
from massact.records.errors import UserError
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import TABLES as SCANNED
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.kinds.training import Trained
from massact.records.result import table
from massact.records.run import finished, is_folder
from massact.records.runinfo import jsonable
from massact.records.tables import Columns, declare, write_table

# What a comparison of runs records. NaN: not measured, never zero; "trained", "scanned", "explained" say why.
_COMPARED = {
    "label": ("string", "name of the run, or of the group of runs that differ by their seed only"),
    "row": ("string", "run; or of a group mean, min and max, each over the runs of it that have the value"),
    "group": ("string", "label of the group that a run is in; empty where it is in none"),
}
TABLES: dict[str, Columns] = {
    "compare": {
        **_COMPARED,
        "n_runs": ("int64", "1; of a group the number of its runs"),
        "directory": ("string", "of the run, as given; empty for a group"),
        "model": ("string", "name, as the training or else the scan has it"),
        "variant": ("string", "attention variant of the training; empty where there is no training"),
        "trained": ("bool", "whether there is the record of a training (of a group: of any of its runs)"),
        "scanned": ("bool", "whether there is a scan"),
        "explained": ("bool", "whether the scan is explained"),
        "seed": ("int64", "of the training; -1 where there is none, or several"),
        "steps": ("float64", "optimizer steps done"),
        "tokens": ("float64", "tokens seen (of image models: images)"),
        "train_loss": ("float64", "cross-entropy in nats, the last logged"),
        "eval_loss": ("float64", "cross-entropy in nats on the held-out part, the last measured"),
        "perplexity": ("float64", "exp(eval_loss); NaN for images"),
        "massive": (
            "float64",
            "1 if it has massive activations under the criterion, else 0 (outlier features, on many "
            "tokens, and humps are none); of a group the share of its runs",
        ),
        "criterion": ("string", "name of the rule of the scan"),
        "cluster": ("string", "its largest cluster that passes: label, dim, class of tokens; empty without findings"),
        "onset": ("float64", "onset of that cluster; NaN without findings"),
        "max": ("float64", "greatest |h| of all layers and sequences"),
        "ratio": ("float64", "greatest top1 / median of any layer and sequence"),
        "sink_rate": ("float64", "share of heads with alpha_0 > eps, mean over sequences (Gu 2025)"),
        "mass_first": ("float64", "attention on position 0 of the queries after it that can see it, mean over heads"),
        "slot_mass": ("float64", "probability of a learned sink, mean over the heads that have one"),
        "value_norm_first": ("float64", "norm of the first token's value over that of the others, median over heads"),
    },
    "compare_layers": {
        **_COMPARED,
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer"),
        **{c: SCANNED["layers"][c] for c in ("top1", "top2", "top3", "median")},
        "mass_first": ("float64", "attention on position 0 in the block, mean over its heads"),
        "slot_mass": ("float64", "probability of a learned sink in the block, mean over its heads"),
    },
    "survival": {
        "original": ("string", "label of the run in full precision"),
        "quantised": ("string", "label of the run of its quantised form"),
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "cluster": ("int64", "place of the cluster in the original; 0 for one that only the quantised form has"),
        "label": SCANNED["clusters"]["label"],
        "dim": ("int64", "coordinate of the residual stream"),
        "position_class": SCANNED["clusters"]["position_class"],
        "verdict": (
            "string",
            "kept (value and share of the sequences within a factor of 0.8 to 1.25, onset within a layer), stronger, "
            "weaker (less than 0.8 of the one or the other, or it no longer passes), moved (another onset, sign or "
            "dim), gone, new; not judged where inputs or rules differ",
        ),
        "dim_quantised": ("int64", "its dim in the quantised form; -1 where it is gone"),
        "n_findings_quantised": ("int64", "entries of it that pass the criterion there; 0: it no longer does"),
        **{
            f"{name}{of}": ("float64", f"{what}{', quantised' if of else ', original'}; NaN where it has none")
            for name, what in (
                ("onset", "first layer where it passes in half of its sequences"),
                ("value", "mean signed value at its peak layer"),
                ("spread", "standard deviation over |mean|: how far from constant"),
                ("share", "share of the sequences"),
            )
            for of in ("", "_quantised")
        },
    },
}
declare(TABLES)


@dataclass
class ComparedRun:
    """A run as it is compared.

    Args:
        label: how it is called.
        directory: as given.
        training, scan, explanation: what of these there is.
        notes: what is missing, and how to get it.
    """

    label: str
    directory: Path
    training: Trained | None = None
    scan: ScanResult | None = None
    explanation: Explanation | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(repr=False)
class Comparison(Display):
    """What a comparison gives.

    Args:
        runs: what was compared, in the order given.
        groups: label of a group of runs that differ by their seed only -> their places in `runs`.
        compare, compare_layers, survival: tables, see `TABLES`; the last of runs of which one is a quantised form of
            the other.
        notes: what a reader must know before taking a difference for an effect, one sentence each.
    """

    KIND: ClassVar[str] = "comparison"

    runs: list[ComparedRun]
    groups: dict[str, list[int]] = field(default_factory=dict)
    compare: pd.DataFrame = table("compare")
    compare_layers: pd.DataFrame = table("compare_layers")
    notes: list[str] = field(default_factory=list)
    survival: pd.DataFrame = table("survival")

    def __repr__(self) -> str:
        """The names of its runs: what a prompt shows."""
        return f"Comparison({', '.join(run.label for run in self.runs)})"

    def save(self, directory: str | Path) -> Path:
        """Write the tables; that of quantised forms only where there are any.

        Raises:
            UserError: the directory cannot be written.
        """
        path = Path(directory)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in TABLES:
                if name != "survival" or len(self.survival):
                    write_table(path, name, getattr(self, name))
        except OSError as error:
            raise UserError(f"--out {path} cannot be written.", error.strerror or str(error),
                            "Give another directory.") from None  # fmt: skip
        return path

    def as_dict(self) -> dict[str, Any]:
        """All tables and the notes, as JSON-able records."""
        tables = {t: jsonable(getattr(self, t).to_dict(orient="records")) for t in TABLES}
        groups = {name: [self.runs[i].label for i in places] for name, places in self.groups.items()}
        return jsonable({"groups": groups, "notes": self.notes}) | tables


def open_compared(directories: Sequence[str | Path], labels: Sequence[str] = ()) -> list[ComparedRun]:
    """Open the runs to compare.

    Args:
        directories: each the run directory of a scan, or of a training, whose scan is in its folder `scan` (or beside
            train.json).
        labels: how to call them, in the same order; nothing: by the names of the directories.

    Raises:
        UserError: fewer than two runs, one given twice, no run in a directory, a damaged one, or other labels.
    """
    paths = [Path(d) for d in directories]
    if len(paths) < 2:
        raise UserError(f"{len(paths)} run was given.", "A comparison takes two or more.",
                        f"Print a single one: massact show {paths[0] if paths else 'RUN'}")  # fmt: skip
    twice = [p for i, p in enumerate(paths) if _real(p) in map(_real, paths[:i])]
    if twice:
        raise UserError(f"{twice[0]} was given twice.", do="Give each run once.")
    if labels and len(labels) != len(paths):
        raise UserError(f"There are {len(paths)} runs and {len(labels)} labels.", do="Give one --label for each run.")
    if len(set(labels)) < len(labels):
        raise UserError("Two runs have the same label.", do="Give each another --label.")
    return [_opened(p, label) for p, label in zip(paths, labels or labels_of(paths), strict=True)]


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many of those before it as tell all of them apart."""
    parts = [Path(os.path.abspath(p)).parts for p in paths]
    for n in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in paths]


def _real(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def _opened(path: Path, label: str) -> ComparedRun:
    training = None
    if is_folder(path):
        training = Trained.open(path)
        if training is None:
            _refuse_other_kinds(path)
    if training is None:
        run, place = ComparedRun(label, path, None, open_run(path)), path
    else:
        place = path if (path / "run.json").is_file() else path / "scan"
        run = ComparedRun(label, path, training, _scan_of(place))
        if training.info.status != "ok":
            run.notes.append(f"Its training has the status {training.info.status}: go on with it with --resume.")
        if run.scan is None:
            run.notes.append("Its model has not been scanned: "
                             f"massact scan {_quoted(path / 'model')} --out {_quoted(path / 'scan')}")  # fmt: skip
    if run.scan is not None:
        run.explanation = Explanation.open(place)
        if run.explanation is None:
            known = (run.scan.info.corpus.get("source") or {}).get("kind")
            text = "" if known else " --corpus FILE; of tensors in Python: massact.explain(model, corpus, scan)"
            run.notes.append(f"Its attention has not been measured: massact explain {_quoted(place)}{text}")
    return run


def _refuse_other_kinds(path: Path) -> None:
    """Toy labs and scans of checkpoints hold several models: they are comparisons themselves."""
    if (path / "run.json").is_file():
        return
    for file, what, instead in (
        ("lab.json", "a toy lab", "or scan the models in its folders model-..., and give those scans."),
        ("trajectory.json", "a scan of several checkpoints", "or the folders of the checkpoints in it."),
    ):
        if (path / file).is_file():
            raise UserError(f"{path} is {what}, with several models side by side already.",
                            "Runs that are compared are scans or trainings, of one model each.",
                            f"Give it alone (massact report {_quoted(path)}), {instead}")  # fmt: skip


def _scan_of(place: Path) -> ScanResult | None:
    """The scan of a training; None where there is none, or none that was finished."""
    return open_run(place) if finished(place) else None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
