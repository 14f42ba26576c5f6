"""Concentration, value drain and implicit bias of random attention, against formulas written out per sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from massact.stats import Where
from massact.stats.attention_call import Attended
from massact.stats.groups import GroupStats
from massact.stats.heads import PARTS, PER_HEAD, PER_PART, SETS, HeadOptions, HeadResult, HeadStats, Targets

H, K, E, F, D = 4, 2, 6, 5, 7
N_HEADS_PER_GROUP = H // K
WEIGHT = torch.randn(D, H * F, generator=torch.Generator().manual_seed(99))
BIAS = torch.linspace(-1, 1, D)
TARGETS = Targets(
    findings={0: [0, 4], 1: [2], 2: [0], 3: [1, 5, 90], 5: [0]},  # 90 lies outside; sequence 4 has none
    random={0: [3, 7], 1: [5], 2: [9], 3: [2, 6], 5: [1]},
    others={0: [1, 2], 1: [0, 1, 3], 2: [4], 3: [0, 3]},
)
LENGTHS = (40, 9, 25, 33, 20, 2)


def project(x_RX: Tensor) -> Tensor:
    """As with a module that has a bias: what it gives to nothing is taken off."""
    return (x_RX @ WEIGHT.T + BIAS) - (0 * x_RX[:1] @ WEIGHT.T + BIAS)


@dataclass(frozen=True)
class Kind:
    """How attention is made: what may be seen, a learned sink, the size of queries and keys.

    A query sees the last `window` keys, or those of its own chunk; nobody sees the hidden ones.
    """

    forward: bool = True
    flag: bool = True
    sink: bool = False
    size: float = 1.0
    window: int | None = None
    chunk: int | None = None
    hidden: tuple[int, ...] = ()


KINDS = {
    "causal": Kind(),
    "causal mask": Kind(flag=False),
    "both ways": Kind(forward=False),
    "learned sink": Kind(sink=True),
    "sharp": Kind(size=3.0),
    "window": Kind(flag=False, window=8),
    "chunks": Kind(flag=False, chunk=10),
    "both ways, hidden keys": Kind(forward=False, flag=False, hidden=(1, 4)),
    "first key hidden": Kind(forward=False, flag=False, hidden=(0,)),
}


def sight(T: int, kind: Kind) -> np.ndarray:
    """Which key each query may see, entry by entry: (T, T)."""
    seen = np.ones((T, T), bool)
    for t in range(T):
        for k in range(T):
            late, outside = kind.forward and k > t, kind.window is not None and t - k >= kind.window
            apart = kind.chunk is not None and t // kind.chunk != k // kind.chunk
            seen[t, k] = not (late or outside or apart or k in kind.hidden)
    return seen


def probabilities(a: Attended) -> np.ndarray:
    """(H, T, S + 1) in float64, the last column is the learned sink's."""
    q, k = a.q_HTE.double().numpy(), np.repeat(a.k_KSE.double().numpy(), N_HEADS_PER_GROUP, 0)
    s = np.einsum("hte,hse->hts", q, k) * a.scale
    if a.mask_HTS is not None:
        s = s + a.mask_HTS.double().numpy()
    elif a.forward:
        s[:, np.triu(np.ones(s.shape[1:], bool), 1)] = -np.inf
    b_H = np.full(H, -np.inf) if a.sink_H is None else a.sink_H.double().numpy()
    s = np.concatenate([s, b_H[:, None, None] + np.zeros((H, s.shape[1], 1))], -1)
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def values(a: Attended) -> np.ndarray:
    return np.repeat(a.v_KSF.double().numpy(), N_HEADS_PER_GROUP, 0)


def attention(T: int, seed: int, kind: Kind = KINDS["causal"]) -> Attended:
    """A random call whose key 0 is liked and whose key 4 is liked by one head, and its output."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    q, k, v = draw(H, T, E) * kind.size + 0.5, draw(K, T, E) * kind.size, draw(K, T, F)
    k[:, 0] += 2.0
    v[:, 0] *= 0.1
    if T > 4:
        k[1, 4] += 3.0
    mask = None
    if not kind.flag:
        mask = torch.zeros(1, T, T).masked_fill(~torch.from_numpy(sight(T, kind)), -math.inf)
    a = Attended(
        q, k, v, None, scale=E**-0.5, mask_HTS=mask, causal=kind.forward and kind.flag, forward=kind.forward,
        sink_H=draw(H) if kind.sink else None,
    )  # fmt: skip
    return replace(a, out_HTF=torch.from_numpy(probabilities(a)[..., :-1] @ values(a)).float())


def calls(kind: Kind = KINDS["causal"], seed: int = 0) -> list[Attended]:
    return [attention(T, 1000 * seed + i, kind) for i, T in enumerate(LENGTHS)]


OPTIONS = HeadOptions(eps=0.12, project=project)


def measured(data: list[Attended], targets: Targets = TARGETS, options: HeadOptions = OPTIONS) -> HeadResult:
    statistic = HeadStats(targets, options)
    for sequence, a in enumerate(data):
        statistic.update(a, Where(sequence))
    return statistic.result()


def rows_of(targets: Targets, name: str, sequence: int, T: int) -> list[int]:
    return [p for p in getattr(targets, name).get(sequence, []) if p < T]


def counted(a: Attended, found: list[int]) -> list[int]:
    """Queries whose attention is looked at: no chosen token, and not the first of a causal model."""
    return [t for t in range(a.shape[1]) if t not in found and not (a.forward and t == 0)]


def entropy_error(a: Attended) -> float:
    """Masses are right to the rounding of the logits behind them, and the logits that they weigh are as large."""
    size = float(a.dense()[0].abs().nan_to_num(posinf=0).max())
    return 2 * torch.finfo(torch.float32).eps * (4 + size) ** 2


def naive_head(a: Attended, sequence: int, targets: Targets = TARGETS) -> dict[str, np.ndarray]:
    """Every number of `PER_HEAD`, head by head."""
    p = probabilities(a)
    _, T, S = a.shape
    v = values(a)
    found = rows_of(targets, "findings", sequence, T)
    queries = counted(a, found)
    table = {name: np.full(H, np.nan) for name in PER_HEAD}
    for h in range(H):
        sets = {name: (rows_of(targets, name, sequence, T), queries) for name in ("findings", "random")}
        for name, (keys, rows) in {**sets, "first": ([0], range(1, T))}.items():
            can = [t for t in rows if any(p[h, t, c] > 0 for c in keys)]
            table[f"mass_{name}"][h] = mean([sum(p[h, t, c] for c in keys) for t in can])
            # A head that looks alike at every key that a query can see, written out as a matrix.
            even = (p[h, :, :-1] > 0) / np.maximum((p[h, :, :-1] > 0).sum(1, keepdims=True), 1)
            table[f"mass_{name}_uniform"][h] = mean([sum(even[t, c] for c in keys) for t in can])
        more = [t for t in queries if (p[h, t, :-1] > 0).sum() > 1]
        table["mass_diagonal"][h] = mean([p[h, t, t] for t in more])
        table["mass_diagonal_uniform"][h] = mean([1 / (p[h, t, :-1] > 0).sum() for t in more])
        if a.sink_H is not None:
            table["slot_mass"][h] = p[h, :, -1].mean()
        terms = [[x * math.log(x) for x in row if x > 0] for row in p[h]]
        table["entropy"][h] = np.mean([-sum(row) for row in terms])
        alpha = alphas(a)[h]
        table["alpha_first"][h] = alpha[0]
        seen_by = [int((p[h, :, k] > 0).sum()) for k in range(S)]
        late = [alpha[k] for k in range(1, S) if seen_by[k] >= min(16, max(seen_by))]
        if S > 1:
            table["secondary"][h] = max(late, default=np.nan)
            norms = [np.linalg.norm(v[h, k]) for k in range(S)]
            for name, at in (("first", [0]), ("findings", found)):
                rest = [norms[k] for k in range(S) if k not in at]
                if at and rest:
                    table[f"value_norm_{name}"][h] = np.mean([norms[k] for k in at]) / np.mean(rest)
    return table


def mean(x: list[float]) -> float:
    """NaN of nothing."""
    return float(np.mean(x)) if len(x) else math.nan


def alphas(a: Attended) -> np.ndarray:
    """Gu's alpha_k: the mean probability of a key over the queries that may see it. (H, S)."""
    p = probabilities(a)[..., :-1]
    return np.array([[mean(p_TS[p_TS[:, k] > 0, k]) for k in range(p.shape[2])] for p_TS in p])


@pytest.mark.parametrize("kind", KINDS)
def test_concentration_and_drain(kind: str) -> None:
    """Mass of the first, chosen and random keys, the slot's, entropy, alpha, value norms: per head and sequence."""
    data = calls(KINDS[kind])
    got = measured(data)
    assert got.sequence.tolist() == list(range(len(data)))
    for i, a in enumerate(data):
        for name, want in naive_head(a, i).items():
            # The entropy is a difference of logits.
            atol = entropy_error(a) if name == "entropy" else 2e-6
            np.testing.assert_allclose(got.per_head[name][i], want, rtol=2e-5, atol=atol, err_msg=f"{name} {i}")
    assert np.isnan(got.per_head["slot_mass"]).all() == (kind != "learned sink")
    assert np.isnan(got.per_head["mass_findings"][4]).all()  # a sequence without findings


@pytest.mark.parametrize("kind", KINDS)
def test_sinks(kind: str) -> None:
    """Mean and greatest alpha over the heads, and the share of heads in which a key is a sink."""
    data = calls(KINDS[kind])
    got = measured(data)
    some = 0
    for i, a in enumerate(data):
        alpha = alphas(a)
        seen_by = (probabilities(a)[0, :, :-1] > 0).sum(0)
        sinks = (alpha > OPTIONS.eps).mean(0)
        sinks[(seen_by == 0) | (seen_by < min(16, seen_by.max()))] = np.nan
        np.testing.assert_allclose(got.alpha[i], alpha.mean(0), rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(got.alpha_max[i], alpha.max(0), rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(got.sinks[i], sinks)
        some += (sinks > 0).sum()
    assert some  # there are sinks to be found


def test_of_a_key_that_few_see_no_sink_is_said() -> None:
    """The last key of a causal model is seen by one query, which may well look at nothing else."""
    a = attention(40, 0)
    q = a.q_HTE.clone()
    q[:, 39] = 30 * a.k_KSE[:, 39].repeat_interleave(N_HEADS_PER_GROUP, 0)
    a = replace(a, q_HTE=q, out_HTF=None)
    got = measured([a], options=HeadOptions(eps=0.12, bias=False))
    assert got.alpha_max[0][39] > 0.9 and np.isnan(got.sinks[0][39])
    assert (got.per_head["secondary"] < 0.9).all()


# ------------------------------------------------------------------------------------------------------ bias
def sampled(a: Attended, keys: list[int]) -> list[int]:
    """Queries that see all chosen keys, or one of them where few do; none is chosen; short enough to be all."""
    p_TS = probabilities(a)[0]
    others = [t for t in range(len(p_TS)) if t not in keys]
    whole = [t for t in others if all(p_TS[t, k] > 0 for k in keys)]
    enough = len(whole) >= min(16, len(p_TS) // 2)
    return whole if enough else [t for t in others if any(p_TS[t, k] > 0 for k in keys)]


def alike(u: np.ndarray, out: np.ndarray) -> list[float]:
    """Constancy, mean cosine of all pairs that are not zero, energy share of updates (R, X)."""
    mean, real = u.mean(0), [x for x in u if x.any()]
    constancy = np.mean([np.linalg.norm(x - mean) for x in u]) / np.linalg.norm(mean) if len(u) > 1 else np.nan
    unit = [x / np.linalg.norm(x) for x in real]
    pairs = [x @ y for i, x in enumerate(unit) for j, y in enumerate(unit) if i != j]
    return [constancy, np.mean(pairs) if pairs else np.nan, (u**2).sum() / (out**2).sum()]


def naive_parts(a: Attended, keys: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(PARTS, PER_PART) of one set of chosen keys, and the mean projected update."""
    p, v, rows = probabilities(a)[..., :-1], values(a), sampled(a, keys)
    u = np.stack([sum(p[:, t, c, None] * v[:, c] for c in keys) for t in rows], 1)  # (H, R, F)
    out = a.out_HTF.double().numpy()[:, rows]
    joined = [np.concatenate(list(x), -1) for x in (u, out)]
    written = [x @ WEIGHT.double().numpy().T for x in joined]
    heads = np.nanmean([alike(u[h], out[h]) for h in range(H)], 0)
    return np.array([heads, alike(*joined), alike(*written)]), written[0].mean(0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_chosen_tokens(kind: str) -> None:
    """Constancy, cosine and energy share of each head, of all heads side by side, and behind the output projection."""
    data = calls(KINDS[kind])
    got = measured(data)
    assert set(got.parts) == {(part, of, name) for part in PARTS for of in SETS for name in PER_PART}
    means: dict[str, list[np.ndarray]] = {of: [] for of in SETS}
    for i, a in enumerate(data):
        for of in SETS:
            found = np.array([[got.parts[part, of, name][i] for name in PER_PART] for part in PARTS])
            keys = rows_of(TARGETS, of, i, a.shape[1])
            if not keys or not sampled(a, keys):
                assert np.isnan(found).all()
                continue
            want, mean = naive_parts(a, keys)
            means[of].append(mean)
            np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-6, err_msg=f"{of} {i}")
    for of, of_sequences in means.items():
        assert got.between[of] == pytest.approx(alike(np.stack(of_sequences), np.ones(1))[1], abs=1e-5)


def test_long_sequences_are_sampled() -> None:
    """Beyond 128 queries every n-th one stands for the rest."""
    a = attention(300, 3)
    got = measured([a], replace(TARGETS, findings={0: [0, 4]}))
    rows = list(range(5, 300))[::3]
    p, v = probabilities(a)[..., :-1], values(a)
    u = np.concatenate([p[:, rows, 0, None] * v[:, None, 0] + p[:, rows, 4, None] * v[:, None, 4]][0].tolist(), -1)
    want = alike(u, np.concatenate(list(a.out_HTF.double().numpy()[:, rows]), -1))
    found = [got.parts["concat", "findings", name][0] for name in PER_PART]
    np.testing.assert_allclose(found, want, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_add_up_to_the_output(kind: str) -> None:
    """What chosen tokens write and what the rest writes is the whole output; of a wrong output it is not."""
    data = calls(KINDS[kind])
    got = measured(data)
    chosen = [rows_of(TARGETS, "findings", i, a.shape[1]) for i, a in enumerate(data)]
    known = np.array([bool(keys and sampled(a, keys)) for keys, a in zip(chosen, data, strict=True)])
    assert known.any() and (got.residual[known] < 2e-6).all() and np.isnan(got.residual[~known]).all()
    assert (got.off < 2e-6).all()  # of every sequence, whether anything was chosen or not
    for spoil in (lambda x: x * 1.5, lambda x: x + 0.2, lambda x: x.flip(0)):
        wrong = measured([replace(a, out_HTF=spoil(a.out_HTF)) for a in data])
        assert (wrong.residual[:4][known[:4]] > 0.05).all() and (wrong.off[:4] > 0.05).all()
    if kind == "learned sink":  # a sink that is not known of makes rows sum to one
        wrong = measured([replace(a, sink_H=None) for a in data])
        assert (wrong.off[:4] > 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stable_rank(kind: str) -> None:
    """|U|_F^2 / |U|_2^2 of the outputs of all counted queries of all sequences, by their singular values."""
    data = calls(KINDS[kind])
    stacked = [
        a.out_HTF.double().numpy()[:, counted(a, rows_of(TARGETS, "findings", i, a.shape[1]))]
        for i, a in enumerate(data)
    ]
    singular = np.linalg.svd(np.concatenate(stacked, 1), compute_uv=False)
    want = (singular**2).sum(1) / singular[:, 0] ** 2
    np.testing.assert_allclose(measured(data).stable_rank, want, rtol=1e-4)


def test_stable_rank_of_equal_outputs_is_one() -> None:
    a = attention(20, 1)
    same = replace(a, out_HTF=torch.ones(H, 20, F) * torch.arange(1, 21)[:, None])
    np.testing.assert_allclose(measured([same]).stable_rank, 1, rtol=1e-5)


# ------------------------------------------------------------------------------------------- numbers at the edge
@pytest.mark.parametrize("logit", [-20.0, -60.0, -85.0, -100.0, -300.0])
def test_tiny_probabilities(logit: float) -> None:
    """A token that hardly anybody looks at: cosines stay cosines, shares stay small, nothing is infinite."""
    a = attention(40, 0)
    q, k = torch.cat([a.q_HTE, torch.ones(H, 40, 1)], -1), torch.cat([a.k_KSE, torch.zeros(K, 40, 1)], -1)
    k[:, [0, 4], -1] = logit / a.scale
    a = replace(a, q_HTE=q, k_KSE=k)
    a = replace(a, out_HTF=torch.from_numpy(probabilities(a)[..., :-1] @ values(a)).float())
    got = measured([a])
    for (_, of, name), (found,) in got.parts.items():
        assert np.isnan(found) or np.isfinite(found)
        if name == "cosine":
            assert np.isnan(found) or -1 - 1e-6 <= found <= 1 + 1e-6
        if (of, name) == ("findings", "energy_share"):
            assert 0 <= found < 1e-9
    if logit > -80:  # still a number of float32
        want, _ = naive_parts(a, [0, 4])
        found = np.array([[got.parts[part, "findings", name][0] for name in PER_PART] for part in PARTS])
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found[:, 2], want[:, 2], rtol=1e-3, atol=1e-37)  # kept in float32
    assert got.residual[0] < 2e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.01, 1.0, 3.0, 6.0]), T=st.integers(1, 40))
def test_shares_are_shares_and_cosines_are_cosines(seed, size, T):
    kind = Kind(forward=seed % 2 == 0, size=size)
    a = attention(T, seed, kind)
    got, close = measured([a]), entropy_error(a)
    for name in ("mass_first", "mass_findings", "mass_random", "alpha_first", "secondary"):
        x = got.per_head[name]
        assert np.all(np.isnan(x) | ((x >= 0) & (x <= 1 + close))), name
    assert np.all(got.per_head["entropy"] <= math.log(T) + close) and np.all(got.per_head["entropy"] >= -close)
    for (_, _, name), x in got.parts.items():
        if name == "cosine":
            assert np.all(np.isnan(x) | (np.abs(x) <= 1 + 1e-6))


# ------------------------------------------------------------------------------------ what is asked, what is there
def test_what_is_not_asked_for_is_not_measured() -> None:
    data = calls()
    got = measured(data, options=HeadOptions(columns=False, bias=False))
    whole = measured(data)
    assert not got.alpha and not got.between and np.isnan(got.residual).all()
    assert all(np.isnan(x).all() for x in got.parts.values())
    for name in PER_HEAD:
        of_columns = name in ("entropy", "alpha_first", "secondary")
        want = np.full_like(whole.per_head[name], np.nan) if of_columns else whole.per_head[name]
        np.testing.assert_array_equal(got.per_head[name], want)
    plain = measured(data, options=HeadOptions())  # no projection known
    assert all(np.isnan(plain.parts["projected", of, name]).all() for of in SETS for name in PER_PART)
    assert np.isfinite(plain.parts["concat", "findings", "cosine"][:4]).all()


def test_only_logits_were_seen() -> None:
    """The masses need no queries and keys; what needs values or outputs is NaN, not a guess."""
    data = calls()
    got = measured([Attended(None, None, None, None, forward=True, scores_HTS=a.dense()[0]) for a in data])
    for i, a in enumerate(data):
        for name, want in naive_head(a, i).items():
            want = np.full(H, np.nan) if name.startswith("value_norm") else want
            np.testing.assert_allclose(got.per_head[name][i], want, rtol=2e-5, atol=2e-6, err_msg=name)
    assert np.isnan(got.stable_rank).all() and np.isnan(got.residual).all() and got.groups["q"] == {}


def test_queries_keys_and_values_of_chosen_tokens() -> None:
    """All heads of a token side by side are one vector of its group."""
    data = calls()
    got, groups = measured(data), {n: getattr(TARGETS, n) for n in ("findings", "random", "others")}
    for name, field in (("q", "q_HTE"), ("k", "k_KSE"), ("v", "v_KSF")):
        want = GroupStats(groups)
        for i, a in enumerate(data):
            x = getattr(a, field)
            want.update(torch.cat(list(x), -1), Where(i))
        for group, result in want.result().items():
            assert got.groups[name][group].n_tokens == result.n_tokens
            assert got.groups[name][group].cosine == pytest.approx(result.cosine)
            np.testing.assert_allclose(got.groups[name][group].mean, result.mean)


def test_nothing_seen() -> None:
    got = HeadStats(TARGETS).result()
    assert len(got.sequence) == 0 and got.residual.shape == (0,) and got.between == {}
    assert all(x.shape[0] == 0 for x in got.per_head.values())


def test_cross_attention_has_no_chosen_keys() -> None:
    """Its keys are another sequence's: the first key, entropy and columns are measured, findings are not."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(H, n, E, generator=rng) for n in (12, 20, 20))
    p = (q @ k.transpose(1, 2) * 0.4).double().softmax(-1)
    got = measured([Attended(q, k, v, (p @ v.double()).float(), scale=0.4)])
    np.testing.assert_allclose(got.per_head["mass_first"][0], p[:, 1:, 0].mean(1), rtol=1e-5)
    np.testing.assert_allclose(got.alpha[0], p.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(got.per_head["entropy"][0], -(p * p.log()).sum(-1).mean(1), rtol=1e-5)
    assert np.isnan(got.per_head["mass_findings"]).all() and np.isnan(got.residual).all() and got.groups["q"] == {}


@pytest.mark.parametrize("where", ["start", "positions"])
def test_padding(where: str) -> None:
    """Chosen tokens are named by their positions in the padded sequence; padding was cut off before."""
    data = calls()

    def moved(chosen: Any) -> dict[int, list[int]]:
        return {s: [p + 11 for p in places] for s, places in chosen.items()}

    targets = Targets(moved(TARGETS.findings), moved(TARGETS.random), moved(TARGETS.others))
    statistic = HeadStats(targets, OPTIONS)
    for i, a in enumerate(data):
        T = a.shape[1]
        statistic.update(a, Where(i, 11) if where == "start" else Where(i, 99, torch.arange(11, 11 + T)))
    same(statistic.result(), measured(data), 0)


def test_positions_with_holes() -> None:
    """The row of a chosen token is where its position is held; a position that was left out is not there."""
    a, held = attention(9, 1), torch.tensor([0, 1, 4, 5, 6, 7, 10, 11, 12])
    statistic = HeadStats(Targets({1: [4, 8]}, {1: [11]}, {}), OPTIONS)
    statistic.update(a, Where(1, positions=held))
    direct = HeadStats(Targets({1: [2]}, {1: [7]}, {}), OPTIONS)
    direct.update(a, Where(1))
    same(statistic.result(), direct.result(), 0)


def same(a: HeadResult, b: HeadResult, rtol: float) -> None:
    """Two results, field by field; sums in another order differ by rounding."""
    np.testing.assert_array_equal(a.sequence, b.sequence)
    np.testing.assert_array_equal(a.residual, b.residual)
    for x, y in ((a.per_head, b.per_head), (a.parts, b.parts)):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=str(name))
    for field in ("alpha", "alpha_max", "sinks"):
        for x, y in zip(getattr(a, field), getattr(b, field), strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(a.stable_rank, b.stable_rank, rtol=max(rtol, 1e-12))
    assert a.between == pytest.approx(b.between, rel=max(rtol, 1e-12), nan_ok=True)
    for name in ("q", "k", "v"):
        assert set(a.groups[name]) == set(b.groups[name])
        for group, x in a.groups[name].items():
            y = b.groups[name][group]
            assert x.n_tokens == y.n_tokens and x.cosine == pytest.approx(y.cosine, nan_ok=True)
            np.testing.assert_allclose(x.mean, y.mean, rtol=1e-9, atol=1e-12)
