"""A tiny random-weight instance of every family that massact promises to understand, from its config.

Importing this file builds nothing; `build(name)` builds one model. No weights are read from anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

T = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56)
G = dict(T, num_key_value_heads=2)
V = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, image_size=20, patch_size=4)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)

# name -> (configuration class, its arguments, model class)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", G, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", G, "MistralForCausalLM"),
    "mixtral": ("MixtralConfig", G | MOE, "MixtralForCausalLM"),
    "qwen2": ("Qwen2Config", G, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", G | dict(head_dim=16), "Qwen3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", G | dict(head_dim=16, num_experts=4, num_experts_per_tok=2,
                                             moe_intermediate_size=24), "Qwen3MoeForCausalLM"),
    "gemma2": ("Gemma2Config", G | dict(head_dim=16, sliding_window=8), "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", G | dict(head_dim=16, sliding_window=8), "Gemma3ForCausalLM"),
    "olmo2": ("Olmo2Config", G, "Olmo2ForCausalLM"),
    "phi": ("PhiConfig", T, "PhiForCausalLM"),
    "phi3": ("Phi3Config", G | dict(pad_token_id=0), "Phi3ForCausalLM"),
    "gpt2": ("GPT2Config", dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64), "GPT2LMHeadModel"),
    "gpt_neox": ("GPTNeoXConfig", T, "GPTNeoXForCausalLM"),
    "gpt_neox_sequential": ("GPTNeoXConfig", T | dict(use_parallel_residual=False), "GPTNeoXForCausalLM"),
    "opt": ("OPTConfig", dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=56,
                              word_embed_proj_dim=32, max_position_embeddings=64), "OPTForCausalLM"),
    "opt_post_norm": ("OPTConfig", dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                        ffn_dim=56, word_embed_proj_dim=24, max_position_embeddings=64,
                                        do_layer_norm_before=False), "OPTForCausalLM"),
    "gpt_oss": ("GptOssConfig", G | MOE | dict(head_dim=16, sliding_window=8), "GptOssForCausalLM"),
    "falcon": ("FalconConfig", T, "FalconForCausalLM"),
    "falcon_new": ("FalconConfig", T | dict(new_decoder_architecture=True, num_kv_heads=2), "FalconForCausalLM"),
    "bloom": ("BloomConfig", dict(vocab_size=99, hidden_size=32, n_layer=3, n_head=4), "BloomForCausalLM"),
    "mpt": ("MptConfig", dict(vocab_size=99, d_model=32, n_layers=3, n_heads=4, max_seq_len=64), "MptForCausalLM"),
    "gptj": ("GPTJConfig", dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64),
             "GPTJForCausalLM"),
    "stablelm": ("StableLmConfig", G, "StableLmForCausalLM"),
    "starcoder2": ("Starcoder2Config", G, "Starcoder2ForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", T | dict(
        num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16,
        moe_intermediate_size=24, first_k_dense_replace=1), "DeepseekV3ForCausalLM"),
    "cohere": ("CohereConfig", G, "CohereForCausalLM"),
    "lfm2": ("Lfm2Config", G | dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
             "Lfm2ForCausalLM"),
    "qwen3_next": ("Qwen3NextConfig", G | dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"]), "Qwen3NextForCausalLM"),
    "granite": ("GraniteConfig", G | dict(residual_multiplier=0.22), "GraniteForCausalLM"),
    "bert": ("BertConfig", T, "BertForMaskedLM"),
    "roberta": ("RobertaConfig", T, "RobertaForMaskedLM"),
    "distilbert": ("DistilBertConfig", dict(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=56),
                   "DistilBertForMaskedLM"),
    "electra": ("ElectraConfig", T | dict(embedding_size=16), "ElectraForMaskedLM"),
    "albert": ("AlbertConfig", T | dict(embedding_size=16), "AlbertForMaskedLM"),
    "modernbert": ("ModernBertConfig", T | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
                                                sep_token_id=2), "ModernBertForMaskedLM"),
    "longformer": ("LongformerConfig", T | dict(attention_window=4, max_position_embeddings=64, pad_token_id=1),
                   "LongformerForMaskedLM"),
    "longt5": ("LongT5Config", dict(vocab_size=99, d_model=32, d_kv=8, d_ff=56, num_layers=3, num_decoder_layers=2,
                                    num_heads=4, local_radius=4), "LongT5ForConditionalGeneration"),
    "t5": ("T5Config", dict(vocab_size=99, d_model=32, d_kv=8, d_ff=56, num_layers=3, num_decoder_layers=2,
                            num_heads=4), "T5ForConditionalGeneration"),
    "bart": ("BartConfig", dict(vocab_size=99, d_model=32, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=56,
                                decoder_ffn_dim=56, encoder_attention_heads=4, decoder_attention_heads=4,
                                max_position_embeddings=64), "BartForConditionalGeneration"),
    "vit": ("ViTConfig", V, "ViTForImageClassification"),
    "swin": ("SwinConfig", dict(embed_dim=24, depths=[3, 2], num_heads=[2, 4], window_size=4, image_size=32,
                                patch_size=2), "SwinModel"),
    "wav2vec2": ("Wav2Vec2Config", dict(T, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3],
                                        num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                                        num_conv_pos_embedding_groups=2), "Wav2Vec2Model"),
    "deit": ("DeiTConfig", V, "DeiTForImageClassification"),
    "dinov2": ("Dinov2Config", dict(V, mlp_ratio=2), "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", dict(V, mlp_ratio=2, num_register_tokens=3),
                              "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", dict(V, num_register_tokens=3), "DINOv3ViTModel"),
    "vit_mae": ("ViTMAEConfig", dict(V, decoder_hidden_size=24, decoder_num_hidden_layers=2,
                                     decoder_num_attention_heads=4, decoder_intermediate_size=40),
                "ViTMAEForPreTraining"),
    "clip": ("CLIPConfig", dict(text_config=dict(T, max_position_embeddings=64, projection_dim=16,
                                                 eos_token_id=98, bos_token_id=97),
                                vision_config=dict(V, projection_dim=16), projection_dim=16), "CLIPModel"),
    "siglip": ("SiglipConfig", dict(text_config=dict(T, max_position_embeddings=64), vision_config=V), "SiglipModel"),
    "whisper": ("WhisperConfig", dict(vocab_size=99, d_model=32, encoder_layers=3, decoder_layers=2,
                                      encoder_ffn_dim=56, decoder_ffn_dim=56, encoder_attention_heads=4,
                                      decoder_attention_heads=4, num_mel_bins=8, max_source_positions=20,
                                      max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                      decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
                "WhisperForConditionalGeneration"),
}  # fmt: skip

STACKS = {"t5": ["encoder", "decoder"], "bart": ["encoder", "decoder"], "whisper": ["encoder", "decoder"],
          "clip": ["text_model", "vision_model"], "siglip": ["text_model", "vision_model"],
          "vit_mae": ["vit", "decoder"], "longt5": ["encoder", "decoder"], "swin": ["0", "1"]}  # fmt: skip
N_LAYERS = {"t5": [3, 2], "bart": [3, 2], "whisper": [3, 2], "vit_mae": [3, 2], "clip": [3, 3], "siglip": [3, 3],
            "longt5": [3, 2], "swin": [3, 2]}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model of one family, in evaluation mode, fp32."""
    return build_as(*FAMILIES[name], seed=seed)


def build_as(config_name: str, args: dict[str, Any], model_name: str, seed: int = 0, moved: bool = False) -> nn.Module:
    """The same of a configuration and a model class of transformers.

    Args:
        moved: parameters and buffers that all start at one value (gates, scales) are moved away from it.
    """
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**args)).eval()
    if moved:
        for x in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point() and b.ndim < 2)):
            if x.numel() and bool((x == x.flatten()[0]).all()):
                x.data.add_(0.3 * torch.rand_like(x))
    return model
