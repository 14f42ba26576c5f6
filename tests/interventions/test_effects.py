"""evaluate(), intervene() and what is said of them: padded prompts, planted truth, the embedded model, a real ViT."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.corpora import Batch, Corpus
from massact.interventions import (
    QUARTET,
    Massive,
    cut_attention,
    drop_first,
    evaluate,
    intervene,
    massive,
    shuffle,
    zero_dims,
)
from massact.interventions.effects import Paired, effects_of
from massact.interventions.watchers import Whole
from massact.models import Model, with_attention
from massact.records.errors import UserError, WorkError
from massact.records.kinds.intervention import InterveneInfo, Intervention
from massact.records.sites import Site
from massact.records.tables import columns_of, frame
from massact.records.verdicts import VERDICTS
from massact.reports import effects_in_words, verdict
from massact.reports.kinds.intervention import draw_effects
from massact.reports.render.sheets import figure_of
from massact.trace import Edit, WeightEdit, edited
from tests.facts import each, tells
from tests.families import build
from tests.photographs import photographs

OFF = {"null": False, "bos_contrast": False}
CAUSAL = re.compile(r"\b(caus\w*|because|due to|leads? to|therefore|responsible|explains?)\b", re.I)


def ids(n: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def ragged(lengths: list[int], left: bool) -> dict[str, Tensor]:
    tokens, mask = ids(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(-n, None) if left else slice(0, n)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def logp(model: Model, tokens: Tensor) -> np.ndarray:
    """log p (T, V) of one prompt that stands alone."""
    with torch.no_grad():
        return model.module(input_ids=tokens[None]).logits[0].double().log_softmax(-1).numpy()


# ------------------------------------------------------------------------------------ numbers, against naive ones
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_prompts_of_different_lengths(left: bool, batch_size: int) -> None:
    """Perplexity over all targets, and over windows; each prompt as if it stood alone, without and with an edit."""
    model, lengths = ma.load(build("llama")), [12, 7, 9, 2]
    given, edit = ragged(lengths, left), zero_dims([3, 4, 5], "2.resid_post")
    paired = evaluate(model, ma.corpus(given), [edit], batch_size=batch_size)
    alone = [given["input_ids"][i][given["attention_mask"][i].bool()] for i in range(len(lengths))]
    plain = [logp(model, t) for t in alone]
    with edited(model, edit):
        after = [logp(model, t) for t in alone]
    nll = np.array([[-x[np.arange(len(t) - 1), t[1:]].mean() for x, t in zip(many, alone, strict=True)]
                    for many in (plain, after)])  # fmt: skip
    n = np.array(lengths) - 1
    assert paired.n_targets.tolist() == n.tolist()
    np.testing.assert_allclose(paired.baseline["nll"], nll[0], rtol=1e-5)
    np.testing.assert_allclose(paired.edited[edit.name]["nll"], nll[1], rtol=1e-5)
    kl = [(np.exp(p) * (p - q)).sum(-1)[:-1].mean() for p, q in zip(plain, after, strict=True)]
    np.testing.assert_allclose(paired.edited[edit.name]["kl"], kl, atol=2e-6)
    told = {e.metric: e for e in effects_of(paired, edit.name, np.ones(4, bool))}
    assert told["perplexity"].baseline == pytest.approx(math.exp((nll[0] * n).sum() / n.sum()), rel=1e-5)
    assert told["perplexity"].edited == pytest.approx(math.exp((nll[1] * n).sum() / n.sum()), rel=1e-5)
    assert told["perplexity_windowed"].edited == pytest.approx(math.exp(nll[1].mean()), rel=1e-5)
    some = {e.metric: e for e in effects_of(paired, edit.name, np.array([True, False, True, False]))}
    assert some["kl"].edited == pytest.approx((kl[0] + kl[2]) / 2, abs=2e-6) and some["kl"].n_sequences == 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_dropped_first_token_is_no_target_and_shifts_none(batch_size: int) -> None:
    """The prompt without its first token predicts what is left of it, also where shorter prompts are padded."""
    model, lengths = ma.load(build("llama")), [12, 7, 11]
    given = ragged(lengths, left=False)
    paired = evaluate(model, ma.corpus(given), [drop_first(2)], batch_size=batch_size)
    for row, n in enumerate(lengths):
        tokens = given["input_ids"][row, :n]
        whole, rest = logp(model, tokens), logp(model, tokens[2:])
        got = {m: v[row] for m, v in next(iter(paired.edited.values())).items()}
        assert got["nll"] == pytest.approx(-rest[np.arange(n - 3), tokens[3:]].mean(), rel=1e-5)
        kl = (np.exp(whole[2:]) * (whole[2:] - rest)).sum(-1)[:-1].mean()
        assert got["kl"] == pytest.approx(kl, abs=2e-6)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "albert"])
def test_the_shared_prefix_with_padding_and_edits_of_all_kinds(name: str) -> None:
    model = with_attention(ma.load(build(name)))
    norm = next(n for n, p in model.module.named_parameters() if p.shape == (32,) and n.endswith("weight"))
    more = WeightEdit("more", norm, lambda w: w + 0.1)
    edits = [zero_dims([1], "1.resid_post"), zero_dims([2], "1.resid_post"), zero_dims([3], "3.resid_post"),
             zero_dims([4], "*.resid_post"), zero_dims([5], "2.mlp_out"), more, cut_attention([0])]  # fmt: skip
    corpus = ma.corpus(ragged([12, 5, 9], left=False))
    one, other = (evaluate(model, corpus, edits, batch_size=2, watcher=watcher) for watcher in (None, Whole()))
    for edit in edits:
        assert one.fired[edit.name] == other.fired[edit.name]
        for metric, values in other.edited[edit.name].items():
            np.testing.assert_array_equal(one.edited[edit.name][metric], values)
    layers = model.anatomy.stacks[0].n_layers
    assert [one.fired[e.name].n_calls for e in edits] == [2, 2, 2, 2 * (layers + 1), 2, 2, 2 * layers]
    assert one.fired[edits[0].name].n_elements == 12 + 12 + 9, "one dim at all positions of both batches"


def test_labels_give_loss_and_accuracy_of_a_classifier() -> None:
    model, x = ma.load(build("vit")), torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    edit = Edit("wave", "2.resid_post", lambda h, b: h + 3 * torch.sin(torch.arange(h.shape[-1]).float()))
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    paired = evaluate(model, ma.corpus({"pixel_values": x}), [edit], batch_size=4, labels=labels)
    with torch.no_grad():
        plain = model.module(x).logits.double().log_softmax(-1)
        with edited(model, edit):
            after = model.module(x).logits.double().log_softmax(-1)
    for found, p in ((paired.baseline, plain), (paired.edited["wave"], after)):
        np.testing.assert_allclose(found["nll"], -p[torch.arange(6), labels].numpy(), rtol=1e-5)
        assert found["accuracy"].tolist() == (p.argmax(-1) == labels).double().tolist()
    np.testing.assert_allclose(paired.edited["wave"]["kl"], (plain.exp() * (plain - after)).sum(-1), atol=2e-6)
    assert {e.metric for e in effects_of(paired, "wave", np.ones(6, bool))} == {
        "nll", "kl", "top1_agreement", "top1_probability", "accuracy"}  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_an_edit_of_another_shape_is_that_error(first: bool) -> None:
    """Neither swallowed nor measured with what the edit before it gave."""
    model, good = ma.load(build("llama")), zero_dims([1], "1.resid_post")
    cut = Edit("cut", "1.resid_post", lambda h, b: h[:, 1:])
    with pytest.raises(WorkError, match="'cut' gave shape"):
        evaluate(model, ma.corpus(ids()), [cut, good] if first else [good, cut])
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.module.modules())


def test_an_edit_may_leave_a_batch_alone_but_not_all() -> None:
    model = ma.load(build("llama"))
    once = Edit("once", "1.resid_post", lambda h, b: h * 2 if 1 in b.sequences else h)
    paired = evaluate(model, ma.corpus(ids()), [once])
    assert (paired.fired["once"].n_calls, paired.fired["once"].n_elements) == (4, 12 * 32)
    assert (np.abs(paired.edited["once"]["kl"]) > 1e-6).tolist() == [False, True, False, False]
    with pytest.raises(WorkError, match="changed nothing"):
        evaluate(model, ma.corpus(ids()[2:3]), [once])


def test_every_sequence_is_shuffled_on_its_own() -> None:
    """Of two values one is drawn for each sequence: not the same one for all of them, whatever the batch size."""
    model, drawn = ma.load(build("llama")), []
    pools = {"start": ((-900.0, 900.0),), "delimiter": ((0.0,),), "other": ((0.0,),)}
    target = Massive(Site("", 2, "resid_post"), (3,), (0.0,), dict.fromkeys(pools, (0.0,)), pools)
    mixed = shuffle(target)

    def apply(h: Tensor, batch: Batch) -> Tensor:
        new = mixed.apply(h, batch)
        drawn.extend(new[:, 0, 3].tolist())
        return new

    for batch_size in (1, 3):
        drawn.clear()
        evaluate(model, ma.corpus(ids(12)), [Edit("shuffle", mixed.site, apply)], batch_size=batch_size)
        assert len(drawn) == 12 and 2 <= drawn.count(900.0) <= 10, (batch_size, drawn)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="no logits"):
        evaluate(ma.load(build("llama").model), ma.corpus(ids()), [zero_dims([1], "1.resid_post")])


# ---------------------------------------------------------------------------------------------- planted truth
V, WIDTH, SPIKE = 16, 24, 20


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            for linear in (self.q, self.v, self.o, self.mlp):
                linear.weight.mul_(1e-3)
                linear.weight[:, SPIKE:] = 0
                linear.weight[SPIKE:] = 0

    def forward(self, x: Tensor) -> Tensor:
        q, v = (linear(x)[:, None] for linear in (self.q, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)[:, 0])
        return x + self.mlp(x)


class Carried(nn.Module):
    """The next id is the last one plus one; the first token carries 1,000 at dim 20 through three blocks.

    `reads`: the logits of every position are the right ones times (spike of the first token) / 1,000, so that without
    it they are even: the loss is log 16. Otherwise nothing reads it. `only`: it is read where the second id is even.
    Hand-built, not evidence about real models.
    """

    def __init__(self, reads: bool, only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(V, WIDTH), nn.ModuleList(_Block() for _ in range(3))
        self.head, self.reads, self.only = nn.Linear(WIDTH, V, bias=False), reads, only
        with torch.no_grad():
            self.embed.weight.zero_()
            self.embed.weight[:, :V] = torch.eye(V)
            self.embed.weight[0, SPIKE] = 1000.0
            self.head.weight.zero_()
            self.head.weight[:, :V] = 8 * torch.eye(V).roll(1, 0)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        gain = x[:, :1, SPIKE : SPIKE + 1] / 1000 if self.reads else torch.ones_like(x[:, :1, :1])
        if self.only:
            gain = torch.where((input_ids[:, 1] % 2 == 0)[:, None, None], gain, torch.ones_like(gain))
        return SimpleNamespace(logits=self.head(x) * gain)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def counting(n: int) -> Tensor:
    """Id 0, then ids that count up from 1 + the sequence's number, never 0 again."""
    rows = torch.arange(10)[None] + torch.arange(n)[:, None]
    tokens = 1 + rows % (V - 1)
    tokens[:, 0] = 0
    return tokens


@cache
def carried(reads: bool, only: bool = False) -> tuple[Model, Corpus, ma.ScanResult]:
    model = ma.load(Carried(reads, only), inputs={"input_ids": counting(2)})
    corpus = ma.corpus(counting(16))
    return model, corpus, ma.scan(model, corpus, thresholds={"ratio": 100.0}, **OFF)


def main_rows(done: Intervention, group: str = "all") -> pd.DataFrame:
    rows = done.effects[(done.effects.metric == "perplexity") & (done.effects.group == group)]
    return rows.set_index("edit")


def test_information_that_the_logits_need_is_harmful_to_lose() -> None:
    """Known in advance: without the spike all logits are 0, the perplexity is 16; its mean is the spike itself."""
    model, corpus, scan = carried(True)
    assert set(zip(scan.findings.pos, scan.findings.dim, strict=True)) == {(0, SPIKE)}
    done = intervene(model, corpus, scan, layer=2, sets=(*QUARTET, "scale=0", "value=1000"))
    rows = main_rows(done)
    assert rows.edited["zero"] == pytest.approx(V, rel=1e-4) and rows.baseline["zero"] < V / 3
    assert {name: verdict(row) for name, row in rows.iterrows()} == {
        "zero": "harmful", "mean": "not tested", "random": "harmless", "shuffle": "not tested", "scale 0": "harmful",
        "value 1000": "not tested"}  # fmt: skip
    assert rows.change.to_dict() == {"zero": 1, "mean": 0, "random": 1, "shuffle": 0, "scale 0": 1, "value 1000": 0}
    assert list(done.effects.columns) == list(columns_of("effects"))
    assert (done.effects.n_sequences == 8).all() and (done.effects.n_calls == 8).all()
    assert (done.effects.n_elements == 8).all()
    np.testing.assert_allclose(done.effects.delta, done.effects.edited - done.effects.baseline)
    assert (done.effects.ci_low <= done.effects.ci_high).all()


def test_what_nothing_reads_is_never_called_harmful() -> None:
    """Massive and useless: the effect of every edit is nothing, whatever its size."""
    model, corpus, scan = carried(False)
    rows = main_rows(intervene(model, corpus, scan, layer=2))
    assert rows.delta["zero"] == 0 and {n: verdict(row) for n, row in rows.iterrows()} == {
        "zero": "harmless", "mean": "not tested", "random": "harmless", "shuffle": "not tested"}  # fmt: skip


def test_only_the_sequences_of_one_label_are_hurt() -> None:
    model, corpus, scan = carried(True, only=True)
    labels = ["even" if int(t) % 2 == 0 else "odd" for t in corpus.inputs["input_ids"][:, 1]]
    done = intervene(model, corpus, scan, layer=2, sets=("zero",), groups={"second": labels})
    even, odd = (main_rows(done, f"second={x}").loc["zero"] for x in ("even", "odd"))
    assert verdict(even) == "harmful" and even.edited == pytest.approx(V, rel=1e-4)
    assert verdict(odd) == "harmless" and odd.delta == 0 and even.n_sequences == odd.n_sequences == 4
    assert tells(effects_in_words(done), "zero", "second=even", "most")


def test_the_second_half_has_no_say_in_the_target() -> None:
    model, corpus, scan = carried(True)
    changed = scan.findings.copy()
    late = changed.sequence >= 8
    changed.loc[late, ["value", "magnitude"]] = 5e4
    other = intervene(model, corpus, ma.ScanResult(**(vars(scan) | {"findings": changed})), layer=2)
    one = intervene(model, corpus, scan, layer=2)
    assert one.info.target == other.info.target
    pd.testing.assert_frame_equal(one.effects, other.effects)
    assert (one.info.estimated_on, one.info.evaluated_on) == ("sequences 0 to 7", "sequences 8 to 15")
    whole = intervene(model, corpus, scan, layer=2, hold_out=False)
    assert whole.info.evaluated_on == "sequences 0 to 15" and any("Means and cuts" in n for n in whole.info.notes)


# ------------------------------------------------------------------------------------------------ the embedded model
@pytest.fixture(scope="module")
def embedded() -> Intervention:
    model = ma.load()
    corpus = ma.corpus(None, tokenizer=model.tokenizer, seq_len=64, n_sequences=12)
    scan = ma.scan(model, corpus, thresholds={"ratio": 200.0, "magnitude": 10.0}, **OFF)
    return intervene(model, corpus, scan, layer=2)


def test_the_embedded_model_needs_them_and_not_their_exact_values(embedded: Intervention) -> None:
    rows = main_rows(embedded)
    assert rows.edited["zero"] > 2 * rows.baseline["zero"] and verdict(rows.loc["zero"]) == "harmful"
    for name in ("mean", "random", "shuffle"):
        assert abs(rows.delta[name]) < 0.01 * rows.baseline[name] and verdict(rows.loc[name]) == "harmless", name
    assert rows.n_elements["zero"] == rows.n_elements["random"] >= 6


def test_words_and_figure_of_an_intervention(embedded: Intervention, tmp_path: Path) -> None:
    said = effects_in_words(embedded)
    for name in QUARTET:
        (sentence,) = [s for s in said if s.startswith(f"{name} (")]
        assert "95% interval" in sentence and any(f": {v}" in sentence for v in VERDICTS)
    assert len(tells(said, "0.01 nats", "1%", "perplexity")) == 1  # what the verdicts are by
    assert not CAUSAL.search(" ".join(said)) and "2.resid_post" in said[0] and "sequences 6 to 11" in said[0]
    sheet = draw_effects(embedded)
    assert sheet is not None
    figure = figure_of(sheet)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(QUARTET)
    figure.savefig(tmp_path / "effects.png")
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "effects.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 10
    embedded.save(tmp_path)
    read = Intervention.open(tmp_path)
    assert read is not None and effects_in_words(read) == said
    pd.testing.assert_frame_equal(read.effects, embedded.effects)


# -------------------------------------------------------------------------------------------------------- verdicts
def row(metric: str, baseline: float, edited_: float, low: float, high: float) -> pd.Series:
    return pd.Series({"edit": "e", "metric": metric, "baseline": baseline, "edited": edited_,
                      "delta": edited_ - baseline, "ci_low": low, "ci_high": high, "n_sequences": 8})  # fmt: skip


@pytest.mark.parametrize(("given", "says"), [
    (row("perplexity", 10, 20, 8, 12), "harmful"), (row("perplexity", 10, 10.2, 0.11, 0.3), "harmful"),
    (row("perplexity", 10, 10.2, 0.09, 0.3), "not settled"), (row("perplexity", 10, 10, -0.09, 0.09), "harmless"),
    (row("perplexity", 10, 9, -2, 0.05), "not settled"), (row("perplexity", 10, 9, -2, -0.5), "helpful"),
    (row("perplexity", 1000, 1005, 1, 9), "harmless"), (row("perplexity", 10, math.inf, 5, math.inf), "harmful"),
    (row("perplexity", 10, math.nan, math.nan, math.nan), "harmful"),
    (row("perplexity", 10, 10, math.nan, math.nan), "not settled"),
    (row("accuracy", 0.8, 0.5, -0.4, -0.2), "harmful"), (row("accuracy", 0.8, 0.8, -0.005, 0.005), "harmless"),
    (row("accuracy", 0.8, 0.78, -0.05, 0.01), "not settled"), (row("accuracy", 0.8, 0.9, 0.05, 0.2), "helpful"),
    (row("accuracy", 0.8, math.nan, math.nan, math.nan), "not settled"),
    (row("top1_agreement", 1, 0.4, -0.7, -0.5), "harmful"), (row("top1_agreement", 1, 1, 0, 0), "harmless"),
])  # fmt: skip
def test_verdicts(given: pd.Series, says: str) -> None:
    """0.01 nats of the log-perplexity, 0.01 of the accuracy; of fewer than 4 sequences nothing is said."""
    assert verdict(given) == says
    few = pd.Series(given.to_dict() | {"n_sequences": 3})
    broken = given["metric"] == "perplexity" and not math.isfinite(given["edited"])
    assert verdict(few) == ("harmful" if broken else "not settled")


def test_an_edit_that_breaks_the_model_is_said_and_drawn() -> None:
    blank = {
        c: "" if dtype == "string" else 1 if dtype == "int64" else math.nan
        for c, (dtype, _) in columns_of("effects").items()
    }
    broken = blank | {"edit": "value nan", "metric": "perplexity", "group": "all", "baseline": 9.0, "change": math.inf}
    bad = {k: math.nan for k in ("edited", "delta", "ci_low", "ci_high")}
    e = Intervention(InterveneInfo(target={"site": "2.resid_post", "dims": [3]}), frame("effects", [broken | bad]))
    assert any(s.startswith("value nan") and s.endswith("harmful.") for s in effects_in_words(e))
    assert figure_of(draw_effects(e)).axes
    assert draw_effects(Intervention(InterveneInfo())) is None


# ------------------------------------------------------------------------------------------------------- real data
def test_real_vit_needs_them_at_their_onset(real_data: Path) -> None:
    """ViT-tiny on real photographs with labels: zero costs more than ten points of top-1, the controls nothing."""
    x, labels = photographs(real_data, 50)
    model = ma.load(real_data / "models" / "vit-tiny-imagenet")
    scan = ma.scan(model, ma.corpus({"pixel_values": x[:40]}), thresholds={"ratio": 500.0}, **OFF)
    target = massive(scan.findings)
    assert (str(target.site), target.dims) == ("8.resid_post", (41,))
    edits = [QUARTET[name](target) for name in ("zero", "mean", "random")]
    paired = evaluate(model, ma.corpus({"pixel_values": x}), edits, batch_size=10, labels=labels)
    everyone = np.ones(len(x), bool)
    top1 = {name: next(e for e in effects_of(paired, name, everyone) if e.metric == "accuracy")
            for name in paired.fired}  # fmt: skip
    assert top1["zero"].baseline > 0.8 and top1["zero"].delta < -0.1
    assert abs(top1["mean"].delta) < 0.015 and abs(top1["random"].delta) < 0.015


def test_a_classifier_that_is_never_right_shows_nothing() -> None:
    row = {"metric": "accuracy", "baseline": 0.0, "edited": 0.0, "ci_low": 0.0, "ci_high": 0.0, "n_sequences": 8}
    assert verdict(pd.Series(row)) == "not settled"
    assert verdict(pd.Series(row | {"baseline": 0.5, "edited": 0.5})) == "harmless"


def test_findings_behind_the_half_that_cuts_are_of() -> None:
    model, ids = ma.load(build("llama")), torch.randint(5, 90, (8, 9))
    result = ma.scan(model, ids, thresholds={"magnitude": 0.0, "ratio": 2.0}, null=False, bos_contrast=False)
    result.findings = result.findings[result.findings["sequence"] >= 4]
    assert len(result.findings)
    onset = int(result.clusters.loc[result.clusters["n_findings"] > 0, "onset"].iloc[0])
    with pytest.raises(UserError, match=each(f"{onset}.resid_post", "sequences 4 to 7")) as caught:
        intervene(model, ids, result, sets=("zero",), sinks=False)
    assert "--no-hold-out" in caught.value.do


def test_one_sequence_says_nothing_about_others() -> None:
    """An interval over one sequence would have no width, and call anything harmful."""
    one = np.array([0])
    paired = Paired(one, np.array([7.0]), {"nll": np.array([2.0])}, {"zero": {"nll": np.array([3.0])}}, {})
    found = effects_of(paired, "zero", np.array([True]))
    assert {e.metric for e in found} >= {"perplexity", "nll"}
    assert all(np.isnan(e.ci_low) and np.isnan(e.ci_high) and e.n_sequences == 1 for e in found)
    row = pd.Series({"metric": "perplexity", "baseline": 7.4, "edited": 20.1, "delta": 12.7, "ci_low": np.nan,
                     "ci_high": np.nan, "edit": "zero", "n_elements": 1, "n_calls": 1, "n_sequences": 1})  # fmt: skip
    assert verdict(row) == "not settled"
