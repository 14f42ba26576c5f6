"""What a GGUF file says of its model and transformers leaves at a default: put right, or refused."""

from __future__ import annotations

import math
from typing import Any

from massact.models.gguf_header import GgufHeader
from massact.records.errors import UserError

_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
_SAID = {
    "context_length": ("max_position_embeddings",),
    "attention.layer_norm_rms_epsilon": _EPS,
    "attention.layer_norm_epsilon": _EPS,
    "attention.key_length": ("head_dim",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
# llama.cpp knows by the number of layers which Gemma does not scale its queries by the width of a head.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_ELSEWHERE = "Give the model as a folder of safetensors or by its Hub id."


def settle(config: Any, header: GgufHeader) -> dict[str, Any]:
    """Put right what transformers took from its defaults though the file says it.

    Args:
        config: of transformers, as read from the file; changed in place.
        header: of the file.

    Returns:
        What was changed: name -> value.

    Raises:
        UserError: the file says something that transformers cannot do, or would do wrongly.
    """
    if header.architecture == "llama" and header.setting("attention.head_count_kv") is None:
        raise UserError(f"{header.path} does not say how many key heads it has.",
                        "Transformers would leave the rows of its queries and keys in the order of llama.cpp.",
                        "Convert it again, with a newer llama.cpp.")  # fmt: skip
    changed: dict[str, Any] = {}
    for key, names in _SAID.items():
        said = header.setting(key)
        name = next((n for n in names if hasattr(config, n)), None)
        two_widths = name == "head_dim" and hasattr(config, "global_head_dim")  # Gemma 4
        if not said or isinstance(said, list) or name is None or two_widths:
            continue
        now = getattr(config, name)
        if now is None or not math.isclose(now, said, rel_tol=1e-6):
            setattr(config, name, said)
            changed[name] = said
    if header.setting("block_count") == _SCALED_BY_WIDTH.get(header.architecture, 0):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
        changed["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    return changed | _settle_rotary(config, header)


def _settle_rotary(config: Any, header: GgufHeader) -> dict[str, Any]:
    """Base, width and scaling of rotary positions; of layers with a window as the family has them."""
    whole = getattr(config, "rope_parameters", None)
    if not isinstance(whole, dict) or "sections" in str(whole):
        return {}
    part = whole.get("full_attention", whole)
    before = dict(part)
    base, n_dims = header.setting("rope.freq_base"), header.setting("rope.dimension_count")
    if base and not math.isclose(part.get("rope_theta") or 0, base, rel_tol=1e-6):
        part["rope_theta"] = float(base)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = part.get("partial_rotary_factor", 1.0)
    if n_dims and not hasattr(config, "global_head_dim") and int(head * share) != n_dims:
        if "partial_rotary_factor" not in part:
            raise UserError(f"{header.path} turns {n_dims} of the {head} dims of a head.",
                            "Transformers would turn all of them.", _ELSEWHERE)  # fmt: skip
        part["partial_rotary_factor"] = n_dims / head
    part.update(_scaling(config, header))
    return {k: v for k, v in part.items() if before.get(k) != v}


def _scaling(config: Any, header: GgufHeader) -> dict[str, Any]:
    """Scaled rotary positions, in the words of transformers; {} where the file has none."""
    length = header.setting("rope.scaling.original_context_length") or config.max_position_embeddings
    every = header.floats("rope_freqs.weight")
    short, long = header.floats("rope_factors_short.weight"), header.floats("rope_factors_long.weight")
    if every is not None:  # Llama 3.1: one divisor for each frequency, at any length
        short = long = every
    if short is not None and long is not None:
        scaled = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(),
                  "original_max_position_embeddings": length}  # fmt: skip
        attention = 1.0 if every is not None else header.setting("rope.scaling.attn_factor")
        return scaled | ({"attention_factor": float(attention)} if attention else {})
    kind, factor = header.setting("rope.scaling.type"), header.setting("rope.scaling.factor")
    if kind in (None, "none") or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": length}
    raise UserError(f"{header.path} scales its rotary positions by {kind!r}.", "Transformers would not.", _ELSEWHERE)
