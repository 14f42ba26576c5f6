"""Classes of tokens, each position in one of them, and text in the format of Clark et al. 2019.

Shapes: N sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.corpora.token_strings import Spelling
from massact.models import Model
from massact.stats import Where

# In the order in which they are tried; "first" is a first position that is none of those before it.
CLASSES = ("cls", "sep", "mask", "period_comma", "delimiter", "first", "other")
CLS, SEP, FIRST, OTHER = (CLASSES.index(name) for name in ("cls", "sep", "first", "other"))
SPECIAL = {"cls": ("cls_token_id", "bos_token_id"), "sep": ("sep_token_id", "eos_token_id"), "mask": ("mask_token_id",)}
FEWEST = 2  # tokens of a sequence that can be halved

Labels = Callable[[Where, int], Tensor]  # a sequence and its number of positions -> (T,) numbers of classes


class TokenLabels:
    """Says which class a token is in, by its id and its position.

    Args:
        tokenizer: None where there is none: then only the first position is told from the others.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.spelling = None if tokenizer is None else Spelling(tokenizer)
        self._known: dict[int, int] = {}
        for name in reversed(CLASSES):  # what is tried first is written last
            for attribute in SPECIAL.get(name, ()):
                token_id = getattr(tokenizer, attribute, None)
                if token_id is not None:
                    self._known[int(token_id)] = CLASSES.index(name)

    def of(self, ids_T: Tensor | None, where: Where, n_positions: int) -> Tensor:
        """Numbers of the classes, (T,) int64.

        Args:
            ids_T: token ids of the whole sequence, those that do not count included; None for what is not text.
            where: which of its positions are looked at.
            n_positions: how many these are, T.
        """
        at_T = where.rows(n_positions).cpu()
        if ids_T is None or self.spelling is None:
            labels_T = torch.full((n_positions,), OTHER)
        else:
            labels_T = torch.tensor([self._by_id(int(i)) for i in ids_T.cpu()[at_T]])
        if n_positions and int(labels_T[0]) == OTHER:
            labels_T[0] = FIRST
        return labels_T

    def _by_id(self, token_id: int) -> int:
        if token_id not in self._known:
            assert self.spelling is not None
            name = "other"
            if self.spelling.string(token_id).strip(" ") in (".", ","):
                name = "period_comma"
            elif self.spelling.is_delimiter(token_id):
                name = "delimiter"
            self._known[token_id] = CLASSES.index(name)
        return self._known[token_id]


def labels_of(model: Model, stack: str, ids_of: Callable[[int], Tensor | None], tokens: TokenLabels) -> Labels:
    """Classes of the positions of one stack.

    Args:
        model: what each stack reads: the text, the text one position later (a decoder that is forced), or no text.
        stack: its name.
        ids_of: index of a sequence -> its token ids (T,), None for what is not text.
        tokens: says which class.
    """
    reads = next(model.reads(s) for s in model.anatomy.stacks if s.name == stack)

    def label(where: Where, n_positions: int) -> Tensor:
        ids_T = ids_of(where.sequence)
        if ids_T is not None and reads == "decoder_input_ids":
            ids_T = model.decoder_ids(ids_T[None])[0]
        elif reads not in ("input_ids", None):
            ids_T = None
        return tokens.of(ids_T, where, n_positions)

    return label


def ids_in(inputs: Any, sequences: tuple[int, ...] | None = None) -> Callable[[int], Tensor | None]:
    """Token ids by index of the sequence, of the inputs of a corpus, or of a batch with these sequences."""
    ids_NT = inputs.get("input_ids")

    def find(sequence: int) -> Tensor | None:
        return None if ids_NT is None else ids_NT[sequence if sequences is None else sequences.index(sequence)]

    return find


def ids_of_batch(batch: Batch) -> Callable[[int], Tensor | None]:
    """Token ids that a model is given, by index of the sequence."""
    return ids_in(batch.inputs, batch.sequences)


def paired_text(model: Model, corpus: Corpus) -> Corpus | None:
    """Each sequence as [CLS] p1 [SEP] p2 [SEP], its two halves; None where none can be halved.

    The special tokens that are there are taken out first, and the text is cut so that the sequence is no longer than
    before, or than the model's context. Token types are 0 up to the first [SEP] and 1 behind it, where the model tells
    two of them apart.

    Args:
        model: with a tokenizer that has [CLS] and [SEP].
        corpus: of tokens.

    Source: Clark et al. 2019, Section 2.
    """
    tokenizer = model.tokenizer
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    special = set(getattr(tokenizer, "all_special_ids", None) or ()) | {cls, sep}
    rows, types = [], []
    for i, ids_T in enumerate(corpus.inputs["input_ids"]):
        counted_T = ids_T if corpus.mask is None else ids_T[corpus.mask[i]]
        longest = min(len(counted_T), model.context or len(counted_T)) - 3  # without what is added here
        body = [int(t) for t in counted_T if int(t) not in special][: max(longest, 0)]
        if len(body) < FEWEST:
            continue
        half = (len(body) + 1) // 2
        rows.append([cls, *body[:half], sep, *body[half:], sep])
        types.append([0] * (half + 2) + [1] * (len(body) - half + 1))
    if not rows:
        return None
    width = max(map(len, rows))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    inputs = {"input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows])}
    two = (getattr(getattr(model.module, "config", None), "type_vocab_size", None) or 0) >= 2
    if two and "token_type_ids" in model.inputs_accepted():
        inputs["token_type_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in types])
    mask_NT = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return replace(corpus, inputs=inputs, mask=None if bool(mask_NT.all()) else mask_NT)
