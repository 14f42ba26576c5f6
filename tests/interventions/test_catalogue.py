"""The catalogue: targets from a hand-made table of findings, and every edit against a loop over entries in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from massact.corpora import Batch
from massact.interventions import (
    Massive,
    clip,
    everywhere,
    fixed,
    massive,
    matched_random,
    mean,
    norm_dims,
    remove_direction,
    replace_first,
    scale,
    shuffle,
    super_weights,
    zero,
    zero_dims,
)
from massact.interventions.massive_entries import massive_everywhere
from massact.records.clusters import clusters_table
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.records.tables import columns_of, frame

# layer, sequence, pos, dim, position class, value
TABLE = [
    (2, 0, 0, 5, "start", 900.0),  # one sequence of three: not yet the onset
    (3, 0, 0, 5, "start", 1000.0), (3, 1, 0, 5, "start", 1200.0), (3, 2, 0, 5, "start", 1100.0),
    (3, 0, 4, 5, "delimiter", 600.0),
    (3, 1, 6, 5, "other", 800.0), (3, 1, 6, 1, "other", -400.0),
    (4, 0, 0, 5, "start", 1100.0), (4, 1, 0, 5, "start", 1100.0), (4, 2, 3, 5, "other", -1100.0),
]  # fmt: skip


def table(rows: list[tuple] = TABLE, stack: str = "", site: str = "resid_post") -> pd.DataFrame:
    blank = {"string": "", "float64": 0.0, "int64": 0, "bool": False}
    full = {c: [blank.get(dtype, 0)] * len(rows) for c, (dtype, _) in columns_of("findings").items()}
    layer, sequence, pos, dim, position_class, value = (list(x) for x in zip(*rows, strict=True))
    return frame("findings", full | {
        "stack": [stack] * len(rows), "site": [site] * len(rows), "layer": layer, "sequence": sequence, "pos": pos,
        "dim": dim, "position_class": position_class, "value": value, "magnitude": [abs(v) for v in value],
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------ targets
def test_what_a_target_is() -> None:
    """Onset: the first layer at which half of the sequences with findings have one; the cut is half of the least."""
    t = massive(table())
    assert (t.site, t.dims, t.cuts) == (Site("", 3, "resid_post"), (1, 5), (200.0, 300.0))
    assert t.means["start"] == pytest.approx((np.nan, 1100.0), nan_ok=True)
    assert t.means["delimiter"] == pytest.approx((np.nan, 600.0), nan_ok=True)
    assert t.means["other"] == (-400.0, 800.0)
    assert t.values == {
        "start": ((), (1000.0, 1200.0, 1100.0)), "delimiter": ((), (600.0,)), "other": ((-400.0,), (800.0,))
    }  # fmt: skip
    assert t.pairs == [(5, "start"), (5, "delimiter"), (1, "other"), (5, "other")]
    assert massive(table(), 2).values == {"start": ((900.0,),), "delimiter": ((),), "other": ((),)}
    assert massive(table(), 4).means["other"] == (-1100.0,)


def test_the_largest_cluster_is_meant_with_those_of_its_label_at_its_onset() -> None:
    """A stray finding in an early layer does not move the onset, and an outlier feature is not edited with it."""
    stray = [(1, 0, 3, 5, "other", 150.0), (1, 1, 9, 5, "other", -150.0)]
    main = [(4, s, 0, 5, "start", 9000.0 + s) for s in range(4)] + [(4, s, 0, 2, "start", -700.0) for s in range(4)]
    feature = [(n, s, p, 8, "other", 300.0) for n in (2, 4) for s in range(4) for p in range(1, 20)]
    found = table([*stray, *main, *feature])
    t = massive(found)
    assert (t.site.layer, t.dims, t.pairs) == (4, (2, 5), [(2, "start"), (5, "start")])
    assert massive(found, 4).dims == (2, 5, 8)  # of a layer that is asked for, all
    assert [m.site.layer for m in massive_everywhere(found)] == [1, 4]
    only = clusters_table(found).query("label == 'outlier feature'")
    assert massive(found, clusters=only).site.layer == 2 and massive(found, clusters=only).dims == (8,)


def test_half_is_enough_for_the_onset() -> None:
    rows = [(1, 0, 0, 5, "start", 900.0), (2, 0, 0, 5, "start", 900.0), (2, 1, 0, 5, "start", 900.0)]
    assert massive(table(rows)).site.layer == 1
    assert massive(table([*rows, (2, 2, 0, 5, "start", 900.0)])).site.layer == 2
    late = [(3, 0, 0, 5, "start", 900.0)] * 9  # nine findings of one sequence are one sequence
    assert massive(table([*late, *((4, s, 0, 5, "start", 900.0) for s in range(3))])).site.layer == 4


def test_stack_and_site_are_those_with_most_findings() -> None:
    few = table(TABLE[:2], "encoder", "resid_post")
    both = pd.concat([few, table(stack="decoder"), table(TABLE[:3], "decoder", "resid_post_prenorm")])
    assert massive(both).site == Site("decoder", 3, "resid_post")
    assert massive(both, stack="encoder").site == Site("encoder", 2, "resid_post")
    whole_vectors = table([(1, s, 0, -1, "start", 9.0) for s in range(20)])  # findings without a dim are not entries
    assert massive(pd.concat([whole_vectors, table()])).site.layer == 3


@pytest.mark.parametrize(("rows", "options", "says"), [
    (TABLE, {"layer": 7}, ["Layer 7", "2, 3, 4"]), (TABLE, {"layer": 1}, ["2, 3, 4"]),
    (TABLE, {"stack": "decoder"}, ["'decoder'", "no findings"]), (TABLE, {"layer": "last"}, ["last", "2, 3, 4"]),
    ([(1, 0, 0, -1, "start", 9.0)], {}, ["no massive activations"]),
])  # fmt: skip
def test_errors_name_what_there_is(rows: list[tuple], options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        massive(table(rows), **options)
    assert all(word in str(refused.value) for word in says)
    with pytest.raises(UserError, match="no massive activations"):
        massive(table().iloc[:0])


def test_the_same_edit_at_every_layer() -> None:
    edits = everywhere(zero, table())
    assert [(e.name, e.site) for e in edits] == [(f"zero at {n}.resid_post", f"{n}.resid_post") for n in (2, 3, 4)]
    h = torch.zeros(1, 2, 8)
    h[0, :, 1], h[0, :, 5] = 250.0, 500.0  # dim 1 is massive at layer 3 alone; 500 is below the cut of layer 4
    got = [e.apply(h, Batch({"input_ids": torch.ones(1, 2)}, (0,), (None,)))[0][:, [1, 5]].tolist() for e in edits]
    assert got == [[[250, 0], [250, 500]], [[250, 0], [0, 0]], [[250, 500], [250, 500]]]  # by class of the token
    named = everywhere(lambda t: scale(t, 0.5), pd.concat([table(TABLE[:3], "a"), table(stack="b")]), "a")
    assert [e.site for e in named] == ["a/2.resid_post", "a/3.resid_post"]


# --------------------------------------------------------------------------------------- edits against a loop
B, T, D = 3, 7, 9
DIMS, CUTS = (2, 5), (50.0, 80.0)
TARGET = Massive(
    Site("", 3, "resid_post"), DIMS, CUTS,
    {"start": (float("nan"), 100.0), "delimiter": (-60.0, float("nan")), "other": (-70.0, 120.0)},
    {"start": ((), (95.0, 105.0)), "delimiter": ((-60.0,), ()), "other": ((-71.0, -69.0), (119.0, 120.5, 121.5))},
    delimiters=frozenset({7}),
)  # fmt: skip
IDS = (np.arange(B * T) * 5 % 9).reshape(B, T)  # some are 7


def class_at(b: int, t: int, mask: np.ndarray) -> str:
    if t == int(np.flatnonzero(mask[b])[0]):
        return "start"
    return "delimiter" if IDS[b, t] == 7 else "other"


def is_massive(h: np.ndarray, b: int, t: int, j: int, where: str) -> bool:
    """It reaches the cut, on a token of a class that has findings at that dim."""
    return abs(h[b, t, DIMS[j]]) >= CUTS[j] and len(TARGET.values[where][j]) > 0


@st.composite
def planted(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, bool]:
    """Noise with massive values at some places, values just below the cut, large ones elsewhere; a mask; its side."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    h = rng.normal(size=(B, T, D)).astype(np.float32)
    places = st.tuples(st.integers(0, B - 1), st.integers(0, T - 1), st.integers(0, D - 1))
    for place in draw(st.lists(places, min_size=1, max_size=12)):
        value = draw(st.sampled_from([49.0, 50.0, 51.0, 79.5, 80.0, 300.0, 5e4]))
        h[place] = value * draw(st.sampled_from([1, -1]))
    h[draw(places)[:2] + (5,)] = 200.0  # at least one
    mask, left = np.ones((B, T), int), draw(st.booleans())
    for b, n in enumerate(draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B))):
        mask[b, slice(0, n) if left else slice(T - n, T)] = 0
    return h, mask, left


def batch_of(mask: np.ndarray, past: int = 0) -> Batch:
    padded = {"input_ids": torch.tensor(IDS)} | ({} if mask.all() else {"attention_mask": torch.tensor(mask)})
    return Batch(padded, tuple(range(B)), (None,) * B, past)


def naively(h: np.ndarray, mask: np.ndarray, value: Callable[[float, int, str], float]) -> np.ndarray:
    """`value(old, index of the dim, class of the token)` at massive entries."""
    new = h.copy()
    for b, t in np.ndindex(B, T):
        where = class_at(b, t, mask)
        for j, dim in enumerate(DIMS):
            if is_massive(h, b, t, j, where):
                new[b, t, dim] = value(float(h[b, t, dim]), j, where)
    return new


EDITS = {
    "zero": (zero, lambda old, j, where: 0.0),
    "scale": (lambda t: scale(t, 0.25), lambda old, j, where: old * 0.25),
    "clip": (lambda t: clip(t, 60.0), lambda old, j, where: min(60.0, max(-60.0, old))),
    "fixed": (lambda t: fixed(t, -3.0), lambda old, j, where: -3.0),
    "mean": (mean, lambda old, j, where: TARGET.means[where][j]),
}


@pytest.mark.parametrize("name", EDITS)
@given(given_=planted())
@settings(max_examples=20)
def test_values_are_those_of_a_loop_and_all_others_are_untouched(name: str, given_: tuple) -> None:
    """Bit for bit, the input not written into; padded on either side."""
    h, mask, _ = given_
    make, value = EDITS[name]
    tensor = torch.from_numpy(h.copy())
    got = make(TARGET).apply(tensor, batch_of(mask))
    np.testing.assert_array_equal(got.numpy(), naively(h, mask, value))
    np.testing.assert_array_equal(tensor.numpy(), h)


@given(given_=planted(), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_shuffle_draws_from_its_own_class_and_dim(given_: tuple, seed: int) -> None:
    h, mask, _ = given_
    got = shuffle(TARGET, seed).apply(torch.from_numpy(h), batch_of(mask)).numpy()
    for b, t in np.ndindex(B, T):
        where = class_at(b, t, mask)
        for j, dim in enumerate(DIMS):
            if is_massive(h, b, t, j, where):
                assert got[b, t, dim] in np.float32(TARGET.values[where][j])
            else:
                assert got[b, t, dim] == h[b, t, dim]
    others = [d for d in range(D) if d not in DIMS]
    np.testing.assert_array_equal(got[..., others], h[..., others])


def test_shuffle_is_a_function_of_seed_and_sequences() -> None:
    h = torch.full((B, T, D), 500.0)

    def drawn(seed: int, sequences: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        return shuffle(TARGET, seed).apply(h, replace(batch_of(np.ones((B, T))), sequences=sequences))

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1)) and not torch.equal(drawn(0), drawn(0, (3, 4, 5)))
    others = torch.from_numpy(IDS != 7)
    others[:, 0] = False
    values, counts = drawn(0)[..., 5][others].unique(return_counts=True)
    assert values.tolist() == [119.0, 120.5, 121.5] and counts.min() >= 2


@given(given_=planted())
@settings(max_examples=20)
def test_matched_random_zeroes_as_many_entries_near_the_median(given_: tuple) -> None:
    """As many in each sequence as there are massive ones, none at a massive dim, those nearest to the median."""
    h, mask, _ = given_
    got = matched_random(TARGET).apply(torch.from_numpy(h), batch_of(mask)).numpy()
    others = [d for d in range(D) if d not in DIMS]
    for b in range(B):
        n = sum(is_massive(h, b, t, j, class_at(b, t, mask)) for t in range(T) for j in range(len(DIMS)))
        changed = got[b] != h[b]
        assert changed.sum() == n and (got[b][changed] == 0).all() and not changed[:, list(DIMS)].any()
        magnitudes = np.abs(h[b])
        off = np.abs(magnitudes - np.sort(magnitudes.ravel())[(magnitudes.size - 1) // 2])
        np.testing.assert_allclose(np.sort(off[changed]), np.sort(off[:, others].ravel())[:n], rtol=1e-5, atol=1e-6)
        assert (magnitudes[changed] < 3).all()


@pytest.mark.parametrize("make", [zero, mean, shuffle, matched_random, lambda t: clip(t, 60.0)])
def test_without_massive_entries_nothing_changes(make: Callable) -> None:
    h = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    h[0, 0, 3] = 1000.0  # at another dim
    assert torch.equal(make(TARGET).apply(h, batch_of(np.ones((B, T)))), h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [zero, mean, shuffle, matched_random, lambda t: scale(t, 0.5)])
def test_half_precision_stays_what_it_is(make: Callable, dtype: torch.dtype) -> None:
    h = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    h[1, 0, 5], h[1, 3, 2] = 300.0, -90.0
    got = make(TARGET).apply(h, batch_of(np.ones((B, T))))
    assert got.dtype == dtype and int((got != h).sum()) == 2


def test_behind_a_cache_no_position_is_the_start() -> None:
    h = torch.full((B, 1, D), 500.0)
    batch = {past: replace(batch_of(np.ones((B, 1)), past), inputs={"input_ids": torch.ones(B, 1)}) for past in (0, 6)}
    got = {past: mean(TARGET).apply(h, batch[past])[0, 0, 5].item() for past in (0, 6)}
    assert got == {0: 100.0, 6: 120.0}


def test_without_ids_delimiters_cannot_be_told() -> None:
    h = torch.full((B, T, D), 500.0)
    with pytest.raises(UserError, match="input_ids"):
        zero(TARGET).apply(h, Batch({}, tuple(range(B)), (None,) * B))
    alike = replace(TARGET, values={c: ((1.0,), (1.0,)) for c in TARGET.values})  # all classes are edited at all dims
    assert (zero(alike).apply(h, Batch({}, tuple(range(B)), (None,) * B))[..., list(DIMS)] == 0).all()


def test_edits_take_the_table_of_findings_itself() -> None:
    h = torch.full((1, 2, 8), 1000.0)
    batch = Batch({"input_ids": torch.tensor([[3, 0]])}, (0,), (None,))
    for make in (zero, mean, shuffle, matched_random, lambda t: scale(t, 2.0), lambda t: clip(t, 1.0)):
        one, other = make(table()), make(massive(table()))
        assert (one.name, one.site) == (other.name, other.site) and one.site == "3.resid_post"
        assert torch.equal(one.apply(h, batch), other.apply(h, batch))


# ------------------------------------------------------------------------- dims, directions, weights, inputs
@given(seed=st.integers(0, 1000), dims=st.lists(st.integers(0, D - 1), min_size=1, max_size=5, unique=True))
@settings(max_examples=25)
def test_whole_dims(seed: int, dims: list[int]) -> None:
    h = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    wanted = h.numpy().copy()
    for dim in dims:
        wanted[:, :, dim] = 0
    edit = zero_dims(dims, "1.resid_post")
    assert np.array_equal(edit.apply(h, Batch({}, (), ())).numpy(), wanted) and not (h == 0).any()
    assert ("..." in edit.name) == (len(dims) > 4)


@given(seed=st.integers(0, 1000), length=st.floats(1e-3, 1e3))
@settings(max_examples=25)
def test_a_removed_direction_is_orthogonal_to_what_is_left(seed: int, length: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, u = torch.randn(B, T, D, generator=generator), torch.randn(D, generator=generator)
    got = remove_direction(u * length, "1.resid_post").apply(h, Batch({}, (), ()))
    unit = (u / u.norm()).double().numpy()
    assert np.abs(got.double().numpy() @ unit).max() < 1e-5
    along = h.double().numpy() @ unit
    np.testing.assert_allclose(got.numpy(), h.double().numpy() - along[..., None] * unit, atol=1e-5)


def test_super_weights_and_norm_dims() -> None:
    w = torch.arange(1.0, 13.0).reshape(3, 4)
    gone = super_weights("w", [(0, 1), (2, 3)]).apply(w.clone())
    assert gone[0, 1] == gone[2, 3] == 0 and int((gone != w).sum()) == 2
    kept = super_weights("w", [(0, 1), (2, 3)], keep_only=True).apply(w.clone())
    assert kept[0, 1] == 2 and kept[2, 3] == 12 and kept.count_nonzero() == 2
    assert torch.equal(gone + kept, w)
    assert super_weights("w", [(0, 1)], True).name != super_weights("w", [(0, 1)]).name
    assert norm_dims("n", [0, 2]).apply(torch.ones(4)).tolist() == [0, 1, 0, 1]


def test_a_first_token_is_replaced_in_a_copy() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert replace_first(9).apply({"input_ids": ids})["input_ids"].tolist() == [[9, 1, 2], [9, 4, 5]]
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5]]
