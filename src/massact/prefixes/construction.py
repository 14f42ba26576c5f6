"""The folded model: a copy whose attention has slots, filled with the keys and values of a prefix.

Shapes: n tokens of the prefix, K key-value heads, E width of keys, F width of values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from massact.models import Model, with_attention
from massact.prefixes.position_shift import Positions, logits_at
from massact.prefixes.refusals import FALLBACK, title_of
from massact.records.anatomy import AttentionPlace
from massact.records.errors import UserError
from massact.trace.attention import AttentionCall, attending
from massact.variants.application import apply_variant
from massact.variants.changes import PREFIX

Pair = tuple[Tensor, Tensor]  # keys (K, n, E) and values (K, n, F)


@dataclass(frozen=True)
class Folded:
    """A model whose attention has the keys and values of a prefix as slots.

    Args:
        model: to be read and measured as any other; text is given without the prefix.
        ids: of the prefix.
        positions: how the model counts them.
        windows: layer -> keys that a query of it sees, where these are fewer than all.
    """

    model: Model
    ids: tuple[int, ...]
    positions: Positions
    windows: Mapping[int, int]

    @property
    def n(self) -> int:
        """How many slots."""
        return len(self.ids)


def keys_and_values(model: Model, ids: Sequence[int], **more: Any) -> dict[str, Pair]:
    """Keys (after rotary) and values that a prefix alone gives every attention module, by its path.

    Args:
        model: with its attention.
        ids: of the prefix; more: arguments of the pass, such as its positions.
    """
    found: dict[str, Pair] = {}

    def see(place: AttentionPlace) -> Any:
        def keep(call: AttentionCall) -> None:
            assert call.k_BKSE is not None and call.v_BKSF is not None  # `check_foldable` has looked
            found[place.module] = call.k_BKSE[0].clone(), call.v_BKSF[0].clone()

        return keep

    taps = {place: see(place) for place in model.anatomy.attentions.values()}
    with attending(model.module, taps):
        logits_at(model, model.module, torch.tensor([list(ids)]), **more)
    return found


def build(model: Model, ids: Sequence[int], positions: Positions) -> Folded:
    """A copy of a model with the keys and values of a prefix as slots of every block.

    A slot i of n is the key of the i-th token of the prefix at position i - n, and its value: in a causal model the
    first tokens see one another alone, and reach the text through these alone.

    Args:
        model: proved; it is as before.
        ids: of the prefix.
        positions: see `positions_of`.

    Raises:
        UserError: its attention has no room for slots, with the reason.
    """
    seen, n = with_attention(model), len(ids)
    pairs = keys_and_values(seen, ids, **positions.before(n, model.device))
    module = copy.deepcopy(model.module)
    positions.shift(module, n)
    try:
        with torch.random.fork_rng(devices=[]):  # slots are drawn before they are filled
            apply_variant(module, "kv-bias", slots=n, placed=True)
    except UserError as error:
        raise UserError(f"{title_of(model)} cannot be folded.", error.why or error.what, FALLBACK) from error
    fill(module, pairs)
    windows = {site.layer: window for site, place in seen.anatomy.attentions.items()
               if (window := _window(module, place.module)) is not None}  # fmt: skip
    bare = replace(model.anatomy, attentions={}, no_attention={})  # attention is another function now
    calls = {name: n for name, n in model.proof.calls.items() if not name.startswith("attention:")}
    name = f"{model.name} folded" if model.name else ""
    made = replace(model, module=module.eval(), anatomy=bare, proof=replace(model.proof, calls=calls), name=name)
    return Folded(made, tuple(ids), positions, windows)


def fill(module: nn.Module, pairs: Mapping[str, Pair]) -> None:
    """Put keys and values into the slots of every attention module; of one slot without its axis."""
    with torch.no_grad():
        for name, part in module.named_modules():
            if getattr(part, PREFIX + "variant", None) is None:
                continue
            for letter, given in zip("kv", pairs[name], strict=True):
                slot: Any = getattr(part, PREFIX + letter)
                slot.copy_(given.reshape(slot.shape))


def refilled(folded: Folded, model: Model, ids: Sequence[int]) -> Folded:
    """The same copy with the keys and values of another prefix of as many tokens.

    Args:
        model: of which it is a copy, with its attention.
    """
    fill(folded.model.module, keys_and_values(model, ids, **folded.positions.before(len(ids), model.device)))
    return replace(folded, ids=tuple(ids))


def _window(module: nn.Module, name: str) -> int | None:
    window: int | None = getattr(module.get_submodule(name), PREFIX + "variant").window
    return window
