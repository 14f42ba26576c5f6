"""A learned token at the front (text) or the end (images) of the residual stream: in before the first block, out after
the last norm.

The hooks are functions of this file, and what they share is an object that both modules hold, so that copies and
pickles of the model keep them.

Shapes: B batch, T tokens, D width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.errors import UserError

PARAMETER = "massact_token"
_STATE = "massact_token_state"


@dataclass
class _State:
    """What the hooks of the two modules tell one another."""

    text: bool
    rotary: bool
    here: bool = False  # whether this forward pass has the token in its hidden states (with a cache: only the first)
    masked: bool = False  # nothing sees the token: the model must then be what it was


def add_token(base: nn.Module, block: nn.Module, token: Tensor, text: bool, rotary: bool) -> list[Any]:
    """Add a learned token to a model.

    Args:
        base: the module from token ids or pixels to the last norm.
        block: its first block.
        token: what the token is before training (D,); becomes `block.massact_token`.
        text: tokens have an order: it goes to the front, and mask and positions are told of it. Else to the end.
        rotary: positions are rotary, so the token can have position -1; else it shares position 0.

    Returns:
        The handles of its hooks.
    """
    state = _State(text, rotary)
    block.register_parameter(PARAMETER, nn.Parameter(token))
    setattr(base, _STATE, state)
    setattr(block, _STATE, state)
    return [
        base.register_forward_pre_hook(_before_model, with_kwargs=True),
        block.register_forward_pre_hook(_before_block, with_kwargs=True),
        base.register_forward_hook(_after_model),
    ]


def mask_token(base: nn.Module, masked: bool) -> None:
    """Hide the token of a model of text from all others, or show it again: a model that hides it is what it was."""
    getattr(base, _STATE).masked = masked


def drop_token(base: nn.Module, block: nn.Module, handles: list[Any]) -> None:
    """Undo `add_token`."""
    for handle in handles:
        handle.remove()
    delattr(base, _STATE)
    delattr(block, _STATE)
    del block._parameters[PARAMETER]


def _before_model(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Text: room for the token in embeddings, mask and positions. What is in the room, `_before_block` puts there."""
    state: _State = getattr(base, _STATE)
    state.here = True
    if not state.text:
        return None
    given = dict(kwargs)
    if args:
        given["input_ids"], args = args[0], args[1:]
    if args:
        raise UserError("A model with a sink token takes its arguments by keyword.")
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if embeds is None:
        embeds = base.get_input_embeddings()(ids)
    cache = given.get("past_key_values")
    n_past = 0 if cache is None else int(cache.get_seq_length())
    state.here = n_past == 0
    B, T = embeds.shape[:2]
    if state.here:
        embeds = torch.cat([torch.zeros_like(embeds[:, :1]), embeds], 1)
    given["inputs_embeds"] = embeds
    mask = _longer_mask(given.get("attention_mask"), B, T + max(n_past - 1, 0), embeds.device)
    if state.masked:
        mask[:, 0] = 0
    given["attention_mask"] = mask
    given["position_ids"] = _longer_positions(given.get("position_ids"), state, T, n_past, embeds.device)
    return (), given


def _longer_mask(mask: Tensor | None, B: int, n_tokens: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(B, n_tokens + 1, dtype=torch.long, device=device)
    if mask.ndim != 2:
        raise UserError("A model with a sink token takes masks of shape (batch, tokens) only.",
                        f"This one has shape {tuple(mask.shape)}.",
                        "Generate with the dynamic cache; give a padding mask.")  # fmt: skip
    return torch.cat([torch.ones_like(mask[:, :1]), mask], 1)


def _longer_positions(ids: Tensor | None, state: _State, T: int, n_past: int, device: torch.device) -> Tensor:
    if ids is None:
        ids = torch.arange(T, device=device)[None] + max(n_past - 1, 0)
    if not state.here:
        return ids
    first = torch.full_like(ids[..., :1], -1 if state.rotary else 0)
    return torch.cat([first, ids], -1)


def _before_block(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The token, in its room at the front or behind the others."""
    state: _State = getattr(block, _STATE)
    if not state.here:
        return None
    h_BTD = args[0] if args else kwargs["hidden_states"]
    token = getattr(block, PARAMETER).to(h_BTD.dtype).expand(len(h_BTD), 1, -1)
    h_BTD = torch.cat([token, h_BTD[:, 1:]] if state.text else [h_BTD, token], 1)
    return ((h_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h_BTD})


def _after_model(base: nn.Module, _: tuple, output: Any) -> Any:
    """Without the token, so that the rest of the model sees T tokens."""
    state: _State = getattr(base, _STATE)
    if not state.here:
        return None
    kept = slice(1, None) if state.text else slice(None, -1)
    if isinstance(output, tuple):
        return (output[0][:, kept], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, kept]
    return output
