"""A run says whether padding changed what the model made of its texts: by the states of the same tokens without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BloomConfig, BloomModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import massact as ma

SMALL: dict[str, Any] = dict(
    vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)


class Unmasked(nn.Module):
    """Takes a mask and never reads it: the mean over all tokens, padding included, is added to each."""

    class Block(nn.Module):
        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(32, 32)

            def forward(self, x_BTD: Tensor) -> Tensor:
                return self.linear(x_BTD.mean(1, keepdim=True)).expand_as(x_BTD)

        def __init__(self) -> None:
            super().__init__()
            self.mixer, self.mlp = self.Mean(), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

        def forward(self, x_BTD: Tensor) -> Tensor:
            x_BTD = x_BTD + self.mixer(x_BTD)
            return x_BTD + self.mlp(x_BTD)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 32)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x_BTD = self.embedding(input_ids)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD


MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "bloom": lambda: BloomModel(BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4)),
    "unmasked": Unmasked,
}
PAD = 6


def padded(side: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 80, (3, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, slice(0, PAD) if side == "left" else slice(-PAD, None)] = 0
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_that_changes_the_states_is_said(name: str, side: str) -> None:
    """The oracle: the states of sequence 1 with its padding, and of its tokens alone."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    ids, mask = padded(side)
    kept = mask[1].bool()
    with torch.no_grad():
        outs = [net(input_ids=x, attention_mask=m) for x, m in ((ids, mask), (ids[1:2, kept], mask[1:2, kept]))]
    whole, alone = (out if isinstance(out, Tensor) else out.last_hidden_state for out in outs)
    differs = bool((whole[1, kept] - alone[0]).abs().max() > 1e-3)
    assert differs == (name == "unmasked" or (side == "left" and name in ("gpt2", "bert")))
    example = None if name != "unmasked" else {"input_ids": ids[:2, :13], "attention_mask": mask[:2, :13]}
    corpus = ma.corpus({"input_ids": ids, "attention_mask": mask})
    notes = ma.scan(ma.load(net, inputs=example), corpus, null=False, bos_contrast=False).info.notes
    told = [note for note in notes if note.startswith("Padding")]
    assert len(told) == differs
    assert all("sequence 1" in note for note in told)
    assert all(("shifted positions" in note) == (name != "unmasked") for note in told)


def test_positions_that_begin_with_the_text_are_those_of_the_text() -> None:
    torch.manual_seed(0)
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    corpus = ma.corpus({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    notes = ma.scan(ma.load(MODELS["gpt2"]().eval()), corpus, null=False, bos_contrast=False).info.notes
    assert not [note for note in notes if note.startswith("Padding")]
