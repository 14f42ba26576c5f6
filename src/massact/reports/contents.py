"""All that a run directory holds, opened; or one result that was just made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from massact.records.errors import UserError
from massact.records.kinds import alone_in, kinds, scan_in
from massact.records.kinds.scan import ScanResult
from massact.records.result import Result
from massact.records.run import finished
from massact.reports.spelling import visible

R = TypeVar("R", bound=Result)


@dataclass
class Contents:
    """What a run directory holds.

    Args:
        label: how the run is called beside others.
        directory: where it lies; None for a result that was not saved.
        results: kind -> result, of what is there.
    """

    label: str
    directory: Path | None = None
    results: dict[str, Result] = field(default_factory=dict)

    def of(self, kind: type[R]) -> R | None:
        """The result of a kind; None where there is none."""
        return self.results.get(kind.KIND)  # type: ignore[return-value]

    @property
    def scan(self) -> ScanResult | None:
        return self.of(ScanResult)

    @property
    def records(self) -> dict[str, Any]:
        """Verb -> its record, of those that are there."""
        return {kind.VERB: self.results[name].info for name, kind in kinds().items() if name in self.results}

    @property
    def leads(self) -> str:
        """Kind of the result whose words are the answer: the scan, or what else stands alone; "" where nothing is."""
        there = [name for name in kinds() if name in self.results]
        return next((name for name in there if self.results[name].ALONE), there[0] if there else "")

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


def contents_of(run: Any, label: str = "") -> Contents:
    """Open a run directory, or take a result as it is.

    Args:
        run: a directory of a scan, a training (with its scan in the folder `scan`, where there is one), checkpoints or
            a toy lab; or a result of one of the verbs.
        label: how it is called; nothing: the name of the directory, or of the model.

    Raises:
        UserError: no run there, a damaged or an unfinished one, or nothing that massact gives.
    """
    if isinstance(run, Result):
        contents = Contents(label, results={run.KIND: run})
        contents.label = label or contents.model
        return contents
    if not isinstance(run, (str, os.PathLike)):
        raise UserError(f"A report is of run directories or results, not of {type(run).__name__}.",
                        do='For example: massact.report("runs/gpt2"), or report(scan, "gpt2.html")')  # fmt: skip
    path = Path(run)
    contents = Contents(label or Path(os.path.abspath(path)).name, path)
    found = alone_in(path)
    if not found or os.path.isfile(path / "run.json"):
        found += scan_in(path)
    elif finished(path / "scan"):
        found += scan_in(path / "scan")
    by_kind = {one.KIND: one for one in found}
    contents.results = {kind: by_kind[kind] for kind in kinds() if kind in by_kind}
    return contents
