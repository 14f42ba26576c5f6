"""Which tokens stand at the positions of each stack of blocks: not every stack reads the text itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from massact.corpora import Corpus
from massact.models import Model


def tokens_of(model: Model, corpus: Corpus, stack: str, last: int) -> Corpus:
    """A corpus as one stack of blocks reads it: its `input_ids` stand where that stack has its positions.

    The decoder of an encoder-decoder reads `decoder_input_ids`, or else the text one position later
    (`Model.run`); a stack that reads pixels or sound has no tokens; every other one reads the text.

    Args:
        last: greatest position seen in that stack. Where it is not that of the text, the stack has positions of
            its own (patches, a class token), and none is given a token that may not be its.
    """
    read = _read(model, corpus, model.anatomy.stack(stack).path)
    if read.kind == "tokens" and last != _last_counted(read):
        return replace(read, kind="tensors", mask=None)
    return read


def _last_counted(corpus: Corpus) -> int:
    if corpus.mask is None:
        return corpus.inputs["input_ids"].shape[1] - 1
    return int(corpus.mask.any(dim=0).nonzero().max())


def _read(model: Model, corpus: Corpus, path: str) -> Corpus:
    if _inside(path, _decoder(model.module)):
        ids = corpus.inputs.get("decoder_input_ids")
        if ids is not None:
            return replace(corpus, kind="tokens", inputs={"input_ids": ids}, mask=None)
        return (
            replace(corpus, inputs={"input_ids": _later(model.module, corpus)}) if corpus.kind == "tokens" else corpus
        )
    if corpus.kind == "tokens" and _reads(model.module, path) not in (None, "input_ids"):
        return replace(corpus, kind="tensors", mask=None)
    return corpus


def _reads(module: torch.nn.Module, path: str) -> str | None:
    """The main input of the innermost part of a model that holds a stack and says what it reads."""
    said: str | None = None
    for at in [i for i, character in enumerate(path) if character == "."]:
        said = getattr(module.get_submodule(path[:at]), "main_input_name", said)
    return said or getattr(module, "main_input_name", None)


def _decoder(module: torch.nn.Module) -> str | None:
    """Dotted path of the decoder of an encoder-decoder; None for every other model."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    names = {id(part): name for name, part in module.named_modules()}
    return names.get(id(getattr(module, "get_decoder", lambda: None)()))


def _inside(path: str, part: str | None) -> bool:
    return bool(part) and path.startswith(f"{part}.")


def _later(module: torch.nn.Module, corpus: Corpus) -> torch.Tensor:
    """The text one position later, with the start token of the decoder in front: (N, T)."""
    config: Any = module.config
    start = getattr(config, "decoder_start_token_id", None)
    ids = corpus.inputs["input_ids"].roll(1, dims=1)
    ids[:, 0] = start if start is not None else (getattr(config, "pad_token_id", None) or 0)
    return ids
