"""Gemma 3 270M (`<bos>` in front): golden values on WikiText-2, 8 x 256 tokens, computed without massact.

An outlier feature (dim 400, most tokens) before the massive activation (dim 163, `<bos>` only). Tolerances as for
SmolLM2. Effects are those at layer 6, where an edit finds again exactly what the scan found; at layer 1 it also takes
entries of the feature from half of the smallest finding on, and so more of them than the golden edit did.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import massact as ma
from massact.corpora import Corpus
from massact.models import Model
from massact.records.results import ScanResult
from tests.real.golden import last_digit

CLOSE, SOFT = 2e-5, 1e-3
FEATURE, SPIKE = 400, 163


@pytest.fixture(scope="module")
def model(gemma3: Path) -> Model:
    return ma.load(gemma3)


@pytest.fixture(scope="module")
def text(model: Model, real_text: Path) -> Corpus:
    made = ma.corpus(real_text / "wikitext2-valid.txt", tokenizer=model.tokenizer, seq_len=256, n_sequences=8)
    assert isinstance(made, Corpus)
    return made


@pytest.fixture(scope="module")
def scan(model: Model, text: Corpus) -> ScanResult:
    return ma.scan(model, text, rank_sequences=0, null=False, bos_contrast=False)


def test_findings(scan: ScanResult, model: Model, text: Corpus) -> None:
    assert (text.inputs["input_ids"][:, 0] == model.tokenizer.bos_token_id).all()
    f = scan.findings
    assert len(f) == 3_867 and set(f.dim) == {FEATURE, SPIKE}
    feature, spike = (f[f.dim == dim].groupby("layer").size().to_dict() for dim in (FEATURE, SPIKE))
    assert feature == {1: 178, 2: 1_759, 3: 1_218, 4: 595, 5: 13, 6: 8, 7: 8}
    assert spike == {layer: 8 for layer in range(4, 15)}
    assert (f[f.dim == SPIKE].pos == 0).all()


def test_sizes(scan: ScanResult) -> None:
    layers = scan.layers[scan.layers.site == "resid_post"].set_index("layer")
    for layer, top in ((1, "2984"), (6, "41944"), (14, "102014")):
        assert layers.loc[layer, "top1"] == pytest.approx(float(top), rel=CLOSE, abs=last_digit(top)), layer
    assert layers.index[layers.headroom_fp16 < 1].min() == 8  # fp16 overflows from here on
    values = scan.findings[(scan.findings.dim == SPIKE)].groupby("layer").value
    assert (values.min() == values.max()).all()  # behind <bos> every sequence begins alike, bit for bit


def test_attention(scan: ScanResult, model: Model, text: Corpus) -> None:
    heads = ma.explain(model, text, scan, columns=False).heads
    assert heads[heads.layer == 2].mass_first.mean() == pytest.approx(0.5178, rel=SOFT, abs=1e-4)


def test_effects(scan: ScanResult, model: Model, text: Corpus) -> None:
    done = ma.intervene(model, text, scan, sets=("zero", "mean"), layer=6, sinks=False, repetition=False)
    e = done.effects[done.effects.metric == "perplexity"].set_index("edit")
    assert list(e.baseline) == pytest.approx([53.0116] * 2, rel=CLOSE, abs=1e-4)
    assert e.loc["zero", "edited"] == pytest.approx(88.704, rel=SOFT)
    assert e.loc["mean", "edited"] == pytest.approx(53.0116, rel=SOFT)
