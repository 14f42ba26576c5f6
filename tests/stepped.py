"""Checkpoints in which an activation grows as planted. Hand-built: not evidence about real models."""

from __future__ import annotations

import copy
import shutil
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYERS, ONSET, DIM = 3, 2, 7
EMBEDDED = Path(str(resources.files("massact.models"))) / "embedded"


@cache
def _plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(EMBEDDED)), hidden_size=32, intermediate_size=32, mlp_bias=True,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )).eval()  # fmt: skip


def write(folder: Path, height: float, tokenizer: bool = True) -> Path:
    """A checkpoint whose block ONSET adds `height` at DIM of every token: |h| is within 0.1 of it from there on.

    The median is some 0.014, so that of the two constants of sun2024 it is |h| > 100 that decides.
    """
    model = copy.deepcopy(_plain())
    with torch.no_grad():
        model.model.layers[ONSET - 1].mlp.down_proj.bias[DIM] = height
    model.save_pretrained(folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EMBEDDED / name, folder / name)
    return folder


def write_all(root: Path, heights: dict[str, float]) -> Path:
    """A folder of checkpoints by name."""
    for name, height in heights.items():
        write(root / name, height)
    return root
