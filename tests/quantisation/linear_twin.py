"""The embedded model with `torch.nn.Linear` for Conv1D of GPT-2, which llm-compressor and torchao leave as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTBigCodeConfig, GPTBigCodeForCausalLM

from massact.models.loading import EMBEDDED, location_of

TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (inputs, outputs) in Conv1D


def save_linear_twin(folder: Path) -> Path:
    """Save the same function as a GPTBigCode, which has Linear where GPT-2 has Conv1D; every logit is the same.

    Its fused projection has the rows of a head together (H, 3, E), where GPT-2 has (3, H, E).
    """
    gpt2 = AutoModelForCausalLM.from_pretrained(location_of(EMBEDDED), dtype=torch.float32).eval()
    c = gpt2.config
    twin = GPTBigCodeForCausalLM(GPTBigCodeConfig(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        n_inner=c.n_inner, activation_function=c.activation_function, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        layer_norm_epsilon=c.layer_norm_epsilon, multi_query=False, attention_softmax_in_fp32=False,
        scale_attention_softmax_in_fp32=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).eval()  # fmt: skip
    twin.load_state_dict({name: _turned(name, x, c.n_head) for name, x in gpt2.state_dict().items()})
    ids_BT = torch.arange(2 * 32).reshape(2, 32)
    with torch.no_grad():
        assert torch.equal(gpt2(ids_BT).logits, twin(ids_BT).logits)
    twin.save_pretrained(folder)
    AutoTokenizer.from_pretrained(location_of(EMBEDDED)).save_pretrained(folder)
    return folder


def _turned(name: str, x: Tensor, n_heads: int) -> Tensor:
    x = x.T if name.endswith(TURNED) else x
    if "c_attn" in name:
        x = x.reshape(3, n_heads, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
    return x.contiguous()
