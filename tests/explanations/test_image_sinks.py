"""Visual attention sinks: planted ones are found, and every number is that of the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Batch
from massact.explanations import visual_sinks
from massact.positions import ready_corpus
from massact.records.errors import UserError
from massact.trace import Edit, edited
from massact.verbs.scan import ScanConfig
from tests.facts import each
from tests.families import build
from tests.mixed import llava, llava_inputs, qwen, qwen_inputs

OFF = {"null": False, "bos_contrast": False}
SINKS, LOUD = (5, 11), 14  # image tokens with the sink dim of the first token, and with another dim


def plant(h: Tensor, batch: Batch) -> Tensor:
    h = h.clone()
    h[:, 0, 7] = 50.0
    h[:, list(SINKS), 7] = -9.0
    h[:, LOUD, 3] = 9.0
    h[:, 20, 7] = 9.0  # a word
    return h


PLANT = Edit("plant", "language_model/0.resid_post", plant)
TAU = 5.0  # 48 dims: |h_j| / rms(h) is at most sqrt(48) = 6.9


def test_planted_visual_sinks_are_found() -> None:
    """Neither the loud image token at another dim nor the word at the sink dim is one."""
    model, corpus = ma.load(llava()), ma.corpus(llava_inputs())
    with edited(model, PLANT):
        table = visual_sinks(model, corpus, tau=TAU)
        result = ma.scan(model, corpus, criterion="kang2025_visual", thresholds={"tau": TAU}, **OFF)
        wide = ma.scan(model, corpus, criterion="kang2025", thresholds={"tau": TAU}, **OFF).findings
    assert table.attrs["dims"] == [7]
    for layer in (1, 2, 3):
        sinks = table[(table.layer == layer) & table.sink]
        assert set(zip(sinks["sequence"], sinks.pos, strict=True)) == {(s, p) for s in range(3) for p in SINKS}
    found = result.findings
    assert set(found.pos) == set(SINKS) and set(found.dim) == {7} and set(found.modality) == {"image"}
    assert set(found.token) == {"image (0, 3)", "image (2, 1)"} and not result.info.notes
    assert {(LOUD, 3), (20, 7), (0, 7)} <= set(zip(wide.pos, wide.dim, strict=True))


@pytest.mark.parametrize("mixed", ["llava", "qwen2-vl"])
def test_every_number_is_that_of_the_formula(mixed: str) -> None:
    module = llava() if mixed == "llava" else qwen()
    module.set_attn_implementation("eager")
    model = ma.load(module)
    given = llava_inputs() if mixed == "llava" else qwen_inputs()
    corpus = ready_corpus(model, ma.corpus(given), ScanConfig())
    dims = [2, 9]
    table = visual_sinks(model, corpus, dims=dims, tau=1.5)
    for s in range(3):
        with torch.no_grad():
            out = module(**corpus.part(s, s + 1).inputs, output_hidden_states=True, output_attentions=True)
        ids = corpus.inputs["input_ids"][s].numpy()
        at = np.flatnonzero(ids == 95)
        behind = np.arange(at[-1] + 1, len(ids))
        for layer in (1, 2, 3):
            h = out.hidden_states[layer - 1][0].double().numpy()[at]
            phi = (np.abs(h) / np.sqrt((h**2).mean(1, keepdims=True)))[:, dims].max(1)
            p = out.attentions[layer - 1][0].double().numpy().mean(0)[behind][:, at].mean(0)
            rows = table[(table.layer == layer) & (table["sequence"] == s)]
            assert list(rows.pos) == list(at) and list(rows.sink) == list(phi > 1.5)
            np.testing.assert_allclose(rows.phi, phi, rtol=1e-5)
            np.testing.assert_allclose(rows.attention, p, rtol=1e-4)
            np.testing.assert_allclose(rows.share, p / p.sum(), rtol=1e-4)


def test_without_sink_dims_nothing_is_claimed() -> None:
    model, corpus = ma.load(llava()), ma.corpus(llava_inputs())
    table = visual_sinks(model, corpus)
    assert table.attrs["dims"] == [] and table.phi.isna().all() and not table.sink.any()
    assert table.attention.notna().all()
    result = ma.scan(model, corpus, criterion="kang2025_visual", **OFF)
    assert not result.found and any("no sink dims" in note for note in result.info.notes)


def test_texts_and_images_alone_are_refused() -> None:
    text = ma.load(build("llama"))
    ids = torch.randint(5, 90, (2, 9))
    with pytest.raises(UserError, match="image tokens"):
        ma.scan(text, ids, criterion="kang2025_visual", **OFF)
    with pytest.raises(UserError, match=each("No stack", "text", "images")):
        visual_sinks(text, ma.corpus(ids))
    inputs = llava_inputs()
    inputs["input_ids"] = inputs["input_ids"][:, 2:]
    with pytest.raises(UserError, match=each("begins", "image")):
        visual_sinks(ma.load(llava()), ma.corpus(inputs))
