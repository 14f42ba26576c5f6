"""SmolLM2 in low precision: the patterns of a measurement by hand on 4 x 256 tokens of WikiText-2.

Measured by hand: int8 by tensor 0.55 nats, massive token exempt 0.18, rotated 0.073, both 0.0006; int8 by token 0.02,
exempt or not; one neuron of block 11 (0-based) makes the massive activation, and its MLP input the greatest error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import massact as ma
from massact.quantisation import quantise
from massact.records.kinds.quantisation import Quantisation
from massact.records.verdicts import HARMFUL

pytestmark = pytest.mark.minutes
SCHEMES = ("int8-tensor", "int8-tensor+exempt", "int8-tensor+hadamard", "int8-tensor+hadamard+exempt", "int8-token",
           "int8-token+exempt")  # fmt: skip
ONSET = 12  # 1-based


@pytest.fixture(scope="module")
def done(smollm2: Path, real_text: Path) -> Quantisation:
    model = ma.load(smollm2)
    corpus = ma.corpus(real_text / "wikitext2-valid.txt", tokenizer=model.tokenizer, seq_len=256, n_sequences=4)
    scan = ma.scan(model, corpus, rank_sequences=0, null=False, bos_contrast=False)
    return quantise(model, corpus, scan, schemes=SCHEMES, hold_out=False, guilty="none")


@pytest.fixture(scope="module")
def rows(done: Quantisation) -> pd.DataFrame:
    return done.quantised[done.quantised["metric"] == "nll"].set_index("scheme")


def test_massive_tokens_cost_where_one_scale_serves_all(done: Quantisation, rows: pd.DataFrame) -> None:
    assert done.info.massive["tokens"] == 4 and "507@start" in done.info.massive["clusters"]
    plain, exempt = rows.loc["int8-tensor"], rows.loc["int8-tensor+exempt"]
    assert plain["nats_low"] > 0.1 and exempt["nats_low"] > 0 and plain["delta_nats"] > 2 * exempt["delta_nats"]
    saved = done.remedies.set_index(["scheme", "remedy"]).loc[("int8-tensor", "exempt")]
    assert saved["saved_low"] > 0.05


def test_a_rotation_needs_the_exemption_too(rows: pd.DataFrame) -> None:
    rotated, both = rows.loc["int8-tensor+hadamard", "delta_nats"], rows.loc["int8-tensor+hadamard+exempt"]
    assert 0.02 < rotated < rows.loc["int8-tensor+exempt", "delta_nats"]
    assert abs(both["delta_nats"]) < 0.02 < rotated - both["delta_nats"]


def test_a_scale_for_each_token_contains_them(rows: pd.DataFrame) -> None:
    by_token, exempt = rows.loc["int8-token", "delta_nats"], rows.loc["int8-token+exempt", "delta_nats"]
    assert abs(by_token) < 0.1 * rows.loc["int8-tensor", "delta_nats"] and abs(by_token - exempt) < 0.02
    assert rows.loc["int8-token", "verdict"] != HARMFUL


def test_two_columns_and_the_guilty_site(done: Quantisation) -> None:
    sites = done.quantised_sites
    mine = sites[sites["scheme"] == "int8-tensor"]
    worst = mine.loc[mine["local_rest"].idxmax()]
    assert (worst["site"], worst["layer"]) == ("mlp_act", ONSET)
    at = sites[sites["layer"] == ONSET].groupby("scheme")[["error_massive", "error_rest"]].max()
    assert at.loc["int8-tensor", "error_rest"] > at.loc["int8-tensor+exempt", "error_rest"]
    assert at.loc["int8-tensor+exempt", "error_massive"] < 1e-5 < at.loc["int8-tensor", "error_massive"]
    assert at.loc["int8-tensor+hadamard+exempt", "error_rest"] < 0.2 * at.loc["int8-tensor", "error_rest"]


def test_what_rounds_to_zero_is_known_beforehand(done: Quantisation) -> None:
    sites = done.quantised_sites
    known = sites[sites["zeroed_measured"].notna() & sites["zeroed_rate"].notna()]
    off = np.abs(known["zeroed_rate"] - known["zeroed_measured"])
    assert len(known) >= 4 * 4 * 30 and off.max() < 0.02
    rate = sites[sites["site"] == "mlp_act"].set_index(["scheme", "layer"])["zeroed_measured"]
    assert rate["int8-tensor", ONSET] > 0.9 > rate["int8-tensor+exempt", ONSET]
