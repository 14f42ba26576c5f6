"""A corpus made ready for a model; of recordings also which positions of its stacks count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import AnySource, AudioSource, Corpus, Source, ready
from massact.corpora.readiness import Wish
from massact.models import Model
from massact.positions.continuation import PROMPT_TOKENS, PROMPTS, continued
from massact.positions.embedding import embedding_outputs
from massact.positions.frames import framed
from massact.records.errors import MassactError, UserError, first_line
from massact.records.sites import Site
from massact.stats import Keep
from massact.trace import Probe, measure


def ready_corpus(model: Model, source: Corpus | AnySource, wish: Wish) -> Corpus:
    """A corpus that fits a model, see `massact.corpora.ready`; of recordings also which positions count.

    Where `wish.generate` is a number the model goes on with each sequence by so many tokens, see `continued`.

    Padding that the model masks does not count; padding that it attends to counts, and is told apart (`framed`). A
    decoder reads its start tokens, and the transcript where there is one.
    """
    n, made = getattr(wish, "generate", None), isinstance(source, Corpus) and bool(source.prompts)
    if n and not made:
        return continued(model, prompts_for(model, source, wish), n, temperature=wish.temperature, seed=wish.seed or 0)
    corpus = ready(model, source, wish)
    return _placed(model, corpus) if isinstance(source, AudioSource) else corpus


def prompts_for(model: Model, source: Corpus | AnySource, wish: Wish) -> Corpus:
    """What a model goes on with: the sequences of a corpus; of a text, where nobody says, 8 windows of 32 tokens."""
    if not isinstance(source, Source) or source.prompts:
        return ready(model, source, wish)
    if wish.seq_len is None and source.request.seq_len is None:
        wish = wish.changed(seq_len=PROMPT_TOKENS)
    corpus, asked = ready(model, source, wish), (wish.n_sequences, source.request.n_sequences)
    return corpus if asked != (None, None) else corpus.head(min(PROMPTS, corpus.n_sequences))


def _placed(model: Model, corpus: Corpus) -> Corpus:
    notes = list(corpus.origin.source["notes"])
    for stack in [s.name for s in model.anatomy.stacks if model.reads(s) == model.sound_input]:
        n = _positions(model, corpus, stack)
        if any(mask.shape[1] == n for mask in corpus.counts):
            corpus = _wider(corpus)
        corpus = _masked(model, corpus, stack)
        if framed(model, corpus, stack, n).ends is None:
            masked = any(mask.shape[1] == n for mask in corpus.counts)
            whose = f"of stack {stack!r} " if stack else ""
            told = "" if masked else ", so padding is not told apart in them"
            notes.append(f"The positions {whose}were not placed in time{told}.")
    return _noted(corpus, notes)


def _positions(model: Model, corpus: Corpus, stack: str) -> int:
    """How many positions a stack has.

    Raises:
        UserError: the model does not run on what the extractor makes.
    """
    try:
        return len(embedding_outputs(model, replace(corpus.head(1), mask=None, counts=()), stack)[0])
    except Exception as error:
        cause = error.__cause__ if isinstance(error, MassactError) else error  # what the model itself said
        if cause is None:
            raise
        raise UserError(
            f"{model.name or 'The model'} does not run on what its {type(model.processor).__name__} makes.",
            first_line(cause),
            "Is the preprocessor_config.json beside the weights that of this model?",
        ) from error


def _wider(corpus: Corpus) -> Corpus:
    """The decoder's ids with one more column of padding: masks are told apart by their number of positions."""
    ids = corpus.inputs["decoder_input_ids"]
    more = torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)
    counts = tuple(torch.cat([m, torch.zeros_like(m[:, :1])], 1) for m in corpus.counts)
    return replace(corpus, inputs={**corpus.inputs, "decoder_input_ids": more}, counts=counts)


def _masked(model: Model, corpus: Corpus, stack: str) -> Corpus:
    """A corpus whose mask of input frames is also one of the stack's positions, if the model heeds it.

    It heeds it if the last layer of the recording with most padding is another one without the mask. The model
    itself says how many positions so many input frames give.
    """
    lengths_of = next(
        (m._get_feat_extract_output_lengths for m in model.module.modules()
         if hasattr(m, "_get_feat_extract_output_lengths")), None,
    )  # fmt: skip
    if corpus.mask is None or "attention_mask" not in model.inputs_accepted():
        return replace(corpus, mask=None)
    shortest = int(corpus.mask.sum(1).argmin())
    one = replace(corpus.part(shortest, shortest + 1), counts=())
    end = Site(stack, model.anatomy.stack(stack).n_layers, "resid_post")

    def last(of: Corpus) -> np.ndarray:
        return np.asarray(measure(model, of, [Probe("end", str(end), Keep)]).result("end", end).values[0])

    with_mask = last(one)
    if np.array_equal(with_mask, last(replace(one, mask=None))):
        return replace(corpus, mask=None)
    if lengths_of is None:
        return corpus
    n_N = torch.as_tensor(lengths_of(corpus.mask.sum(1)))
    counts: Tensor = torch.arange(len(with_mask))[None] < n_N[:, None]
    return corpus if bool(counts.all()) else replace(corpus, counts=(*corpus.counts, counts))


def _noted(corpus: Corpus, notes: list[str]) -> Corpus:
    source: dict[str, Any] = corpus.origin.source
    prepared = source["preprocess"] | {"masked": corpus.mask is not None}
    return replace(corpus, origin=replace(corpus.origin, source=source | {"notes": notes, "preprocess": prepared}))
