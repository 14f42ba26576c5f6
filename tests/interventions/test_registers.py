"""Registers: their means over images, what overwrites them, and the published table."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor

import massact as ma
from massact.corpora import Batch, Corpus
from massact.interventions import CONTROLS, Registers, collect_registers, evaluate, fix_registers, register_means
from massact.interventions.edit_names import Setting, check_name, edit_named
from massact.interventions.massive_entries import massive
from massact.models import Model
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from massact.reproductions import REGISTER_MEANS, check_published
from massact.reproductions.register_values import SIZES
from massact.stats import Where
from massact.stats.positions import PositionMoments
from massact.trace import edited
from tests.facts import each
from tests.families import FAMILIES, build

AT = [1, 2, 3]


def pictures(n: int = 7, seed: int = 0) -> Corpus:
    return ma.corpus({"pixel_values": torch.rand(n, 3, 20, 20, generator=torch.Generator().manual_seed(seed))})


@cache
def model(name: str = "dinov2_with_registers") -> Model:
    return ma.load(build(name))


@cache
def classifier() -> Model:
    """With a head on class token and patches; larger weights than a family begins with, so that registers matter."""
    config = transformers.Dinov2WithRegistersConfig(**FAMILIES["dinov2_with_registers"][1], num_labels=5)
    torch.manual_seed(0)
    module = transformers.Dinov2WithRegistersForImageClassification(config).eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.mul_(12)
        module.dinov2_with_registers.embeddings.register_tokens.mul_(40)
    return ma.load(module)


def inputs_of_blocks(m: Model, x: Tensor, blocks: Any) -> np.ndarray:
    """Naive: the hidden state that every block was called with (L, N, T, D)."""
    seen: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for b in blocks]
    with torch.no_grad():
        m.module(pixel_values=x)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).double().numpy()


@pytest.mark.parametrize("name", ["dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_means_and_spread_are_those_of_the_inputs_of_the_blocks(name: str, batch_size: int) -> None:
    m, corpus = model(name), pictures()
    blocks = m.module.encoder.layer if name.startswith("dinov2") else m.module.model.layer
    naive_LNTD = inputs_of_blocks(m, corpus.inputs["pixel_values"], blocks)[:, :, AT]
    found = collect_registers(m, corpus, keep=4, batch_size=batch_size)
    assert found.positions == tuple(AT) and found.mean.shape == (3, 3, 32) and found.n_images == 7
    np.testing.assert_allclose(found.mean, naive_LNTD.mean(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.std, naive_LNTD.std(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.values, naive_LNTD[:, :4].swapaxes(0, 1), rtol=1e-5, atol=1e-6)
    assert found.kept.tolist() == [0, 1, 2, 3]
    assert (found.std[0] == 0).all() and (found.std[1:] > 0).any(), "a register is the same before the first block"
    np.testing.assert_array_equal(register_means(m, corpus), register_means(m, corpus, AT))


def test_moments_do_not_depend_on_the_split() -> None:
    x = torch.randn(9, 5, 4) * torch.tensor([1e-3, 1.0, 1e3, 1.0]) + 50
    whole = PositionMoments([1, 3], keep=5)
    parts = [PositionMoments([1, 3], keep=5) for _ in range(3)]
    for i, h in enumerate(x):
        whole.update(h, Where(i))
        parts[i % 3].update(h, Where(i))
    merged = PositionMoments.from_state(parts[2].state())
    for part in parts[:2]:
        merged.merge(part)
    a, b, naive = whole.result(), merged.result(), x[:, [1, 3]].double().numpy()
    np.testing.assert_allclose(a.mean, naive.mean(0), rtol=1e-12)
    np.testing.assert_allclose(a.std, naive.std(0), rtol=1e-9)
    np.testing.assert_allclose(b.std, a.std, rtol=1e-9)
    np.testing.assert_array_equal(b.values, a.values)
    with pytest.raises(ValueError, match="lacks some"):
        whole.update(x[0][:2], Where(9))


def test_overwritten_by_means_is_the_forward_pass_written_out() -> None:
    """Every block is given the means at the registers, in a loop of one's own."""
    m, x = classifier(), pictures().inputs["pixel_values"]
    found = collect_registers(m, pictures())
    base, head = m.module.dinov2_with_registers, m.module
    with torch.no_grad():
        h = base.embeddings(x)
        for layer, block in enumerate(base.encoder.layer):
            h[:, AT] = torch.from_numpy(found.mean[layer]).float()
            h = block(h)
        h = base.layernorm(h)
        want = head.classifier(torch.cat([h[:, 0], h[:, 4:].mean(1)], 1))
        plain = head(pixel_values=x).logits
        with edited(m, fix_registers(found)) as fired:
            got = head(pixel_values=x).logits
        assert torch.equal(head(pixel_values=x).logits, plain), "bit for bit as before"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)
    assert (fired[0].n_calls, fired[0].n_elements) == (3, 3 * 7 * 3 * 32)


def test_registers_need_no_findings(tmp_path: Path) -> None:
    """Where a scan has none the same is done; an edit of massive activations is still refused."""
    m, corpus = classifier(), pictures(10)
    bare = {"null": False, "bos_contrast": False}
    none = ma.scan(m, corpus, thresholds={"magnitude": 1e9}, **bare)
    some = ma.scan(m, corpus, thresholds={"magnitude": 0.0, "ratio": 3.0}, **bare)
    assert not len(none.findings) and len(some.findings)
    options: dict[str, Any] = dict(sets=("registers=mean", "registers=zero"), repetition=False, labels=[0] * 10)
    done, same = (ma.intervene(m, corpus, scan, **options) for scan in (none, some))
    keys = ["edit", "metric", "baseline", "edited", "n_calls", "n_elements"]
    metrics = {"accuracy", "kl", "top1_agreement", "attention_first"}  # the others are about the findings
    a, b = (e.effects[e.effects.metric.isin(metrics)][keys].reset_index(drop=True) for e in (done, same))
    pd.testing.assert_frame_equal(a, b)
    assert set(a.metric) == metrics and (done.effects.layer == -1).all() and done.info.target == {}
    assert "attention_findings" not in set(done.effects.metric), "unavailable, not zero"
    none.save(tmp_path)
    done.save(tmp_path)
    ma.report(tmp_path)
    assert Intervention.open(tmp_path).info.target == {}
    for sets in (("zero",), ("registers=mean", "zero")):
        with pytest.raises(UserError, match=each("--threshold", "registers=HOW")):
            ma.intervene(m, corpus, none, sets=sets)
    with pytest.raises(UserError, match="--threshold"):
        ma.intervene(m, corpus, none, sets=("registers=mean",), layer=2)


def test_other_edits_that_need_no_findings() -> None:
    text = ma.load(build("gpt2"))
    ids = ma.corpus(torch.arange(24).reshape(2, 12) + 5)
    scan = ma.scan(text, ids, null=False, bos_contrast=False)
    assert not len(scan.findings)
    done = ma.intervene(text, ids, scan, sets=("cut-first", "drop-first"), repetition=False)
    rows = done.effects[done.effects.metric == "nll"]
    assert len(rows) == 2 and (rows.n_elements > 0).all() and (rows.edited != rows.baseline).all()


def test_registers_by_name_in_an_intervention() -> None:
    """`intervene --set registers=...`: collected on the first half, as all cuts and means; effects of the second."""
    m, corpus = classifier(), pictures(10)
    scan = ma.scan(m, corpus, thresholds={"magnitude": 0.0, "ratio": 3.0}, null=False, bos_contrast=False)
    sets = tuple(f"registers={how}" for how in CONTROLS)
    done = ma.intervene(m, corpus, scan, sets=sets, sinks=False, repetition=False, labels=[0] * 10, seed=3)
    first, second = corpus.head(5), corpus.part(5)
    found = collect_registers(m, first)
    edits = [fix_registers(found, how, seed=3) for how in CONTROLS]
    paired = evaluate(m, second, edits, labels=torch.zeros(5, dtype=torch.long))
    for edit in edits:
        rows = done.effects[done.effects.edit == edit.name].set_index("metric")
        for metric, values in paired.edited[edit.name].items():
            assert rows.edited[metric] == pytest.approx(float(values.mean()), rel=1e-5, abs=1e-7)
        assert rows.n_calls["kl"] == 3 * 5 and rows.edited["kl"] > 0
    with pytest.raises(UserError, match="no registers"):
        edit_named("registers=mean", Setting(model("vit"), (massive(scan.findings),), pictures()))
    one_more = massive(scan.findings)
    assert edit_named("registers=mean", Setting(m, (one_more,), first)).edits[0].site == "0.resid_post"
    with pytest.raises(UserError, match=each("mean", "noise", "shuffle", "zero")):
        check_name("registers=nosie")


def test_controls_give_what_they_say() -> None:
    m, corpus = classifier(), pictures()
    found = collect_registers(m, corpus, keep=7)
    batch, h = Batch({}, (2, 5), (None, None)), torch.randn(2, 29, 32)

    def new(how: str, layer: int = 1) -> np.ndarray:
        changed = fix_registers(found, how).edits[layer].apply(h, batch)
        assert torch.equal(changed[:, [0, *range(4, 29)]], h[:, [0, *range(4, 29)]])
        return changed[:, AT].numpy()

    assert (new("zero") == 0).all()
    np.testing.assert_allclose(new("mean"), np.stack([found.mean[1]] * 2), rtol=1e-6)
    shuffled = [new("shuffle", layer) for layer in (1, 2)]
    for row, own in enumerate((2, 5)):
        donors = [[i for i in range(7) if (found.values[i, layer] == s[row]).all()]
                  for layer, s in zip((1, 2), shuffled, strict=True)]  # fmt: skip
        assert len(donors[0]) == 1 and donors[0] == donors[1] and donors[0] != [own]
    noisy = [fix_registers(found, "noise", seed=s).edits[1].apply(h, batch)[0, AT].numpy() for s in range(400)]
    np.testing.assert_allclose(np.mean(noisy, 0), found.mean[1], atol=0.3 * found.std[1].max())
    assert np.std(noisy, 0).mean() == pytest.approx(found.std[1].mean(), rel=0.05)
    np.testing.assert_array_equal(new("noise"), new("noise"))


def test_evaluated_with_labels_and_without() -> None:
    m, corpus = classifier(), pictures()
    found, labels = collect_registers(m, corpus), torch.arange(7) % 5
    edits = [fix_registers(found, how) for how in ("mean", "noise", "shuffle", "zero")]
    paired = evaluate(m, corpus, edits, labels=labels, batch_size=3)
    alone = evaluate(m, corpus, edits, batch_size=1)
    for edit in edits:
        assert 0 <= paired.edited[edit.name]["accuracy"].mean() <= 1
        np.testing.assert_allclose(paired.edited[edit.name]["kl"], alone.edited[edit.name]["kl"], rtol=1e-3, atol=1e-6)
    kl = {e.name: alone.edited[e.name]["kl"].mean() for e in edits}
    assert 0 < kl["registers mean"] < kl["registers zero"], kl


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="no registers"):
        register_means(model("vit"), pictures())
    assert register_means(model("vit"), pictures(), [1, 4]).shape == (3, 2, 32)
    bare = Registers.of_means(np.zeros((3, 3, 32)), AT)
    for how, said in (("noise", "spread"), ("shuffle", "two images"), ("nosie", "no control")):
        with pytest.raises(UserError, match=said):
            fix_registers(bare, how)
    with pytest.raises(UserError, match="shape"):
        Registers.of_means(np.zeros((3, 2, 32)), AT)


def made_up(size: str) -> np.ndarray:
    """Means that hold the published entries of a size, and noise."""
    n_layers, width = SIZES[size]
    means = np.random.default_rng(0).normal(0, 1, (n_layers, 4, width))
    for p in REGISTER_MEANS:
        if p.size == size:
            means[p.key, p.register - 1, p.dims[-1]] = p.value * 1.03
    return means


@pytest.mark.parametrize("size", list(SIZES))
def test_published_entries_are_found_in_means_that_have_them(size: str) -> None:
    means = made_up(size)
    told = check_published(means)
    assert told["agrees"].all() and set(told["size"]) == {size} and len(told) >= 1
    first = next(p for p in REGISTER_MEANS if p.size == size and p.largest)
    for change in ("value", "register", "sign"):
        other = means.copy()
        here = other[first.key]
        if change == "register":
            here[:] = np.roll(here, 1, axis=0)
        else:
            here[first.register - 1, first.dims[-1]] *= -1 if change == "sign" else 0.7
        rows = check_published(other, size)
        assert not rows[(rows["key"] == first.key) & (rows["published"] == first.value)]["agrees"].any(), change


def test_means_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=each("not", "DINOv2-reg")):
        check_published(np.zeros((3, 3, 32)))
    with pytest.raises(UserError, match="DINOv2-reg S"):
        check_published(made_up("B"), "S")
    assert not check_published(np.full((12, 4, 384), np.nan))["agrees"].any()
