"""Explain a saved run: load its model again, make its corpus again, and refuse if either is another one."""

from __future__ import annotations

from typing import Any

from massact.explanations.job import Progress, explain
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.scans import reopen


def explain_run(
    result: ScanResult,
    *,
    model: str | None = None,
    corpus: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    load_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Explanation:
    """Explain the findings of a saved run.

    Args:
        result: of the run.
        model: where the scanned model lies now; None: where the scan had it. Other weights are refused.
        corpus: where the scanned text lies now, or another text, which is scanned first; None: as the run records it.
        device, load_options: see `load`; the dtype is that of the scan.
        progress: called with (stage, sequences done, sequences in all).
        options: see `ExplainConfig`.

    Raises:
        UserError: model or corpus cannot be found, or are not those of the scan.
    """
    opened = reopen(
        result, model=model, corpus=corpus, device=device, load_options=load_options, progress=progress
    )
    explanation = explain(opened.model, opened.corpus, opened.scan, progress=progress, **(options or {}))
    explanation.info.notes += opened.notes
    return explanation
