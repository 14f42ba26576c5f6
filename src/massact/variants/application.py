"""Put an attention variant into a transformers model of any architecture: by registration, nothing is copied.

The variant's parameters are added to every self-attention module; one function in transformers' `AttentionInterface`
reads them there. Which modules attend, and how wide they are, is seen in one short forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from massact.anatomy import example_inputs
from massact.anatomy.examples import float_dtype, to_device
from massact.records.errors import MassactError, UserError, class_and_line
from massact.stats.attention_call import fused_attention
from massact.trace.module_inputs import input_of, inputs_kept, keep_input
from massact.variants.calls import Call, Dims, Init, Options, Variant
from massact.variants.changes import PREFIX, changeable, changes_of, note_change
from massact.variants.registry import VARIANTS, variant, variants
from massact.variants.sink_token import add_sink_token
from massact.variants.slots import additive

_PROBE = PREFIX + "probe"
_NOT_OURS = {"softcap": "soft-capped logits", "s_aux": "learned sinks of its own", "position_bias": "a position bias"}


@dataclass(frozen=True)
class Installed:
    """The variant of one attention module: its name, all of its options, and the window that it attends within."""

    name: str
    options: Options
    window: int | None = None


# -------------------------------------------------------------------------------------------- the attention function
def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function of every variant, as transformers' `AttentionInterface` calls it.

    Args:
        module: the attention module, which holds the variant's parameters.
        query, key, value: (B, H, T, E), (B, K, S, E), (B, K, S, F), after rotary.
        attention_mask: (B, 1 or H, T, S), True where a key is seen, or added to the logits; None for all, or for the
            causal order if the module is causal.
        dropout, scaling, is_causal: as in transformers.
        kwargs: of the model; refused where they change the logits.

    Returns:
        The output (B, T, H, F) and None: no weights are kept.
    """
    call, params, installed = _read(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    made = variant(installed.name)
    if made.takes_input:
        call = replace(call, x_BTD=input_of(module))
    out_BHTF, _ = made.attend(call, params, **installed.options)
    return out_BHTF.transpose(1, 2).contiguous(), None


def _reads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a tap cannot see by itself: the mask and the order that were meant, and the extra slot."""
    call, params, installed = _read(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    q, k, v = call.q_BHTE, call.k_BKSE, call.v_BKSF
    mask = None if call.mask is None else additive(call.mask, q.dtype)
    fields: dict[str, Any] = {"k_BKSE": k, "v_BKSF": v, "mask": mask, "causal": call.causal, "scale": call.scale}
    made = variant(installed.name)
    if made.slot is not None:
        given = fused_attention(q, k, v, mask, call.causal, call.scale)
        fields["lse_BHT"] = None if given is None else given[1]
        slot, value = made.slot(call, params, **installed.options)
        fields["slot_logit_BHT"] = slot.detach()
        if value is not None:
            fields["slot_value_BHTF"] = (value[None, :, None] if value.ndim == 2 else value).detach()
    return fields


def _has_slot(module: nn.Module) -> bool:
    """Whether the variant of a module has a slot, which some kernels are given as one more key."""
    installed = getattr(module, PREFIX + "variant", None)
    return installed is not None and variant(installed.name).slot is not None


attention.reads = _reads  # type: ignore[attr-defined]  # for massact.trace.attention
attention.has_slot = _has_slot  # type: ignore[attr-defined]


def _read(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    dropout: float, scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any],
) -> tuple[Call, dict[str, Tensor], Installed]:  # fmt: skip
    installed = getattr(module, PREFIX + "variant", None)
    if installed is None:
        raise UserError(
            f"{type(module).__name__} has no attention variant of its own.",
            "Its model was set to a massact attention implementation, but no variant was put into it.",
            "Call massact.training.apply_variant(model, name), or load_variant(model) after from_pretrained.",
        )
    foreign = _foreign(kwargs)
    if foreign:
        raise UserError(f"The attention variant {installed.name!r} has no place for {foreign}.")
    T, S = query.shape[2], key.shape[2]
    forward = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = forward and mask is None and T > 1
    if causal and S > T:  # the first tokens in a cache that is longer than they are
        key, value = key[:, :, :T], value[:, :, :T]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    names = [n for n in module._parameters if n.startswith(PREFIX)]
    params = {n.removeprefix(PREFIX): getattr(module, n) for n in names}
    window, at = kwargs.get("sliding_window"), kwargs.get("position_ids")
    at = at if isinstance(at, Tensor) and at.ndim == 2 and at.shape[1] == T else None
    call = Call(query, key, value, mask, causal, scale, dropout, forward=forward, window=window, position_BT=at)
    return call, params, installed


def _foreign(kwargs: dict[str, Any]) -> str:
    found = [words for name, words in _NOT_OURS.items() if kwargs.get(name) is not None]
    return " and ".join(found)


def _register(name: str, function: Callable[..., Any] = attention) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


for _name in VARIANTS:
    _register(PREFIX + _name)


# -------------------------------------------------------------------------------------------- where attention is
@dataclass
class _Seen:
    """One attention module, as it was called in the short forward pass."""

    module: nn.Module
    dims: Dims
    n_queries: int
    n_keys: int
    foreign: str
    window: int | None


def _attention_modules(model: nn.Module, inputs: dict[str, Any] | None) -> dict[str, _Seen]:
    """Every module that calls transformers' attention interface, by its dotted name; the model is as before."""
    config = model.config
    names = {id(m): n for n, m in model.named_modules()}
    holders = {id(c): c for c in _configs(model)}.values()
    before = [(c, c._attn_implementation_internal) for c in holders]
    training = {m: m.training for m in model.modules()}
    seen: dict[str, _Seen] = {}

    def probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
        B, H, T, E = query.shape
        K, S, n_values = key.shape[1], key.shape[2], value.shape[-1]
        limit = next((getattr(config, n) for n in ("max_position_embeddings", "n_positions")
                      if isinstance(getattr(config, n, None), int)), S)  # fmt: skip
        dims = Dims(H, K, E, n_values, input_of(module).shape[-1], max(S, limit))
        seen[names[id(module)]] = _Seen(module, dims, T, S, _foreign(kwargs), kwargs.get("sliding_window"))
        return query.new_zeros(B, T, H, n_values), None

    try:
        _register(_PROBE, probe)
        for holder, _ in before:
            holder._attn_implementation_internal = _PROBE
        given = example_inputs(model) if inputs is None else inputs
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with inputs_kept(model), torch.no_grad():
            model.eval()(**to_device(given, device, float_dtype(model)))
    except MassactError:
        raise
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} does not run on a short input while its attention is looked for.",
            class_and_line(error), "Give one that it runs on: apply_variant(model, name, inputs={...}).",
        ) from error  # fmt: skip
    finally:
        for holder, value in before:
            holder._attn_implementation_internal = value
        for module, flag in training.items():
            module.training = flag
        AttentionInterface._global_mapping.pop(_PROBE, None)
        AttentionMaskInterface._global_mapping.pop(_PROBE, None)
    return seen


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that a module of the model reads."""
    found = (getattr(m, "config", None) for m in model.modules())
    return [c for c in found if hasattr(c, "_attn_implementation_internal")]


def _checked(model: nn.Module, name: str, inputs: dict[str, Any] | None) -> dict[str, _Seen]:
    """The attention modules that take a variant.

    Raises:
        UserError: the architecture cannot take one, with the reason.
    """
    title, what = type(model).__name__, f"cannot have the attention variant {name!r}."
    seen = _attention_modules(model, inputs)
    if not seen:
        raise UserError(
            f"{title} {what}",
            "Its attention does not go through transformers' attention interface (it is written out in the model).",
            "Choose an architecture that has it: llama, gpt2, qwen3, opt, vit, dinov2 and most others.",
        )
    for path, one in seen.items():
        if one.foreign:
            raise UserError(f"{title} {what}", f"{path} has {one.foreign}, which the variant would leave out.")
        if one.n_queries != one.n_keys:
            raise UserError(f"{title} {what}", f"{path} attends to another sequence (cross-attention).")
    return seen


# -------------------------------------------------------------------------------------------- apply
def apply_variant(model: nn.Module, name: str, inputs: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """Give every self-attention module of a transformers model an attention variant, in place.

    New parameters are called `massact_...`, so that `state_dict`, `save_pretrained` and optimisers see them; they are
    drawn from torch's global generator. The variant is written into the configuration (`config.massact`).

    Args:
        model: a transformers model whose attention goes through its attention interface.
        name: of the variant, a key of `variants()`.
        inputs: keyword arguments of one short forward pass, where the configuration does not say what it takes.
        options: of the variant, such as std=0.02.

    Returns:
        The same model.

    Raises:
        UserError: no such variant or option, or the architecture cannot take it; the model is then as before.
    """
    made = variant(name)
    resolved = made.resolved(options)
    config = changeable(model)
    already = [n for n in changes_of(model) if n in variants()]
    if already:
        raise UserError(f"This {type(model).__name__} already has the attention variant {already[0]!r}.",
                        do="Build the model again and apply the other one.")  # fmt: skip
    if name == "sink-token":
        add_sink_token(model, **resolved)
    elif name != "softmax":  # which is the model's own attention, whatever the kernel
        seen = _checked(model, name, inputs)
        resolved = _with_length(resolved, seen)
        _install(seen, made, resolved)
        _register(PREFIX + name)
        for holder in {id(c): c for c in (config, *(one.module.config for one in seen.values()))}.values():
            holder._attn_implementation_internal = PREFIX + name
    note_change(model, apply_variant, name, resolved)
    return model


def _with_length(options: Options, seen: dict[str, _Seen]) -> Options:
    if "length" in options and options["length"] is None:
        return options | {"length": max(one.dims.N for one in seen.values())}
    return options


def _install(seen: dict[str, _Seen], made: Variant, options: Options) -> None:
    for one in seen.values():
        dims = replace(one.dims, N=options.get("length") or one.dims.N)
        own = next((p for p in one.module.parameters() if p.is_floating_point()), None)
        where: dict[str, Any] = {} if own is None else {"device": own.device, "dtype": own.dtype}
        for key, init in made.parameters(dims, **options).items():
            one.module.register_parameter(PREFIX + key, nn.Parameter(drawn(init, **where)))
        setattr(one.module, PREFIX + "variant", Installed(made.name, options, one.window))
        if made.takes_input:
            keep_input(one.module)


def drawn(init: Init, **where: Any) -> Tensor:
    """A new tensor as an `Init` says."""
    made = torch.full(init.shape, init.constant, **where)
    return made.normal_(0.0, init.std) if init.std else made
