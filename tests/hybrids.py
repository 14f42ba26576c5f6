"""Tiny random instances of models with recurrent, linear-attention and convolution blocks, alone or beside attention.

Importing this file builds nothing; `hybrid(name)` builds one model. No weights are read from anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tests.families import G, T

T_ = dict(T, pad_token_id=0, bos_token_id=1, eos_token_id=2)
G_ = dict(G, pad_token_id=0, bos_token_id=1, eos_token_id=2)
RECURRENT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SSD = dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=8)
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
LATENT = dict(kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16, moe_intermediate_size=24,
              n_group=2, topk_group=1, num_experts_per_tok=2, num_local_experts=4, n_shared_experts=1)  # fmt: skip

# name -> (configuration class, its arguments, model class, the mixer of each layer)
HYBRIDS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "mamba": ("MambaConfig", RECURRENT | dict(state_size=8), "MambaForCausalLM", ["ssm"] * 3),
    "falcon_mamba": ("FalconMambaConfig", RECURRENT | dict(state_size=8), "FalconMambaForCausalLM", ["ssm"] * 3),
    "mamba2": ("Mamba2Config", RECURRENT | dict(state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
               "Mamba2ForCausalLM", ["ssm"] * 3),
    "falcon_h1": ("FalconH1Config", G_ | SSD | dict(mamba_d_ssm=64), "FalconH1ForCausalLM", ["attention+ssm"] * 3),
    "bamba": ("BambaConfig", G_ | SSD | dict(attn_layer_indices=[1]), "BambaForCausalLM", ["ssm", "attention", "ssm"]),
    "zamba": ("ZambaConfig", T_ | dict(num_key_value_heads=4, mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2,
                                       use_mamba_kernels=False, layers_block_type=["mamba", "hybrid", "hybrid"]),
              "ZambaForCausalLM", ["ssm", "attention+ssm", "attention+ssm"]),
    "zamba2": ("Zamba2Config", T_ | dict(mamba_d_state=8, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8,
                                         use_mamba_kernels=False, layers_block_type=["mamba", "hybrid", "mamba"]),
               "Zamba2ForCausalLM", ["ssm", "attention+ssm", "ssm"]),
    "jamba": ("JambaConfig", G_ | dict(num_experts=4, num_experts_per_tok=2, attn_layer_period=3, attn_layer_offset=1,
                                       mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
              "JambaForCausalLM", ["ssm", "attention", "ssm"]),
    "nemotron_h": ("NemotronHConfig", G_ | dict(
        head_dim=16, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, chunk_size=8,
        use_mamba_kernels=False, layers_block_type=["mamba", "attention", "mlp"]),
        "NemotronHForCausalLM", ["ssm", "attention", "none"]),
    "granitemoehybrid": ("GraniteMoeHybridConfig", G_ | SSD | dict(
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24, residual_multiplier=0.22,
        layer_types=["mamba", "attention", "mamba"]), "GraniteMoeHybridForCausalLM", ["ssm", "attention", "ssm"]),
    "recurrent_gemma": ("RecurrentGemmaConfig", T_ | dict(lru_width=32, attention_window_size=8,
                                                          block_types=["recurrent", "attention", "recurrent"]),
                        "RecurrentGemmaForCausalLM", ["ssm", "attention", "ssm"]),
    "qwen3_next": ("Qwen3NextConfig", G_ | DELTA | dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention", "linear_attention"]), "Qwen3NextForCausalLM",
        ["linear_attn", "attention", "linear_attn"]),
    "qwen3_5": ("Qwen3_5TextConfig", G_ | DELTA | dict(
        head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"]), "Qwen3_5ForCausalLM",
        ["linear_attn", "attention", "linear_attn"]),
    "olmo_hybrid": ("OlmoHybridConfig", G_ | DELTA | dict(
        layer_types=["linear_attention", "full_attention", "linear_attention"]), "OlmoHybridForCausalLM",
        ["linear_attn", "attention", "linear_attn"]),
    "kimi_linear": ("KimiLinearConfig", G_ | LATENT | dict(
        num_key_value_heads=4, linear_head_dim=8, linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"]), "KimiLinearForCausalLM",
        ["linear_attn", "attention", "linear_attn"]),
    "minimax": ("MiniMaxConfig", G_ | dict(
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, block_size=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"]), "MiniMaxForCausalLM",
        ["linear_attn", "attention", "linear_attn"]),
    "rwkv": ("RwkvConfig", RECURRENT | dict(context_length=64), "RwkvForCausalLM", ["ssm+conv"] * 3),
    "lfm2": ("Lfm2Config", G_ | dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
             "Lfm2ForCausalLM", ["conv", "attention", "conv"]),
    "xlstm": ("xLSTMConfig", RECURRENT | dict(num_heads=4, chunk_size=8, autocast_kernel_dtype="float32"),
              "xLSTMForCausalLM", ["linear_attn"] * 3),
}  # fmt: skip


def hybrid(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model of one family, in evaluation mode, fp32."""
    config_name, args, model_name, _ = HYBRIDS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**args)
    return getattr(transformers, model_name)(config).eval()
