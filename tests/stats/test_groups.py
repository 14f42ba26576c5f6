"""Similarity and sparsity of chosen tokens against NumPy over all pairs; values gathered as they are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from massact.stats import Where
from massact.stats.groups import FOLDS, Gather, GroupResult, GroupStats, rows_at
from tests.stats.oracle import DTYPES

CHOSEN = {
    "findings": {0: [0, 3], 1: [0], 3: [2, 5, 6, 99]},  # the last one lies outside of its sequence
    "others": {0: [1, 2, 4], 1: [1, 2], 2: [0, 1]},
    "one": {2: [3]},
    "none": {7: [1]},
}
DIMS = (1, 4)


def stream(seed: int = 0, D: int = 6, dtype: torch.dtype = torch.float32, zero: bool = False) -> list[Tensor]:
    """Four sequences; some tokens are alike, and some hold nothing at all if asked for."""
    rng = torch.Generator().manual_seed(seed)
    direction_D = torch.randn(D, generator=rng)
    made = []
    for n in (7, 5, 4, 9):
        h_TD = torch.randn(n, D, generator=rng)
        h_TD[0] += 100 * direction_D
        if zero:
            h_TD[2] = 0
        made.append(h_TD.to(dtype))
    return made


def naive(x_ND: np.ndarray, dims: tuple[int, ...]) -> dict[str, Any]:
    """Every field of a `GroupResult`, pair by pair and token by token."""
    norms = [np.sqrt((x**2).sum()) for x in x_ND]
    real = [x for x, norm in zip(x_ND, norms, strict=True) if norm > 0]
    root = np.sqrt(x_ND.shape[1])
    cosines = [(a @ b) / np.sqrt((a @ a) * (b @ b)) for i, a in enumerate(real) for j, b in enumerate(real) if i != j]
    mean_D = x_ND.mean(0)
    spread = ((x_ND - mean_D) ** 2).sum(1).mean()
    hoyer = [(root - np.abs(x).sum() / np.sqrt(x @ x)) / (root - 1) if len(x) > 1 else 0.0 for x in real]
    share = [(x[list(dims)] ** 2).sum() / (x @ x) for x in real] if dims else []
    return {
        "n_tokens": len(x_ND),
        "cosine": np.mean(cosines) if cosines else np.nan,
        "row_variance": spread / (x_ND**2).sum(1).mean() if real else np.nan,
        "sparsity": np.mean(hoyer) if hoyer else np.nan,
        "share": np.mean(share) if share else np.nan,
        "max": np.abs(x_ND).max(1).mean(),
        "norm": np.mean(norms),
        "mean": mean_D,
    }


def expected(data: list[Tensor], dims: tuple[int, ...], chosen: dict = CHOSEN) -> dict[str, dict[str, Any]]:
    found = {}
    for name, places in chosen.items():
        rows = [h[p].double().numpy() for s, h in enumerate(data) for p in places.get(s, []) if p < len(h)]
        if rows:
            found[name] = naive(np.stack(rows), dims)
    return found


def check(result: dict[str, GroupResult], want: dict[str, dict[str, Any]], rtol: float = 1e-9) -> None:
    assert set(result) == set(want)
    for name, fields in want.items():
        for field, value in fields.items():
            got = getattr(result[name], field)
            np.testing.assert_allclose(got, value, rtol=rtol, atol=rtol, err_msg=f"{name} {field}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(), DIMS], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_groups_against_all_pairs(dtype: torch.dtype, dims: tuple[int, ...], zero: bool) -> None:
    """Tokens of zeros have no direction, no sparsity and no share: they count for the norms and the mean only."""
    data, statistic = stream(dtype=dtype, zero=zero), GroupStats(CHOSEN, dims)
    for sequence, h_TD in enumerate(data):
        statistic.update(h_TD, Where(sequence))
    check(statistic.result(), expected(data, dims))


def test_the_cosine_has_an_interval_over_folds_of_sequences() -> None:
    """Each fold left out in turn, pair by pair; and it holds the truth of a planted direction."""
    rng, inside, D = np.random.default_rng(0), 0, 24
    truth = rng.normal(size=(20_000, D)) / np.sqrt(D) + np.eye(1, D)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    true = float(truth.mean(0) @ truth.mean(0))
    for trial in range(200):
        x_ND = rng.normal(size=(20, D)) / np.sqrt(D) + np.eye(1, D)
        statistic = GroupStats({"a": {s: [0] for s in range(20)}})
        for s, x in enumerate(x_ND):
            statistic.update(torch.tensor(x[None]), Where(s))
        got = statistic.result()["a"]
        inside += got.cosine_low <= true <= got.cosine_high
        if trial == 0:
            z = np.arctanh([naive(x_ND[np.arange(20) % FOLDS != k], ())["cosine"] for k in range(FOLDS)])
            pseudo = FOLDS * np.arctanh(got.cosine) - (FOLDS - 1) * z
            half = stats.t.ppf(0.975, FOLDS - 1) * pseudo.std(ddof=1) / np.sqrt(FOLDS)
            assert got.n_folds == FOLDS and got.cosine_low == pytest.approx(np.tanh(np.arctanh(got.cosine) - half))
    assert inside / 200 >= 0.91


def test_what_the_numbers_mean() -> None:
    """Equal rows, opposite rows, one entry, even entries."""
    rows = torch.tensor([[0.0, 2, 0, 0], [0, 2, 0, 0], [0, -2, 0, 0], [3, 3, -3, 3]])
    groups = {"equal": {0: [0, 1]}, "opposite": {0: [0, 2]}, "even": {0: [3]}}
    statistic = GroupStats(groups, [1])
    statistic.update(rows, Where(0))
    got = statistic.result()
    assert got["equal"].cosine == pytest.approx(1) and got["equal"].row_variance == pytest.approx(0, abs=1e-12)
    assert got["opposite"].cosine == pytest.approx(-1) and got["opposite"].row_variance == pytest.approx(1)
    assert got["equal"].sparsity == pytest.approx(1) and got["even"].sparsity == pytest.approx(0, abs=1e-12)
    assert got["equal"].share == pytest.approx(1) and got["even"].share == pytest.approx(0.25)
    assert np.isnan(got["even"].cosine) and got["even"].max == 3 and got["even"].norm == pytest.approx(6)


def test_nothing_but_zeros() -> None:
    """What has no value is NaN, not a number that looks like one."""
    statistic = GroupStats({"zero": {0: [0, 1]}}, [0])
    statistic.update(torch.zeros(3, 4), Where(0))
    got = statistic.result()["zero"]
    assert got.n_tokens == 2 and got.norm == got.max == 0 and not got.mean.any()
    assert all(np.isnan([got.cosine, got.row_variance, got.sparsity, got.share]))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_tokens(size: float) -> None:
    """Squares that float32 cannot hold are no trouble."""
    data = [h * size for h in stream()]
    statistic = GroupStats(CHOSEN, DIMS)
    for sequence, h_TD in enumerate(data):
        statistic.update(h_TD, Where(sequence))
    for name, want in expected(data, DIMS).items():
        for field in ("cosine", "row_variance", "sparsity", "share"):
            assert getattr(statistic.result()[name], field) == pytest.approx(want[field], rel=1e-9, nan_ok=True)


def saved_and_loaded(statistic: Any) -> Any:
    file = io.BytesIO()
    np.savez(file, **statistic.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        return type(statistic).from_state(dict(state))


def check_gathered(result: dict, data: list[Tensor], dims: tuple[int, ...] | None) -> None:
    wanted = [(s, p) for s, places in CHOSEN["findings"].items() for p in places if p < len(data[s])]
    assert list(result) == sorted(wanted)
    for (s, p), got in result.items():
        x = data[s][p] if dims is None else data[s][p][list(dims)]
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, x.double().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [None, (4, 0), ()], ids=str)
def test_gathered_values_are_exact(dtype: torch.dtype, dims: tuple[int, ...] | None) -> None:
    data, statistic = stream(dtype=dtype), Gather(CHOSEN["findings"], dims)
    for sequence, h_TD in enumerate(data):
        h_TD = h_TD.clone()
        statistic.update(h_TD, Where(sequence))
        h_TD.fill_(float("nan"))  # what was gathered is a copy
    check_gathered(statistic.result(), data, dims)
    check_gathered(saved_and_loaded(statistic).result(), data, dims)


@pytest.mark.parametrize("make", [lambda: GroupStats(CHOSEN, DIMS), lambda: Gather(CHOSEN["findings"], DIMS)])
def test_nothing_seen_yet(make: Any) -> None:
    empty = make()
    assert empty.result() == {} and saved_and_loaded(empty).result() == {}
    empty.update(torch.ones(3, 6), Where(5))  # a sequence of which nothing was chosen
    assert empty.result() == {}


def test_a_saved_group_goes_back_into_its_kind() -> None:
    """Also where one of the groups has not had a token yet."""
    data, first = stream(), GroupStats(CHOSEN, DIMS)
    first.update(data[0], Where(0))
    rest = GroupStats(CHOSEN, DIMS)
    for sequence in (1, 2, 3):
        rest.update(data[sequence], Where(sequence))
    again = saved_and_loaded(first)
    rest.merge(again)
    check(rest.result(), expected(data, DIMS))


@pytest.mark.parametrize("where", ["start", "positions", "scattered"])
def test_positions_are_those_of_the_sequence(where: str) -> None:
    """Rows of a call are found by their positions: after a start, or at given ones."""
    data = stream()
    chosen = {name: {s: [p + 17 for p in places] for s, places in of.items()} for name, of in CHOSEN.items()}
    groups, gathered = GroupStats(chosen, DIMS), Gather(chosen["findings"])
    for sequence, h_TD in enumerate(data):
        order_T = torch.arange(len(h_TD))
        if where == "scattered":  # rows may lie in any order
            order_T = torch.randperm(len(h_TD), generator=torch.Generator().manual_seed(sequence))
        at = Where(sequence, 17) if where == "start" else Where(sequence, 99, order_T + 17)
        groups.update(h_TD[order_T], at)
        gathered.update(h_TD[order_T], at)
    check(groups.result(), expected(data, DIMS))
    moved = {(s, p - 17): x for (s, p), x in gathered.result().items()}
    check_gathered(moved, data, None)


def test_rows_at() -> None:
    assert rows_at(Where(0), 4, [3, 0, 4, -1]) == [3, 0]
    assert rows_at(Where(0, start=10), 4, [3, 10, 13, 14, 9]) == [0, 3]
    held = torch.tensor([2, 5, 7])
    assert rows_at(Where(0, start=99, positions=held), 3, [7, 3, 2, 0]) == [2, 0]
    assert rows_at(Where(0), 4, []) == []


def test_different_options_do_not_merge() -> None:
    with pytest.raises(ValueError, match="different options"):
        GroupStats(CHOSEN, (1,)).merge(GroupStats(CHOSEN, (2,)))
    with pytest.raises(ValueError, match="different options"):
        GroupStats(CHOSEN).merge(GroupStats({"findings": {}}))
    with pytest.raises(ValueError, match="different options"):
        Gather({}, (1,)).merge(Gather({}))
    for statistic in (GroupStats(CHOSEN), Gather(CHOSEN["findings"])):
        with pytest.raises(ValueError, match=r"\(tokens, dims\)"):
            statistic.update(torch.ones(2, 3, 6), Where(0))
