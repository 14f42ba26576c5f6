"""Layer 0, which every experiment on positions compares, against the hidden states that transformers gives."""

from __future__ import annotations

import numpy as np
import torch

import massact as ma
from massact.positions.embedding import embedding_outputs
from tests.families import build


def test_each_sequence_at_the_positions_that_count_and_under_edits() -> None:
    module = build("gpt2")
    model, ids = ma.load(module), torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        wanted = module(ids, output_hidden_states=True).hidden_states[0].numpy()
    corpus = ma.corpus({"input_ids": ids, "attention_mask": mask})
    found = embedding_outputs(model, corpus, "")
    assert [len(h) for h in found] == [7, 5, 7]
    twice = embedding_outputs(model, corpus, "", [ma.Edit("twice", "0.resid_post", lambda h, batch: 2 * h)])
    for plain, doubled, known in zip(found, twice, wanted, strict=True):
        np.testing.assert_allclose(plain, known[: len(plain)], rtol=1e-6)
        np.testing.assert_array_equal(doubled, 2 * plain)
