"""Odd cases in which a table, a label or a sentence was once wrong: each is recomputed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import massact as ma
from massact.records.errors import UserError
from massact.reports import answer_in_words
from massact.scans import CRITERIA, Evidence
from massact.scans.findings import position_group
from tests.facts import tells
from tests.families import build
from tests.planted import Plant, Planted
from tests.scans import naive

OFF = {"null": False, "bos_contrast": False}
EVERYTHING = {"magnitude": 0.0, "ratio": 0.0}


def ids(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (n, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- criteria
def test_kang_finds_small_values_of_quiet_tokens() -> None:
    """The greatest |h| of the hidden state all sit in one loud token, and none of them passes."""
    width, loud = 600, [Plant(1, 2, 0, dim, 1e4) for dim in range(30)]
    module = Planted(3, 20, width, [*loud, Plant(1, 2, 5, 7, 20.0)])
    x = 0.02 * torch.randn(3, 20, width, generator=torch.Generator().manual_seed(0))
    found = ma.scan(ma.load(module, inputs={"x": x}), {"x": x}, criterion="kang2025", **OFF).findings
    wanted = set()
    for layer, h in enumerate(naive.hidden_states(module, module.layers, {"x": x})):
        rms = np.sqrt((h.astype(np.float64) ** 2).mean(-1, keepdims=True))
        wanted |= {(layer, *place) for place in np.argwhere(np.abs(h) > 20 * rms).tolist()}
    assert wanted and set(zip(found.layer, found.sequence, found.pos, found.dim, strict=True)) == wanted


def test_prefixquant_is_answered_at_the_site_where_it_looks() -> None:
    result = ma.scan(ma.load(build("gpt2")), ids(2, 20), criterion="prefixquant2024", thresholds={"ratio": 1.3}, **OFF)
    answers = {s["site"]: s for s in result.info.answer["stacks"]}
    assert len(result.findings) > 0 and answers["mlp_act"]["n_findings"] == len(result.findings)
    assert answers["resid_post"]["n_findings"] == 0
    words = answer_in_words(result)
    assert words[0].startswith("Yes: ") and tells(words[:1], "outlier tokens", "in mlp_act", "not in resid_post")


def test_a_near_miss_keeps_upper_bounds() -> None:
    """The second of a cluster of at most three, at 0.8 of the ratio, is near; the fourth is not."""
    rows = pd.DataFrame({"stack": "", "site": "resid_post", "layer": 1, "sequence": 0, "pos": 0, "dim": range(4),
                         "magnitude": 800.0, "median": 1.0, "mad": 0.5, "rank": [1, 2, 3, 4]})  # fmt: skip
    layers = pd.DataFrame({"stack": [""], "site": ["resid_post"], "layer": [1]})
    rule = CRITERIA["heretic2025"]
    near = rule.near_misses(Evidence(rows, layers, pd.DataFrame(), pd.DataFrame()), rule.thresholds)
    assert list(near["rank"]) == [1, 2, 3]


def test_zeros_are_not_massive_where_the_median_is_zero() -> None:
    module = Planted(2, 10, 8, [Plant(1, 2, 3, 4, 5.0)])
    x = torch.zeros(1, 10, 8)
    result = ma.scan(
        ma.load(module, inputs={"x": torch.randn(1, 10, 8)}), {"x": x}, criterion="gallego2025", rank_sequences=0, **OFF
    )
    first = result.findings[result.findings.layer == 1]
    assert list(zip(first.pos, first.dim, strict=True)) == [(3, 4)] and (result.findings.magnitude > 0).all()
    assert np.isinf(result.findings.ratio).all()
    assert tells(answer_in_words(result), "inf times", "median |h| of 0")


@pytest.mark.parametrize(
    ("criterion", "constants"), [("dettmers2022", {"tokens": 0.0}), ("osp2025", {"token_kurtosis": 0.0})]
)
def test_dims_and_layers_are_of_no_sequence(criterion: str, constants: dict[str, float]) -> None:
    result = ma.scan(ma.load(build("gpt2")), ids(2, 20), criterion=criterion, thresholds=constants, **OFF)
    assert len(result.findings) and result.findings.ratio.isna().all()
    assert result.coordinates.share.isna().all()
    words = " ".join(answer_in_words(result))
    assert "of the sequences" not in words and "times the median" not in words


def test_a_cut_list_of_near_misses_says_so() -> None:
    result = ma.scan(ma.load(build("gpt2")), ids(1, 20), thresholds={"magnitude": 0.0, "ratio": 5.0}, top_k=3, **OFF)
    assert len(result.near_misses) and tells(result.info.notes, "3 values", "more")


# ------------------------------------------------------------------------------- position groups and options
class _Text:
    """Position classes of one sequence, spelled out."""

    def position_class(self, sequence: int, pos: int) -> str:
        return {"s": "start", ".": "delimiter"}.get("sa.ab."[pos], "other")


@pytest.mark.parametrize(("places", "group"), [
    ([0, 2], "start and first delimiter"), ([0], "start"), ([0, 5], "start, delimiters and others"),
    ([0, 2, 5], "start, delimiters and others"), ([0, 1], "start and others"), ([2], "not at the start"),
])  # fmt: skip
def test_the_first_delimiter_is_the_first(places: list[int], group: str) -> None:
    text = _Text()
    found = pd.DataFrame({"sequence": 0, "pos": places, "position_class": [text.position_class(0, p) for p in places]})
    assert position_group(found, text) == group  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 10**9}, {"seed": 1 << 80}, {"seed": -1}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=str(next(iter(options.values())))):
        ma.scan(None, ids(1, 9), **options)
