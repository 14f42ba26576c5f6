"""Collapse, sinks and spectra of SmolLM2-135M-Instruct: patterns measured without massact, not third digits.

Of other sequences of the same text, by plain PyTorch and NumPy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import massact as ma
from massact.records.kinds.explanation import Explanation
from massact.reports import story_in_words
from massact.reports.kinds.explanation.spectrum import valley
from tests.facts import tells

SPIKE, D = 507, 576
OFF = {"null": False, "bos_contrast": False}


@pytest.fixture(scope="module")
def explained(smollm2: Path, real_text: Path) -> Explanation:
    model = ma.load(smollm2)
    text = ma.corpus(real_text / "wikitext2-valid.txt", tokenizer=model.tokenizer, seq_len=256, n_sequences=4)
    return ma.explain(model, text, ma.scan(model, text, rank_sequences=0, **OFF))


@pytest.fixture(scope="module")
def collapse(explained: Explanation) -> pd.DataFrame:
    rows = explained.collapse
    assert set(rows.dim) == {SPIKE} and set(rows.position_class) == {"start"} and rows.error.max() < 1e-5
    return rows.set_index(["layer", "norm"])


def test_norms_of_the_block_that_reads_it_first(collapse: pd.DataFrame) -> None:
    attn, mlp = collapse.loc[13, "attn_in"], collapse.loc[13, "mlp_in"]
    assert attn.onehot_before == pytest.approx(0.986, abs=0.003) and attn.onehot == pytest.approx(0.761, abs=0.01)
    assert mlp.onehot == pytest.approx(0.0003, abs=1e-4)
    assert attn.min_cosine > 0.9995 and attn.min_cosine >= attn.bound > 0.998
    assert mlp.min_cosine > 0.99 and mlp.min_cosine >= mlp.bound > 0.98
    assert attn.bound_dim == pytest.approx(0.52, abs=0.03) and mlp.bound_dim < -0.99, "empty where the dim is off"
    assert (attn.gain, mlp.gain) == pytest.approx((0.102, 0.0004), abs=5e-4)
    assert attn.entry == pytest.approx(2.43, abs=0.02) and attn.entry_bound == pytest.approx(2.45, abs=0.01)
    assert max(attn.onehot_random, mlp.onehot_random) < 0.05 and mlp.min_cosine_random < 0.6


def test_which_norms_switch_it_off_and_which_feed_what_removes_it(collapse: pd.DataFrame) -> None:
    mlp = collapse.xs("mlp_in", level="norm")
    off = mlp.loc[13:27]
    assert set(off.role) == {"off"} and (off.gain_rank == D).all()
    assert set(collapse.xs("attn_in", level="norm").loc[13:29].role) == {"on"}
    assert (mlp.loc[[29, 30]].gain_rank == 1).all() and mlp.loc[30].gain == pytest.approx(1.375, abs=1e-3)
    assert list(mlp.index[mlp.removes]) == [29]
    known = collapse[collapse.bound.notna()]
    assert (known.min_cosine >= known.bound - 1e-9).all() and (known.entry <= known.entry_bound * (1 + 1e-6)).all()


def test_the_compression_valley_is_one_token(explained: Explanation) -> None:
    rows = explained.spectrum.set_index(["scope", "tokens", "layer"])
    table = {  # p_1, bound, effective rank of all; p_1 and effective rank without token 0; centred effective rank
        11: (0.551, 0.025, 13.6, 0.553, 13.4, 70), 12: (0.9925, 0.9925, 1.07, 0.516, 15.8, 70),
        20: (0.982, 0.982, 1.16, 0.553, 13.9, 75), 29: (0.545, 0.400, 6.0, 0.705, 6.5, 65),
    }  # fmt: skip
    for layer, (p1, bound, rank, p1_without, rank_without, centred) in table.items():
        whole, without = rows.loc["sequence", "all", layer], rows.loc["sequence", "without", layer]
        assert (whole.p1, without.p1) == pytest.approx((p1, p1_without), abs=0.03), layer
        assert whole.p1 >= whole.bound - 1e-12 and whole.bound == pytest.approx(bound, abs=0.03)
        assert (whole.effective_rank, without.effective_rank) == pytest.approx((rank, rank_without), rel=0.15)
        assert rows.loc["sequence", "centred", layer].effective_rank == pytest.approx(centred, rel=0.1)
        assert without.left_out == without.n_sequences == 4
    assert rows.loc["null", "all", 12].effective_rank == pytest.approx(1.1, abs=0.05), "the norms alone"
    assert valley(explained.spectrum) == list(range(12, 29))
    assert rows.loc["sequence", "all", 12].anisotropy == pytest.approx(0.52, abs=0.03)
    assert tells(story_in_words(explained), "valley", "one token", "12-28")


def test_sinks_take_what_the_diagonal_had(explained: Explanation) -> None:
    axes = explained.axes.set_index("layer")
    assert axes.diagonal[12] > 0.15 > 10 * axes.concentration_first[12], "before it is there, heads look at themselves"
    reads = axes[axes.after_onset]
    assert (reads.concentration > 2 * reads.diagonal).all() and reads.diagonal.mean() < 0.1
    kinds = explained.heads.sink_type.value_counts()
    assert kinds["nop"] > 50 and kinds["between"] > 40 and "broadcast" not in kinds


def test_it_is_dark_by_the_gain_of_the_final_norm(explained: Explanation) -> None:
    rows = explained.dark_subspace
    dim = rows[(rows.vector == "dim") & (rows.dim == SPIKE)].set_index(["gain", "centred"])
    assert dim.share[True, True] == pytest.approx(0.90, abs=0.01) and dim.share[False, True] < 0.05
    assert dim.norm_rank[True, True] > 560 and dim.norm_rank[True, False] < 60, "softmax ignores a shift"
    mine = rows[rows.vector != "dim"].set_index(["vector", "gain", "centred"]).share
    assert mine["findings", True, False] == pytest.approx(0.91, abs=0.01)
    assert mine["random", True, False] < 0.7 < mine["findings", True, False] and np.allclose(rows.chance, 29 / D)
