"""What the decoder of a model of sound reads first."""

from __future__ import annotations

from typing import Any

from torch import nn

from massact.corpora import Prompt


def first_ids(module: nn.Module, tokenizer: Any = None) -> tuple[tuple[int, ...], str]:
    """The ids ahead of any transcript, and what says so: start of transcript, language, task, no timestamps.

    They are the tokenizer's `prefix_tokens` where these begin with the start token; else the start token and the forced
    ids of the generation configuration (or configuration), as far as they are given one after another.

    Args:
        module: an encoder-decoder of transformers.
        tokenizer: of it, or None.
    """
    found = (getattr(module, name, None) for name in ("generation_config", "config"))
    holders = [h for h in found if h is not None]

    def said(name: str) -> Any:
        return next((v for v in (getattr(h, name, None) for h in holders) if v is not None), None)

    known = [said(n) for n in ("decoder_start_token_id", "bos_token_id", "pad_token_id")]
    start = int(next((x for x in known if x is not None), 0))
    prefix = [int(i) for i in getattr(tokenizer, "prefix_tokens", None) or ()]
    if prefix[:1] == [start]:
        return tuple(prefix), f"{type(tokenizer).__name__}.prefix_tokens"
    ids = [start]
    for place, token in sorted(said("forced_decoder_ids") or (), key=lambda pair: pair[0]):
        if place != len(ids) or token is None:
            break
        ids.append(int(token))
    forced = " and forced_decoder_ids" if len(ids) > 1 else ""
    return tuple(ids), f"decoder_start_token_id{forced}" if known[0] is not None else f"the start token{forced}"


def prompt_of(module: nn.Module, tokenizer: Any = None) -> Prompt:
    """What the decoder reads ahead of any transcript, see `first_ids`."""
    ids, said_by = first_ids(module, tokenizer)
    return Prompt(ids, said_by, decoder_context(module))


def decoder_context(module: nn.Module) -> int | None:
    """Most positions of the decoder, where the configuration says."""
    config = getattr(module, "config", None)
    for name in ("max_target_positions", "max_position_embeddings"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
