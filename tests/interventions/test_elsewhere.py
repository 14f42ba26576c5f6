"""Effects on another text than the scanned one: what is of which text, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Corpus
from massact.interventions import QUARTET, evaluate, intervene, massive
from massact.interventions.effects import effects_of
from massact.interventions.sinks import Sinks
from massact.models import with_attention
from massact.records.clusters import MASSIVE
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from tests.facts import each, tells
from tests.families import build
from tests.interventions.test_paired import OFF, planted, tokens

SETS = ("zero", "mean", "shuffle")


def elsewhere(n: int = 5, length: int = 20) -> Corpus:
    """Fewer and shorter sequences of other tokens, with the same first one."""
    ids = tokens(n, length, seed=9)
    ids[:, 0] = 0
    made = ma.corpus(ids)
    assert isinstance(made, Corpus)
    return replace(made, name="elsewhere")


@cache
def scanned() -> tuple[ma.models.Model, ScanResult, Tensor]:
    """Values differ from sequence to sequence, so that means and shuffles of some are not those of all."""
    model, scan, ids = planted(read=True)
    changed = copy.deepcopy(scan)
    changed.findings["value"] *= 1 + 0.1 * changed.findings["sequence"]
    changed.findings["magnitude"] = changed.findings["value"].abs()
    return model, changed, ids


@cache
def done() -> Intervention:
    model, scan, ids = scanned()
    return intervene(model, ids, scan, evaluate_on=elsewhere(), layer=1, sets=SETS, repetition=False)


def test_cuts_and_means_are_of_the_scanned_text_all_of_it() -> None:
    """Twelve sequences: none of them is held out, as none of them is evaluated on."""
    _, scan, _ = scanned()
    target = massive(scan.findings, 1)
    assert done().info.target == jsonable(
        {
            "site": "1.resid_post",
            "dims": target.dims,
            "cuts": target.cuts,
            "means": target.means,
            "clusters": {"7@start": MASSIVE},
        }
    )
    half = massive(scan.findings[scan.findings.sequence < 6], 1)
    assert half.means["start"] != target.means["start"]
    late = copy.deepcopy(scan)
    late.findings.loc[late.findings.sequence >= 6, "value"] *= 3
    model, _, ids = scanned()
    other = intervene(model, ids, late, evaluate_on=elsewhere(), layer=1, sets=("mean",), repetition=False)
    assert other.info.target["means"] != done().info.target["means"]


def test_effects_are_those_of_the_other_text() -> None:
    """Every number, sinks too, as `evaluate` gives it on that text; not those of the scanned text."""
    model, scan, ids = scanned()
    target = massive(scan.findings, 1)
    edits = [QUARTET[name](target) for name in SETS]
    paired = evaluate(with_attention(model), elsewhere(), edits, sinks=Sinks(target))
    for name in SETS:
        told = done().effects[done().effects.edit == name].set_index("metric")
        wanted = {e.metric: e for e in effects_of(paired, name, np.ones(5, bool))}
        assert set(told.index) == set(wanted) and {"perplexity", "attention_findings", "entropy_nats"} <= set(wanted)
        for metric, effect in wanted.items():
            row = told.loc[metric]
            got = [row.baseline, row.edited, row.delta, row.ci_low, row.ci_high, row.n_sequences]
            np.testing.assert_allclose(got, [effect.baseline, effect.edited, effect.delta, effect.ci_low,
                                             effect.ci_high, effect.n_sequences], rtol=1e-6)  # fmt: skip
            assert row.n_sequences == 5
    here = intervene(model, ids, scan, layer=1, sets=("zero",), repetition=False, sinks=False).effects
    nll = [frame[(frame.metric == "nll") & (frame.edit == "zero")].iloc[0] for frame in (here, done().effects)]
    assert nll[0].baseline != pytest.approx(nll[1].baseline, rel=1e-3)


def test_the_record_names_both_texts() -> None:
    model, scan, ids = scanned()
    info = done().info
    assert tells([info.estimated_on], "0 to 11", "ids")
    assert tells([info.evaluated_on], "0 to 4", "elsewhere")
    read = {name: info.corpus[name] for name in ("name", "sha256", "n_sequences")}
    assert read == {"name": "elsewhere", "sha256": elsewhere().sha256, "n_sequences": 5}
    assert not any("Means and cuts" in note for note in info.notes)
    short = intervene(model, ids, scan, evaluate_on=elsewhere(1), layer=1, sets=("zero",), repetition=False)
    assert tells([short.info.evaluated_on], "0 to 0", "elsewhere")


@pytest.mark.parametrize("hold_out", [True, False])
def test_holding_out_does_not_matter(hold_out: bool) -> None:
    """Eight sequences or more elsewhere: all of them are evaluated on."""
    model, scan, ids = scanned()
    many = intervene(
        model, ids, scan, evaluate_on=elsewhere(9), layer=1, sets=("zero",), repetition=False, hold_out=hold_out,
        sinks=False,
    )  # fmt: skip
    assert set(many.effects.n_sequences) == {9} and many.info.target == done().info.target


def test_groups_are_of_the_other_text() -> None:
    model, scan, ids = scanned()
    labels = ["a", "b", "a", "b", "b"]
    told = intervene(
        model, ids, scan, evaluate_on=elsewhere(), layer=1, sets=("zero",), groups={"kind": labels}, repetition=False,
        sinks=False,
    ).effects  # fmt: skip
    rows = told[told.metric == "nll"].set_index("group")
    assert rows.n_sequences.to_dict() == {"all": 5, "kind=a": 2, "kind=b": 3}
    base = evaluate(model, elsewhere(), []).baseline["nll"]
    a = np.array(labels) == "a"
    assert rows.baseline["kind=a"] == pytest.approx(base[a].mean(), rel=1e-6)
    assert rows.baseline["kind=b"] == pytest.approx(base[~a].mean(), rel=1e-6)


def test_labels_are_of_the_other_images() -> None:
    """Accuracy on images that were not scanned; the labels are the model's own answers, but for one."""
    module = build("vit")
    with torch.no_grad():
        module.vit.embeddings.cls_token[0, 0, 5] = 300.0
        for block in module.vit.layers if hasattr(module.vit, "layers") else module.vit.encoder.layer:
            for name, parameter in block.named_parameters():
                if name.endswith(("attention.output.dense.weight", "output.dense.weight", "o_proj.weight",
                                  "fc2.weight")):  # fmt: skip
                    parameter[5] = 0
    model = ma.load(module)
    one, other = (torch.rand(n, 3, 20, 20, generator=torch.Generator().manual_seed(n)) for n in (8, 6))
    scan = ma.scan(model, ma.corpus({"pixel_values": one}), thresholds={"magnitude": 20.0, "ratio": 100.0}, **OFF)
    with torch.no_grad():
        labels = module(other).logits.argmax(-1).tolist()
    labels[3] = 1 - labels[3]
    options = {"layer": int(scan.findings.layer.min()), "sets": ("zero",), "repetition": False, "sinks": False}
    images = [ma.corpus({"pixel_values": x}) for x in (one, other)]
    told = intervene(model, images[0], scan, evaluate_on=images[1], labels=labels, **options).effects
    row = told[told.metric == "accuracy"].iloc[0]
    assert row.baseline == pytest.approx(5 / 6) and row.n_sequences == 6
    with pytest.raises(UserError, match=each("labels", "8 entries", 6)):
        intervene(model, images[0], scan, evaluate_on=images[1], labels=[0] * 8, **options)


@pytest.mark.parametrize("n", [4, 6, 12])
def test_groups_of_a_wrong_length_are_refused(n: int) -> None:
    """Twelve is the number of scanned sequences: not the one that counts."""
    model, scan, ids = scanned()
    with pytest.raises(UserError, match=f"kind has {n} entries for 5 sequences"):
        intervene(model, ids, scan, evaluate_on=elsewhere(), layer=1, groups={"kind": ["a"] * n})


def test_the_scanned_text_is_still_checked() -> None:
    model, scan, ids = scanned()
    with pytest.raises(UserError, match=each("scanned", scan.info.corpus["sha256"][:12])):
        intervene(model, ids.flip(0), scan, evaluate_on=elsewhere(), layer=1)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    model, scan, ids = scanned()
    with pytest.raises(UserError, match="outside the vocabulary"):
        intervene(model, ids, scan, evaluate_on=torch.full((2, 8), 99), layer=1)
