"""A tiny language model, all that massact says of it, and whether that is the same with something around it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor, nn

import massact as ma

SIZES = dict(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96)  # fmt: skip
IDS = torch.randint(0, 99, (2, 11), generator=torch.Generator().manual_seed(3))
RULE = {"thresholds": {"magnitude": 2.0, "ratio": 20.0}}


def tiny(seed: int = 0, **sizes: Any) -> Any:
    """A random Llama in which neuron 7 of block 1 makes dim 5 large."""
    torch.manual_seed(seed)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | sizes))).eval()
    mlp = module.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[7] *= 30
        mlp.up_proj.weight[7] *= 30
        mlp.down_proj.weight[5, 7] = 3
    return module


def everything(module: Any, **given: Any) -> dict[str, pd.DataFrame]:
    """Every table of a scan, an explanation and an intervention; names of modules as they are without torch.compile."""
    model, corpus = ma.load(module, **given), ma.corpus(IDS)
    scan = ma.scan(model, corpus, bos_contrast=False, **RULE)
    assert "n_findings" in scan.info.answer["null"], scan.info.answer["null"]
    why, effects = ma.explain(model, corpus, scan), ma.intervene(model, corpus, scan, sets=("zero",))
    tables = {**scan.tables(), **why.tables(), **effects.tables()}
    assert len(scan.findings) and len(why.heads) and len(effects.effects)
    assert not model.anatomy.no_attention
    return {name: _plain(table) for name, table in tables.items()}


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    named = {c: table[c].str.replace("_orig_mod.", "").str.replace("_checkpoint_wrapped_module.", "")
             for c in table if "module" in c}  # fmt: skip
    return table.assign(**named)


def same(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame], **how: Any) -> None:
    """All tables are equal, bit by bit unless `how` says otherwise."""
    assert list(one) == list(other)
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, other[name], **({"check_exact": True} | how))


def logits(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return module(IDS, use_cache=False).logits.clone()
