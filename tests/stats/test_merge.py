"""The contract of every statistic: any split by sequences and any order of merges gives the same result."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import pkgutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import massact
from massact.classics import attention_biases
from massact.classics.attention_by_class import ClassShares
from massact.explanations.heat_maps import _Dense
from massact.explanations.image_sinks import _OnImages, _Scaled
from massact.interventions import relocation
from massact.interventions.massive_entries import Massive
from massact.interventions.sinks import MassiveTokens, Sinks, SinkStats
from massact.labs.looks import _FirstMass, _KeyScale, _Sizes
from massact.quantisation.deviations import Kept, Off
from massact.quantisation.massive_tokens import MassiveTokens as MassivePlaces
from massact.quantisation.ranges import Look, Ranges
from massact.records.sites import Site
from massact.stats import DimMoments, HiddenStats, Keep, Ranks, Resumable, Statistic, TokenMax, Where
from massact.stats.gram import GramStats
from massact.stats.groups import Gather, GroupStats
from massact.stats.heads import HeadStats
from massact.stats.hits import HitShares, TailCounts
from massact.stats.neighbours import NeighbourCosines
from massact.stats.patch_columns import PatchColumns
from massact.stats.positions import MagnitudesAt, PositionMoments
from massact.stats.prefix_medians import PrefixMedians
from massact.stats.shares import AttentionShares
from massact.stats.token_peaks import TokenPeaks
from massact.training.monitor import AttentionSums, HiddenSums
from tests.stats import test_gram as gram
from tests.stats import test_groups as groups
from tests.stats import test_heads as heads
from tests.stats import test_shares as shares
from tests.stats.oracle import DTYPES, Seen, check_hidden, dims_oracle, hard_stream, hidden_oracle, order_of


def check_dims(result: Any, stream: list[Seen]) -> None:
    want = dims_oracle(stream, hit=6.0)
    size_D = np.sqrt(want["mean"] ** 2 + want["std"] ** 2)
    assert result.n_tokens == want["n_tokens"]
    np.testing.assert_array_equal(result.n, want["n"])
    np.testing.assert_array_equal(result.max, want["max"])
    np.testing.assert_allclose(result.mean_abs, want["mean_abs"], rtol=2e-6)
    assert np.all(np.abs(result.mean - want["mean"]) <= 2e-6 * size_D)
    assert np.all(np.abs(result.std - want["std"]) <= 2e-6 * size_D)


def check_token_max(result: Any, stream: list[Seen]) -> None:
    for i, seen in enumerate(stream):
        positions_T, max_T = result.tokens(i)
        np.testing.assert_array_equal(positions_T, seen.positions_T)
        np.testing.assert_array_equal(max_T, seen.h_TD.double().abs().amax(1).numpy())


def check_token_peaks(result: Any, stream: list[Seen]) -> None:
    for i, seen in enumerate(stream):
        h_TD = seen.h_TD.double().numpy()
        np.testing.assert_array_equal(result.positions[i], seen.positions_T)
        for token_D, value, dim in zip(h_TD, result.value[i], result.dim[i], strict=True):
            known = [(abs(v), -d) for d, v in enumerate(token_D) if np.isfinite(v)]
            assert dim == (-max(known)[1] if known else -1)
            assert value == token_D[dim] if known else np.isnan(value)
        sizes = sorted(abs(v) for v in h_TD.ravel() if np.isfinite(v))
        np.testing.assert_array_equal(result.median[i], sizes[(len(sizes) - 1) // 2] if sizes else np.nan)


def check_keep(result: Any, stream: list[Seen]) -> None:
    for seen, positions_T, values_TD in zip(stream, result.positions, result.values, strict=True):
        np.testing.assert_array_equal(positions_T, seen.positions_T)
        np.testing.assert_array_equal(values_TD, seen.h_TD.float().numpy())


def check_ranks(result: Any, stream: list[Seen]) -> None:
    for i, seen in enumerate(stream):
        h_TD = seen.h_TD.double().numpy()
        order_V, V, D = order_of(h_TD), h_TD.size, h_TD.shape[1]
        assert result.ranks == (1, 2, 3, 4, 5, 10, 100, 0.01, 0.1, 0.5)
        ranks = [0, 1, 2, 3, 4, 9, 99, -(-V // 100) - 1, -(-V // 10) - 1, V // 2]
        for j, rank in enumerate(ranks):
            if rank >= V:
                assert np.isnan(result.value[i, j]) and result.pos[i, j] == result.dim[i, j] == -1
                continue
            assert result.value[i, j] == h_TD.reshape(-1)[order_V[rank]]
            assert result.pos[i, j] == seen.positions_T[order_V[rank] // D]
            assert result.dim[i, j] == order_V[rank] % D


CHOSEN_TOKENS = {0: (0, 2, 10**6), 1: (1,), 2: ()}


def check_prefix_medians(result: Any, stream: list[Seen]) -> None:
    for seen in stream:
        wanted = CHOSEN_TOKENS.get(seen.sequence, ())
        assert list(result[seen.sequence]) == list(wanted)
        for pos in wanted:
            size = np.abs(seen.h_TD.float().numpy()[seen.positions_T <= pos])
            values = np.sort(size[np.isfinite(size)])
            middle = values[(len(values) - 1) // 2] if len(values) else np.nan
            np.testing.assert_array_equal(result[seen.sequence][pos], middle)


def check_columns(result: Any, stream: list[Seen]) -> None:
    """Of the first three images, |h| of patches 1 to 12 at the two dims where it is greatest."""
    assert sorted(result) == list(range(min(3, len(stream))))
    for n, kept in result.items():
        size_PD = stream[n].h_TD[1:13].float().abs().numpy()
        greatest_D = np.nan_to_num(size_PD, nan=0.0, posinf=0.0).max(0)
        np.testing.assert_array_equal(sorted(greatest_D[list(kept)]), sorted(greatest_D)[-2:])
        for dim, size_P in kept.items():
            np.testing.assert_array_equal(size_P, size_PD[:, dim])


def check_hits(kind: str, limit: float, result: Any, stream: list[Seen]) -> None:
    np.testing.assert_array_equal(result.sequence, np.arange(len(stream)))
    np.testing.assert_array_equal(result.n_tokens, [len(seen.h_TD) for seen in stream])
    np.testing.assert_array_equal(result.count, [counts_of(kind, seen.h_TD, limit) for seen in stream])
    assert result.count.dtype == np.int64


def counts_of(kind: str, h_TD: torch.Tensor, limit: float) -> np.ndarray:
    """(D,) counts, in float64."""
    x = h_TD.double().numpy()
    fine = np.isfinite(x)
    if kind == "hits":
        return (np.where(fine, np.abs(x), 0) >= limit).sum(0)
    values = x[fine]
    if not len(values):
        return np.zeros(x.shape[1], int)
    return (np.abs(np.where(fine, x, values.mean()) - values.mean()) > limit * values.std()).sum(0)


def spoilt_stream(seed: int, lengths: list[int], D: int, dtype: torch.dtype) -> list[Seen]:
    """Three of four with a value that is not finite in every sequence."""
    stream, rng = hard_stream(seed, lengths, D, dtype), np.random.default_rng(seed)
    bad = [None, float("nan"), float("inf"), -float("inf")][seed % 4]
    for seen in stream:
        if bad is not None:
            seen.h_TD[rng.integers(len(seen.h_TD)), rng.integers(D)] = bad
    return stream


def hidden_check(**options: Any) -> Callable[[Any, list[Seen]], None]:
    return lambda result, stream: check_hidden(result, hidden_oracle(stream, **options))


# ------------------------------------------------------------------------------- streams of other shapes
def grouped_stream(seed: int, lengths: list[int], D: int, dtype: torch.dtype) -> list[Seen]:
    data = groups.stream(seed, 5 + D % 5, dtype, zero=bool(seed % 2))
    return [Seen(s, h_TD, np.arange(len(h_TD))) for s, h_TD in enumerate(data)]


def of_one_length(seed: int, lengths: list[int], D: int, dtype: torch.dtype, n: int = 13) -> list[Seen]:
    return hard_stream(seed, [n] * len(lengths), D + 1, dtype)


def attention_stream(seed: int, lengths: list[int], D: int, dtype: torch.dtype, kind: str = "causal") -> list[Seen]:
    calls = heads.calls(heads.KINDS[kind], seed % 100)[: len(lengths)]
    return [Seen(s, a, np.arange(a.shape[1])) for s, a in enumerate(calls)]


def long_calls(seed: int, lengths: list[int], D: int, dtype: torch.dtype) -> list[Seen]:
    """Attention calls of one length; of both ways of seeing it."""
    kind = heads.KINDS["learned sink" if seed % 2 else "both ways"]
    return [Seen(s, heads.attention(20, 1000 * seed + s, kind), np.arange(20)) for s in range(len(lengths))]


def shared_stream(seed: int, lengths: list[int], D: int, dtype: torch.dtype) -> list[Seen]:
    sight = list(shares.SIGHTS.values())[seed % len(shares.SIGHTS)]
    called = [shares.call(seed + s, sight, bool(seed % 2))[0] for s in range(len(lengths))]
    return [Seen(s, a, np.arange(shares.T)) for s, a in enumerate(called)]


def check_groups(result: Any, stream: list[Seen]) -> None:
    groups.check(result, groups.expected([seen.h_TD for seen in stream], groups.DIMS), rtol=1e-8)


def check_gathered(result: Any, stream: list[Seen]) -> None:
    groups.check_gathered(result, [seen.h_TD for seen in stream], None)


def check_gram(result: Any, stream: list[Seen]) -> None:
    """Sequence by sequence; heavy tails of sixteen decades have no common matrix in float64."""
    gram.check(result, [seen.h_TD.double().numpy() for seen in stream], corpus=False)


def check_moments(result: Any, stream: list[Seen]) -> None:
    x_NRD = np.stack([seen.h_TD.double().numpy()[[1, 3]] for seen in stream])
    np.testing.assert_allclose(result.mean, x_NRD.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.std, x_NRD.std(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(result.values, x_NRD[:2].astype(np.float32))
    assert result.n == len(stream) and result.kept.tolist() == list(range(min(2, len(stream))))


CHOSEN = {0: [2, 5], 3: [1]}
AMONG = [1, 2, 3, 5, 8]


def check_magnitudes(result: Any, stream: list[Seen]) -> None:
    x = {s.sequence: np.abs(s.h_TD.double().numpy()) for s in stream}
    chosen = [x[s][p] for s, at in CHOSEN.items() if s in x for p in at]
    rest = [x[s][p] for s in x for p in AMONG if p not in CHOSEN.get(s, ())]
    assert (result.n_chosen, result.n_rest) == (len(chosen), len(rest))
    np.testing.assert_allclose(result.chosen, np.mean(chosen, 0), rtol=1e-12)
    np.testing.assert_allclose(result.rest, np.mean(rest, 0), rtol=1e-12)


def check_outputs(result: Any, stream: list[Seen]) -> None:
    for seen in stream:
        assert torch.equal(result[seen.sequence], seen.h_TD)


CLUSTERS = {0: {2: 0, 5: 1}, 3: {1: 0}}  # sequence -> position -> cluster
LOOKS = (Look(False, False, "tensor", 0), Look(False, True, "token", 0), Look(False, False, "channel", 0),
         Look(True, True, "tensor", 0), Look(True, False, "static", 0))  # fmt: skip


def check_off(result: Any, stream: list[Seen]) -> None:
    for seen in stream:
        x, mine = seen.h_TD.double().numpy(), list(CLUSTERS.get(seen.sequence, {}))
        for sums, rows in (
            (result[seen.sequence].massive, x[mine]),
            (result[seen.sequence].rest, np.delete(x, mine, 0)),
        ):
            assert (sums.n, sums.of) == (len(rows), len(rows))
            np.testing.assert_allclose(sums.off, ((rows - 1) ** 2).sum(), rtol=1e-9)


def check_ranges(result: Any, stream: list[Seen]) -> None:
    x = {s.sequence: s.h_TD.double().numpy() for s in stream}
    rest = {s: np.delete(h, list(CLUSTERS.get(s, {})), 0) for s, h in x.items()}
    for spares, among in ((False, x), (True, rest)):
        for rotated in (False, True):  # a reversal changes no size
            assert float(result.amax[rotated, spares]) == max(np.abs(h).max() for h in among.values())
            assert {s: float(result.of_sequence[rotated, spares, s]) for s in among} == {
                s: np.abs(h).max() for s, h in among.items()
            }
        np.testing.assert_array_equal(result.channels[spares], np.abs(np.concatenate(list(among.values()))).max(0))
    assert {s: int(n.sum()) for (rotated, s), n in result.magnitudes.items() if not rotated} == {
        s: np.count_nonzero(h) for s, h in rest.items()
    }
    n_rest = sum(np.count_nonzero(h) for h in rest.values())
    assert all(int(counts.sum()) <= n_rest for counts in result.shares.values())
    at = [[x[s][p] for s in x for p, c in CLUSTERS.get(s, {}).items() if c == cluster] for cluster in (0, 1)]
    assert result.tokens.tolist() == [len(rows) for rows in at]
    for sums, rows in zip(result.sums, at, strict=True):
        np.testing.assert_allclose(sums, np.sum(rows, 0) if rows else 0, rtol=1e-9)


# ------------------------------------------------------------------------------- the cases
def assert_same(a: Any, b: Any, rtol: float = 1e-9, joined: Container[str] | None = None, name: str = "") -> None:
    """Two results, entry by entry: what is selected or counted is equal, floats are so to `rtol`.

    Args:
        joined: only these fields are floats that were summed; None: all floats may be.
    """
    if dataclasses.is_dataclass(a):
        a, b = ({f.name: getattr(x, f.name) for f in dataclasses.fields(x)} for x in (a, b))
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key], rtol, joined, str(key))
    elif isinstance(a, tuple | list):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other, rtol, joined, name)
    elif np.asarray(a).dtype.kind == "f" and (joined is None or name.removeprefix("dim_") in joined):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 100, err_msg=name)
    else:
        np.testing.assert_array_equal(a, b, err_msg=name)


def same_ranges(a: Any, b: Any) -> None:
    """What it holds, not what it was made with."""
    for name in ("amax", "of_sequence", "channels", "magnitudes", "shares", "sums", "tokens"):
        assert_same(getattr(a, name), getattr(b, name), name=name)


Stream = Callable[[int, list[int], int, torch.dtype], list[Seen]]


@dataclass(frozen=True)
class Case:
    """A statistic, what it is given, and what it must equal.

    Args:
        make: a fresh one.
        check: of a result, what NumPy makes of the whole stream; None: it is compared with its own unsplit run.
        stream: seed, lengths, dims, dtype -> sequences.
        same: compares two results.
        basic: it takes hidden states of any length and place, without reading them, and goes on from its state.
        dtypes: of the stream.
    """

    make: Callable[[], Statistic]
    check: Callable[[Any, list[Seen]], None] | None = None
    stream: Stream = hard_stream
    same: Callable[[Any, Any], None] = assert_same
    basic: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


selected = partial(assert_same, rtol=1e-11, joined=("mean", "std", "mean_abs"))
basic = partial(Case, same=selected, basic=True, dtypes=DTYPES)
CASES: dict[str, Case] = {
    "hidden": basic(lambda: HiddenStats(top_k=5), hidden_check(top_k=5, hit=6.0, mad=False)),
    "hidden, mad": basic(lambda: HiddenStats(3, 900.0, True), hidden_check(top_k=3, hit=900.0, mad=True)),
    "hidden, accelerator": basic(
        lambda: HiddenStats(5, mad=True, blocked=False), hidden_check(top_k=5, hit=6.0, mad=True)
    ),
    "dims": basic(DimMoments, check_dims),
    "token max": basic(TokenMax, check_token_max),
    "token peaks": Case(TokenPeaks, check_token_peaks, spoilt_stream),
    "keep": basic(Keep, check_keep),
    "ranks": basic(Ranks, check_ranks),
    **{
        f"{name} of {limit}": basic(partial(kind, limit), partial(check_hits, name, limit), spoilt_stream)
        for name, kind in (("hits", HitShares), ("tail", TailCounts))
        for limit in (0.5, 2.0, 6.0, 6.1)
    },
    "groups": Case(lambda: GroupStats(groups.CHOSEN, groups.DIMS), check_groups, grouped_stream),
    "gathered": Case(lambda: Gather(groups.CHOSEN["findings"]), check_gathered, grouped_stream),
    "prefix medians": Case(lambda: PrefixMedians(CHOSEN_TOKENS), check_prefix_medians, spoilt_stream),
    "gram": Case(lambda: GramStats(gram.CHOSEN, corpus=True), check_gram, dtypes=(torch.float32, torch.float64)),
    "moments": Case(lambda: PositionMoments([1, 3], keep=2), check_moments, of_one_length),
    "magnitudes": Case(lambda: MagnitudesAt(CHOSEN, AMONG), check_magnitudes, of_one_length),
    "patch columns": Case(lambda: PatchColumns(range(1, 13), 3, 2), check_columns, of_one_length),
    "neighbours": Case(lambda: NeighbourCosines(range(1, 13), (3, 4)), None, of_one_length),
    **{
        f"heads, {kind}": Case(
            lambda: HeadStats(heads.TARGETS, heads.OPTIONS),
            None,
            partial(attention_stream, kind=kind),
            partial(heads.same, rtol=1e-9),
        )
        for kind in heads.KINDS
    },
    "attention shares": Case(
        lambda: AttentionShares(shares.GROUPS, shares.PATCHES, shares.MASSIVE), None, shared_stream
    ),
    "class shares": Case(lambda: ClassShares(lambda at, T: (torch.arange(T) + at.sequence) % 7), None, long_calls),
    "attention maps": Case(_Dense, None, long_calls),
    "first mass": Case(lambda: _FirstMass(1), None, long_calls),
    "key scale": Case(_KeyScale, None, long_calls),
    "sums": Case(lambda: HiddenSums((1.0, 1.0)), None, spoilt_stream),
    "attention sums": Case(AttentionSums, None, long_calls),
    "massive tokens": Case(
        lambda: MassiveTokens(Massive(Site("", 3, "resid_post"), (0, 1), (900.0, 777.0), {}, {})), None, of_one_length
    ),
    "sinks": Case(lambda: SinkStats(Sinks(eps=0.12), {0: [4], 2: [0, 7]}), None, attention_stream),
    "kept": Case(Kept, check_outputs),
    "off": Case(
        lambda: Off({s: torch.ones(13, 1) for s in range(6)}, MassivePlaces(("7@start",), CLUSTERS)),
        check_off,
        of_one_length,
    ),
    "ranges": Case(lambda: Ranges(CLUSTERS, 2, LOOKS, lambda x: x.flip(-1)), check_ranges, of_one_length, same_ranges),
    "outputs": Case(relocation._Outputs, check_outputs),
    "attention outputs": Case(attention_biases._Outputs, None, attention_stream),
    "sizes": Case(lambda: _Sizes(1), None, of_one_length),
    "phi": Case(lambda: _Scaled(dict.fromkeys(range(6), [1, 4]), [0, 1]), None, of_one_length),
    "on images": Case(
        lambda: _OnImages(dict.fromkeys(range(6), [1, 4]), dict.fromkeys(range(6), [9, 12])), None, long_calls
    ),
}
BASIC = [name for name, case in CASES.items() if case.basic]


def statistics() -> Iterator[type]:
    """Every class of the package that updates, merges and has a result."""
    for found in pkgutil.walk_packages(massact.__path__, "massact."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for cls in vars(module).values():
            made_here = inspect.isclass(cls) and cls.__module__ == module.__name__
            if made_here and all(callable(getattr(cls, name, None)) for name in ("update", "merge", "result")):
                if not inspect.isabstract(cls) and not getattr(cls, "_is_protocol", False):
                    yield cls


def test_every_statistic_has_a_case() -> None:
    covered = {type(case.make()) for case in CASES.values()}
    assert not set(statistics()) - covered, "add it to CASES"
    assert all(isinstance(case.make(), Statistic) for case in CASES.values())


def saved_and_loaded(statistic: Any) -> Any:
    """Through the file that a checkpoint writes."""
    file = io.BytesIO()
    np.savez(file, **statistic.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        return type(statistic).from_state(dict(state))


@pytest.mark.parametrize(("case", "dtype"), [(n, d) for n, c in CASES.items() for d in c.dtypes], ids=str)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    D=st.integers(1, 20),
    group=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    arrival=st.permutations(range(6)),
    order=st.permutations(range(4)),
    fresh=st.booleans(),
    save=st.booleans(),
)
def test_any_split_and_any_order_of_merges(case, dtype, seed, lengths, D, group, arrival, order, fresh, save):
    """Some parts get nothing at all; sequences arrive in any order."""
    make, check = CASES[case].make, CASES[case].check
    stream = CASES[case].stream(seed, lengths, D, dtype)
    whole, parts = make(), [make() for _ in range(4)]
    for seen in stream:
        whole.update(seen.h_TD, Where(seen.sequence))
    for i in arrival:
        for seen in stream[i : i + 1]:
            parts[group[i]].update(seen.h_TD, Where(seen.sequence))
    if save:
        parts = [saved_and_loaded(part) if isinstance(part, Resumable) else part for part in parts]
    merged, others = (make(), order) if fresh else (parts[order[0]], order[1:])
    for i in others:
        merged.merge(parts[i])
    if check is not None:
        check(merged.result(), stream)
    CASES[case].same(merged.result(), whole.result())


@pytest.mark.parametrize("case", BASIC)
def test_a_state_is_complete(case):
    """Saved, loaded, and updated further equals never having stopped; also before the first update."""
    make, check = CASES[case].make, CASES[case].check
    stream = hard_stream(7, [13, 1, 30], 9, torch.float32)
    going, resumed = make(), saved_and_loaded(make())
    for seen in stream:
        going.update(seen.h_TD, Where(seen.sequence))
        resumed.update(seen.h_TD, Where(seen.sequence))
        resumed = saved_and_loaded(resumed)
    check(resumed.result(), stream)
    assert_same(resumed.result(), going.result(), rtol=0)
    assert isinstance(going, Resumable)


@pytest.mark.parametrize("case", BASIC)
def test_start_and_positions(case):
    make, check = CASES[case].make, CASES[case].check
    stream = [Seen(s.sequence, s.h_TD, s.positions_T + 17) for s in hard_stream(8, [12, 25], 6, torch.float32)]
    by_start, by_positions = make(), make()
    for seen in stream:
        by_start.update(seen.h_TD, Where(seen.sequence, start=17))
        positions = torch.from_numpy(seen.positions_T)
        by_positions.update(seen.h_TD, Where(seen.sequence, start=99, positions=positions))
    check(by_start.result(), stream)
    check(by_positions.result(), stream)


@pytest.mark.parametrize("case", BASIC)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_on_an_accelerator_never_synchronises(case, dtype):
    """A meta tensor has no values: reading one, or a shape that depends on values, is an error."""
    h_TD = torch.empty(20, 9, dtype=dtype, device="meta")
    statistic = CASES[case].make()
    for where in (Where(0), Where(1, start=5), Where(2, positions=torch.arange(20))):
        statistic.update(h_TD, where)


def test_the_meta_device_does_refuse_to_be_read():
    x = torch.empty(3, device="meta")
    for read in (lambda: x.max().item(), lambda: x[x > 0], lambda: bool((x > 0).all()), lambda: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
