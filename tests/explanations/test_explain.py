"""`explain` on the embedded model and on tiny random ones: naive oracles, refusals, files, determinism."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import massact as ma
from massact.corpora import Corpus
from massact.models import Model, with_attention
from massact.records.clusters import clusters_table
from massact.records.errors import UserError
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from massact.records.sites import Site
from massact.records.tables import columns_of
from massact.reports import story_in_words
from massact.scans import reopen
from tests.facts import each, tells
from tests.families import build

N, T = 4, 64
OFF = {"null": False, "bos_contrast": False}


@pytest.fixture(scope="module")
def model() -> Model:
    return ma.load()


@pytest.fixture(scope="module")
def text(model: Model) -> Corpus:
    made = ma.corpus(None, tokenizer=model.tokenizer, seq_len=T, n_sequences=N)
    assert isinstance(made, Corpus)
    return made


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explained") / "run"


@pytest.fixture(scope="module")
def scan(model: Model, run_dir: Path) -> ScanResult:
    return ma.scan(model, None, out=run_dir, seq_len=T, n_sequences=N, **OFF)


@pytest.fixture(scope="module")
def explained(model: Model, text: Corpus, scan: ScanResult) -> Explanation:
    return ma.explain(model, text, scan)


def same(a: Explanation, b: Explanation) -> None:
    for table in Explanation.TABLES:
        pd.testing.assert_frame_equal(getattr(a, table), getattr(b, table))
    assert a.maps.keys() == b.maps.keys()
    for name in a.maps:
        assert np.array_equal(a.maps[name], b.maps[name], equal_nan=a.maps[name].dtype.kind == "f"), name


# --------------------------------------------------------------------------------------------------- the oracle
@pytest.fixture(scope="module")
def attentions(model: Model, text: Corpus) -> list[np.ndarray]:
    """(N, H, T, T) of every layer, from an eager copy of the model."""
    eager = copy.deepcopy(model.module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(input_ids=text.inputs["input_ids"], output_attentions=True)
    return [a.double().numpy() for a in out.attentions]


def test_heads_equal_the_naive_ones(explained: Explanation, attentions: list[np.ndarray], scan: ScanResult) -> None:
    found = {int(s): sorted({*rows.pos}) for s, rows in scan.findings.groupby("sequence")}
    assert set(found) == set(range(N))
    for layer, p in enumerate(attentions, 1):
        rows = explained.heads[explained.heads.layer == layer].sort_values("head")
        assert len(rows) == p.shape[1]
        mass = []
        for s, at in found.items():
            queries = [t for t in range(1, T) if t not in at]
            mass.append(p[s][:, queries][:, :, at].sum(2).mean(1))
        np.testing.assert_allclose(rows.mass_findings, np.mean(mass, axis=0), rtol=1e-4)
        np.testing.assert_allclose(rows.mass_first, p[:, :, 1:, 0].mean((0, 2)), rtol=1e-4)
        np.testing.assert_allclose(rows.alpha_first, p[:, :, :, 0].mean((0, 2)), rtol=1e-4)
        np.testing.assert_allclose(rows.sink_rate, (p[:, :, :, 0].mean(2) > 0.3).mean(0), rtol=1e-6)
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(3).mean((0, 2))
        np.testing.assert_allclose(rows.entropy_nats, entropy, rtol=1e-3, atol=1e-4)


def test_alpha_of_every_position_equals_the_naive_one(explained: Explanation, attentions: list[np.ndarray]) -> None:
    for layer, p in enumerate(attentions, 1):
        rows = explained.positions[explained.positions.layer == layer]
        assert list(rows.pos) == list(range(T))
        alpha = np.stack([p[:, :, k:, k].mean(2) for k in range(T)], axis=2)
        np.testing.assert_allclose(rows.alpha, alpha.mean((0, 1)), rtol=1e-3)
        np.testing.assert_allclose(rows.alpha_max, alpha.max(1).mean(0), rtol=1e-3)


def test_maps_are_the_probabilities_of_the_prompt(explained: Explanation, model: Model, scan: ScanResult) -> None:
    eager = copy.deepcopy(model.module)
    eager.set_attn_implementation("eager")
    assert model.tokenizer is not None
    ids = model.tokenizer(scan.info.config["prompt"], return_tensors="pt")["input_ids"]
    tokens = explained.maps["tokens"]
    assert len(tokens) == ids.shape[1] and scan.info.answer["stacks"][0]["onset"] in explained.maps["layers"]
    with torch.no_grad():
        seen = eager(input_ids=ids, output_attentions=True).attentions
    for layer, p, s in zip(*(explained.maps[n] for n in ("layers", "probs", "logits")), strict=True):
        np.testing.assert_allclose(p, seen[int(layer) - 1][0].mean(0).numpy(), atol=1e-5)
        assert np.isnan(s[np.triu_indices(len(s), 1)]).all() and np.isfinite(s[np.tril_indices(len(s))]).all()


def test_writers_add_up_to_the_scanned_values(explained: Explanation, scan: ScanResult) -> None:
    """The account passes through the value that the scan found after each block, and closes."""
    assert explained.info.closure[""] < 1e-5
    for dim, rows in explained.writers.groupby("dim"):
        np.testing.assert_allclose(rows.write.cumsum(), rows.after, rtol=1e-5, atol=1e-3)
        found = scan.findings[scan.findings.dim == dim]
        for layer, here in found.groupby("layer"):
            if here.sequence.nunique() == N:
                after = rows[rows.layer <= layer].after.iloc[-1]
                assert after == pytest.approx(here.value.mean(), rel=1e-5)
    ups = explained.writers[explained.writers.role == "up"]
    assert len(ups) and set(zip(explained.neurons["layer"], explained.neurons["dim"], strict=True)) <= set(
        zip(ups["layer"], ups["dim"], strict=True)
    )


def test_two_runs_are_equal(explained: Explanation, model: Model, text: Corpus, scan: ScanResult) -> None:
    again = ma.explain(model, text, scan)
    same(explained, again)
    assert again.info.closure == explained.info.closure


def test_progress_and_fewer_sequences(model: Model, text: Corpus, scan: ScanResult) -> None:
    told: list[tuple[str, int, int]] = []
    e = ma.explain(model, text, scan, n_sequences=2, progress=lambda *x: told.append(x))
    assert ("explain", 2, 2) in told and e.info.corpus["n_sequences"] == 2
    assert set(e.heads.n_sequences) == {2} and set(e.sinks.sequence) <= {0, 1}
    assert ma.explain(model, text, scan, n_sequences=99).info.corpus["n_sequences"] == N


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_padding_is_not_there(name: str) -> None:
    """Sequences of 20 and 12 tokens, padded: each is told as if it stood alone, and each position over those it has."""
    model = ma.load(build(name, seed=3))
    ids, mask = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(4)), torch.ones(2, 20).long()
    mask[1, 12:] = 0

    def one(inputs: dict[str, torch.Tensor]) -> Explanation:
        corpus = ma.corpus(inputs)
        low = {"magnitude": 0.02 if name == "gpt2" else 1.5, "ratio": 3.0}
        return ma.explain(model, corpus, ma.scan(model, corpus, thresholds=low, **OFF))

    padded = one({"input_ids": ids, "attention_mask": mask})
    long, short = one({"input_ids": ids[:1]}), one({"input_ids": ids[1:, :12]})
    columns = ["mass_first", "mass_findings", "alpha_first", "entropy_nats", "value_norm_first", "value_norm_ratio"]
    alone = (long.heads[columns] + short.heads[columns]) / 2
    pd.testing.assert_frame_equal(padded.heads[columns], alone, rtol=1e-4)
    keys = [e.positions.set_index(["layer", "pos"]) for e in (padded, long, short)]
    assert list(keys[0].n_sequences) == [2 if pos < 12 else 1 for _, pos in keys[0].index]
    mean = pd.concat([keys[1].alpha, keys[2].alpha], axis=1).mean(axis=1)
    np.testing.assert_allclose(keys[0].alpha, mean.loc[keys[0].index], rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ options
def test_without_columns_entropy_and_positions_are_unavailable(
    explained: Explanation, model: Model, text: Corpus, scan: ScanResult
) -> None:
    e = ma.explain(model, text, scan, columns=False)
    assert e.heads[["entropy_nats", "alpha_first", "sink_rate", "secondary"]].isna().all(axis=None)
    assert not len(e.positions) and not len(e.sinks)
    assert tells(e.info.notes, "not", "entropy")
    assert not any("sink" in s for s in story_in_words(e)), "nothing is said of what was not measured"
    for table in ("decomposition", "writers", "neurons", "axes", "trajectory"):
        pd.testing.assert_frame_equal(getattr(e, table), getattr(explained, table))
    np.testing.assert_array_equal(e.heads.mass_first, explained.heads.mass_first)


def test_eps_is_the_bound_of_a_sink(explained: Explanation, model: Model, text: Corpus, scan: ScanResult) -> None:
    for eps, e in ((0.3, explained), (0.9, ma.explain(model, text, scan, eps=0.9))):
        sinks = e.sinks[e.sinks["heads"] > 0]
        assert (sinks.alpha_max > eps).all() and set(e.sinks[e.sinks["heads"] == 0].finding) <= {True}
        rates = e.heads.groupby("layer").sink_rate.mean()
        at_first = sinks[sinks.pos == 0].groupby("layer")["heads"].sum().reindex(rates.index, fill_value=0) / N
        np.testing.assert_allclose(rates, at_first, rtol=1e-6)
    assert e.heads.sink_rate.sum() < explained.heads.sink_rate.sum()
    np.testing.assert_array_equal(e.heads.alpha_first, explained.heads.alpha_first)


@pytest.mark.parametrize(("options", "says"), [
    ({"epss": 0.2}, ["epss", "eps"]), ({"colums": False}, ["colums", "columns"]),
    ({"n_sequence": 3}, ["n_sequence", "n_sequences"]), ({"eps": 0.0}, ["eps"]), ({"eps": 1.0}, ["eps"]),
    ({"eps": float("nan")}, ["eps"]), ({"n_sequences": 0}, ["n_sequences"]), ({"batch_size": 0}, ["0"]),
])  # fmt: skip
def test_bad_options(options: dict[str, object], says: list[str], model: Model, text: Corpus, scan: ScanResult) -> None:
    with pytest.raises(UserError) as refused:
        ma.explain(model, text, scan, **options)
    assert all(word in str(refused.value) for word in says)


def test_other_weights_are_refused(model: Model, text: Corpus, scan: ScanResult) -> None:
    other = ma.load(build("gpt2"))
    with pytest.raises(UserError) as refused:
        ma.explain(other, text, scan)
    for weights in (other.info().weights_sha256, scan.info.model["weights_sha256"]):
        assert weights[:12] in str(refused.value)


def test_another_corpus_is_refused_or_scanned_anew(model: Model, scan: ScanResult, tmp_path: Path) -> None:
    other = ma.corpus(["The boat is old. The sea is cold."] * N, tokenizer=model.tokenizer)
    with pytest.raises(UserError, match=each(scan.info.corpus["sha256"][:12], other.sha256[:12])):
        ma.explain(model, other, scan)
    file = tmp_path / "other.txt"
    file.write_text("The boat is old. The sea is cold, and the wind is up!\n" * 200)
    e = reopen(scan, corpus=str(file)).run(ma.explain)
    assert any("scanned anew" in note for note in e.info.notes)
    assert e.info.corpus["sha256"] != scan.info.corpus["sha256"]
    assert set(e.sinks.token) and e.heads.mass_findings.notna().all()


# -------------------------------------------------------------------------------------------------------- files
def test_a_saved_run_is_explained_alike(explained: Explanation, scan: ScanResult, run_dir: Path) -> None:
    e = reopen(ma.open_run(run_dir)).run(ma.explain)
    same(explained, e)
    assert Explanation.open(run_dir) is None
    before = {p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}
    e.save(run_dir)
    read = Explanation.open(run_dir)
    assert read is not None
    same(e, read)
    assert jsonable(asdict(read.info)) == jsonable(asdict(e.info))
    assert json.loads(json.dumps(e.as_dict())) == json.loads(json.dumps(read.as_dict()))
    assert all((run_dir / name).read_bytes() == data for name, data in before.items()), "files of the scan changed"
    ma.open_run(run_dir)
    assert not list(run_dir.glob(".*.tmp"))


def _json(path: Path, text: str) -> None:
    (path / "explain.json").write_text(text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half a file": lambda p: _json(p, (p / "explain.json").read_text()[:80]),
    "a list": lambda p: _json(p, "[]"),
    "no version": lambda p: _json(p, "{}"),
    "newer version": lambda p: _json(p, '{"schema_version": 99}'),
    "wrong types": lambda p: _json(p, '{"schema_version": 1, "notes": 7, "config": []}'),
    "not unicode": lambda p: (p / "explain.json").write_bytes(b"\xff\xfe{"),
    "no heads": lambda p: (p / "heads.parquet").unlink(),
    "no neurons": lambda p: (p / "neurons.parquet").unlink(),
    "broken table": lambda p: (p / "writers.parquet").write_bytes(b"PAR1"),
    "broken maps": lambda p: (p / "attention.npz").write_bytes(b"PK"),
    "lost column": lambda p: pd.read_parquet(p / "sinks.parquet").drop(columns="alpha").to_parquet(p / "sinks.parquet"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_one_clear_message(damage: str, explained: Explanation, tmp_path: Path) -> None:
    explained.save(tmp_path)
    assert Explanation.open(tmp_path) is not None
    DAMAGE[damage](tmp_path)
    with pytest.raises(UserError) as refused:
        Explanation.open(tmp_path)
    assert str(tmp_path) in str(refused.value) and "Traceback" not in str(refused.value)


def test_a_directory_that_cannot_be_written(explained: Explanation, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        explained.save(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# ----------------------------------------------------------------------------------------------------- families
IDS = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "vit": {"pixel_values": PIXELS}, "clip": {"input_ids": IDS, "pixel_values": PIXELS},
    "whisper": {"input_features": SOUND, "decoder_input_ids": IDS},
}  # fmt: skip
FORCED = ("bert", "t5", "vit", "whisper", "gpt_oss", "bloom", "mixtral", "clip", "lfm2")


@cache
def forced(name: str, writes: float = 1.0) -> tuple[Model, ScanResult, Explanation]:
    """A tiny random model with findings forced by low thresholds, so that every table is filled.

    Args:
        writes: times so much the MLPs write.
    """
    module = build(name, seed=3)
    with torch.no_grad():
        for parameter, weight in module.named_parameters():
            weight *= writes if "down_proj" in parameter else 1.0
    model = ma.load(module)
    corpus = ma.corpus(INPUTS.get(name, {"input_ids": IDS}))
    low = {"magnitude": 1.0, "ratio": 2.5} if name == "bert" else {"magnitude": 0.02, "ratio": 3.0}
    scan = ma.scan(model, corpus, criterion="sun2024", thresholds=low, **OFF)
    # So low, most tokens have findings: those of every third, so that ordinary ones are left.
    scan.findings = scan.findings[scan.findings["pos"] % 3 == 0].reset_index(drop=True)
    scan.near_misses = scan.near_misses[:0]
    scan.clusters = clusters_table(scan.findings)
    assert len(scan.findings) > 20
    return model, scan, ma.explain(model, corpus, scan)


@pytest.mark.parametrize("name", FORCED)
def test_every_table_of_a_random_model(name: str) -> None:
    model, scan, e = forced(name)
    for table in Explanation.TABLES:
        assert list(getattr(e, table)) == list(columns_of(table))
    calls = len(e.heads.groupby(["stack", "layer", "kind"]))
    assert len(e.heads) == calls * 4 and calls == sum(a["n_calls"] for a in e.info.attention.values())
    shares = ["mass_first", "mass_findings", "mass_random", "alpha_first", "sink_rate", "secondary", "slot_mass"]
    values = e.heads[shares].to_numpy()
    assert np.all((values >= 0) & (values <= 1 + 1e-6) | np.isnan(values))
    assert (e.heads.update_stable_rank >= 1 - 1e-5).all()
    assert set(e.info.closure) == set(scan.findings["stack"]) and max(e.info.closure.values()) < 1e-5
    assert e.decomposition.residual_error.max() < 1e-4
    key = ["stack", "layer", "dim", "position_class", "module"]
    assert len(e.writers) and not e.writers.duplicated(key).any()
    assert not e.neurons.duplicated([*key, "rank"]).any()
    assert all(s.isprintable() for s in story_in_words(e))


@pytest.mark.parametrize("name", FORCED)
def test_mass_on_all_keys_is_one(name: str) -> None:
    """Sum over k of alpha_k x (queries that see k) / T, and the learned sink where there is one."""
    _, _, e = forced(name)
    types = getattr(forced(name)[0].module.config, "layer_types", ())
    own = e.heads[e.heads["kind"] == "attention"]
    for (stack, layer), rows in e.positions.groupby(["stack", "layer"]):
        n = len(rows)
        see = n - rows.pos if e.info.attention[stack]["causal"] else n
        if len(types) and types[layer - 1] == "sliding_attention":
            see = see.clip(upper=forced(name)[0].module.config.sliding_window)
        slot = own[(own["stack"] == stack) & (own["layer"] == layer)].slot_mass.fillna(0).mean()
        assert (rows.alpha * see).sum() / n + slot == pytest.approx(1, abs=1e-4)
    assert own.slot_mass.notna().all() == (name == "gpt_oss")
    assert e.heads.slot_mass.isna().all() == (name != "gpt_oss")


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_experts_add_up_to_the_write(name: str) -> None:
    _, _, e = forced(name, 30.0)
    ups = e.writers[(e.writers.role == "up") & (e.writers.submodule == "mlp_out")].set_index(["dim", "position_class"])
    assert len(ups) and (e.neurons.expert >= 0).all() and (e.neurons.neuron == -1).all()
    for key, rows in e.neurons.groupby(["layer", "dim", "position_class"]):
        write = ups[ups["layer"] == key[0]].loc[[key[1:]], "write"].iloc[0]
        # gpt_oss has a bias of each expert inside it; what is told of the experts is all of the write
        assert rows["contribution"].sum() == pytest.approx(write, rel=1e-3)
        assert list(rows["rank"]) == list(range(1, len(rows) + 1))
        assert rows["contribution"].abs().is_monotonic_decreasing


def test_post_norm_steps_are_in_the_account() -> None:
    """BERT: after every sum a norm changes the stream; a coordinate at two points of a block is told once."""
    _, scan, e = forced("bert")
    assert set(scan.findings.site) == {"resid_post", "resid_post_prenorm"}
    for _, rows in e.writers.groupby(["dim", "position_class"]):
        assert list(rows.submodule) == ["embedding", *["attn_out", "norm", "mlp_out", "norm"] * 3]
        assert rows.n_tokens.nunique() == 1
        np.testing.assert_allclose(rows.before.iloc[1:], rows.after.iloc[:-1], rtol=1e-6)


def test_what_is_not_seen_is_nan_and_said() -> None:
    _, _, bloom = forced("bloom")
    assert set(bloom.trajectory.stage) == {"hidden", "normed", "v"}
    assert tells(bloom.info.notes, "queries", "keys", "not")
    for name in ("t5", "whisper"):
        cross = forced(name)[2].heads.query("kind == 'cross_attention'")
        assert len(cross) and cross[["mass_findings", "mass_random", "value_norm_ratio"]].isna().all(axis=None)
    model, _, lfm2 = forced("lfm2")
    assert set(lfm2.heads.layer) == {2} and set(lfm2.axes.layer) == {2}
    assert tells(lfm2.info.notes, "layers 1, 3", "not")
    assert tells(forced("vit")[2].info.notes, "dark subspace", "unavailable", "unembedding")


def test_position_classes_of_the_stack_that_does_not_read_text() -> None:
    _, _, clip = forced("clip")
    assert set(clip.heads["stack"]) == {"text_model", "vision_model"}
    told = [s for s in story_in_words(clip) if s.startswith("vision_model: ")]
    assert told and any(s.startswith("text_model: ") for s in story_in_words(clip))
    assert not clip.sinks["token_id"].ge(0).any() or set(clip.sinks["stack"]) != {"vision_model"}


def test_a_model_whose_attention_is_not_seen_says_so() -> None:
    """Attention in windows: no heads are told, and why not is in the notes; writers and norms are."""
    model = ma.load(build("longformer", seed=3))
    scan = ma.scan(model, IDS, thresholds={"magnitude": 1.0, "ratio": 2.5}, **OFF)
    e = ma.explain(model, ma.corpus(IDS), scan)
    assert not len(e.heads) and not len(e.axes) and not len(e.decomposition) and not e.maps
    assert len(e.writers) and len(e.norm_weights) and e.info.closure[""] < 1e-5
    words = story_in_words(e)
    (note,) = [s for s in words if s.startswith("Note: Attention of layers 1-3 ")]
    assert "5 entries" in note
    assert not any(s.startswith(("Attention: ", "What ")) for s in words)


def test_layers_whose_attention_is_not_seen_are_named() -> None:
    """Of one layer in three: the words say which, the sentences' layers are the others, and no table has it."""
    model = with_attention(ma.load(build("llama", seed=3)))
    hidden = Site("", 2, "attention")
    seen = {site: place for site, place in model.anatomy.attentions.items() if site != hidden}
    anatomy = replace(model.anatomy, attentions=seen, no_attention={hidden: "its rows sum to 2 (a test)"})
    model = replace(model, anatomy=anatomy)
    scan = ma.scan(model, IDS, thresholds={"magnitude": 0.02, "ratio": 3.0}, **OFF)
    e = ma.explain(model, ma.corpus(IDS), scan)
    assert set(e.heads["layer"]) == set(e.axes["layer"]) == set(e.positions["layer"]) == {1, 3}
    assert e.info.attention[""]["unseen_layers"] == [2]
    words = story_in_words(e)
    assert tells(words, "about layers 1, 3", "not about layer 2")
    (note,) = tells(words, "Attention of layer 2", anatomy.no_attention[hidden])
    assert note.startswith("Note: ")
