"""Which tokens stand at the positions of each stack of blocks: not every stack reads the text itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from massact.corpora import Corpus
from massact.models import Model
from massact.positions.frames import framed
from massact.positions.patch_grids import packed_names
from massact.positions.patch_names import place_names
from massact.positions.placeholders import modalities_of


def tokens_of(model: Model, corpus: Corpus, stack: str, last: int) -> Corpus:
    """A corpus as one stack of blocks reads it: its `input_ids` stand where that stack has its positions.

    The decoder of an encoder-decoder reads `decoder_input_ids`, or else the text one position later
    (`Model.run`); a stack that reads pixels or sound has no tokens, but its positions may have names (`place_names`,
    `framed`); every other one reads the text. It also says what each position is (`modalities_of`).

    Args:
        last: greatest position seen in that stack. Where it is not that of the text, the stack has positions of
            its own (patches, a class token), and none is given a token that may not be its.
    """
    read = _read(model, corpus, stack)
    if read.kind == "tokens" and last != _last_counted(read):
        read = replace(read, kind="tensors", mask=None)
    if read.kind == "tensors" and read.recordings is not None:
        read = framed(model, read, stack, last + 1)
    elif read.kind == "tensors":
        names, own = place_names(model, read, stack), packed_names(model, corpus, stack) or ()
        own = own if max(map(len, own), default=0) == last + 1 else ()
        if corpus.packed and not own and names is not None:  # the same names for each of several images
            own = _of_images(corpus, names, last + 1)
        same = names is not None and len(names) == last + 1
        read = replace(read, places=names if same else None, own_places=own)
    return replace(read, modalities=modalities_of(model, corpus, read, stack))


def _of_images(corpus: Corpus, names: tuple[str, ...], n: int) -> tuple[tuple[str, ...], ...]:
    """Names of the positions of a tower with a row for each image of a sequence; () where they are not n at most."""
    counts = [corpus.n_images(s) for s in range(corpus.n_sequences)]
    if max(counts) * len(names) != n:
        return ()
    return tuple(tuple(f"image#{i} {name}" if k > 1 else name for i in range(1, k + 1) for name in names)
                 for k in counts)  # fmt: skip


def _last_counted(corpus: Corpus) -> int:
    if corpus.mask is None:
        return corpus.inputs["input_ids"].shape[1] - 1
    return int(corpus.mask.any(dim=0).nonzero().max())


def _read(model: Model, corpus: Corpus, stack: str) -> Corpus:
    name = model.reads(model.anatomy.stack(stack))
    if name == "decoder_input_ids":
        given = corpus.inputs.get(name)
        if given is not None:
            mask = next((m for m in corpus.counts if m.shape[1] == given.shape[1]), None)
            return replace(corpus, kind="tokens", inputs={"input_ids": given}, mask=mask)
        if corpus.kind == "tokens":
            return replace(corpus, inputs={"input_ids": model.decoder_ids(corpus.inputs["input_ids"])})
        return corpus
    if corpus.kind == "tokens" and name not in (None, "input_ids"):
        return replace(corpus, kind="tensors", mask=None)
    return corpus


def notes_on_positions(model: Model, corpus: Corpus, last: Mapping[str, int]) -> list[str]:
    """What is said of stacks whose positions are not those that a corpus counts.

    Args:
        last: of each stack, the greatest position seen in it.
    """
    if corpus.kind == "tensors" and corpus.mask is not None and not corpus.counts:
        return [
            f"The attention_mask has {corpus.mask.shape[1]} positions, the stack {name} another number: all of its "
            "are counted."
            for name, pos in last.items()
            if int(pos) != int(corpus.mask.any(0).nonzero().max())
        ]
    notes = []
    for name, pos in last.items():
        read = _read(model, corpus, str(name))
        n = read.inputs["input_ids"].shape[1] if read.kind == "tokens" else int(pos) + 1
        if int(pos) + 1 > n:
            notes.append(
                f"The blocks{f' of {name}' if name else ''} have {int(pos) + 1} positions for {n} tokens (padding or "
                "prompts of the model's own): all are counted, and none is given a token."
            )
    return notes
