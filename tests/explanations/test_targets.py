"""Which tokens are looked at: every one with a finding, and nulls of ordinary tokens only."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import massact as ma
from massact.explanations.targets import N_OTHERS, counts, main_findings, positions_of, targets
from massact.records.kinds.explanation import Explanation
from tests.families import build

N, T, MASSIVE, NEAR = 3, 48, 7, 2  # sequences, tokens, and the dims at which tokens 0 and 1 are large
PLACES = [0, 3, 4, 8, 9, 13, 17, 20, 21, 22, 30, 41]  # of token 0 in sequence 0; later ones in the others


def chosen(share: float, length: int, draw: np.random.Generator) -> list[int]:
    return [p for p in range(length) if draw.random() < share]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6), share=st.floats(0, 1), near=st.floats(0, 1),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), pad=st.integers(0, 9),
)  # fmt: skip
def test_nulls_are_ordinary_and_as_many_or_none(seed, share, near, lengths, pad):
    """Also where padding stands to the left."""
    draw = np.random.default_rng(seed)
    kept = [range(pad, pad + n) for n in lengths]
    found = {i: rows for i, n in enumerate(lengths) if (rows := [p + pad for p in chosen(share, n, draw)])}
    close = {i: rows for i, n in enumerate(lengths) if (rows := [p + pad for p in chosen(near, n, draw)])}
    made = targets(found, close, kept, seed)
    assert made.findings == found
    for i, positions in enumerate(kept):
        taken = {pad, *found.get(i, []), *close.get(i, [])}
        random, others = made.random.get(i, []), made.others.get(i, [])
        ordinary = set(positions) - taken
        assert set(random) <= ordinary and set(others) <= ordinary
        assert (
            len(set(random)) == len(random) == (len(found.get(i, [])) if len(found.get(i, [])) <= len(ordinary) else 0)
        )
        assert len(set(others)) == len(others) == min(N_OTHERS, len(ordinary))
        alone = targets({i: found[i]} if i in found else {}, {i: close.get(i, [])}, kept, seed)
        assert alone.random.get(i, []) == random, "the draw of a sequence depends on nothing else"
    told = counts(made, close)
    assert told["findings"] == sum(map(len, found.values())) and told["findings_sequences"] == len(found)
    assert told["random"] == sum(map(len, made.random.values()))


def test_positions_are_those_of_any_layer() -> None:
    rows = pd.DataFrame({"sequence": [1, 0, 1, 1, -1, 5], "layer": [3, 1, 2, 1, 1, 1], "pos": [4, 2, 0, 4, 3, 1]})
    assert positions_of(rows, 5) == {0: [2], 1: [0, 4]}


# ------------------------------------------------------------------------------------- a model with many of them
def ids() -> torch.Tensor:
    """Token 0 (massive from the embedding on) at 12 places of each sequence, in the last at 40; token 1 (near) once."""
    x = torch.randint(2, 99, (N, T), generator=torch.Generator().manual_seed(7))
    for i in range(N - 1):
        x[i, [p + i for p in PLACES]] = 0
        x[i, 44 + i] = 1
    x[N - 1, : T - 8] = 0
    return x


@cache
def explained() -> tuple[torch.nn.Module, Explanation]:
    """A random Llama, hand-built: not evidence about real models."""
    module = build("llama", seed=3)
    with torch.no_grad():
        module.get_input_embeddings().weight[:2] *= 0.01
        module.get_input_embeddings().weight[0, MASSIVE] = 900.0
        module.get_input_embeddings().weight[1, NEAR] = 80.0
    model, corpus = ma.load(module), ma.corpus(ids())
    return module, ma.explain(model, corpus, ma.scan(model, corpus, null=False, bos_contrast=False))


def test_every_token_with_a_finding_counts() -> None:
    """More than 10 of them a sequence: masses from dense attention, and what a uniform head gives."""
    module, e = explained()
    with torch.no_grad():
        module.set_attn_implementation("eager")
        p_LBHTS = [a.double().numpy() for a in module(input_ids=ids(), output_attentions=True).attentions]
        module.set_attn_implementation("sdpa")
    found = [np.flatnonzero(row == 0) for row in ids().numpy()]
    assert e.info.tokens[""] == {
        "findings": 2 * 12 + 40, "near_misses": 2, "random": 2 * 12, "others": 2 * N_OTHERS + 8,
        "findings_sequences": 3, "near_misses_sequences": 2, "random_sequences": 2, "others_sequences": 3,
    }  # fmt: skip
    even_TS = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    for layer, p_BHTS in enumerate(p_LBHTS, 1):
        heads = e.heads[e.heads["layer"] == layer]
        rows = [[t for t in range(1, T) if t not in f and t > f.min()] for f in found]
        want = np.mean([p[:, t][:, :, f].sum(2).mean(1) for p, t, f in zip(p_BHTS, rows, found, strict=True)], 0)
        even = np.mean([even_TS[t][:, f].sum(1).mean() for t, f in zip(rows, found, strict=True)])
        np.testing.assert_allclose(heads["mass_findings"], want, rtol=1e-4)
        np.testing.assert_allclose(heads["mass_findings_uniform"], even, rtol=1e-6)
        axes = e.axes[e.axes["layer"] == layer].iloc[0]
        assert axes["concentration_uniform"] == pytest.approx(even, rel=1e-6)
        assert (axes["found_tokens"], axes["random_tokens"], axes["other_tokens"]) == (64, 24, 2 * N_OTHERS + 8)


def test_ordinary_tokens_have_no_massive_dim() -> None:
    """Tokens with findings and near misses are no ordinary ones: their share of the massive dims tells."""
    trajectory = explained()[1].trajectory.set_index(["layer", "stage", "group"])["massive_share"]
    assert trajectory.loc[(1, "hidden", "findings")] > 0.99
    for group in ("random", "others"):
        assert trajectory.loc[(1, "hidden", group)] < 0.5


def test_clusters_without_findings_in_the_first_sequences_are_named() -> None:
    module = build("llama")
    weight = module.get_input_embeddings().weight
    with torch.no_grad():
        weight[:, [5, 7]] = 0.0
        weight[0, 7], weight[1, 5] = 9000.0, 4000.0
    x = torch.randint(4, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    x[:2, 0], x[2:, 0] = 1, 0
    model = ma.load(module)
    scan = ma.scan(model, x, null=False, bos_contrast=False)
    for n, named in ((2, True), (4, False)):
        notes = ma.explain(model, x, scan, n_sequences=n).info.notes
        missed = [note for note in notes if note.startswith("Not accounted")]
        assert any("7@start" in note for note in missed) == named and not any("5@start" in note for note in missed)


def test_tokens_of_an_outlier_feature_are_no_massive_tokens() -> None:
    """Beside a massive activation of the first token a dim that is large at many: only the former is left out."""
    labels = {"label": ["massive activation", "outlier feature"], "stack": "", "site": "resid_post", "dim": [7, 3],
              "position_class": ["start", "other"], "n_findings": [4, 40]}  # fmt: skip
    rows = [(0, 0, 7, "start"), (0, 3, 3, "other"), (1, 0, 7, "start"), (1, 5, 3, "other")]
    found = pd.DataFrame(rows, columns=["sequence", "pos", "dim", "position_class"]).assign(stack="", site="resid_post")
    kept = main_findings(found, pd.DataFrame(labels))
    assert positions_of(kept, 2) == {0: [0], 1: [0]}
    assert positions_of(main_findings(found, pd.DataFrame(labels).iloc[::-1]), 2) == {0: [3], 1: [5]}
    assert not len(main_findings(found, pd.DataFrame(labels).iloc[:0]))
