"""Checkpoints by their names: revisions of a Hub model, or folders beside each other."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from massact.records.errors import UserError

MOST = 10_000
# A number in front of another letter or digit is something else: a size, a half of a hash.
_STEPS = (
    re.compile(r"step[-_ ]*([0-9]{1,18})([km]?)(?![0-9a-z])", re.I),
    re.compile(r"(?:iter|iteration|checkpoint|ckpt)[-_ ]*([0-9]{1,18})([km]?)(?![0-9a-z])", re.I),
    re.compile(r"^([0-9]{1,18})()$"),
)
_TIMES = {"": 1.0, "k": 1e3, "m": 1e6}
_RESERVED = {"figures", "revisions.parquet", "trajectory.json"}
_LONGEST = 120


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a training.

    Args:
        name: for people: the revision, or the name of the folder.
        spec: what `load` takes: a Hub id, or the path of the folder.
        revision: of a Hub model.
    """

    name: str
    spec: str
    revision: str | None = None

    @property
    def step(self) -> float:
        """The training step that the name says; NaN where it says none."""
        return step_of(self.name)

    @property
    def folder(self) -> str:
        """A name for its run directory: no two checkpoints share one, and none leads elsewhere."""
        safe = quote(os.fsencode(self.name), safe="+=,@~")
        if safe.startswith((".", "-", "~")) or safe.lower() in _RESERVED:
            safe = f"%{ord(safe[0]):02X}{safe[1:]}"
        if len(safe) > _LONGEST:
            return f"{safe[:80]}~{hashlib.sha256(safe.encode()).hexdigest()[:16]}"
        return safe


def step_of(name: str) -> float:
    """The training step in a name such as step1000, checkpoint-500, stage1-step10k-tokens4B; NaN if none."""
    for pattern in _STEPS:
        if found := pattern.search(name):
            return int(found[1]) * _TIMES[found[2].lower()]
    return math.nan


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts step9 before step10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(0, int(p), p) if i % 2 else (1, 0, p) for i, p in enumerate(parts)]


def in_order(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """By step where every name says one; else as given: which comes first is then not ours to guess."""
    known = all(not math.isnan(c.step) for c in checkpoints)
    return sorted(checkpoints, key=lambda c: c.step) if known else list(checkpoints)


def revisions_of(model: str | None, text: str) -> list[Checkpoint]:
    """The revisions of a Hub model.

    Args:
        model: its id.
        text: names with commas between; FIRST:LAST:STEP stands for a range, both ends included
            (step1000:step10000:1000).

    Raises:
        UserError: the model is no Hub model, or the text names none.
    """
    if model is None or Path(model).exists():
        raise UserError(
            f"--revisions needs a Hub model; {'the embedded model' if model is None else model} has no revisions.",
            do="Name a Hub model; for a folder of checkpoints use --checkpoints.",
        )
    names = [name for part in text.split(",") if part.strip() for name in _spread(part.strip())]
    if not names:
        raise UserError(f"--revisions {text!r} names no revision.", do="For example: --revisions step1000,step2000")
    if len(names) > MOST:
        raise UserError(f"--revisions {text!r} names {len(names):,} revisions.", do=f"Name {MOST:,} at most.")
    return in_order([Checkpoint(name, model, name) for name in dict.fromkeys(names)])


def _spread(part: str) -> list[str]:
    if ":" not in part:
        return [part]
    found = re.fullmatch(r"([^:]*?)([0-9]{1,18})([^0-9:]*):\1([0-9]{1,18})\3:([0-9]{1,18})", part)
    first, last, step = (int(found[i]) for i in (2, 4, 5)) if found else (1, 0, 0)
    if found is None or step < 1 or first > last:
        raise UserError(f"{part!r} is no range of revisions.", "A range is FIRST:LAST:STEP, its names alike but for "
                        "one number.", "For example: --revisions step1000:step10000:1000")  # fmt: skip
    numbers = range(first, last + 1, step)
    if len(numbers) > MOST:
        raise UserError(f"{part!r} names {len(numbers):,} revisions.", do=f"Name {MOST:,} at most.")
    width = len(found[2]) if found[2].startswith("0") else 0
    return [f"{found[1]}{n:0{width}d}{found[3]}" for n in numbers]


def checkpoints_in(folder: str | os.PathLike[str] | None) -> list[Checkpoint]:
    """The checkpoints in a folder: its subfolders that hold a model, or whose name says a step.

    Args:
        folder: that holds them, or whose folder `checkpoints` does, as a training of massact leaves it.

    Raises:
        UserError: there are none.
    """
    if folder is None or not os.path.isdir(folder):
        raise UserError(f"--checkpoints needs a folder; {'the embedded model' if folder is None else folder} is none.",
                        do="Name the folder whose subfolders are the checkpoints.")  # fmt: skip
    both = [found for root in (Path(folder), Path(folder) / "checkpoints") if (found := _listed(root))]
    # Beside `checkpoints` a training leaves its last model, in a folder that is no checkpoint by its name.
    stepped = [found for found in both if any(not math.isnan(c.step) for c in found)]
    if both:
        return (stepped or both)[0]
    raise UserError(
        f"{folder} holds no checkpoints.",
        "None of its subfolders has a config.json, and none has a name such as step1000 or checkpoint-500.",
        "Name the folder whose subfolders are the checkpoints.",
    )


def _listed(root: Path) -> list[Checkpoint]:
    try:
        folders = [e for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")]
    except OSError:
        return []
    # A folder that only says that it is a checkpoint is reported as one that cannot be read, not passed over.
    kept = [e for e in folders if os.path.isfile(os.path.join(e.path, "config.json")) or step_of(e.name) >= 0]
    return in_order([Checkpoint(e.name, e.path) for e in sorted(kept, key=lambda e: natural(e.name))])
