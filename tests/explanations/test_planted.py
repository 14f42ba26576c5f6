"""Every number of an explanation against its closed form, on a hand-built model: not evidence about real models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.explanations.targets import reading_blocks
from massact.explanations.unembedding import dark_rows, unread
from massact.explanations.weights import norm_weights_table
from massact.records.clusters import clusters_table
from massact.records.kinds.explanation import Explanation
from massact.reports import story_in_words
from tests import planted_explain as plant
from tests.facts import tells
from tests.families import build
from tests.interventions.test_catalogue import table as findings_of
from tests.planted_explain import D, Explained, H, Tokenizer, attention, tokens

N, T = 3, 24
WELL_SEEN = T - 16 + 1  # keys below this are seen by 16 queries, the fewest over which a sink is told
OFF = {"null": False, "bos_contrast": False}


@cache
def explained(second: int | None = None, gate: str = "") -> tuple[Explained, Tensor, Explanation]:
    """The model, its ids and its explanation, made once for all tests."""
    module, ids = Explained(gate), tokens(N, T, second)
    model = ma.load(module, inputs={"input_ids": ids})
    corpus = ma.corpus({"input_ids": ids}, tokenizer=Tokenizer())
    return module, ids, ma.explain(model, corpus, ma.scan(model, corpus, **OFF))


def where(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Rows with these values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def one(table: pd.DataFrame, **wanted: object) -> pd.Series:
    rows = where(table, **wanted)
    assert len(rows) == 1, wanted
    return rows.iloc[0]


def second_at(sequence: int, second: int | None) -> int | None:
    return None if second is None else second + sequence


def over_sequences(see: Callable[[np.ndarray, int | None], np.ndarray], second: int | None) -> np.ndarray:
    """Mean over sequences of something of the probabilities (H, T, T) of block 2 and the second marked position."""
    places = [second_at(i, second) for i in range(N)]
    return np.mean([see(attention(T, s).numpy(), s) for s in places], axis=0)


def states(module: Explained, ids: Tensor) -> dict[str, np.ndarray]:
    """What enters block 2, its values and the output of its heads, by plain hooks: "x", "v", "out", "write"."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach().double().numpy()

    attn = module.layers[1].attn
    hooks = [
        module.layers[1].register_forward_pre_hook(lambda m, a: keep("x", a[0])),
        attn.v.register_forward_hook(lambda m, a, y: keep("v", y)),
        attn.o.register_forward_hook(lambda m, a, y: (keep("out", a[0]), keep("write", y))[0]),
    ]
    with torch.no_grad():
        module(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


BOTH = pytest.mark.parametrize("second", [None, 5], ids=["one sink", "two sinks"])


# ---------------------------------------------------------------------------------------------- concentration
@BOTH
def test_probabilities_of_the_model_are_those_written_here(second: int | None) -> None:
    """The closed form is the model's: P V is what its kernel gives."""
    module, ids, _ = explained(second)
    seen = states(module, ids)
    v = seen["v"].reshape(N, T, H, -1)
    for i in range(N):
        out = np.einsum("hts,shf->thf", attention(T, second_at(i, second)).numpy(), v[i]).reshape(T, -1)
        np.testing.assert_allclose(out, seen["out"][i], atol=1e-5)


@BOTH
def test_mass_on_the_first_token_and_on_the_findings(second: int | None) -> None:
    def findings(p: np.ndarray, s: int | None) -> np.ndarray:
        queries = [t for t in range(1, T) if t != s]
        return p[:, queries][:, :, [0] + [s] * (s is not None)].sum(2).mean(1)

    heads = where(explained(second)[2].heads, layer=2)
    assert list(heads["head"]) == list(range(H))
    np.testing.assert_allclose(heads.mass_first, over_sequences(lambda p, s: p[:, 1:, 0].mean(1), second), rtol=1e-5)
    np.testing.assert_allclose(heads.mass_findings, over_sequences(findings, second), rtol=1e-5)
    if second is None:  # m = e^C / (e^C + t), spelled out
        c = np.exp([2.0, 3.0, 4.0, 6.0])
        spelled = [np.mean([m / (m + t) for t in range(1, T)]) for m in c]
        np.testing.assert_allclose(heads.mass_first, spelled, rtol=1e-5)
    before = where(explained(second)[2].heads, layer=1)
    np.testing.assert_allclose(before.mass_first, np.mean([1 / (t + 1) for t in range(1, T)]), rtol=1e-5)


def test_random_tokens_get_what_any_ordinary_key_gets() -> None:
    """One random position r in the first half: mean over t >= r of 1 / (e^C + t), between its ends."""
    heads = where(explained()[2].heads, layer=2)
    for mass, c in zip(heads.mass_random, np.exp(plant.C.double().numpy()), strict=True):
        of_key = [sum(1 / (c + t) for t in range(r, T)) / (T - 1) for r in range(1, T // 2)]
        assert min(of_key) * (1 - 1e-5) <= mass <= max(of_key) * (1 + 1e-5)


@BOTH
def test_alpha_of_every_key_and_the_entropy(second: int | None) -> None:
    def alpha(p: np.ndarray, _: int | None) -> np.ndarray:
        return np.stack([p[:, k:, k].mean(1) for k in range(T)], axis=1)

    def entropy(p: np.ndarray, _: int | None) -> np.ndarray:
        return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(2).mean(1)

    def greatest(p: np.ndarray, s: int | None) -> np.ndarray:
        return alpha(p, s)[:, 1:WELL_SEEN].max(1)

    e = explained(second)[2]
    heads, keys = where(e.heads, layer=2), where(e.positions, layer=2)
    np.testing.assert_allclose(heads.alpha_first, over_sequences(alpha, second)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(heads.entropy_nats, over_sequences(entropy, second), rtol=1e-4)
    np.testing.assert_allclose(heads.secondary, over_sequences(greatest, second), rtol=1e-5)
    assert list(keys.pos) == list(range(T)) and set(keys.n_sequences) == {N}
    np.testing.assert_allclose(keys.alpha, over_sequences(alpha, second).mean(0), rtol=1e-5)
    np.testing.assert_allclose(keys.alpha_max, over_sequences(lambda p, s: alpha(p, s).max(0), second), rtol=1e-5)
    above = over_sequences(lambda p, s: (alpha(p, s) > 0.3).mean(0), second)
    above[WELL_SEEN:] = np.nan  # of too few queries to say
    np.testing.assert_allclose(keys.sink_rate, above, rtol=1e-6)
    assert set(heads.sink_rate) == {1.0} and set(where(e.heads, layer=1).sink_rate) == {0.0}


def test_secondary_sinks_are_the_second_marked_tokens() -> None:
    sinks, second = explained(5)[2].sinks, 5
    assert len(sinks) == 3 * 2 * N and sinks.finding.all(), "tokens with findings are told in every layer"
    assert set(where(sinks, layer=1)["heads"]) == set(where(sinks, layer=3)["heads"]) == {0.0}
    sinks = where(sinks, layer=2)
    for i in range(N):
        p, s = attention(T, second + i).numpy(), second + i
        alpha = p[:, s:, s].mean(1)
        row = one(sinks, sequence=i, pos=s)
        assert (row.token_id, row.token, row.position_class, row.finding) == (1, ".", "delimiter", True)
        assert row["heads"] == np.mean(alpha > 0.3) == 0.25
        assert row.alpha == pytest.approx(alpha.mean(), rel=1e-5) and row.alpha_max == pytest.approx(alpha.max(), 1e-5)
        assert one(sinks, sequence=i, pos=0).position_class == "start"
    assert set(explained()[2].sinks.pos) == {0} and set(explained()[2].sinks["heads"]) == {0.0, 1.0}


@BOTH
def test_axes_are_the_means_over_heads_and_the_norms(second: int | None) -> None:
    module, ids, e = explained(second)
    seen, axes = states(module, ids), e.axes.set_index("layer")
    assert list(axes.after_onset) == [False, True, True]
    for layer in (1, 2, 3):
        heads = where(e.heads, layer=layer)
        assert axes.concentration[layer] == pytest.approx(heads.mass_findings.mean(), rel=1e-6)
        assert axes.concentration_null[layer] == pytest.approx(heads.mass_random.mean(), rel=1e-6)
        assert axes.value_drain[layer] == pytest.approx(heads.value_norm_ratio.mean(), rel=1e-6)
    assert axes.concentration[2] > 3 * axes.concentration[1] and axes.value_drain[1] == 0
    norm = np.linalg.norm(seen["x"], axis=2)
    found = np.zeros((N, T), bool)
    found[:, 0] = True
    for i in range(N if second is not None else 0):
        found[i, second + i] = True  # type: ignore[operator]
    assert axes.residual_norm[2] == pytest.approx(norm[found].mean() / norm[~found].mean(), rel=1e-5)
    v = np.linalg.norm(seen["v"].reshape(N, T, H, -1), axis=3)
    drain = np.mean([v[i, found[i]].mean(0) / v[i, ~found[i]].mean(0) for i in range(N)], axis=0)
    np.testing.assert_allclose(where(e.heads, layer=2).value_norm_ratio, drain, rtol=1e-4)


def test_stable_rank_of_the_updates() -> None:
    """|U|_F^2 / |U|_2^2 of all queries after the first token; near one for the head with the greatest logit."""
    module, ids, e = explained()
    out = states(module, ids)["out"].reshape(N, T, H, -1)[:, 1:]
    for h, rank in enumerate(where(e.heads, layer=2).update_stable_rank):
        s = np.linalg.svd(out[:, :, h].reshape(N * (T - 1), -1), compute_uv=False)
        assert rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-4)
    assert where(e.heads, layer=2).update_stable_rank.iloc[-1] < 1.01


# ------------------------------------------------------------------------------------------------ implicit bias
def test_decomposition_is_m_times_a_known_vector() -> None:
    """u_t = W_O of the heads' m_h(t) v_h: the same in every sequence, so `between` is 1."""
    module, ids, e = explained()
    write = states(module, ids)["write"][:, 1:]
    out = states(module, ids)["out"].reshape(N, T, H, -1)[:, 1:]
    m_HT = attention(T).numpy()[:, 1:, 0]
    v_HF = plant.VALUE.double().numpy().reshape(H, -1)
    u_THF = m_HT.T[:, :, None] * v_HF
    w_o = module.layers[1].attn.o.weight.detach().double().numpy()
    parts = {"concat": u_THF.reshape(T - 1, -1), "projected": u_THF.reshape(T - 1, -1) @ w_o.T}
    outs = {"concat": out.reshape(N, T - 1, -1), "projected": write}

    def constancy(u: np.ndarray) -> float:
        return np.linalg.norm(u - u.mean(0), axis=1).mean() / np.linalg.norm(u.mean(0))

    def cosine(u: np.ndarray) -> float:
        unit = u / np.linalg.norm(u, axis=1, keepdims=True)
        return (unit @ unit.T)[~np.eye(len(u), dtype=bool)].mean()

    for part, u in parts.items():
        row = one(e.decomposition, layer=2, part=part)
        assert row.constancy == pytest.approx(constancy(u), rel=1e-4)
        assert row.cosine == pytest.approx(cosine(u), rel=1e-5)
        share = np.mean([(u**2).sum() / (outs[part][i] ** 2).sum() for i in range(N)])
        assert row.energy_share == pytest.approx(share, rel=1e-4)
        assert row.residual_error < 1e-4 and row.n_sequences == N
    # One head is m(t) times one vector: exactly one direction, and constancy is that of the numbers m(t).
    row = one(e.decomposition, layer=2, part="head")
    assert row.cosine == pytest.approx(1, abs=1e-5)
    assert row.constancy == pytest.approx(np.mean([np.abs(m - m.mean()).mean() / m.mean() for m in m_HT]), rel=1e-4)
    assert one(e.decomposition, layer=2, part="projected")["between"] == pytest.approx(1, abs=1e-6)
    assert one(e.decomposition, layer=2, part="projected").null_energy_share < 0.05 * row.energy_share
    nothing = one(e.decomposition, layer=1, part="projected")  # before the onset their values are zero
    assert nothing.energy_share == 0 and np.isnan(nothing.constancy)


def test_trajectory_of_the_first_token() -> None:
    """All first tokens are one vector: cosine 1 at every stage; its squared norm lies in dims 7 and 9."""
    module, ids, e = explained()
    x = states(module, ids)["x"]
    for stage in ("hidden", "normed", "q", "k", "v"):
        row = one(e.trajectory, layer=2, stage=stage, group="findings")
        assert row.n_tokens == N and row.cosine == pytest.approx(1, abs=1e-6)
        assert row.row_variance == pytest.approx(0, abs=1e-6)
    hidden = one(e.trajectory, layer=2, stage="hidden", group="findings")
    start = x[0, 0]
    assert hidden.massive_share == pytest.approx((start[[7, 9]] ** 2).sum() / (start**2).sum(), rel=1e-6)
    assert hidden.massive_share > 0.999 and hidden["max"] == plant.START
    hoyer = (D**0.5 - np.abs(start).sum() / np.linalg.norm(start)) / (D**0.5 - 1)
    assert hidden.sparsity == pytest.approx(hoyer, rel=1e-6)
    others = one(e.trajectory, layer=2, stage="hidden", group="others")
    unit = (x / np.linalg.norm(x, axis=2, keepdims=True))[:, 1:].reshape(-1, D)
    assert others.n_tokens == N * (T - 1) and others.massive_share == 0
    assert others.cosine == pytest.approx((unit @ unit.T)[~np.eye(len(unit), dtype=bool)].mean(), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ writers
@pytest.mark.parametrize("gate", ["", "apart", "fused"])
def test_writers_are_the_planted_steps(gate: str) -> None:
    e = explained(5, gate)[2]
    steps = [(0, "embedding"), *((layer, p) for layer in (1, 2, 3) for p in ("attn_out", "mlp_out"))]
    for dim, place, embedded, peak in ((plant.START_DIM, "start", plant.EMBEDDED, plant.START),
                                       (plant.FAN_DIM, "start", 0, plant.FAN),
                                       (plant.SECOND_DIM, "delimiter", 0, plant.SECOND)):  # fmt: skip
        rows = where(e.writers, dim=dim)
        assert set(rows.position_class) == {place} and set(rows.n_tokens) == {N}
        assert list(zip(rows.layer, rows.submodule, strict=True)) == steps
        np.testing.assert_allclose(rows.write, [embedded, 0, peak - embedded, 0, 0, 0, -peak], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(rows.share, rows.write / peak, rtol=1e-6, atol=1e-9)
        assert list(rows.role) == ["", "", "up", "", "", "", "down"]
        assert rows.write_std.max() < 1e-6 * abs(peak)
        np.testing.assert_allclose(rows.before.iloc[1:], rows.after.iloc[:-1], rtol=1e-9)
        assert one(rows, role="up").module == "layers.0.mlp"
    assert e.info.closure[""] < 1e-5


@pytest.mark.parametrize("gate", ["", "apart", "fused"])
def test_neurons_are_the_planted_super_weights(gate: str) -> None:
    module, _, e = explained(5, gate)
    weight = module.layers[0].mlp.down_proj.weight.detach()
    planted = (
        (plant.START_DIM, plant.MAIN, plant.MAIN_ACT, plant.START - plant.EMBEDDED, 2),
        (plant.FAN_DIM, plant.MAIN, plant.MAIN_ACT, plant.FAN, 2),
        (plant.SECOND_DIM, plant.OTHER, plant.OTHER_ACT, plant.SECOND, 1),
    )
    assert set(e.neurons["layer"]) == {1} and set(e.neurons["expert"]) == {-1}
    assert set(e.neurons["module"]) == {"layers.0.mlp.down_proj"}
    for dim, neuron, act, write, fan_out in planted:
        row = one(e.neurons, dim=dim, **{"rank": 1})
        assert (row.neuron, row.fan_out, row.weight) == (neuron, fan_out, float(weight[dim, neuron]))
        assert row.activation == pytest.approx(act, rel=1e-6)
        assert row.contribution == pytest.approx(act * float(weight[dim, neuron]), rel=1e-6)
        assert row.share == pytest.approx(row.contribution / write, rel=1e-6) and row.share > 0.99
        assert where(e.neurons, dim=dim)["contribution"].sum() == pytest.approx(write, rel=1e-6)
    minor = one(e.neurons, dim=plant.START_DIM, **{"rank": 2})
    assert (minor.neuron, minor.activation) == (plant.MINOR, pytest.approx(plant.MINOR_ACT, rel=1e-6))


@pytest.mark.parametrize("gate", ["", "apart", "fused"])
def test_rows_that_feed_the_planted_neuron(gate: str) -> None:
    module, _, e = explained(5, gate)
    feeding, row = module.layers[0].mlp.feeding(), one(e.neurons, dim=plant.START_DIM, **{"rank": 1})

    def z(role: str) -> float:
        norms = np.linalg.norm(feeding[role].numpy(), axis=1)
        return (norms[plant.MAIN] - norms.mean()) / norms.std(ddof=1)

    name = "gate_up_proj" if gate == "fused" else "up_proj"
    assert row.up_module == f"layers.0.mlp.{name}" and row.up_row_z == pytest.approx(z("up"), rel=1e-5)
    if gate:
        silu = plant.GATE / (1 + np.exp(-plant.GATE))
        name = "gate_up_proj" if gate == "fused" else "gate_proj"
        assert row.gate_module == f"layers.0.mlp.{name}" and row.gate_row_z == pytest.approx(z("gate"), rel=1e-5)
        assert row.gate == pytest.approx(plant.GATE, rel=1e-6)
        assert row.up == pytest.approx(plant.MAIN_ACT / silu, rel=1e-6)
    else:
        assert row.gate_module == "" and np.isnan(row.gate) and np.isnan(row.gate_row_z)
        assert row.up == pytest.approx(plant.MAIN_ACT, rel=1e-6)


def test_the_first_token_lies_where_the_unembedding_does_not_read() -> None:
    _, _, e = explained()
    dark = where(e.dark_subspace, centred=False, gain=False).set_index("vector")
    assert set(dark.layer) == {2} and set(dark.chance) == {round(0.05 * D) / D}
    assert dark.share["findings"] == pytest.approx(1, abs=1e-5) and dark.share["random"] < 1e-9
    assert not e.dark_subspace.gain.any() and tells(e.info.notes, "dark subspace", "without the gain")


def test_other_batch_sizes_give_the_same() -> None:
    module, ids, e = explained(5)
    model = ma.load(module, inputs={"input_ids": ids})
    corpus = ma.corpus({"input_ids": ids}, tokenizer=Tokenizer())
    scan = ma.scan(model, corpus, **OFF)
    for size in (1, 2):
        other = ma.explain(model, corpus, scan, batch_size=size)
        for table in ("heads", "positions", "sinks", "decomposition", "writers", "neurons"):
            pd.testing.assert_frame_equal(getattr(other, table), getattr(e, table), rtol=1e-5, atol=1e-6)
    few = ma.explain(model, corpus, scan, n_sequences=1)
    assert set(few.heads.n_sequences) == {1} and set(few.sinks.sequence) == {0} and set(few.writers.n_tokens) == {1}


# ------------------------------------------------------------------------------------------- planted in families
EXPERT, TOKEN, SPIKE = 2, 7, 5


def planted_mixtral() -> torch.nn.Module:
    """One expert of block 2 writes a large value at dim 5 of token 7; the router sends that token to it."""
    module = build("mixtral")
    block = module.model.layers[1].mlp
    with torch.no_grad():
        module.model.embed_tokens.weight[:, 3] = 0
        module.model.embed_tokens.weight[TOKEN] = 0
        module.model.embed_tokens.weight[TOKEN, 3] = 1.0
        block.gate.weight[:, 3] = torch.tensor([0.0, 0.2, 1.5, 0.0])  # times about sqrt(32) after the norm
        n_neurons = block.experts.down_proj.shape[-1]
        block.experts.gate_up_proj[EXPERT, [0, n_neurons]] = 0
        block.experts.gate_up_proj[EXPERT, [0, n_neurons], 3] = 2.0
        block.experts.down_proj[EXPERT, SPIKE, 0] = 30.0
    return module


def test_the_expert_that_writes_is_told() -> None:
    module, seen = planted_mixtral(), []
    ids = torch.randint(8, 90, (N, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = TOKEN
    model, corpus = ma.load(module), ma.corpus(ids)
    result = ma.scan(model, corpus, **OFF)
    assert set(result.findings.dim) == {SPIKE} and set(result.findings.pos) == {0}
    e = ma.explain(model, corpus, result)
    assert where(e.writers, role="up")[["layer", "submodule"]].to_numpy().tolist() == [[2, "mlp_out"]]
    first = one(e.neurons, **{"rank": 1})
    assert (first.expert, first.neuron, first["layer"], first.fan_out) == (EXPERT, -1, 2, 1)
    assert first["module"] == "model.layers.1.mlp.experts" and first.share == pytest.approx(1, abs=1e-3)
    # Written out: gate weight x down(silu(gate) x up) of the one expert.
    mlp = module.model.layers[1].mlp
    hook = mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        module(input_ids=ids)
        hook.remove()
        x = seen[0][0, 0]
        top = (mlp.gate.weight @ x).softmax(0).topk(2)
        gate = float((top.values / top.values.sum())[top.indices.tolist().index(EXPERT)])
        g, u = (mlp.experts.gate_up_proj[EXPERT] @ x).chunk(2)
        wrote = gate * float(mlp.experts.down_proj[EXPERT, SPIKE] @ (torch.nn.functional.silu(g) * u))
    assert first.activation == pytest.approx(gate, rel=1e-4) and gate > 0.9
    assert first.contribution == pytest.approx(wrote, rel=1e-4)
    assert where(e.neurons)["contribution"].sum() == pytest.approx(one(e.writers, role="up")["write"], rel=1e-4)
    assert tells(story_in_words(e), "experts", EXPERT, "model.layers.1.mlp.experts")


def test_outlier_dims_of_norms() -> None:
    """Kovaleva's rule: scale and bias beyond 3 sigma in at least half of the layers; one alone is not enough."""
    module = build("bert")
    with torch.no_grad():
        for i, layer in enumerate(module.bert.encoder.layer):
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight[5], norm.bias[5] = 9.0, -7.0
                norm.weight[21] = 9.0  # its bias stays
                if i == 0:
                    norm.weight[20], norm.bias[20] = 9.0, -7.0
    table = norm_weights_table(ma.load(module), {"": {20, 11}})
    assert set(table.dim) == {5, 11, 20} and len(table) == 3 * 2 * 3
    assert set(where(table, outlier=True).dim) == {5} and where(table, dim=5).outlier.all()
    assert where(table, dim=20).groupby("layer")["beyond"].all().tolist() == [True, False, False]
    assert set(where(table, finding=True).dim) == {11, 20} and not where(table, dim=11)["beyond"].any()
    norm = module.bert.encoder.layer[2].output.LayerNorm
    w, b = (x.detach().double().numpy() for x in (norm.weight, norm.bias))
    row = one(table, dim=5, **{"module": "bert.encoder.layer.2.output.LayerNorm"})
    assert row.weight_z == pytest.approx((w[5] - w.mean()) / w.std(), rel=1e-9)
    assert row.bias_z == pytest.approx((b[5] - b.mean()) / b.std(), rel=1e-9)
    assert (row.weight, row.bias) == (9.0, -7.0)
    plain = norm_weights_table(ma.load(build("bert")), {})
    assert not len(plain), "equal weights have no outliers"


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_dark_subspace_is_that_of_the_singular_vectors(gain: bool, centred: bool) -> None:
    """A direction that W does not read is dark; shares are those of a plain SVD of W, centred and scaled or not."""
    module, draw = build("llama"), np.random.default_rng(0)
    null, other = draw.normal(size=(2, 32))
    null /= np.linalg.norm(null)
    g = np.linspace(0.5, 2, 32)
    with torch.no_grad():
        w = module.lm_head.weight
        w += 0.3  # the mean over the vocabulary
        n = torch.tensor(null, dtype=torch.float32)
        w -= (w @ n)[:, None] * n
    rows = dark_rows(ma.load(module), {"findings": {(0, 0): -50 * null}, "random": {(0, 3): other}}, {7}, g)
    dark = where(pd.DataFrame(rows), gain=gain, centred=centred).set_index("vector")
    W = module.lm_head.weight.detach().double().numpy()
    W = W - W.mean(0) * centred
    W = W * g if gain else W
    weakest = np.linalg.svd(W, full_matrices=False)[2][-2:]

    def share(h: np.ndarray) -> float:
        return float(((weakest @ h) ** 2).sum() / (h**2).sum())

    assert set(dark.chance) == {2 / 32}
    assert dark.share["random"] == pytest.approx(share(other), rel=1e-3)
    assert dark.share["dim"] == pytest.approx(share(np.eye(32)[7]), rel=1e-3)
    assert dark.norm_rank["dim"] == 1 + np.argsort(-np.linalg.norm(W, axis=0)).tolist().index(7)
    if not gain:
        assert dark.share["findings"] == pytest.approx(1, abs=1e-5)


def test_what_has_no_dark_subspace_says_why() -> None:
    assert unread(ma.load(build("llama")), "") == ""
    assert tells([unread(ma.load(build("dinov2")), "")], "unembedding")
    both = ma.load(build("t5"))
    encoder, decoder = (s.name for s in both.anatomy.stacks)
    assert tells([unread(both, encoder)], "no", "reads", "stack") and unread(both, decoder) == ""


# --------------------------------------------------------------------------------------------------------- null
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_without_findings_what_is_about_them_is_nan_and_never_zero(name: str) -> None:
    model, corpus = ma.load(build(name, seed=7)), ma.corpus(torch.randint(5, 90, (N, T)))
    result = ma.scan(model, corpus, **OFF)
    assert not result.found
    e = ma.explain(model, corpus, result)
    unknown = {
        "heads": ["mass_findings", "mass_random", "value_norm_ratio"],
        "axes": ["concentration", "concentration_null", "value_drain", "residual_norm"],
    }
    for table, columns in unknown.items():
        assert len(getattr(e, table)) and getattr(e, table)[columns].isna().all(axis=None)
    assert e.heads[["mass_first", "alpha_first", "entropy_nats", "update_stable_rank"]].notna().all(axis=None)
    assert not len(e.decomposition) and not len(e.writers) and not len(e.neurons)
    assert not e.axes.after_onset.any() and not e.sinks.finding.any() and not e.norm_weights.finding.any()
    assert set(e.trajectory.group) == {"others"}
    assert not len(e.dark_subspace) and not len(e.collapse) and e.info.closure == {}
    assert set(e.spectrum.tokens) == {"all", "centred"}, "nothing can be left out"
    words = story_in_words(e)
    assert tells(words[:1], "No block", "findings")
    (note,) = tells(words, "no findings", "unavailable")
    assert note.startswith("Note: ")
    assert not any(s.startswith(("Dim ", "Attention: ", "What ")) for s in words)


def test_a_stray_finding_makes_no_block_one_that_reads_massive_activations() -> None:
    """Of 8 sequences two have a finding at layer 3 on other tokens: the blocks that read are those behind layer 12."""
    main = [(layer, s, 0, 7, "start", 9000.0) for layer in range(12, 15) for s in range(8)]
    stray = [(3, s, 5, 7, "other", 1100.0) for s in (0, 1)]
    found = findings_of([*main, *stray])
    near = findings_of([(3, s, 5, 7, "other", 700.0) for s in range(2, 8)])
    assert reading_blocks(found, clusters_table(found, near)) == {("", 13), ("", 14), ("", 15)}
    assert reading_blocks(found.iloc[:0], clusters_table(found.iloc[:0])) == set()
