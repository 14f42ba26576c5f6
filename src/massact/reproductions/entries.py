"""What an experiment is: declared data, and a pure function of the tables of a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from massact.records.answer import Answer, StackAnswer
from massact.records.kinds.classics import Classics
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.reproduction import NOTHING
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.tables import load_arrays, read_table
from massact.reproductions.claims import Claim

Row = dict[str, Any]
PROMPTS_IN, TEXTS_IN, REGISTERS_IN, TUNED_IN, TRAINED_IN = "prompts", "texts", "registers", "tuned", "trained"
MEANS = "registers.npz"

# The prompts of the paper: Fig. 1 (a), (b), (c), and that of its attention maps.
PROMPTS = {
    "warm-cold": "Summer is warm. Winter is cold.\n",
    "warm-cold-newline": "Summer is warm\n Winter is cold.\n",
    "why": "Why is summer warm and winter cold?",
    "choices": "The following are multiple choice questions (with answers) about machine learning.\n\n A 6-sided die "
    "is rolled 15 times and the results are: side 1 comes up 0 times;",
}

# What an experiment needs that only the user can give.
ASK = {
    "tasks": "--tasks boolq,piqa,winogrande,arc_easy,arc_challenge (extra: tasks; offline: --task-folder)",
    "labels": "--labels auto, or --labels FILE.csv",
    "tuned": "--tuned MODEL",
    "trained": "--trained RUN --trained RUN ..., each made by: massact train --config gpt2-124m --attention NAME",
}


class Nothing(Exception):
    """An experiment, or a step, that gives no number here.

    Args:
        reason: why, one sentence.
        verdict: see `massact.records.kinds.reproduction.VERDICTS`.
    """

    def __init__(self, reason: str, verdict: str = NOTHING) -> None:
        self.reason, self.verdict = reason, verdict
        super().__init__(reason)


@dataclass
class Finished:
    """What the steps left in a run directory.

    Args:
        scan, explanation, intervention, classics: of the directory itself; None where there is none.
        prompts: name of a prompt of the paper -> its scan and explanation.
        texts: folder -> effects on another text.
        tuned: scan of the tuned model.
        trained: table `compare` of the trainings.
        registers: effects of overwritten registers; means: "mean" and "std" (L, R, D), "positions".
        shares: table `patch_attention`.
        missing: need -> why it is not there.
    """

    scan: ScanResult
    explanation: Explanation | None = None
    intervention: Intervention | None = None
    classics: Classics | None = None
    prompts: dict[str, tuple[ScanResult, Explanation | None]] = field(default_factory=dict)
    texts: dict[str, Intervention] = field(default_factory=dict)
    tuned: ScanResult | None = None
    trained: pd.DataFrame | None = None
    registers: Intervention | None = None
    means: dict[str, np.ndarray] = field(default_factory=dict)
    shares: pd.DataFrame | None = None
    missing: dict[str, Nothing] = field(default_factory=dict)

    def looked(self) -> dict[str, tuple[ScanResult, Explanation | None]]:
        """What stands for the paper's prompts: these, or the first sequence where the model reads no text."""
        return self.prompts or {"the first sequence": (self.scan, self.explanation)}


def finished(directory: Path, missing: dict[str, Nothing]) -> Finished:
    """Open what there is in a run directory.

    Raises:
        UserError: something is damaged.
    """
    shares = directory / "patch_attention.parquet"
    pictured = shares.is_file()
    means = directory / REGISTERS_IN / MEANS
    folders = {name: _below(directory / name) for name in (PROMPTS_IN, TEXTS_IN)}
    prompts = {f.name: (open_run(f), Explanation.open(f)) for f in folders[PROMPTS_IN]}
    texts = {f.name: Intervention.open(f) for f in folders[TEXTS_IN]}
    return Finished(
        open_run(directory), Explanation.open(directory), Intervention.open(directory), Classics.open(directory),
        prompts={n: prompts[n] for n in PROMPTS if n in prompts},
        texts={name: text for name, text in texts.items() if text is not None},
        tuned=open_run(directory / TUNED_IN) if (directory / TUNED_IN / "run.json").is_file() else None,
        trained=_table(directory / TRAINED_IN, "compare"),
        registers=Intervention.open(directory / REGISTERS_IN),
        means=load_arrays(means) if means.is_file() else {},
        shares=read_table(directory, "patch_attention") if pictured else None,
        missing=missing,
    )  # fmt: skip


def _below(folder: Path) -> list[Path]:
    """Folders of finished work, in the order of their names."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f for f in inside if (f / "run.json").is_file() or (f / "intervene.json").is_file()]


def _table(folder: Path, name: str) -> pd.DataFrame | None:
    return read_table(folder, name) if (folder / f"{name}.parquet").is_file() else None


@dataclass(frozen=True)
class Entry:
    """A declared experiment of the paper, or one beyond it.

    Args:
        id: E1 to E25; X1, X2, ... beyond the paper.
        section: of Sun 2024, with its figures and tables; `BEYOND` of one beyond it.
        title: what it is called here.
        domain: "language", "image", or "any".
        needs: what it needs: names of steps, or of what a step gives only if it is asked (see `steps.GIVEN_BY`).
        computation: in one sentence.
        says: what the paper finds, or what is expected, in one sentence.
        run: rows of the table `reproduced`, made by `row`, from what the steps left; raises `Nothing`.
        claim: how that is tested, on any model.
        figures: files below the run that show it.
    """

    id: str
    section: str
    title: str
    domain: str
    needs: tuple[str, ...]
    computation: str
    says: str
    run: Callable[[Finished], list[Row]]
    claim: Claim
    figures: tuple[str, ...] = ()


def row(
    quantity: str,
    ours: float = math.nan,
    *,
    text: str = "",
    stack: str = "",
    layer: int = -1,
    place: str = "",
    unit: str = "",
    reason: str = "",
    headline: bool = False,
) -> Row:
    """One quantity as it was found here; what was published is added by `massact.reproductions.judgement.judged`."""
    return {
        "quantity": quantity, "ours": float(ours), "ours_text": text, "stack": stack, "layer": int(layer),
        "place": place, "unit": unit, "reason": reason, "headline": headline,
    }  # fmt: skip


def answers(scan: ScanResult) -> list[StackAnswer]:
    """What a scan says of each stack, that with the largest ratio first."""
    found = Answer.from_dict(scan.info.answer).stacks if scan.info.answer else []
    seen = [s for s in found if s.largest is not None or s.n_findings]
    if not seen:
        raise Nothing("The scan measured no finite value.")
    return sorted(seen, key=lambda s: -(s.largest.ratio if s.largest else 0.0))


def massive(scan: ScanResult) -> list[StackAnswer]:
    """The stacks that have findings.

    Raises:
        Nothing: none has; says how far the nearest activation is.
    """
    known = answers(scan)
    some = [s for s in known if s.n_findings]
    if not some:
        near = known[0].largest
        told = "" if near is None else f"; the largest ratio is {near.ratio:.4g} (|h| {near.magnitude:.4g})"
        raise Nothing(f"Nothing passes {scan.info.criterion.get('name')}{told}.")
    return some


def at(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows of a table that have these values."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def plain(numbers: Any) -> str:
    """Whole numbers, ascending, with commas."""
    return ", ".join(str(n) for n in sorted({int(x) for x in numbers}))
