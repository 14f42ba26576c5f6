"""How much greedy samples repeat themselves: perplexity alone misses a collapse into loops (Jin 2025)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.interventions.effects import Paired
from massact.models import Model
from massact.trace import Fired, observing, unchanged
from massact.trace.edits import AnyEdit

N_GRAM = 4
N_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 32


def evaluate_repetition(model: Model, corpus: Corpus, edits: Sequence[AnyEdit]) -> Paired | str:
    """Greedy samples without edits and with each: 1 - distinct 4-grams / 4-grams of what was generated.

    Args:
        model: a language model that generates.
        corpus: its first sequences begin the samples.
        edits: each applied to the live module.

    Returns:
        Paired by sample, or the reason why there are none.
    """
    generates = getattr(model.module, "can_generate", lambda: False)()
    ids = corpus.inputs.get("input_ids")
    encodes = getattr(getattr(model.module, "config", None), "is_encoder_decoder", False)
    if not generates or encodes or ids is None or corpus.mask is not None:
        return "the model does not generate from this corpus"
    room = (model.context or NEW_TOKENS * 2) - NEW_TOKENS
    prompts = ids[:N_SAMPLES, : max(1, min(PROMPT_TOKENS, room))].to(model.device)

    settings = copy.deepcopy(model.module.generation_config)
    settings.update(
        max_length=None, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0,
        use_cache=True,
    )  # fmt: skip

    def samples(edit: AnyEdit | None) -> tuple[np.ndarray, list[Fired]]:
        watched = observing(model, edits=[] if edit is None else [edit])
        with unchanged(model.module), watched as seen, torch.inference_mode():
            out = model.module.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
        return np.array([repeated(row[prompts.shape[1] :]) for row in out]), seen.edits

    base, _ = samples(None)
    after = {edit.name: samples(edit) for edit in edits}
    totals = {name: fired[0] for name, (_, fired) in after.items()}
    ones = np.ones(len(base))
    return Paired(
        np.arange(len(base)), ones, {"repetition": base}, {n: {"repetition": r} for n, (r, _) in after.items()}, totals
    )


def repeated(ids_T: Tensor) -> float:
    """1 - distinct n-grams / n-grams, n = 4: 0 if none comes twice."""
    ids = ids_T.tolist()
    grams = [tuple(ids[i : i + N_GRAM]) for i in range(len(ids) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
