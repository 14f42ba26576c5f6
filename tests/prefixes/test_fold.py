"""Folding the embedded model: no token is massive any more, the loss is what it was, and the files are good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DynamicCache

import massact as ma
from massact.corpora import Corpus
from massact.models import Model, with_attention
from massact.prefixes import fold
from massact.prefixes.equality import in_front
from massact.prefixes.job import PRUNED, SUPER
from massact.prefixes.position_shift import apart
from massact.prefixes.prefix_files import _save_tokenizer
from massact.prefixes.starts import rows_of, together
from massact.records.errors import UserError
from massact.records.kinds.fold import Fold
from massact.records.kinds.scan import ScanResult
from massact.stats.heads import HeadOptions, HeadStats, Targets
from massact.trace import Probe, measure
from massact.variants.storage import load_variant

Made = tuple[Model, Corpus, ScanResult, Fold]


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    """The embedded model folded by search, super weights looked at."""
    model = ma.load(None)
    scan = ma.scan(model, None, null=False, bos_contrast=False, n_sequences=8, seq_len=64)
    corpus = ma.corpus(None, tokenizer=model.tokenizer, n_sequences=8, seq_len=64)
    assert isinstance(corpus, Corpus)
    yield model, corpus, scan, fold(model, corpus, scan, prune=True)


@pytest.fixture(scope="module")
def saved(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory with the fold in it."""
    _, _, scan, done = made
    return done.save(scan.save(tmp_path_factory.mktemp("fold") / "run")).parent / "run"


def test_no_token_is_massive_and_the_loss_is_what_it_was(made: Made) -> None:
    _, _, scan, done = made
    assert len(scan.findings) and done.info.before["n_findings"] == len(scan.findings)
    assert done.info.after["n_findings"] == 0 and done.info.cleared and not done.info.stays
    assert done.info.after["greatest"] < done.info.before["greatest"] / 10
    nll = done.fold_effects.set_index(["edit", "metric"]).loc["folded", "nll"]
    assert nll["ci_low"] <= 0 and nll["verdict"] != "harmful" and nll["n_sequences"] == 4


def test_slots_have_the_loss_of_the_prefix_in_front(made: Made) -> None:
    rows = made[3].fold_effects.set_index(["edit", "metric"])
    for metric in ("nll", "kl", "top1_probability"):
        a, b = (rows.loc[name, metric]["edited"] for name in ("folded", "prefix in front"))
        assert a == pytest.approx(b, rel=1e-4), metric
    assert rows.loc["folded", "kl"]["edited"] > 0


def test_layers_are_those_of_two_scans(made: Made) -> None:
    model, corpus, scan, done = made
    layers = done.fold_layers.set_index("layer")
    assert layers["max_before"].to_dict() == scan.layers.set_index("layer")["max"].to_dict()
    text = together([row[: (model.context or 0) - 1] for row in rows_of(corpus)], corpus)
    again = ma.scan(done.model, text, null=False, bos_contrast=False, rank_sequences=0).layers.set_index("layer")
    pruned = done.info.pruned["zero"]  # then it is another model by now
    if not pruned:
        assert layers["max_after"].to_dict() == again["max"].to_dict()
    np.testing.assert_allclose(layers["headroom_fp16_after"], 65504 / layers["max_after"])
    assert (layers["findings_after"] == 0).all() and layers["findings_before"].sum() == len(scan.findings)


def test_attention_on_slots_is_that_on_the_prefix(made: Made) -> None:
    """The oracle: the prefix in front as a token, and what the heads give to position 0."""
    model, corpus, _, done = made
    rows = [torch.cat([torch.tensor(done.info.ids), row]) for row in rows_of(corpus)]
    seen = with_attention(model)
    make = lambda: HeadStats(Targets({}, {}, {}), HeadOptions(columns=False, bias=False))  # noqa: E731
    measured = measure(seen, together(rows, corpus), [Probe("first", str(s), make) for s in seen.anatomy.attentions])
    heads = done.fold_heads.set_index(["layer", "head"])["slots_after"]
    for site in seen.anatomy.attentions:
        for head, mass in enumerate(measured.result("first", site).per_head["mass_first"].mean(0)):
            assert heads[site.layer, head] == pytest.approx(mass, abs=1e-5)


def test_super_weights_matter_no_more(made: Made) -> None:
    rows = made[3].fold_effects
    nll = rows[rows["metric"] == "nll"].set_index("edit")["delta"]
    pruned = made[3].info.pruned
    assert pruned["weights"] and all(w["share"] >= 0.1 for w in pruned["weights"])
    assert abs(nll[PRUNED]) < abs(nll[SUPER]) / 4
    assert pruned["zero"] == (pruned["verdict"] in ("harmless", "helpful"))


def test_every_candidate_is_measured_on_every_class(made: Made) -> None:
    rows = made[3].prefixes
    chosen = rows[rows["part"] == "search"]
    sizes = chosen.groupby("ids")["text_class"].agg(frozenset)
    assert len(set(sizes)) == 1 and {"text", "word", "digit", "newline", "'.'", "code"} <= sizes.iloc[0]
    assert chosen[chosen["prefix"] == ""]["n_massive"].sum() == chosen[chosen["prefix"] == ""]["n_sequences"].sum()
    held = rows[rows["part"] == "held out"]
    assert set(held["ids"]) == {"", ",".join(map(str, made[3].info.ids))}


# -------------------------------------------------------------------------------------------- files
def test_transformers_reads_the_folder(made: Made, saved: Path) -> None:
    model, corpus, _, done = made
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved / "folded" / "model")
    text = torch.stack(rows_of(corpus))[:2, :40]
    with torch.no_grad():
        out = load_variant(plain)(input_ids=text).logits
        wanted = model.module(input_ids=in_front(done.info.ids, text)).logits[:, 1:]
    assert apart(out, wanted) < 1e-4 or done.info.pruned["zero"]
    assert plain.config.n_positions == model.module.config.n_positions - 1
    assert (saved / "folded" / "model" / "tokenizer.json").is_file()


def test_keys_and_values_go_into_a_cache(made: Made, saved: Path) -> None:
    """prefix_kv.safetensors as transformers' own cache in front of the original model."""
    model, corpus, _, done = made
    pairs = load_file(saved / "folded" / "prefix_kv.safetensors")
    record = json.loads((saved / "folded" / "prefix.json").read_text(encoding="utf-8"))
    assert record["ids"] == done.info.ids and record["model"]["weights_sha256"] == model.info().weights_sha256
    text = torch.stack(rows_of(corpus))[:2, :40]
    cache, n = DynamicCache(), record["n"]
    for i in range(len(pairs) // 2):
        k, v = (pairs[f"layers.{i}.{name}"][None].expand(2, -1, -1, -1) for name in ("key", "value"))
        cache.update(k, v, i)
    with torch.no_grad():
        wanted = model.module(input_ids=in_front(done.info.ids, text)).logits[:, n:]
        out = model.module(input_ids=text, past_key_values=cache).logits
    assert apart(out, wanted) < 1e-5


def test_opened_again_it_is_the_same(made: Made, saved: Path) -> None:
    again, done = Fold.open(saved), made[3]
    assert again is not None and again.model is None
    for table in Fold.TABLES:
        pd.testing.assert_frame_equal(getattr(again, table), getattr(done, table))
    assert set(again.info.files) == {f"folded/{n}" for n in ("model", "prefix.json", "prefix_kv.safetensors")}


def test_scan_and_explain_go_on_from_the_folder(made: Made, saved: Path) -> None:
    """Findings 0, attention on the slot is accounted for, and it is not folded again."""
    from massact.explanations import explain

    model = ma.load(saved / "folded" / "model")
    corpus = ma.corpus(None, tokenizer=model.tokenizer, n_sequences=4, seq_len=64)
    scan = ma.scan(model, corpus, null=False, bos_contrast=False, rank_sequences=0)
    assert not len(scan.findings) and model.context == made[0].context - 1  # type: ignore[operator]
    why = explain(model, corpus, scan)
    heads = why.heads.set_index(["layer", "head"])
    known = made[3].fold_heads.set_index(["layer", "head"])["slots_after"]
    assert float((heads["slot_mass"] - known).abs().max()) < 0.1 and heads["slot_mass"].max() > 0.9
    with pytest.raises(UserError):
        fold(model, corpus, scan)


def test_the_folded_model_is_not_the_one_that_was_scanned(made: Made) -> None:
    _, corpus, scan, done = made
    with pytest.raises(UserError, match=scan.info.model["weights_sha256"][:12]):
        ma.explain(done.model, corpus, scan)


# -------------------------------------------------------------------------------------------- what is asked for
def test_a_prefix_of_ones_own(made: Made) -> None:
    model, corpus, scan, done = made
    ids = tuple(int(i) for i in done.prefixes[done.prefixes["prefix"] == "."]["ids"].unique())
    other = fold(model, corpus, scan, prefix=[*ids, 5])
    assert other.info.ids == [*ids, 5] and other.info.proof["error"] < 1e-3
    assert set(other.prefixes["ids"]) == {"", f"{ids[0]},5"}
    assert not other.info.pruned and SUPER not in set(other.fold_effects["edit"])


@pytest.mark.parametrize("options", [{"slots": 5}, {"slots": 0}, {"prefix": "one"}, {"prefix": (99999,)},
                                     {"prefix": (1, 2, 3, 4, 5)}, {"prefx": (1,)}])  # fmt: skip
def test_bad_options_are_refused(made: Made, options: dict[str, Any]) -> None:
    model, corpus, scan, _ = made
    with pytest.raises(UserError):
        fold(model, corpus, scan, **options)


def test_nothing_massive_is_nothing_to_fold(made: Made) -> None:
    model, corpus, *_ = made
    none = ma.scan(model, corpus, null=False, bos_contrast=False, rank_sequences=0, thresholds={"magnitude": 1e6})
    with pytest.raises(UserError, match="findings"):
        fold(model, corpus, none)


class PutsBos:
    """A tokenizer that puts token 2 in front, whatever it says, until it is told not to; or for good."""

    all_special_ids = (2,)

    def __init__(self, obeys: bool) -> None:
        self.obeys, self.puts = obeys, True

    @property
    def add_bos_token(self) -> bool:
        return False

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self.puts = value or not self.obeys

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2, 7] if self.puts else [7]}

    def save_pretrained(self, folder: Path) -> None:
        (folder / "puts").write_text(str(self.puts))


@pytest.mark.parametrize(("obeys", "ids", "puts", "told"), [
    (True, (2,), False, False), (False, (2,), True, True), (True, (5,), True, False),
])  # fmt: skip
def test_a_bos_that_is_a_slot_is_not_put_in_front_again(
    obeys: bool, ids: tuple[int, ...], puts: bool, told: bool, tmp_path: Path
) -> None:
    given: Any = SimpleNamespace(tokenizer=PutsBos(obeys))
    notes = _save_tokenizer(given, SimpleNamespace(ids=ids), tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "puts").read_text() == str(puts) and bool(notes) == told
    assert given.tokenizer.puts  # that of the model is as before
