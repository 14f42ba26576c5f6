"""Prompts that a model goes on with itself: the text it makes, and which of its tokens were given.

Shapes: N prompts, T tokens, B prompts of one length at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.models import Model
from massact.records.errors import UserError
from massact.trace import unchanged

PROMPT_TOKENS, PROMPTS = 32, 8  # of a text that is cut into windows, where nobody says
AT_ONCE = 8  # prompts that are generated from together
OWN_TEXT = "Scan without --generate, on a text of your own."


def continued(model: Model, corpus: Corpus, n: int, *, temperature: float = 0.0, seed: int = 0) -> Corpus:
    """Prompts with what a model generates behind them, by `generate` of transformers with a cache.

    The token t + 1 is argmax z at temperature 0, else drawn from softmax(z / temperature); a sequence ends with the end
    token or after n. Memory: the cache, 2 T values of each layer and key-value head for every one of the (at most 8)
    prompts that run together; no statistic is taken here. Edits that are in force (`massact.edited`) act while it runs.

    Args:
        model: a causal language model of transformers.
        corpus: prompts (N, T) of tokens alone.
        n: tokens to generate, at most.
        temperature: 0 takes the likeliest token.
        seed: of what is drawn.

    Returns:
        A corpus whose `prompts` say how many tokens of each sequence were given.

    Raises:
        UserError: the model does not generate, there is no room for n tokens, or all prompts end at once.
    """
    check_generates(model, corpus)
    if n < 1:
        raise UserError(f"{n} tokens were to be generated.", do="Generate 1 or more.")
    rows = _rows(corpus)
    longest = max(map(len, rows))
    if model.context is not None and longest + n > model.context:
        raise UserError(
            f"There is no room for {n:,} tokens behind a prompt of {longest:,}.",
            f"The model takes at most {model.context:,} tokens.",
            f"Generate at most {max(model.context - longest, 0):,}, or give shorter prompts (--seq-len).",
        )
    settings = _settings(model, n, temperature)
    made: dict[int, Tensor] = {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length in sorted({len(row) for row in rows}):
            mine = [i for i, row in enumerate(rows) if len(row) == length]
            for start in range(0, len(mine), AT_ONCE):
                chosen = mine[start : start + AT_ONCE]
                made |= dict(zip(chosen, _generated(model, [rows[i] for i in chosen], settings), strict=True))
    if all(len(made[i]) == len(row) for i, row in enumerate(rows)):
        raise UserError(
            "The model generated nothing.", "Behind every prompt its first token is the one that ends a text.",
            "Give prompts that stop within a sentence, or draw with --temperature 1.",
        )  # fmt: skip
    told = {"tokens": n, "temperature": temperature, "seed": seed}
    return _joined(corpus, [made[i] for i in range(len(rows))], [len(row) for row in rows], told)


def check_generates(model: Model, corpus: Corpus) -> None:
    """Refuse a model that does not go on with a text, and a corpus that is not text alone.

    Raises:
        UserError: says why.
    """
    name, kind = model.name or type(model.module).__name__, getattr(model.module, "config", None)
    if corpus.kind != "tokens" or set(corpus.inputs) != {"input_ids"}:
        holds = ", ".join(sorted(corpus.inputs))
        raise UserError(f"{name} cannot go on with {corpus.name!r}.",
                        f"A model goes on with text alone, and this corpus holds {holds}.", OWN_TEXT)  # fmt: skip
    if getattr(kind, "is_encoder_decoder", False):
        raise UserError(f"{name} does not go on with a text.", "Its encoder reads the text, and its decoder begins a "
                        "new one.", OWN_TEXT)  # fmt: skip
    if not getattr(model.module, "can_generate", lambda: False)():
        raise UserError(f"{name} does not generate.", f"{type(model.module).__name__} has no `generate` of "
                        "transformers: it is an encoder, a model without its head, or not of transformers.",
                        OWN_TEXT)  # fmt: skip


def _settings(model: Model, n: int, temperature: float) -> Any:
    settings: Any = copy.deepcopy(model.module.generation_config)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = settings.pad_token_id if settings.pad_token_id is not None else 0
    settings.update(
        max_length=None, min_length=0, min_new_tokens=None, max_new_tokens=n, num_beams=1, num_return_sequences=1,
        pad_token_id=pad, use_cache=True, return_dict_in_generate=False, output_scores=False, output_attentions=False,
        output_hidden_states=False, **(drawn if temperature > 0 else {"do_sample": False}),
    )  # fmt: skip
    return settings


def _generated(model: Model, rows: list[Tensor], settings: Any) -> list[Tensor]:
    """Prompts of one length with what follows, up to their end token and with it."""
    ids_BT, generate = torch.stack(rows).to(model.device), getattr(model.module, "generate")  # noqa: B009
    with unchanged(model.module), torch.inference_mode():
        out_BT: Tensor = generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings).cpu()
    ends = settings.eos_token_id
    known = torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()
    cut, start = [], ids_BT.shape[1]
    for row in out_BT:
        at = torch.isin(row[start:], known).nonzero().flatten()
        # The end token itself is no text; what stands behind it is padding.
        cut.append(row[: start + int(at[0])] if len(at) else row)
    return cut


def _rows(corpus: Corpus) -> list[Tensor]:
    ids_NT = corpus.inputs["input_ids"]
    return list(ids_NT) if corpus.mask is None else [row[m] for row, m in zip(ids_NT, corpus.mask, strict=True)]


def _joined(corpus: Corpus, rows: list[Tensor], prompts: list[int], told: Mapping[str, Any]) -> Corpus:
    """Texts of any length as a corpus, padded behind."""
    width = max(map(len, rows))
    ids_NT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_NT = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = row
    origin = replace(corpus.origin, packing=corpus.origin.packing | {"generated": dict(told)})
    mask = None if bool(mask_NT.all()) else mask_NT
    return replace(corpus, inputs={"input_ids": ids_NT}, mask=mask, prompts=tuple(prompts), origin=origin)


def kept(corpus: Corpus) -> dict[str, np.ndarray]:
    """What a run keeps of a text that was generated, so that it need not be generated again; {} of any other."""
    if not corpus.prompts:
        return {}
    lengths = [len(row) for row in _rows(corpus)]
    return {"ids": corpus.inputs["input_ids"].numpy(), "lengths": np.array(lengths), "given": np.array(corpus.prompts)}


def restored(prompts: Corpus, text: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> Corpus | None:
    """The text that a run has kept, behind the same prompts; None behind others."""
    given, rows = _rows(prompts), [torch.tensor(ids[:n]) for ids, n in zip(text["ids"], text["lengths"], strict=True)]
    lengths = [int(n) for n in text["given"]]
    if len(given) < len(rows) or not all(torch.equal(g, r[:n]) for g, r, n in zip(given, rows, lengths, strict=False)):
        return None
    return _joined(prompts.head(len(rows)), rows, lengths, told)
