"""What an attention variant is declared of: one attention call, the sizes and parameters of a module, the variant.

Shapes: B batch, H heads, K key-value heads, T queries, S keys, E width of q and k, F width of v, D width of the input,
N greatest number of positions. Where queries share keys (K < H), whatever belongs to a key or a value has K heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from massact.records.errors import UserError, check_options
from massact.stats.attention_call import HIDES

Given = tuple[Tensor, Tensor | None]
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One attention call of a batch.

    Args:
        q_BHTE, k_BKSE, v_BKSF: queries, keys (after rotary) and values.
        mask: True where a key is seen, or added to the logits; broadcastable to (B, H, T, S), or None.
        causal: query t sees the keys up to t; only for T = S.
        scale: logits are scale * q.k.
        dropout: probability that a weight is set to 0.
        x_BTD: the input of the attention module, for variants that need it.
        forward: no query sees a key behind it (by flag or mask): its position is counted from the last key.
        window: keys that a query sees at most, itself among them, where the module attends within a sliding window.
        position_BT: positions of the queries, where the model says them; else they are counted, see `positions`.
    """

    q_BHTE: Tensor
    k_BKSE: Tensor
    v_BKSF: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    x_BTD: Tensor | None = None
    forward: bool = False
    window: int | None = None
    position_BT: Tensor | None = None

    def per_head(self, x: Tensor, axis: int) -> Tensor:
        """A tensor of K key-value heads as one of H heads."""
        H, K = self.q_BHTE.shape[1], self.k_BKSE.shape[1]
        return x if x.shape[axis] == H else x.repeat_interleave(H // K, axis)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the queries (T,) and of the keys (S,): with a cache, queries are the last of the keys."""
        T, S = self.q_BHTE.shape[2], self.k_BKSE.shape[2]
        key_S = torch.arange(S, device=self.q_BHTE.device)
        return key_S[:T] if self.causal or not self.forward else key_S[S - T :], key_S

    def written(self) -> tuple[Tensor, Tensor]:
        """Logits (B, H, T, S), at least float32, and where a key is seen, broadcastable to them."""
        k_BHSE = self.per_head(self.k_BKSE, 1)
        z = torch.matmul(self.q_BHTE, k_BHSE.transpose(-1, -2))
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * self.scale
        T, S = z.shape[-2:]
        seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=z.device)
        if self.causal:
            seen = seen.tril()
        if self.mask is not None:
            mask = self.mask.reshape((1,) * (4 - self.mask.ndim) + self.mask.shape)
            if mask.dtype == torch.bool:
                seen = seen & mask
            else:
                seen, z = seen & (mask > HIDES), z + mask.clamp(min=HIDES)
        return z, seen

    def weighted(self, p_BHTS: Tensor) -> Tensor:
        """P v, with dropout on P."""
        v_BHSF = self.per_head(self.v_BKSF, 1)
        return torch.matmul(F.dropout(p_BHTS, self.dropout).to(v_BHSF.dtype), v_BHSF)


@dataclass(frozen=True)
class Dims:
    """Sizes of one attention module: heads, key-value heads, widths of keys, values and input, positions."""

    H: int
    K: int
    E: int
    F: int
    D: int
    N: int


@dataclass(frozen=True)
class Init:
    """A parameter before training: its shape, and how it is drawn.

    Args:
        shape: of the parameter.
        std: of a normal distribution with mean 0; 0 for a constant.
        constant: every entry, where std is 0.
    """

    shape: tuple[int, ...]
    std: float = 0.0
    constant: float = 0.0


Options = dict[str, Any]
Slot = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Variant:
    """An attention variant.

    Args:
        name: what a user calls it.
        source: paper, section.
        formula: of one head's output.
        row_sum: what the weights of the keys sum to in a row: "1", "<= 1" or "any".
        attend: `attend(call, params, **options) -> (out, lse or None)`.
        parameters: `parameters(dims, **options) -> {name: Init}`.
        options: with their defaults.
        takes_input: whether it reads `Call.x_BTD`.
        slot: of the extra-slot family: `slot(call, params, **options) -> (logit (B, H, T), value or None)`, the value
            (H, F), or (B, H, T, F) where it differs from query to query.
        check: refuses options that make no sense.
        note: what is not certain about it.
    """

    name: str
    source: str
    formula: str
    row_sum: str
    attend: Callable[..., Given]
    parameters: Callable[..., dict[str, Init]] = lambda dims, **_: {}
    options: Options = field(default_factory=dict)
    takes_input: bool = False
    slot: Slot | None = None
    check: Callable[..., str] = lambda **_: ""
    note: str = ""

    def resolved(self, given: Options) -> Options:
        """All options, the given ones over the defaults.

        Raises:
            UserError: an option is unknown or makes no sense.
        """
        check_options(f"The attention variant {self.name!r}", given, self.options)
        options = self.options | given
        wrong = self.check(**options)
        if wrong:
            raise UserError(f"The attention variant {self.name!r} cannot be had with {given}.", wrong)
        return options
