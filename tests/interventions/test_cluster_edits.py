"""What is edited by default, one cluster, and each: a planted bias on first tokens beside a feature of all others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Corpus
from massact.interventions import intervene, zero
from massact.interventions.job import _chosen, _left, _told_delimiters
from massact.interventions.massive_entries import CLASSES, target_of
from massact.models import Model
from massact.records.clusters import HUMP, MASSIVE, OUTLIER, clusters_table
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult
from massact.records.sites import Site
from massact.reports.kinds.intervention import effects_in_words
from massact.verbs.intervene import InterveneConfig
from tests.facts import tells
from tests.families import build
from tests.mixed import llava
from tests.records.test_clusters import rows, tables

N, T, BIAS, FEATURE = 8, 20, 7, 5
QUICK: dict[str, Any] = {"sets": ("zero", "mean"), "sinks": False, "repetition": False}


@cache
def planted() -> tuple[Model, ScanResult, Tensor]:
    """Token 0, always the first: 9,000 at one dim. All others: 250 to 450 at another. Two strays at the first dim."""
    module = build("gpt2")
    weight = module.get_input_embeddings().weight
    with torch.no_grad():
        weight[:, [BIAS, FEATURE]] = 0.0
        weight[4:40, FEATURE] = torch.arange(36) * 5 + 250.0
        weight[0, BIAS], weight[3, BIAS] = 9000.0, 1100.0
    ids = torch.randint(4, 40, (N, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[1, 6], ids[5, 9] = 0, 3, 3
    model = ma.load(module)
    return model, ma.scan(model, ids, null=False, bos_contrast=False), ids


def done(**more: Any) -> Intervention:
    model, scan, ids = planted()
    return intervene(model, ids, scan, **QUICK, **more)


def elements(e: Intervention) -> dict[str, int]:
    return {str(name): int(rows["n_elements"].iloc[0]) for name, rows in e.effects.groupby("edit", sort=False)}


def test_clusters_of_the_planted_model() -> None:
    _, scan, _ = planted()
    found = scan.clusters[scan.clusters["n_findings"] > 0]
    assert found[["label", "dim", "position_class"]].to_numpy().tolist() == [
        [MASSIVE, BIAS, "start"], [MASSIVE, BIAS, "other"], [OUTLIER, FEATURE, "other"]
    ]  # fmt: skip
    assert HUMP not in set(found["label"])


def test_the_feature_is_not_edited_with_the_bias() -> None:
    """The strays are: they are massive activations of the same layer; means are of their own class."""
    e = done()
    assert e.info.target["clusters"] == {f"{BIAS}@start": MASSIVE, f"{BIAS}@other": MASSIVE}
    assert elements(e) == {"zero": N // 2 + 1, "mean": N // 2 + 1}  # on the half that effects are of
    assert set(e.effects["cluster"]) == {f"{BIAS}@start, {BIAS}@other"}
    assert tells(e.info.notes, f"{FEATURE}@other", OUTLIER)
    means = e.info.target["means"]
    assert (means["start"], means["other"]) == (pytest.approx([9000.0], rel=1e-3), pytest.approx([1100.0], rel=1e-2))
    assert tells(effects_in_words(e), f"{BIAS}@start", e.info.target["site"])


def test_one_cluster_by_its_name() -> None:
    assert elements(done(cluster=f"{BIAS}@start")) == {"zero": N // 2, "mean": N // 2}
    one = done(cluster=f"{FEATURE}@other")
    _, _, ids = planted()
    assert elements(one)["zero"] == int((ids[N // 2 :] >= 4).sum()) and one.info.target["dims"] == [FEATURE]


def test_each_cluster_for_itself_too() -> None:
    """The numbers of the further edits are those of an intervention on that cluster alone."""
    both, alone = done(cluster="each"), done(cluster=f"{FEATURE}@other")
    assert list(elements(both)) == ["zero", "mean", f"zero {FEATURE}@other", f"mean {FEATURE}@other"]
    for name in ("zero", "mean"):
        mine = both.effects[both.effects["edit"] == f"{name} {FEATURE}@other"]
        theirs = alone.effects[alone.effects["edit"] == name]
        np.testing.assert_array_equal(mine["edited"], theirs["edited"])
        assert set(mine["cluster"]) == {f"{FEATURE}@other"} and set(mine["layer"]) == set(theirs["layer"])


@pytest.mark.parametrize(("options", "names"), [
    ({"cluster": "8@start"}, ["8@start", f"{BIAS}@start"]), ({"cluster": f"{BIAS}@start", "layer": 2}, ["--cluster"]),
])  # fmt: skip
def test_what_is_refused(options: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        done(**options)
    assert all(name in str(refused.value) for name in names)


def scan_of(*parts: tuple[dict[str, str], list[dict[str, Any]]]) -> Any:
    """A scan that is its tables, with rows of several stacks and sites."""
    found, near = tables(*([row | where for row in mine] for where, mine in parts))
    info = SimpleNamespace(model={})
    return SimpleNamespace(findings=found, clusters=clusters_table(found, near, n_sequences=N), info=info)


@pytest.mark.parametrize("where", [{"stack": "decoder"}, {"site": "mlp_act"}])
def test_a_cluster_of_the_smaller_place_by_its_name(where: dict[str, str]) -> None:
    scan = scan_of(({}, rows(5, "start", range(2, 7), 9000.0, [0])), (where, rows(6, "start", [1], 5000.0, [0])))
    chosen = _chosen(scan, InterveneConfig.of({"cluster": "6@start"}))
    key = next(iter(where))
    assert set(chosen["dim"]) == {6} and set(chosen["layer"]) == {1} and set(chosen[key]) == set(where.values())
    assert not len(_left(scan, Site("", 2, "resid_post"), "5@start")), "what is elsewhere is not left here"
    with pytest.raises(UserError):
        _chosen(scan, InterveneConfig.of({"cluster": "6@start", "stack": "encoder"}))


def test_padding_is_edited_like_other_frames_so_it_is_not_left() -> None:
    scan = scan_of(({}, rows(5, "padding", [2], 9000.0, [0])))
    target = target_of(_chosen(scan, InterveneConfig.of({})))
    assert target.pairs == [(5, "other")] and not len(_left(scan, target.site, "5@other"))


def test_delimiters_are_not_other_tokens_where_only_those_are_edited() -> None:
    """The entry of a delimiter is as large, and the mean of other tokens is not its own."""
    model = ma.load()
    text = ma.corpus(["A lamp. A door, a hill. It is low."], tokenizer=model.tokenizer)
    assert isinstance(text, Corpus)
    target = target_of(_chosen(scan_of(({}, rows(5, "other", [2], 9000.0, [4]))), InterveneConfig.of({})))
    told = _told_delimiters(target, model, (text,))
    (batch,) = text.batches(1)
    T = text.inputs["input_ids"].shape[1]
    classes = [CLASSES[i] for i in told.classes(torch.zeros(1, T, 8), batch)[0].tolist()]
    assert classes == [text.position_class(0, pos) for pos in range(T)] and "delimiter" in classes
    assert told.mask(torch.full((1, T, 8), 9000.0), batch)[0, :, 0].tolist() == [c == "other" for c in classes]


def test_an_edit_of_a_scan_is_that_of_intervene() -> None:
    """Ten tokens of 4,096 are no outlier feature; a table of findings alone does not know of how many they are."""
    found, near = tables(rows(5, "delimiter", range(2, 9), 5000.0, list(range(1, 11))),
                         rows(6, "start", range(4, 9), 2000.0, [0]))  # fmt: skip
    made = clusters_table(found, near, n_sequences=N, n_tokens={"": 4096})
    scan = replace(planted()[1], findings=found, clusters=made)
    assert zero(scan).site == "2.resid_post" == str(target_of(_chosen(scan, InterveneConfig.of({}))).site)


def test_what_passes_in_another_stack_is_told() -> None:
    module = build("t5")
    weight = module.get_input_embeddings().weight
    with torch.no_grad():
        weight[:, BIAS], weight[0, BIAS] = 0.0, 9000.0
    ids = torch.randint(4, 40, (4, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    model, inputs = ma.load(module), {"input_ids": ids, "decoder_input_ids": ids}
    scan = ma.scan(model, inputs, null=False, bos_contrast=False)
    assert {"encoder", "decoder"} == set(scan.clusters.loc[scan.clusters["n_findings"] > 0, "stack"])
    for cluster in (None, "each"):
        e = intervene(model, inputs, scan, **QUICK, cluster=cluster)
        here, other = sorted(("encoder", "decoder"), key=lambda name: name != e.info.target["site"].partition("/")[0])
        assert tells(e.info.notes, other, f"{BIAS}@start") and here != other
    asked = intervene(model, inputs, scan, **QUICK, stack="decoder")
    assert not tells(asked.info.notes, "encoder")


def test_a_hump_is_edited_where_it_first_passes() -> None:
    """It is near the threshold from layer 3 on, and passes at layer 5 alone."""
    near, passing = rows(5, "start", range(3, 8), 700.0, [0]), rows(6, "start", [5], 1_050.0, [0], [0])
    scan = scan_of(({}, [r | {"dim": 6} for r in near] + [r | {"pos": 1} for r in passing]))
    assert scan.clusters["label"].tolist() == [HUMP] and scan.clusters["onset"].tolist() == [3]
    assert set(_chosen(scan, InterveneConfig.of({}))["layer"]) == {5}


def test_patches_have_no_delimiters() -> None:
    """A tower of images in a model of images with text: what it reads are pixels, no ids of tokens."""
    model, words = ma.load(llava()), ma.corpus(["A lamp."], tokenizer=ma.load().tokenizer)
    assert isinstance(words, Corpus)
    x = {"pixel_values": torch.full((1, 3, 8, 8), 12.0)}
    where = {"stack": "vision_tower"}
    target = target_of(_chosen(scan_of((where, rows(5, "other", [2], 9000.0, [4]))), InterveneConfig.of({})))
    for spelling in (words.spelling, None):
        text = replace(words, inputs=words.inputs | x, spelling=spelling)
        assert _told_delimiters(target, model, (text,)) is target
