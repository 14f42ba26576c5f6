"""Explain a saved run: load its model again, make its corpus again, and refuse if either is another one."""

from __future__ import annotations

from typing import Any

from massact.corpora import corpus as make_corpus
from massact.corpora import corpus_again
from massact.explanations.job import Progress, check_weights, explain, scanned_corpus
from massact.models import EMBEDDED, load
from massact.records.explanation import Explanation
from massact.records.results import ScanResult
from massact.scans import scan


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
    info = result.info
    say = progress or (lambda *_: None)
    source = corpus_again(info.corpus, info.config.get("corpus")) if corpus is None else make_corpus(corpus)
    name = info.model["id"] if model is None else model
    say("load", 0, 1)
    loaded = load(
        None if name == EMBEDDED else name,
        device=device,
        dtype=info.model["dtype"],
        revision=info.model.get("revision") if model is None else None,
        options=load_options,
    )
    say("load", 1, 1)
    check_weights(loaded, result)
    ready = scanned_corpus(loaded, source, result)
    if corpus is None or ready.sha256 == info.corpus.get("sha256"):
        return explain(loaded, ready, result, progress=progress, **(options or {}))
    again = {k: v for k, v in info.config.items() if k not in ("null", "bos_contrast", "rank_sequences", "corpus")}
    anew = scan(loaded, source, progress=progress, null=False, bos_contrast=False, rank_sequences=0, **again)
    explanation = explain(loaded, ready, anew, progress=progress, **(options or {}))
    explanation.info.notes.append(f"{ready.name} is not the corpus of this run: it was scanned anew, by the same rule.")
    return explanation
