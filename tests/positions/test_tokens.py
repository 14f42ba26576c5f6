"""Each stack has the tokens that it reads, and none where its positions are not those of a text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import massact as ma
from tests.families import build

OFF = {"null": False, "bos_contrast": False}
EVERYTHING = {"magnitude": 0.0, "ratio": 0.0}


def ids(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_tokens_of_a_decoder_are_those_it_reads(name: str) -> None:
    module, text = build(name), ids(3, 9)
    found = ma.scan(ma.load(module), text, thresholds=EVERYTHING, **OFF).findings
    start = getattr(module.config, "decoder_start_token_id", None)
    start = start if start is not None else module.config.pad_token_id or 0
    read = {"encoder": text, "decoder": torch.cat([torch.full((3, 1), start), text[:, :-1]], dim=1)}
    assert set(found["stack"]) == set(read)
    for stack, s, pos, token in zip(found["stack"], found.sequence, found.pos, found.token_id, strict=True):
        assert token == read[stack][s, pos]


def test_given_decoder_ids_may_be_longer_than_the_text() -> None:
    text, decoder = ids(3, 9), ids(3, 14, seed=1)
    corpus = {"input_ids": text, "decoder_input_ids": decoder}
    found = ma.scan(ma.load(build("bart")), corpus, thresholds=EVERYTHING, **OFF).findings
    assert found[found["stack"] == "decoder"].pos.max() == 13
    for stack, s, pos, token in zip(found["stack"], found.sequence, found.pos, found.token_id, strict=True):
        assert token == (text if stack == "encoder" else decoder)[s, pos]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x)


class _ClassToken(nn.Module):
    """Text with a learned token in front: position 1 is the first word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(50, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.ModuleList([_Block(), _Block()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.first.expand(len(input_ids), -1, -1), self.embedding(input_ids)], dim=1)
        for block in self.layers:
            x = block(x)
        return x


def test_positions_that_are_not_of_the_text_get_no_token() -> None:
    model = ma.load(_ClassToken(), inputs={"input_ids": torch.randint(0, 50, (2, 13))})
    found = ma.scan(model, torch.randint(0, 50, (3, 11)), thresholds=EVERYTHING, **OFF).findings
    assert found.pos.max() == 11 and set(found.token_id) == {-1}
    assert set(found.token) == {f"token {pos}" for pos in range(12)}
