"""A saved scan again: its model loaded, its corpus made, and both checked to be what was scanned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from massact.corpora import AnySource, Corpus, corpus_again
from massact.corpora import corpus as make_corpus
from massact.models import EMBEDDED, Model, load
from massact.positions import ready_corpus
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.scans.job import ScanConfig, scan


@dataclass(frozen=True)
class Reopened:
    """What another verb needs of a saved scan.

    Args:
        model, corpus: loaded and ready.
        scan: the result; of a new scan where another text was given.
        notes: what a reader must know.
    """

    model: Model
    corpus: Corpus
    scan: ScanResult
    notes: list[str] = field(default_factory=list)


def scanned_corpus(model: Model, corpus: Any, result: ScanResult) -> Corpus:
    """A corpus made ready by the options of a scan; None makes it again from the scan's record."""
    known = {f.name for f in fields(ScanConfig)}
    asked = ScanConfig.of({k: v for k, v in result.info.config.items() if k in known})
    source = corpus_again(result.info.corpus, result.info.config.get("corpus")) if corpus is None else corpus
    source = source if isinstance(source, Corpus | AnySource) else make_corpus(source)
    return ready_corpus(model, source, asked)


def check_weights(model: Model, result: ScanResult) -> None:
    """Refuse another model than the one that was scanned.

    Raises:
        UserError: its weights have another hash.
    """
    ours, theirs = model.info().weights_sha256, result.info.model.get("weights_sha256")
    if ours != theirs:
        raise UserError(
            f"The model {model.name!r} is not the one that was scanned.",
            f"Its weights have the hash {ours[:12]}..., those of the scan {str(theirs)[:12]}...",
            "Give the scanned model, or scan this one first.",
        )


def check_text(corpus: Corpus, result: ScanResult) -> None:
    """Refuse another corpus than the one that was scanned.

    Raises:
        UserError: its content has another hash.
    """
    if corpus.sha256 != result.info.corpus.get("sha256"):
        raise UserError(
            f"The corpus {corpus.name!r} is not the one that was scanned.",
            f"Its content has the hash {corpus.sha256[:12]}..., that of the scan "
            f"{str(result.info.corpus.get('sha256'))[:12]}...",
            "Positions of findings mean nothing in another text: scan it first.",
        )


def reopen(
    result: ScanResult,
    *,
    model: str | None = None,
    corpus: Any = None,
    device: str = "auto",
    load_options: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Reopened:
    """Load the model of a saved scan and make its corpus again.

    Args:
        result: of the scan.
        model: where the scanned model lies now; None: where the scan had it. Other weights are refused.
        corpus: where the scanned text lies now, or another text (or anything that `corpora.corpus` takes), which is
            scanned first, by the same rule; None: as the run records it.
        device, load_options: see `load`; the dtype is that of the scan.
        progress: called with (stage, sequences done, sequences in all).

    Raises:
        UserError: model or corpus cannot be found, or the model is another one.
    """
    info, say = result.info, progress or (lambda *_: None)
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
        check_text(ready, result)
        return Reopened(loaded, ready, result)
    left_out = ("null", "bos_contrast", "rank_sequences", "corpus")
    again = {k: v for k, v in info.config.items() if k not in left_out}
    anew = scan(loaded, source, progress=progress, null=False, bos_contrast=False, rank_sequences=0, **again)
    note = f"{ready.name} is not the corpus of this run: it was scanned anew, by the same rule."
    return Reopened(loaded, ready, anew, [note])
