"""Gemma 3 270M (`<bos>` in front): golden values on WikiText-2, 8 x 256 tokens, computed without massact.

An outlier feature (dim 400, most tokens) before the massive activation (dim 163, `<bos>` only). Tolerances as for
SmolLM2; perplexities are right to one unit of the last printed digit, as no edit leads far from what the model knows.
At layer 6 an edit finds again exactly what the scan found. At layer 1 the golden edit is of 91 findings. The cut (half
of 677.6, the smallest finding of sequences 0 to 3) is reached by 109 entries of the feature: 11 of them are commas, and
no delimiter has a finding in sequences 0 to 3, so 98 are edited. Plain hooks give 57.905 without the 109, and 57.841
without the 98.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import massact as ma
from massact.corpora import Corpus
from massact.interventions import exactly, massive, zero
from massact.models import Model
from massact.prefixes import build
from massact.prefixes.position_shift import apart, logits_at, positions_of
from massact.prefixes.search import Judge, read
from massact.prefixes.starts import Texts, without_lead
from massact.records.kinds.scan import ScanResult
from tests.facts import tells
from tests.real import naive
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


@pytest.mark.parametrize(("exact", "n", "zeroed"), [(True, 91, 57.78), (False, 98, 57.841)])
def test_effects_on_a_feature(scan: ScanResult, model: Model, text: Corpus, exact: bool, n: int, zeroed: float) -> None:
    """Means are by position class: one value for `<bos>` and the rest would give 54.11."""
    quick = {"sets": ("zero", "mean"), "layer": 1, "sinks": False, "repetition": False}
    done = ma.intervene(model, text, scan, exact=exact, **quick)
    e = done.effects[done.effects.metric == "perplexity"].set_index("edit")
    assert list(e.n_elements) == [n, n] and bool(tells(done.info.notes, 98, "91 of the 91")) != exact
    assert e.loc["zero", "edited"] == pytest.approx(zeroed, abs=last_digit(str(zeroed)))
    if exact:
        assert e.loc["mean", "edited"] == pytest.approx(52.99, abs=0.01)


def test_effects_of_some_findings(scan: ScanResult, model: Model, text: Corpus) -> None:
    """`<bos>` alone carries most of it; the rest alone was computed with plain hooks beside the golden values."""
    half, f, known = text.inputs["input_ids"][4:], scan.findings, massive(scan.findings, 1)
    for chosen, wanted in ((f, 57.78), (f[f.pos == 0], 55.54), (f[f.pos > 0], 53.676)):
        with ma.edited(model, zero(exactly(known, chosen)), sequences=range(4, 8)):
            assert naive.perplexity(model.module, half) == pytest.approx(wanted, abs=last_digit(str(wanted)))


def test_bos_as_a_slot(scan: ScanResult, model: Model, text: Corpus) -> None:
    """It takes the massive activation over, exactly; the outlier feature of many tokens stays, on the first one too."""
    bos = (model.tokenizer.bos_token_id,)
    folded = build(model, bos, positions_of(model))
    assert set(folded.windows.values()) == {512} and 0 < len(folded.windows) < 18
    few = text.head(2)
    bare = without_lead(few, bos)
    out = logits_at(folded.model, folded.model.module, bare.inputs["input_ids"])
    assert apart(out, logits_at(model, model.module, few.inputs["input_ids"])[:, 1:]) < 1e-4
    judge, texts = Judge.of(scan), Texts(bare, ("text",) * 2)
    assert set(judge.limits) == {FEATURE}
    slot, without = read(folded.model, texts, judge), read(model, texts, judge)
    assert slot.score == (0, 0) and without.score[0] == 2
    assert without.nll.mean() > slot.nll.mean() + 0.3
