"""Spectra of an explanation against an SVD of what plain hooks see, and what is said of them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import massact as ma
from massact.explanations import spectra
from massact.explanations.concentration import sink_type
from massact.explanations.unembedding import final_gain
from massact.records.kinds.explanation import Explanation
from massact.records.tables import frame
from massact.reports import story_in_words
from massact.reports.kinds.explanation.spectrum import draw_spectrum, spectrum_in_words, valley
from tests.facts import tells
from tests.families import build
from tests.real.naive import kept
from tests.stats.test_gram import sets_of, svd_numbers

N, T = 4, 20
OFF = {"null": False, "bos_contrast": False}


@cache
def planted(name: str = "llama", size: float = 900.0, **options: bool) -> tuple[nn.Module, torch.Tensor, Explanation]:
    """A random model whose first token has one large entry."""
    module = build(name, seed=3)
    ids = torch.randint(1, 99, (N, T), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    with torch.no_grad():
        module.get_input_embeddings().weight[0, 7] = size
    model, corpus = ma.load(module), ma.corpus(ids)
    return module, ids, ma.explain(model, corpus, ma.scan(model, corpus, **OFF), **options)


def test_rows_are_those_of_the_stacked_states() -> None:
    module, ids, e = planted(corpus_spectrum=True)
    block = "model.layers.1"
    x_NTD = kept(module, ids, [block])[block].astype(float)
    for scope in ("sequence", "corpus"):
        rows = e.spectrum[(e.spectrum.layer == 2) & (e.spectrum.scope == scope)].set_index("tokens")
        for i, tokens in enumerate(("all", "without", "centred")):
            if scope == "sequence":
                want = np.mean([svd_numbers(sets_of(x, [0])[i], 2) for x in x_NTD], 0)
            else:
                rest = x_NTD[:, 1:].reshape(-1, x_NTD.shape[2])
                want = svd_numbers([x_NTD.reshape(N * T, -1), rest, rest - rest.mean(0)][i], 2)[:4]
            got = rows.loc[tokens, ["p1", "entropy_bits", "effective_rank", "participation", "anisotropy"]]
            np.testing.assert_allclose(got[: len(want)].astype(float), want, rtol=1e-4, atol=1e-5)
    rows = e.spectrum[(e.spectrum.scope == "sequence") & (e.spectrum.tokens == "all")]
    assert set(rows.layer) == {0, 1, 2, 3} and (rows.p1 >= rows.bound - 1e-9).all()
    assert (rows.p1_low <= rows.p1 + 1e-12).all() and (rows.p1 <= rows.p1_high + 1e-12).all()
    assert set(e.spectrum[e.spectrum.tokens == "without"].left_out) == {N} and set(rows.left_out) == {0}


def test_a_valley_that_is_one_token_is_named_so() -> None:
    e = planted()[2]
    assert valley(e.spectrum) == [0, 1, 2, 3]
    assert tells(story_in_words(e), "valley", "one token")
    none = planted(size=105.0)[2]
    assert draw_spectrum(none), "there is something to draw"
    flat = e.spectrum.copy()
    flat.loc[flat.tokens == "all", ["effective_rank", "effective_rank_low", "effective_rank_high"]] = 50.0
    assert valley(flat) == []
    said = spectrum_in_words(Explanation(e.info, spectrum=flat))
    assert len(said) == 1 and tells(said, "no", "valley")


def test_two_tokens_are_not_called_one() -> None:
    e = planted()[2]
    rows = e.spectrum.copy()
    rows.loc[rows.tokens != "all", "left_out"] = 2 * N
    said = spectrum_in_words(Explanation(e.info, spectrum=rows))
    assert tells(said, "valley", "2 tokens") and not tells(said, "one token of")


def test_the_gain_of_the_final_norm_is_found() -> None:
    for name in ("llama", "gemma3", "gpt2"):
        module = build(name, seed=1)
        norm = module.transformer.ln_f if name == "gpt2" else module.model.norm
        with torch.no_grad():
            norm.weight.copy_(torch.rand(norm.weight.shape) + 0.2)
        gain = norm.weight.detach().double().numpy() + (name == "gemma3")
        found = final_gain(ma.load(module), "")
        assert found is not None
        np.testing.assert_allclose(found, gain, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ hostile inputs
def test_without_findings_nothing_is_left_out() -> None:
    model, corpus = ma.load(build("llama", seed=7)), ma.corpus(torch.randint(5, 90, (3, T)))
    e = ma.explain(model, corpus, ma.scan(model, corpus, **OFF))
    assert set(e.spectrum.tokens) == {"all", "centred"} and not len(e.dark_subspace)
    said = spectrum_in_words(e)
    assert len(said) == 1 and tells(said, "Spectrum", "no token")


@pytest.mark.parametrize("T", [1, 2])
def test_one_token_has_no_spectrum(T: int) -> None:
    module = build("llama", seed=3)
    with torch.no_grad():
        module.get_input_embeddings().weight[0, 7] = 900.0
    model, corpus = ma.load(module), ma.corpus(torch.zeros(3, T, dtype=torch.long))
    e = ma.explain(model, corpus, ma.scan(model, corpus, **OFF))
    told = tells(e.info.notes, "Spectra", "unavailable", "two tokens")
    if T == 1:
        assert not len(e.spectrum) and len(told) == 1 and not tells(story_in_words(e), "effective rank")
        assert e.axes.diagonal.isna().all(), "a query that sees one key has no choice"
    else:
        assert not told and e.spectrum[e.spectrum.tokens == "centred"].p1.isna().all()
        assert e.spectrum[(e.spectrum.tokens == "all") & (e.spectrum.scope == "sequence")].p1.notna().all()


IMAGES = ("vit", "dinov2")


@pytest.mark.parametrize("name", ["bert", "t5", *IMAGES])
def test_encoders_and_images_have_spectra(name: str) -> None:
    module = build(name, seed=2)
    model = ma.load(module)
    if name in IMAGES:
        corpus = ma.corpus({"pixel_values": torch.rand(3, 3, *[module.config.image_size] * 2)})
    else:
        corpus = ma.corpus(torch.randint(1, 90, (3, T)))
    scan = ma.scan(model, corpus, **OFF)
    e = ma.explain(model, corpus, scan)
    rows = e.spectrum[(e.spectrum.scope == "sequence") & (e.spectrum.tokens == "all")]
    assert (rows.p1 >= rows.bound - 1e-9).all() and set(rows["stack"]) == {s.name for s in model.anatomy.stacks}


def test_matrices_of_a_corpus_that_are_too_large_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "WIDEST_BYTES", 1000)
    module, ids = build("llama"), torch.randint(1, 90, (2, T))
    model, corpus = ma.load(module), ma.corpus(ids)
    e = ma.explain(model, corpus, ma.scan(model, corpus, **OFF), corpus_spectrum=True)
    assert set(e.spectrum.scope) == {"sequence", "null"} and len(tells(e.info.notes, "one matrix", "not")) == 1


def test_spectra_can_be_left_out() -> None:
    e = planted(spectrum=False)[2]
    assert not len(e.spectrum) and len(e.collapse) and tells(e.info.notes, "Spectra", "not")
    assert not tells(story_in_words(e), "Spectrum:")


def test_unavailable_numbers_are_not_drawn_nor_told() -> None:
    e = planted()[2]
    rows = e.spectrum.copy()
    for column in rows.select_dtypes(float):
        rows[column] = np.nan
    assert spectrum_in_words(Explanation(e.info, spectrum=rows)) == []
    assert spectrum_in_words(Explanation(e.info, spectrum=frame("spectrum"))) == []
    sheet = draw_spectrum(Explanation(e.info, spectrum=rows))
    assert sheet is not None and not any(part for part in sheet.parts)


# -------------------------------------------------------------------------------------------- sink and diagonal
def test_types_of_sinks() -> None:
    assert [sink_type(0.9, x) for x in (0.1, 0.3, 0.5, 1.2, np.nan)] == ["nop", "between", "broadcast", "broadcast", ""]
    assert sink_type(0.5, 0.1) == "" and sink_type(np.nan, 0.1) == ""


def test_the_diagonal_is_that_of_eager_attention() -> None:
    module, ids, e = planted()
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(input_ids=ids, output_attentions=True).attentions
    module.set_attn_implementation("sdpa")
    for layer, p_NHTT in enumerate(out, 1):
        own = p_NHTT.double().diagonal(dim1=2, dim2=3)[:, :, 1:].mean((0, 2)).numpy()
        heads = e.heads[e.heads.layer == layer]
        np.testing.assert_allclose(heads.mass_diagonal, own, rtol=1e-4)
        np.testing.assert_allclose(heads.mass_diagonal_uniform, np.mean(1 / np.arange(2, T + 1)), rtol=1e-5)
        axes = e.axes[e.axes.layer == layer].iloc[0]
        assert axes.diagonal == pytest.approx(own.mean(), rel=1e-4)
        each = e.per_sequence[e.per_sequence.layer == layer].diagonal
        assert each.mean() == pytest.approx(own.mean(), rel=1e-4)
    assert tells(story_in_words(e), "own key")
