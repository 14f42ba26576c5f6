"""What is edited by default, one cluster, and each: a planted bias on first tokens beside a feature of all others."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.interventions import intervene
from massact.models import Model
from massact.records.clusters import HUMP, MASSIVE, OUTLIER
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.intervention import effects_in_words
from tests.facts import tells
from tests.families import build

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
