"""The classics on a saved run, or on a model that is scanned first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from massact.classics.job import classics
from massact.models import Model
from massact.records.kinds.classics import Classics
from massact.records.kinds.scan import ScanResult
from massact.scans import reopen, scan

Progress = Callable[[str, int, int], None]


def classics_run(
    result: ScanResult,
    *,
    model: str | None = None,
    corpus: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    load_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Classics:
    """Run the classics on the model and the text of a saved run.

    Args:
        result: of the run.
        model, corpus, device, load_options: see `massact.scans.reopen`.
        progress: called with (stage, done, in all).
        options: see `ClassicsConfig`.

    Raises:
        UserError: model or corpus cannot be found, or are not those of the scan.
    """
    opened = reopen(
        result, model=model, corpus=corpus, device=device, load_options=load_options, progress=progress
    )
    say = progress or (lambda *_: None)
    done = classics(
        opened.model, opened.corpus, opened.scan, progress=lambda now, all_: say("classics", now, all_),
        **(options or {}),
    )  # fmt: skip
    done.info.notes += opened.notes
    return done


def classics_anew(
    model: Model,
    corpus: str | None = None,
    *,
    scan_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[ScanResult, Classics]:
    """Scan a model, without null and contrast, and run the classics on it.

    Args:
        model: loaded.
        corpus: see `massact.scans.scan`.
        scan_options: of the scan; options: see `ClassicsConfig`.
        progress: called with (stage, done, in all).

    Raises:
        UserError: a bad option, or a corpus that does not fit the model.
    """
    say = progress or (lambda *_: None)
    asked = {"null": False, "bos_contrast": False} | (scan_options or {})
    result = scan(model, corpus, progress=progress, **asked)
    done = classics(model, corpus, result,
                    progress=lambda now, all_: say("classics", now, all_), **(options or {}))  # fmt: skip
    return result, done
