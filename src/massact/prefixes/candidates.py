"""Which tokens may take a massive activation over: all of them are measured, none is assumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from massact.corpora import Corpus
from massact.corpora.packing import token_ids
from massact.models import Model
from massact.prefixes.starts import rows_of
from massact.records.kinds.scan import ScanResult

MOST_DELIMITERS, MOST_MASSIVE = 4, 4


def candidate_ids(model: Model, corpus: Corpus, scan: ScanResult) -> list[int]:
    """BOS, EOS, space, newlines, the delimiters that occur most and the tokens that are massive most often.

    Whatever of these the tokenizer has, each once; a model without a tokenizer has the massive tokens alone.
    """
    tokenizer = model.tokenizer
    specials = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")]
    texts = [_single(tokenizer, text) for text in (" ", "\n", "\n\n")] if tokenizer is not None else []
    massive = scan.findings[scan.findings["token_id"] >= 0]["token_id"].value_counts().index[:MOST_MASSIVE]
    every = [*specials, *texts, *_delimiters(corpus), *map(int, massive)]
    known = model.vocabulary or 0
    return list(dict.fromkeys(i for i in every if i is not None and 0 <= i < known))


def _single(tokenizer: object, text: str) -> int | None:
    """The one token that spells a text; None where there is none."""
    ids = token_ids(tokenizer, text)
    # Some tokenizers put a mark of a word's beginning before it.
    spelled = [i for i in ids[-1:] if getattr(tokenizer, "decode", lambda _: "")([i]) == text]
    return spelled[0] if spelled and len(ids) <= 2 else None


def _delimiters(corpus: Corpus) -> Sequence[int]:
    spelling = corpus.spelling
    if spelling is None:
        return ()
    counts = Counter(torch.cat(rows_of(corpus)).tolist())
    return [i for i, _ in counts.most_common() if spelling.is_delimiter(i)][:MOST_DELIMITERS]


def spelled(corpus: Corpus, ids: Sequence[int]) -> str:
    """A prefix as it is shown: its tokens between bars; nothing for none."""
    return "|".join(corpus.spelling.string(i) if corpus.spelling else f"id {i}" for i in ids)
