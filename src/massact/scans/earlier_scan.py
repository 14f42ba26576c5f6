"""A saved scan again: its model loaded, its corpus made, and both checked to be what was scanned."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from massact.corpora import AnySource, Corpus, corpus_again
from massact.corpora import corpus as make_corpus
from massact.corpora.files import has_columns
from massact.models import EMBEDDED, Model, load
from massact.positions import prompts_for, ready_corpus
from massact.positions.continuation import restored
from massact.records.adapter_states import difference
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.records.run import check_out
from massact.records.runinfo import ModelInfo
from massact.scans.job import Progress, Text, named, scan_text, source_of
from massact.verbs.scan import ScanConfig


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

    def run(self, job: Callable[..., Any], progress: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Do a verb on it: `job(model, corpus, scan, progress=..., **options)`; its notes go with the result."""
        before = _at_work.set(self)
        try:
            done = job(self.model, self.corpus, self.scan, progress=progress, **options)
        finally:
            _at_work.reset(before)
        done.info.notes += self.notes
        return done


# What a verb runs on now: it was checked when it was opened, and a hash of all weights takes long.
_at_work: ContextVar[Reopened | None] = ContextVar("_at_work", default=None)


def _options_of(result: ScanResult) -> ScanConfig:
    """Those that a scan was made with."""
    return ScanConfig.of({k: v for k, v in result.info.config.items() if k in ScanConfig.model_fields})


def scanned_corpus(model: Model, corpus: Any, result: ScanResult) -> Corpus:
    """A corpus made ready by the options of a scan; None makes it again from the scan's record."""
    source = corpus_again(result.info.corpus, result.info.config.get("corpus")) if corpus is None else corpus
    source = source if isinstance(source, Corpus | AnySource) else _named_corpus(source, result)
    asked, made = _options_of(result), isinstance(source, Corpus) and bool(source.prompts)
    if result.generated and not made:  # the text that was scanned, if its prompts are these
        told = result.info.corpus.get("packing", {}).get("generated", {})
        text = restored(prompts_for(model, source, asked), result.generated, told)
        if text is not None:
            return text
    return ready_corpus(model, source, asked)


def _named_corpus(corpus: Any, result: ScanResult) -> Corpus | AnySource:
    """A corpus that the user names, its text in the column in which that of the scan stood."""
    column = result.info.config.get("text_column")
    plain = isinstance(corpus, str | Path) and os.path.isfile(corpus) and not has_columns(Path(corpus))
    return make_corpus(corpus, text_column=None if plain else column)


def check_weights(model: Model, result: ScanResult) -> ModelInfo:
    """Refuse another model than the one that was scanned; gives what a run records of it.

    Raises:
        UserError: its weights have another hash.
    """
    info = model.info()
    ours, theirs = info.weights_sha256, result.info.model.get("weights_sha256")
    other = difference(info.adapters, result.info.model.get("adapters"))
    if ours != theirs and other:
        raise UserError(f"The model {model.name!r} is not in the state in which it was scanned.", other,
                        "Put its adapters into that state, or scan it as it is now.")  # fmt: skip
    if ours != theirs:
        raise UserError(
            f"The model {model.name!r} is not the one that was scanned.",
            f"Its weights have the hash {ours[:12]}..., those of the scan {str(theirs)[:12]}...",
            "Give the scanned model, or scan this one first.",
        )
    return info


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


def scanned_inputs(model: Any, corpus: Any, result: ScanResult) -> tuple[Model, Corpus]:
    """The model and the corpus of a scan, loaded and ready; others are refused, once in a verb on a saved run.

    Args:
        model: loaded, or anything that `load` takes.
        corpus: the scanned one, or anything that `corpora.corpus` takes; None makes it again from the scan's record.

    Raises:
        UserError: they are not those of the scan.
    """
    now = _at_work.get()
    if now is not None and now.model is model and now.corpus is corpus and now.scan is result:
        return now.model, now.corpus
    loaded = model if isinstance(model, Model) else load(model)
    check_weights(loaded, result)
    ready = scanned_corpus(loaded, corpus, result)
    check_text(ready, result)
    return loaded, ready


def reopen(
    result: ScanResult,
    *,
    model: str | None = None,
    corpus: Any = None,
    device: str = "auto",
    load_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
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
    source = corpus_again(info.corpus, info.config.get("corpus")) if corpus is None else _named_corpus(corpus, result)
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
    told = check_weights(loaded, result)
    ready = scanned_corpus(loaded, source, result)
    if corpus is None or ready.sha256 == info.corpus.get("sha256"):
        check_text(ready, result)
        return Reopened(loaded, ready, result)
    config = _options_of(result).changed(null=False, bos_contrast=False, rank_sequences=0)
    anew = scan_text(loaded, Text(source, ready, named(corpus)), config, progress=progress, told=told)
    note = f"{ready.name} is not the corpus of this run: it was scanned anew, by the same rule."
    return Reopened(loaded, ready, anew, [note])


def scan_first(
    target: Any,
    corpus: Any,
    *,
    asked: dict[str, Any],
    device: str = "auto",
    load_options: dict[str, Any] | None = None,
    place: Path | None = None,
    progress: Progress | None = None,
) -> Reopened:
    """Load a model and scan it, without null and contrast, for a verb that is of a scan.

    Args:
        target: the model, see `load`; corpus: see `scan`.
        asked: options of the scan.
        device, load_options: see `load`.
        place: run directory that keeps the scan.
        progress: called with (stage, done, in all).

    Raises:
        UserError: a bad option, or a corpus that does not fit the model.
    """
    if place is not None:
        check_out(place)
    config = ScanConfig.of({"null": False, "bos_contrast": False} | asked)
    source = source_of(corpus, config)
    loaded = load(target, device=device, options=load_options)
    text = Text(source, ready_corpus(loaded, source, config), named(corpus))
    result = scan_text(loaded, text, config, progress=progress)
    if place is not None:
        result.save(place)
    return Reopened(loaded, text.ready, result)
