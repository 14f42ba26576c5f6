"""SmolLM2-135M-Instruct: what massact says of a real language model is what plain PyTorch says, and the known truth.

Tolerances. Everything is float32 (eps 6e-8). Kernels add in different orders; a product of two sums of 576 terms, as
in the MLP that writes the spike, is right to about 2 sqrt(576) eps = 3e-6, and CLOSE allows seven times as much. SOFT
is for what goes through exp: an error of a score (some hundreds, right to 1e-6) is one of the probability relative to
it, and one of a loss (near 16 nats with zero, where the model is far outside of what it knows) is one of the
perplexity. What was printed is right to one unit of its last digit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import massact as ma
from massact.classics.outlier_features import HIT, INPUTS, outlier_features
from massact.corpora import Corpus
from massact.interventions.effects import effects_of, evaluate
from massact.interventions.window import window
from massact.models import Model, with_attention
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult
from massact.stats.hits import HitShares
from massact.trace import Probe, measure
from tests.real import naive
from tests.real.golden import last_digit, printed
from tests.scans import naive as naive_scan

N, T = 8, 64
CLOSE, SOFT = 2e-5, 1e-3
OFF = {"null": False, "bos_contrast": False}
QUICK = {"sets": ("zero", "mean", "random"), "sinks": False, "repetition": False}
SPIKE, SECOND, ONSET, LAST = 507, 247, 12, 28
DOWN = "model.layers.11.mlp.down_proj"


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return ma.load(smollm2)


@pytest.fixture(scope="module")
def text(model: Model) -> Corpus:
    made = ma.corpus(None, tokenizer=model.tokenizer, seq_len=T, n_sequences=N)
    assert isinstance(made, Corpus)
    return made


@pytest.fixture(scope="module")
def ids(text: Corpus) -> torch.Tensor:
    return text.inputs["input_ids"]


@pytest.fixture(scope="module")
def scan(model: Model, text: Corpus) -> ScanResult:
    return ma.scan(model, text, batch_size=N, rank_sequences=0, **OFF)


@pytest.fixture(scope="module")
def states(model: Model, ids: torch.Tensor) -> list[np.ndarray]:
    return naive_scan.hidden_states(model.module, model.module.model.layers, {"input_ids": ids})


@pytest.fixture(scope="module")
def seen(model: Model, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """What modules give, and what the down projection that writes the spike takes in: module -> (N, T, width)."""
    blocks = [f"model.layers.{i}" for i in range(30)]
    given = naive.kept(model.module, ids, [f"{b}.{m}" for b in blocks for m in ("self_attn.v_proj", "mlp")])
    return given | naive.kept(model.module, ids, [DOWN], inputs=True)


@pytest.fixture(scope="module")
def explained(model: Model, text: Corpus, scan: ScanResult) -> Explanation:
    return ma.explain(model, text, scan, columns=False)


@pytest.fixture(scope="module")
def effects(model: Model, text: Corpus, scan: ScanResult) -> Intervention:
    return ma.intervene(model, text, scan, **QUICK)


# ------------------------------------------------------------------------------------------------- weights alone
def test_the_weights_are_those_of_the_file(model: Model) -> None:
    """Q4_1 and its scales de-quantised, rows and columns in their places: printed to four decimals."""
    weight = model.module.get_submodule(DOWN).weight
    assert weight[SPIKE, 1229].item() == pytest.approx(5.8757, abs=6e-5)
    assert weight[SPIKE, 1487].item() == pytest.approx(6.0659, abs=6e-5)


def test_norms_at_the_spike(explained: Explanation) -> None:
    rows = explained.norm_weights
    at = rows[rows.dim == SPIKE].set_index("module").weight
    known = {
        "11.input_layernorm": 0.171, "11.post_attention_layernorm": 0.0, "12.input_layernorm": 0.102,
        "12.post_attention_layernorm": 0.0004, "29.post_attention_layernorm": 1.375,
    }  # fmt: skip
    for name, weight in known.items():
        assert at[f"model.layers.{name}"] == pytest.approx(weight, abs=5e-4 if weight > 0.001 else 5e-5), name
    assert sorted(rows[rows.outlier].dim.unique()) == [8, 100, SECOND, 260, 261, 446]


# ------------------------------------------------------------------------------------------------------ the scan
def test_findings_are_those_of_plain_hooks(scan: ScanResult, states: list[np.ndarray]) -> None:
    f = scan.findings
    got = set(zip(f.layer, f.sequence, f.pos, f.dim, f.value, strict=True))
    assert got == naive_scan.findings(states, 100, 1000)
    assert set(f.pos) == {0} and set(f.dim) == {SPIKE, SECOND} and (f.value > 0).all()
    assert set(f.layer) == set(range(ONSET, LAST + 1))
    assert (f[f.dim == SPIKE].groupby("layer").size() == N).all()


def test_layers_are_those_of_plain_hooks(scan: ScanResult, states: list[np.ndarray]) -> None:
    table = scan.layers[scan.layers.site == "resid_post"].set_index("layer")
    for layer, row in enumerate(naive_scan.layer_rows(states)):
        for column in ("top1", "max", "median", "ratio"):
            assert table.loc[layer, column] == pytest.approx(row[column], rel=1e-12), (layer, column)


def test_the_answer_names_onset_and_dims(scan: ScanResult, states: list[np.ndarray]) -> None:
    answer = scan.info.answer["stacks"][0]
    assert (answer["onset"], answer["offset"], answer["onset_module"]) == (ONSET, LAST, "model.layers.11")
    assert [dim for dim, _ in answer["dims"]] == [SPIKE, SECOND]
    top = [np.abs(h[:, 0, SPIKE]) for h in states]
    assert answer["largest"]["value"] == top[ONSET].max() > 20_000
    assert answer["largest"]["layer"] == ONSET and top[ONSET - 1].max() < 200 < 500 < top[3].min()  # a hump before it


# ------------------------------------------------------------------------------------------------- the explanation
def test_attention_is_that_of_the_eager_model(
    explained: Explanation, model: Model, ids: torch.Tensor, seen: dict[str, np.ndarray]
) -> None:
    by_layer = explained.heads.groupby("layer")[["mass_first", "value_norm_ratio"]].mean()
    on_first = naive.attention_on_first(model.module, ids)
    np.testing.assert_allclose(by_layer.mass_first, on_first, rtol=SOFT)
    values = [seen[f"model.layers.{i}.self_attn.v_proj"] for i in range(30)]
    ratios = [naive.value_norm_ratio(v, model.module.config.head_dim) for v in values]
    np.testing.assert_allclose(by_layer.value_norm_ratio, ratios, rtol=CLOSE)
    assert on_first[ONSET:].min() > 0.3 and on_first[ONSET - 1] < 0.05  # nothing but the spike turns the heads to it


def test_writers_are_those_of_plain_hooks(explained: Explanation, seen: dict[str, np.ndarray]) -> None:
    w = explained.writers[(explained.writers.dim == SPIKE) & (explained.writers.submodule == "mlp_out")]
    w = w.set_index("layer")
    for layer in (ONSET, 29, 30):
        written = seen[f"model.layers.{layer - 1}.mlp"][:, 0, SPIKE].mean()
        assert w.loc[layer, "write"] == pytest.approx(written, rel=CLOSE), layer
    assert w.loc[ONSET, "role"] == "up" and w.loc[ONSET, "write"] > 20_000
    assert w.loc[29, "role"] == "down" and w.loc[30, "write"] < -1000
    assert w["write"].abs().nlargest(3).index.tolist() == [ONSET, 29, 30]


def test_two_neurons_carry_the_write(explained: Explanation, model: Model, seen: dict[str, np.ndarray]) -> None:
    x_F = seen[DOWN][:, 0].mean(0)
    parts_F = x_F * model.module.get_submodule(DOWN).weight[SPIKE].detach().double().numpy()
    rows = explained.neurons[(explained.neurons.dim == SPIKE) & (explained.neurons.module == DOWN)].set_index("rank")
    assert list(rows.neuron[:2]) == [1229, 1487] == list(np.argsort(-np.abs(parts_F))[:2])
    for rank in (1, 2):
        row = rows.loc[rank]
        assert row.activation == pytest.approx(x_F[row.neuron], rel=CLOSE)
        assert row.share == pytest.approx(parts_F[row.neuron] / parts_F.sum(), rel=CLOSE)
    assert rows.share[:2].sum() == pytest.approx(0.996, abs=0.002) and abs(rows.loc[3, "share"]) < 0.001


# --------------------------------------------------------------------------------------------------- interventions
def perplexities(effects: Intervention) -> pd.DataFrame:
    e = effects.effects
    return e[e.metric == "perplexity"].set_index("edit")


def test_effects_are_those_of_plain_hooks(
    effects: Intervention, scan: ScanResult, model: Model, ids: torch.Tensor
) -> None:
    """Constants from the first half, effects on the second; the control draws other entries than ours."""
    half, f = ids[N // 2 :], scan.findings
    known = f[(f.layer == ONSET) & (f.sequence < N // 2)].groupby("dim").value
    ours = {
        "zero": naive.perplexity(model.module, half, ONSET, naive.put({SPIKE: 0.0, SECOND: 0.0})),
        "mean": naive.perplexity(model.module, half, ONSET, naive.put(known.mean().to_dict())),
    }
    plain = naive.perplexity(model.module, half)
    e = perplexities(effects)
    assert (e.n_elements == N).all() and (e.layer == ONSET).all()
    assert e.loc["zero", "baseline"] == pytest.approx(plain, rel=CLOSE * 10)
    for name, value in ours.items():
        assert e.loc[name, "edited"] == pytest.approx(value, rel=SOFT), name
    control = naive.perplexity(model.module, half, ONSET, naive.zero_ordinary(2, [SPIKE, SECOND]))
    for value in (control, e.loc["random", "edited"]):
        assert value == pytest.approx(plain, rel=3e-3)
    assert ours["zero"] > 1e5 * plain and ours["mean"] == pytest.approx(plain, rel=0.05)


# -------------------------------------------------------------------------------------------- golden, on WikiText-2
class Golden:
    """One scan, explanation and intervention of 8 x 256 tokens of WikiText-2."""

    def __init__(self, model: Model, file: Path) -> None:
        text = ma.corpus(file, tokenizer=model.tokenizer, seq_len=256, n_sequences=8)
        self.ids = text.inputs["input_ids"]
        self.scan = ma.scan(model, text, rank_sequences=0, **OFF)
        self.explained = ma.explain(model, text, self.scan, columns=False)
        self.effects = ma.intervene(model, text, self.scan, **QUICK)


@pytest.fixture(scope="module")
def golden(model: Model, real_text: Path) -> Golden:
    return Golden(model, real_text / "wikitext2-valid.txt")


def test_golden_table_of_layers(golden: Golden) -> None:
    layers = golden.scan.layers[golden.scan.layers.site == "resid_post"].set_index("layer")
    heads = golden.explained.heads.groupby("layer")[["mass_first", "value_norm_ratio"]].mean()
    table = printed()
    assert sorted(table) == sorted(layers.index) and sorted(heads.index) == sorted(table)[1:]
    for layer, row in table.items():
        for column, text in row.items():
            if text != "-":
                got = (layers if column in layers else heads).loc[layer, column]
                near = CLOSE if column in layers else SOFT
                assert got == pytest.approx(float(text), rel=near, abs=last_digit(text)), (layer, column)


def test_golden_findings(golden: Golden) -> None:
    f = golden.scan.findings
    assert f.groupby("dim").size().to_dict() == {SPIKE: 136, SECOND: 10} and set(f.pos) == {0} and (f.value > 0).all()
    assert set(f.layer) == set(range(ONSET, LAST + 1))
    largest = f.loc[f.magnitude.idxmax()]
    assert (largest.sequence, largest.layer, largest.token) == (4, ONSET, " Sea")
    assert largest.value == pytest.approx(25_750.24, rel=CLOSE)
    at = f[f.layer == ONSET].groupby("dim").value
    assert at.size().to_dict() == {SPIKE: 8, SECOND: 6}
    for dim, mean, std in ((SPIKE, 23_368.4, 1_278.3), (SECOND, 1_740.5, 95.5)):
        assert at.mean()[dim] == pytest.approx(mean, rel=CLOSE, abs=0.1)
        assert at.std(ddof=0)[dim] == pytest.approx(std, rel=CLOSE, abs=0.1)


def test_golden_writers_and_neurons(golden: Golden) -> None:
    w = golden.explained.writers
    w = w[(w.dim == SPIKE) & (w.submodule == "mlp_out")].set_index("layer")["write"]
    for layer, written in ((ONSET, 23_338.9), (29, -14_192.5), (30, -5_514.8)):
        assert w[layer] == pytest.approx(written, rel=CLOSE, abs=0.1)
    n = golden.explained.neurons
    n = n[(n.dim == SPIKE) & (n.module == DOWN)].set_index("rank")
    assert list(n.neuron[:2]) == [1229, 1487]
    assert list(n.activation[:2]) == pytest.approx([2_924, 1_000], abs=1)
    assert list(n.share[:3]) == pytest.approx([0.7361, 0.2598, 0.0005], abs=1e-4)


def test_golden_implicit_bias(golden: Golden) -> None:
    d = golden.explained.decomposition
    row = d[(d.layer == 16) & (d.part == "projected")].iloc[0]
    # The golden ones are over all queries, ours over 128 of them, evenly spaced.
    assert [row.constancy, row.cosine, row.energy_share] == pytest.approx([0.412, 0.874, 0.253], abs=0.005)


def test_golden_effects(golden: Golden, model: Model) -> None:
    """The golden 28.524 puts 1,691.1 at dim 247: position 0 of sequences 0 to 3. Ours is the mean of the
    findings there, three of the four, 1,731.1. Both are right to a unit of the last digit."""
    e = perplexities(golden.effects)
    assert list(e.baseline) == pytest.approx([28.4147] * 3, rel=CLOSE, abs=1e-4) and (e.n_elements == 8).all()
    assert e.loc["zero", "edited"] == pytest.approx(9_288_403, rel=SOFT)
    for second, wanted in ((1_691.1, 28.524), (1_731.1, 28.520)):
        given = naive.perplexity(model.module, golden.ids[4:], ONSET, naive.put({SPIKE: 23_127.9, SECOND: second}))
        assert given == pytest.approx(wanted, abs=0.001), second
    assert e.loc["mean", "edited"] == pytest.approx(28.520, abs=0.001)
    assert e.loc["random", "edited"] == pytest.approx(28.413, rel=SOFT)


# ------------------------------------------------------------------------------ golden, on a text of another kind
@pytest.mark.minutes
def test_golden_two_findings_before_the_main_cluster(model: Model, real_text: Path) -> None:
    """PEPs, 8 x 128: two tokens in the text pass at layer 3. Edited is layer 12, also with values of half of them."""
    text = ma.corpus(real_text / "technical" / "peps.txt", tokenizer=model.tokenizer, seq_len=128, n_sequences=8)
    scan = ma.scan(model, text, rank_sequences=0, **OFF)
    early = scan.findings[scan.findings.layer < ONSET]
    assert len(scan.findings) == 147 and set(early.layer) == {3} and set(early.dim) == {SPIKE}
    assert list(zip(early.sequence, early.pos, early.ratio.round(), strict=True)) == [(0, 3, 1_017), (1, 10, 1_091)]
    assert set(scan.findings[scan.findings.layer >= ONSET].pos) == {0}
    done = ma.intervene(model, text, scan, sets=("zero", "mean"), sinks=False, repetition=False)
    e = perplexities(done)
    assert done.info.target["site"] == f"{ONSET}.resid_post" and (e.n_elements == 8).all()
    assert list(e.baseline) == pytest.approx([35.8] * 2, abs=0.1)
    assert e.loc["zero", "edited"] == pytest.approx(9.2e6, abs=0.1e6)
    assert e.loc["mean", "edited"] == pytest.approx(35.5, abs=0.1)


@pytest.mark.minutes
def test_golden_outlier_feature(model: Model, real_text: Path) -> None:
    """The rule of LLM.int8 at the inputs of linear layers: one feature, and it is a massive dim."""
    sites = [s for s in model.anatomy.sites() if s.layer >= 1 and s.point in INPUTS]
    text = ma.corpus(real_text / "wikitext2-valid.txt", tokenizer=model.tokenizer, seq_len=256, n_sequences=8)
    hits = measure(model, text, [Probe("hits", str(s), lambda: HitShares(HIT)) for s in sites])
    by_layer = {n: [hits.result("hits", s) for s in sites if s.layer == n] for n in {s.layer for s in sites}}
    assert list(outlier_features(by_layer).dims) == [SECOND]


@pytest.mark.minutes
def test_golden_windows(model: Model, real_text: Path) -> None:
    """Windows of 64 keys on the first 4 x 256 tokens of WikiText-2, targets from 65 on: nothing kept, one kept, all."""
    text = ma.corpus(real_text / "wikitext2-valid.txt", tokenizer=model.tokenizer, seq_len=256, n_sequences=4)
    paired = evaluate(with_attention(model), text, [window(64, k) for k in (0, 1)], since=65)
    got = [effects_of(paired, f"window 64, first {k} kept", np.ones(4, bool)) for k in (0, 1)]
    (dense, none), (_, one) = ((e.baseline, e.edited) for effects in got for e in effects if e.metric == "perplexity")
    assert [none, one, dense] == pytest.approx([68.8, 24.3, 16.7], abs=0.1)
