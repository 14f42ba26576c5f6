"""GGUF files of tiny models, written the way llama.cpp's converter writes them: names, orders and offsets by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

# What llama.cpp calls a family; Mistral is stored as a Llama.
ARCHITECTURES = {"mistral": "llama", "qwen3_moe": "qwen3moe"}
ZERO_CENTRED = ("gemma2", "gemma3")  # norms are stored as 1 + weight
WORDS = ["<unk>", "<s>", "</s>", "\u0120", "\u0120a", "\u0120b", *(chr(c) for c in range(33, 127))]


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a query or key matrix in llama.cpp's order: the two halves of each head interleaved."""
    rows = weight.shape[0] // n_heads // 2
    order = [h * 2 * rows + half * rows + r for h in range(n_heads) for r in range(rows) for half in range(2)]
    return weight[order]


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that llama.cpp's converter writes, without the architecture in front."""
    found = {
        "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "context_length": getattr(config, "max_position_embeddings", 2048),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    }  # fmt: skip
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found |= {"attention.key_length": head, "attention.value_length": head}
    rotary = getattr(config, "rope_parameters", None)
    if rotary:
        rotary = rotary.get("full_attention", rotary)
        found["rope.freq_base"] = float(rotary["rope_theta"])
        found["rope.dimension_count"] = int(head * rotary.get("partial_rotary_factor", 1.0))
    if hasattr(config, "rms_norm_eps"):
        found["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    if getattr(config, "num_experts", None):
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
                  "expert_feed_forward_length": config.moe_intermediate_size}  # fmt: skip
    if config.model_type == "lfm2":
        found["attention.layer_norm_rms_epsilon"], found["shortconv.l_cache"] = config.norm_eps, config.conv_L_cache
        found["attention.head_count_kv"] = [2 * (kind == "full_attention") for kind in config.layer_types]
    for name in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"):
        if hasattr(config, name):
            found["attention.layer_norm_epsilon"] = float(getattr(config, name))
    if getattr(config, "sliding_window", None):
        found["attention.sliding_window"] = config.sliding_window
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            found[name] = float(getattr(config, name))
    return found


def stored_tensors(module: nn.Module) -> dict[str, np.ndarray]:
    """Name in llama.cpp -> values (float32), as its converter would store them."""
    import gguf

    config: Any = module.config
    family = config.model_type.removesuffix("_text")
    arch = ARCHITECTURES.get(family, family)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found = {}
    for name, tensor in module.state_dict().items():
        block, _, experts = name.partition(".mlp.experts.")
        if experts:  # three tensors of all experts; gate and up are one in transformers
            halves = tensor.chunk(2, 1)
            parts = {"gate": halves[0], "up": halves[1]} if "gate" in experts else {"down": tensor}
            found |= {f"blk.{block.split('.')[2]}.ffn_{part}_exps.weight": value.contiguous().numpy()
                      for part, value in parts.items()}  # fmt: skip
            continue
        stem, _, suffix = name.rpartition(".")
        stored = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        if tied and name == "lm_head.weight":
            continue
        assert stored is not None, name
        value = tensor.float().numpy()
        if arch == "llama" and ".attn_q" in stored:
            value = permuted(value, config.num_attention_heads)
        elif arch == "llama" and ".attn_k" in stored:
            value = permuted(value, config.num_key_value_heads)
        elif arch == "lfm2" and "shortconv.conv" in stored:
            value = value[:, 0]
        elif arch == "bloom" and "attn_qkv" in stored:  # all queries, all keys, all values; there head by head
            heads = value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:])
            value = heads.swapaxes(0, 1).reshape(value.shape)
        elif arch in ZERO_CENTRED and "norm" in stored:
            value = value + 1
        elif arch == "gpt2" and suffix == "weight" and any(s in stored for s in ("attn_qkv", "attn_output", "ffn")) \
                and value.ndim == 2:  # fmt: skip
            value = value.T
        found[f"{stored}.{suffix}"] = np.ascontiguousarray(value)
    return found


def write_gguf(
    path: Path, module: nn.Module, *, types: dict[str, str] | None = None, settings: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None, architecture: str | None = None, words: list[str] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Write a model as GGUF.

    Args:
        path: of the file.
        module: a model of transformers.
        types: end of a tensor's name -> its type (F16, Q8_0, ...); F32 for all others.
        settings: to add, or to leave out (None), of the architecture's; with a dot in front general ones.
        more: further tensors.
        architecture: to name in place of the true one.
        words: of a tokenizer; None: of as many as the model has.

    Returns:
        Name -> values as they come back from the file: rounded to their type.
    """
    import gguf

    config: Any = module.config
    family = config.model_type.removesuffix("_text")
    arch = architecture or ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    named = {f"{arch}.{k}": v for k, v in settings_of(config).items()} | {f"{arch}.vocab_size": config.vocab_size}
    named |= {k[1:] if k.startswith(".") else f"{arch}.{k}": v for k, v in (settings or {}).items()}
    for key, value in named.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    _add_words(writer, WORDS if words is None else words, config.vocab_size)
    back = {}
    for name, value in (stored_tensors(module) | (more or {})).items():
        kind = next((gguf.GGMLQuantizationType[t] for end, t in (types or {}).items() if name.endswith(end)),
                    gguf.GGMLQuantizationType.F32)  # fmt: skip
        packed = gguf.quants.quantize(value, kind)
        back[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


def _add_words(writer: Any, words: list[str], n: int) -> None:
    """A byte-level tokenizer: single characters, and two words with a space in front."""
    words = (words + [f"word{i}" for i in range(n)])[:n]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if w.startswith("<") and len(w) > 1 else 1 for w in words])
    writer.add_token_merges(["\u0120 a", "\u0120 b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)


def logits(module: nn.Module, seed: int = 0) -> torch.Tensor:
    """Logits (2, 24, V) of random tokens."""
    ids_BT = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module.eval()(input_ids=ids_BT).logits
