"""The proof of a fold: the folded model on a text is the model with the prefix in front of it.

Shapes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from massact.models import Model
from massact.prefixes.construction import Folded
from massact.prefixes.position_shift import allowed_of, apart, logits_at
from massact.prefixes.refusals import FALLBACK, title_of
from massact.records.errors import ProofError
from massact.trace import unchanged

EXACT = 1e-3  # of the greatest logit, in 32 bits
WIDEST = 1024  # a window up to this is crossed in the proof
BEYOND = 24  # tokens behind the end of a window
LONGEST, N_TEXTS = 128, 4
PROMPT, NEW_TOKENS, NEW_BEYOND = 12, 16, 4


@dataclass
class Proof:
    """What was compared.

    Args:
        error: max |logit(folded, text) - logit(model, prefix + text)| over max |logit|, the greatest of all texts.
        allowed: what was allowed.
        lengths: tokens of the texts, each with its own error.
        windows: layer -> window; crossed: whether a text is longer than each of them.
        n_generated: tokens generated greedily with a cache, without one, and by the model with the prefix in front;
            ties: of these, tokens at which two logits are as near as rounding, and the choice was another.
    """

    error: float
    allowed: float
    lengths: list[tuple[int, float]] = field(default_factory=list)
    windows: dict[int, int] = field(default_factory=dict)
    crossed: bool = True
    n_generated: int = 0
    ties: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As a record keeps it."""
        return asdict(self)


def in_front(ids: Sequence[int], text_BT: Tensor) -> Tensor:
    """A prefix before every text."""
    return torch.cat([torch.tensor([list(ids)]).expand(len(text_BT), -1).to(text_BT), text_BT], 1)


def prove_equal(model: Model, folded: Folded, texts: Sequence[Tensor]) -> Proof:
    """Compare the folded model with the model with the prefix in front, on texts and in what they generate.

    Args:
        model: the one that was folded.
        texts: ids (T,) of texts without the prefix; all are read, joined where a window is longer than each.

    Raises:
        ProofError: logits or tokens differ by more than rounding; says by how much.
    """
    allowed = allowed_of(model.dtype, EXACT)
    batches, crossed = _batches(model, folded, texts)
    proof = Proof(0.0, allowed, windows=dict(folded.windows), crossed=crossed)
    for text_BT in batches:
        wanted = logits_at(model, model.module, in_front(folded.ids, text_BT))[:, folded.n :]
        error = apart(logits_at(folded.model, folded.model.module, text_BT), wanted)
        proof.lengths.append((text_BT.shape[1], error))
        proof.error = max(proof.error, error)
        if not error <= allowed:
            raise ProofError(
                f"{title_of(model)} with slots is not the model with the prefix in front of {text_BT.shape[1]} tokens.",
                f"Logits are off by {error:.2g} of the greatest (allowed {allowed:.1g}).", FALLBACK,
            )  # fmt: skip
    if getattr(model.module, "can_generate", lambda: False)():
        _generates_alike(model, folded, batches, proof)
    return proof


def _batches(model: Model, folded: Folded, texts: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """Texts of one length together, one alone, and one beyond the windows; whether that is beyond all of them."""
    room = (model.context or 10**9) - folded.n
    rows = sorted((text[: min(LONGEST, room)] for text in texts), key=len)
    most = [row for row in rows[-N_TEXTS:] if 2 * len(row) >= len(rows[-1])]
    length = len(most[0])
    alone = most[-1] if len(most[-1]) > length else most[-1][: max(1, length // 2)]
    batches = [torch.stack([row[:length] for row in most]), alone[None]]
    length = max(length, len(alone))
    whole, crossed = torch.cat(list(texts)), True
    for window in sorted(set(folded.windows.values())):
        longer = window + BEYOND
        inside = window <= WIDEST and longer <= room
        crossed = crossed and inside
        if inside and longer > length:
            batches.append(whole.repeat(-(-longer // len(whole)))[None, :longer])
    return batches, crossed


def _generates_alike(model: Model, folded: Folded, batches: Sequence[Tensor], proof: Proof) -> None:
    """Compare greedy samples: of the folded model with a cache and without, of the model with the prefix in front."""
    prompts = [(row[None, :PROMPT], NEW_TOKENS) for row in batches[0][:2]]
    prompts += [(long[:, : long.shape[1] - BEYOND - 2], NEW_BEYOND) for long in batches[2:]]
    for prompt_1T, n_new in prompts:
        room = (model.context or 10**9) - folded.n - prompt_1T.shape[1]
        n_new = min(n_new, room)
        if n_new < 1:
            continue
        wanted = _greedy(model, model.module, in_front(folded.ids, prompt_1T), n_new, True)[:, folded.n :]
        for cache in (True, False):
            made = _greedy(folded.model, folded.model.module, prompt_1T, n_new, cache)
            proof.ties += _differ(model, folded, made, wanted, proof.allowed)
        proof.n_generated += n_new


def _greedy(model: Model, module: nn.Module, prompt_1T: Tensor, n_new: int, cache: bool) -> Tensor:
    """The prompt and what follows it greedily, whatever the model's own settings are."""
    prompt_1T = prompt_1T.to(model.device)
    settings: Any = copy.deepcopy(module.generation_config)
    settings.update(
        max_length=None, do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=n_new,
        min_new_tokens=n_new, pad_token_id=0, use_cache=cache,
    )  # fmt: skip
    generate: Any = module.generate
    with torch.inference_mode(), unchanged(module):
        out: Tensor = generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), generation_config=settings)
    return out.cpu()


def _differ(model: Model, folded: Folded, made: Tensor, wanted: Tensor, allowed: float) -> bool:
    """Whether two samples part, at a token where two logits are as near as rounding.

    Raises:
        ProofError: they part where the logits are apart.
    """
    if torch.equal(made, wanted):
        return False
    at = int((made != wanted)[0].nonzero()[0])
    logits = logits_at(model, model.module, in_front(folded.ids, wanted[:, :at]))[0, -1].double()
    gap = float((logits[wanted[0, at]] - logits[made[0, at]]) / logits.abs().max())
    if gap > allowed:
        raise ProofError(
            f"{title_of(model)} with slots generates another token than the model with the prefix in front.",
            f"Token {at} of the sample is {int(made[0, at])}, not {int(wanted[0, at])}; their logits are {gap:.2g} of "
            f"the greatest apart (allowed {allowed:.1g}).", FALLBACK,
        )  # fmt: skip
    return True
