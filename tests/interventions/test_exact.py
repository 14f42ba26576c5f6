"""Exactly the findings, and what is said of an edit that takes more: a feature of many sizes, written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Batch
from massact.interventions import QUARTET, exactly, intervene, massive, zero
from massact.interventions.job import _same_places
from massact.models import Model
from massact.records.clusters import clusters_table
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.intervention import effects_in_words
from tests.facts import each, tells
from tests.families import build
from tests.interventions.test_catalogue import table

N, T, DIM = 8, 12, 5
ROWS = [(1, s, p, DIM, "start" if not p else "other", v) for s, p, v in ((0, 0, 900.0), (0, 4, -600.0), (1, 3, 700.0))]


def states() -> Tensor:
    h = torch.zeros(2, 6, 8)
    for _, s, p, d, _, value in ROWS:
        h[s, p, d] = value
    h[1, 5, DIM], h[0, 2, 3] = 400.0, 9000.0  # reaches half of the smallest finding; another dim
    return h


def batch_of(sequences: tuple[int, ...] = (0, 1), past: int = 0) -> Batch:
    return Batch({}, sequences, (None,) * len(sequences), past)


def test_which_entries() -> None:
    """By cut all that reach half of the smallest finding, exactly only the findings: of the rows' own sequences."""
    known, h = massive(table(ROWS), 1), states()
    alone = exactly(known, table(ROWS))
    assert known.mask(h, batch_of()).nonzero()[:, :2].tolist() == [[0, 0], [0, 4], [1, 3], [1, 5]]
    assert alone.mask(h, batch_of()).nonzero()[:, :2].tolist() == [[0, 0], [0, 4], [1, 3]]
    assert alone.mask(h, batch_of((1, 7))).nonzero()[:, :2].tolist() == [[0, 3]]
    assert alone.mask(h[:, :2], batch_of(past=3)).nonzero()[:, :2].tolist() == [[0, 1], [1, 0]]  # behind a cache
    new, wanted = zero(alone).apply(h, batch_of()), h.clone()
    for _, s, p, d, *_ in ROWS:
        wanted[s, p, d] = 0
    assert torch.equal(new, wanted)
    for make in QUARTET.values():
        edit = make(alone)
        assert edit.writes is not None and int(edit.writes(h, batch_of()).sum()) == 3
        assert int((edit.apply(h, batch_of()) != h).any(-1).sum()) <= 3


def test_refused_where_they_cannot_be() -> None:
    alone = exactly(massive(table(ROWS), 1), table(ROWS))
    with pytest.raises(UserError, match="4, of 3 tokens"):
        alone.mask(states()[:, :3], batch_of())
    with pytest.raises(UserError, match=each("one row", "3")):
        alone.mask(states(), batch_of((0, 1, 2)))
    with pytest.raises(UserError, match=r"dims \[7\]"):
        exactly(massive(table(ROWS), 1), table([*ROWS, (1, 1, 2, 7, "other", 800.0)]))


def feature() -> tuple[Model, ScanResult, Tensor]:
    """Some tokens with 300 to 1,900 at one dim of the embedding: all of them reach 100, few of them 1,000."""
    module = build("gpt2")
    weight = module.get_input_embeddings().weight
    with torch.no_grad():
        weight[:, DIM] = 0
        weight[10:27, DIM] = torch.arange(17) * 100 + 300.0
    ids = torch.randint(4, 40, (N, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 26  # every sequence has one
    model = ma.load(module)
    return model, ma.scan(model, ids, thresholds={"magnitude": 1000.0}, null=False, bos_contrast=False), ids


QUICK: dict[str, Any] = {"sets": ("zero", "mean"), "sinks": False, "repetition": False}


def naive_nll(module: Any, ids: Tensor, layer: int, entries: set[tuple[int, int]]) -> float:
    """Mean loss with the feature at some (row, position) set to zero behind a block."""

    def put(m: Any, args: Any, out: Any) -> Any:
        new = (out[0] if isinstance(out, tuple) else out).clone()
        for row, pos in entries:
            new[row, pos, DIM] = 0
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module.transformer.h[layer - 1].register_forward_hook(put)
    with torch.no_grad():
        logp = module(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    handle.remove()
    return float(-logp.gather(-1, ids[:, 1:, None]).mean())


def test_an_intervention_on_exactly_the_findings() -> None:
    """Effects are of the second half, whose sequences are numbered by the scan; the default says that it takes more."""
    model, scan, ids = feature()
    found = scan.findings[(scan.findings.layer == 1) & (scan.findings.sequence >= N // 2)]
    entries = {(int(s) - N // 2, int(p)) for s, p in zip(found.sequence, found.pos, strict=True)}
    assert set(found.dim) == {DIM} and len(entries) == len(found) > N // 2
    reached = intervene(model, ids, scan, layer=1, **QUICK)
    alone = intervene(model, ids, scan, layer=1, exact=True, **QUICK)
    nll = alone.effects[(alone.effects.metric == "nll") & (alone.effects.edit == "zero")].iloc[0]
    assert nll.edited == pytest.approx(naive_nll(model.module, ids[N // 2 :], 1, entries), rel=1e-5)
    assert set(alone.effects.n_elements) == {len(entries)}
    more = int(reached.effects.n_elements.iloc[0])
    assert more > len(entries)
    told = " ".join(effects_in_words(reached))
    assert f"smallest finding: {more}, among them {len(found)} of the {len(found)} findings there" in told
    assert not tells(alone.info.notes, "half", "smallest")
    assert alone.info.config["exact"] and "exactly the findings" in effects_in_words(alone)[0]


def test_nothing_is_said_where_both_are_the_same() -> None:
    model, scan, ids = feature()
    lonely = ids.clone()
    lonely[:, 1:] = torch.where((ids[:, 1:] >= 10) & (ids[:, 1:] < 27), 5, ids[:, 1:])
    scan = ma.scan(model, lonely, thresholds={"magnitude": 1000.0}, null=False, bos_contrast=False)
    both = [intervene(model, lonely, scan, layer=1, exact=exact, **QUICK) for exact in (False, True)]
    assert not tells(both[0].info.notes, "half", "smallest")
    np.testing.assert_array_equal(both[0].effects.edited, both[1].effects.edited)


def test_not_in_another_text() -> None:
    model, scan, ids = feature()
    with pytest.raises(UserError, match=each("not", "another text")):
        intervene(model, ids, scan, layer=1, exact=True, evaluate_on=ids.flip(0), **QUICK)


def test_the_onset_is_that_of_all_sequences() -> None:
    """Values are of the first half, in which as many sequences as it takes have findings one layer earlier."""
    model, scan, ids = feature()
    f = scan.findings
    f = f[(f.layer > 1) | ((f.layer == 1) & (f.sequence < 2))]
    scan = replace(scan, findings=f, clusters=clusters_table(f))
    assert massive(scan.findings[scan.findings.sequence < N // 2]).site.layer == 1
    done = intervene(model, ids, scan, **QUICK)
    assert done.info.target["site"] == "2.resid_post" == str(massive(scan.findings).site)
    early = intervene(model, ids, scan, layer=1, **QUICK)
    assert tells(early.info.notes, "none", "finding")


def test_effects_where_no_finding_would_be_edited_are_refused() -> None:
    """The dims are of the first half; of the second half all findings are at another: 'harmless' would be untrue."""
    here = table([(1, 0, 0, 7, "start", 500.0)])
    target = massive(table([(1, 0, 0, 3, "start", 500.0)]))
    with pytest.raises(UserError, match="would be edited") as caught:
        _same_places([target], here, 4)
    assert "[7]" in caught.value.why and "--no-hold-out" in caught.value.do
    with pytest.raises(UserError, match="would be edited"):  # the same dim on tokens of another class
        _same_places([target], table([(1, 0, 5, 3, "other", 500.0)]), 4)
    _same_places([massive(table([(1, 0, 0, 3, "start", 500.0), (1, 0, 0, 7, "start", 500.0)]))], here, 4)
    _same_places([target], here.iloc[:0], 4)
