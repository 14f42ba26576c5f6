"""The sink token: one more token, learned, with its own place in the residual stream.

It goes in after the position embeddings and comes out after the last norm (Xiao et al. 2023; Sun et al. 2024, 4.3), so
the logits keep their length. `output_hidden_states` and attention modules see it: position 0 in text, the last one in
images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy import example_inputs
from massact.anatomy.examples import float_dtype, to_device
from massact.records.errors import UserError
from massact.trace.extra_token import add_token, drop_token, mask_token


def add_sink_token(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Give a transformers model a sink token, in place; `apply_variant(model, "sink-token")` calls this.

    Args:
        model: a decoder of text, or a vision transformer with position embeddings that are added.
        std: of the token at the start.

    Raises:
        UserError: the architecture cannot have one, with the reason; the model is then as before.
    """
    title = type(model).__name__
    text = getattr(model, "main_input_name", "") == "input_ids"
    rotary = bool(getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_theta", None))
    if getattr(model.config, "is_encoder_decoder", False):
        raise _cannot(title, "it has an encoder and a decoder")
    if not text and rotary:
        raise _cannot(title, "its rotary positions take every token behind the first few for a patch")
    block = _first_block(model, title)
    base = _base(model, block)
    if text and not hasattr(base, "get_input_embeddings"):
        raise _cannot(title, "it does not say which of its modules embeds the tokens")
    width = getattr(model.config, "hidden_size", None)
    own = next((p for p in block.parameters() if p.is_floating_point()), None)
    if width is None or own is None:
        raise _cannot(title, "its width is not known")
    given = to_device(example_inputs(model), own.device, float_dtype(model))
    before = _run(model, given)
    if text and not _causal(model, given, before):
        raise _cannot(title, "its tokens see those behind them, and a token at the front would be their summary")
    handles = add_token(base, block, torch.randn(width, device=own.device, dtype=own.dtype) * std, text, rotary)
    try:
        _check(model, base, block, given, before)
    except Exception as error:
        drop_token(base, block, handles)
        if isinstance(error, UserError):
            raise
        raise _cannot(title, f"it does not run with one more token ({type(error).__name__}: {error})") from error
    return model


def _cannot(title: str, why: str) -> UserError:
    return UserError(f"{title} cannot have a sink token.", f"Reason: {why}.",
                     "kv-bias and sink-logit need no token of their own.")  # fmt: skip


def _first_block(model: nn.Module, title: str) -> nn.Module:
    n = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if len(lists) != 1:
        raise _cannot(title, f"it has {len(lists)} lists of {n} blocks, not one")
    return lists[0][0]


def _base(model: nn.Module, block: nn.Module) -> nn.Module:
    """The innermost model of transformers around the block: it takes ids or pixels and gives `last_hidden_state`."""
    around = [m for m in model.modules() if hasattr(m, "main_input_name") and any(x is block for x in m.modules())]
    return around[-1] if around else model  # modules() gives outer modules first


def _causal(model: nn.Module, given: dict[str, Any], before: Tensor) -> bool:
    """Whether another last token changes nothing in front of it."""
    ids = given["input_ids"].clone()
    ids[:, -1] = ids[:, 0]
    return torch.allclose(_run(model, given | {"input_ids": ids})[:, :-1], before[:, :-1], rtol=1e-3, atol=1e-4)


def _check(model: nn.Module, base: nn.Module, block: nn.Module, given: dict[str, Any], before: Tensor) -> None:
    """Whether outputs keep their length, depend on the token, and are what they were where nothing sees it.

    Raises:
        UserError: they do not.
    """
    title, token = type(model).__name__, block.massact_token
    first = _run(model, given)
    if first.shape != before.shape:
        raise _cannot(title, f"its outputs have another shape with it: {tuple(first.shape)}, not {tuple(before.shape)}")
    with torch.no_grad():
        drawn = token.detach().clone()
        token.add_(1.0 + torch.arange(len(token), device=token.device, dtype=token.dtype) % 3)
        second = _run(model, given)
        token.copy_(drawn)
    if torch.equal(first, second):
        raise _cannot(title, "its outputs do not depend on the token")
    if "input_ids" in given:
        mask_token(base, True)
        hidden = _run(model, given)
        mask_token(base, False)
        off = float((hidden - before).abs().max() / before.abs().max())
        if not off < 64 * torch.finfo(before.dtype).eps ** 0.75:
            raise _cannot(title, f"a token that nothing sees changes its outputs (by {off:.2g} of the greatest)")


def _run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The first tensor of the outputs, without dropout; the model's mode is as before."""
    training = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad():
            value = model.eval()(**given)[0]
    finally:
        for module, flag in training.items():
            module.training = flag
    return value if isinstance(value, Tensor) else value[0]
