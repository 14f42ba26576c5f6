"""Attention and gradients by class of tokens, against eager attention written out, and on planted heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import massact as ma
from massact.classics import CLASSICS, Ground, Outcome, Unavailable, classics
from massact.classics.attention_by_class import ClassShares
from massact.classics.token_classes import TOKEN_CLASSES
from massact.classics.token_labels import CLASSES, OTHER, SEP, TokenLabels, ids_in, paired_text
from massact.corpora import Corpus
from massact.interventions.predictions import ask, task_of
from massact.models import Model, load, with_attention
from massact.stats import Where
from massact.stats.attention_call import Attended
from tests.families import build

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", ".", ",", ";", "!", "\n")
T = 24


def tokenizer(special: bool = True) -> Any:
    """Of 99 whole words, with BERT's special tokens or with none."""
    vocabulary = {w: i for i, w in enumerate([*WORDS, *(f"w{i}" for i in range(len(WORDS), 99))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "cls", "sep", "mask", "unk")} if special else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def text(n: int = 3, length: int = T, seed: int = 0, low: int = 5) -> Tensor:
    """Ids without special tokens, marks among them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 99, (n, length), generator=rng)
    marks = torch.randint(low, 10, (n, length), generator=rng)
    ids = torch.where(torch.rand(n, length, generator=rng) < 0.3, marks, ids)
    ids[:, 0] = 11
    return ids


def ground(name: str, ids: Tensor, special: bool = True, module: Any = None, batch_size: int = 2) -> Ground:
    model = with_attention(load(module or build(name), tokenizer=tokenizer(special)))
    corpus = ma.corpus(ids).with_tokenizer(model.tokenizer)
    return Ground(model, corpus, ma.scan(model, corpus, null=False, bos_contrast=False), batch_size)


def read_by(g: Ground) -> Corpus:
    paired = paired_text(g.model, g.corpus) if task_of(g.model).mask_id is not None else None
    return paired or g.corpus


def inputs_of(corpus: Corpus) -> dict[str, Tensor]:
    mask = {} if corpus.mask is None else {"attention_mask": corpus.mask.long()}
    return dict(corpus.inputs) | mask


def eager_of(model: Model, dtype: torch.dtype = torch.float64) -> Any:
    eager = copy.deepcopy(model.module).to(dtype)
    eager.set_attn_implementation("eager")
    return eager


def classes_of(ids_T: Tensor) -> np.ndarray:
    """Numbers of classes, written out."""
    names = {1: "cls", 2: "sep", 3: "mask", 5: "period_comma", 6: "period_comma", 7: "delimiter", 8: "delimiter",
             9: "delimiter"}  # fmt: skip
    first = [names.get(int(ids_T[0]), "first")]
    return np.array([CLASSES.index(n) for n in [*first, *(names.get(int(i), "other") for i in ids_T[1:])]])


def table(outcome: Outcome, metric: str, subject: str | None = None) -> np.ndarray:
    """Values by layer and head, (L, H), or by layer."""
    f = pd.DataFrame(outcome.rows)
    f = f[f["metric"] == metric]
    f = f if subject is None else f[f["subject"] == subject]
    return f.pivot_table(index="layer", columns="head", values="value", dropna=False).to_numpy().squeeze()


@pytest.fixture(scope="module")
def runs() -> Callable[[str], tuple[Ground, Outcome]]:
    known: dict[str, tuple[Ground, Outcome]] = {}

    def run(name: str) -> tuple[Ground, Outcome]:
        if name not in known:
            ids = text()
            if name == "bert":
                ids[1, :9] = 2  # taken out: this sequence becomes a shorter one, with padding
            g = ground(name, ids, special=name == "bert")
            known[name] = g, TOKEN_CLASSES.run(g)
        return known[name]

    return run


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_shares_and_entropies_are_those_of_eager_attention(name: str, runs: Any) -> None:
    g, outcome = runs(name)
    corpus, since = read_by(g), int(name != "bert")
    with torch.no_grad():
        maps = eager_of(g.model)(**inputs_of(corpus), output_attentions=True).attentions
    rows: dict[str, list[list[np.ndarray]]] = {
        n: [[] for _ in maps] for n in (*CLASSES, "chance", "sep2sep", "cls_query")
    }
    entropies: list[list[np.ndarray]] = [[] for _ in maps]
    for layer, map_BHTS in enumerate(maps):
        for b, ids_T in enumerate(corpus.inputs["input_ids"]):
            n = T if corpus.mask is None else int(corpus.mask[b].sum())
            p, c = map_BHTS[b, :, :n, :n].numpy(), classes_of(ids_T[:n])
            e = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
            entropies[layer].append(e[:, since:])
            rows["cls_query"][layer].append(e[:, :1])
            for t in range(since, n):
                seen = c[: t + 1] if since else c
                for i in set(seen):
                    rows[CLASSES[i]][layer].append(p[:, t, c == i].sum(-1))
                if OTHER in seen:
                    rows["chance"][layer].append((seen == OTHER).mean()[None])
                if c[t] == SEP:
                    rows["sep2sep"][layer].append(p[:, t, c == SEP].sum(-1))
    present = [n for n in CLASSES if rows[n][0]]
    assert set(present) == set(outcome.numbers[""]["attention"]) and len(present) == (5 if name == "bert" else 4)
    for n in present:
        wanted = np.array([np.mean(r, 0) for r in rows[n]])
        np.testing.assert_allclose(table(outcome, "attention", n), wanted, atol=1e-5)
        assert outcome.numbers[""]["attention"][n] == pytest.approx(wanted.mean(), abs=1e-5)
    np.testing.assert_allclose(table(outcome, "chance", "other"), [np.mean(r) for r in rows["chance"]], atol=1e-6)
    np.testing.assert_allclose(table(outcome, "entropy"), [np.concatenate(e, 1).mean(1) for e in entropies], atol=1e-5)
    if name == "bert":
        wanted = np.array([np.mean(r, 0) for r in rows["sep2sep"]])
        np.testing.assert_allclose(table(outcome, "self_attention", "sep"), wanted, atol=1e-5)
        cls = np.array([np.concatenate(r, 1).mean(1) for r in rows["cls_query"]])
        np.testing.assert_allclose(table(outcome, "cls_entropy"), cls, atol=1e-5)
        assert outcome.numbers[""]["cls_entropy_last_layer"] == pytest.approx(cls[-1].mean(), abs=1e-5)
    else:
        assert "sep_to_sep" not in outcome.numbers[""] and "sep" in outcome.numbers[""]["classes_not_seen"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_gradients_are_those_of_eager_attention(name: str, runs: Any) -> None:
    g, outcome = runs(name)
    corpus, task, eager = read_by(g), task_of(g.model), eager_of(g.model)
    L, H = 3, 4
    sums, pairs = np.zeros((L, H, len(CLASSES))), np.zeros(len(CLASSES))
    for batch in corpus.batches(1):
        asked = ask(batch, task)
        given = asked.batch.inputs
        out = eager(**given, output_attentions=True)
        ids, logits = batch.inputs["input_ids"][0], out.logits[0]
        n = len(ids) if batch.rows[0] is None else batch.rows[0].stop
        log_p = logits.log_softmax(-1)
        if task.ahead is None:
            loss = -torch.stack([log_p[t, ids[t]] for t in asked.hidden[0]]).mean()
            assert bool((given["input_ids"][0, asked.hidden[0]] == 3).all())
        else:
            loss = -torch.stack([log_p[t - 1, ids[t]] for t in range(1, n)]).mean()
        labels = classes_of(given["input_ids"][0, :n])
        for layer, d in enumerate(torch.autograd.grad(loss, list(out.attentions))):
            size = d[0, :, :n, :n].abs().numpy()
            for t in range(int(task.ahead == 1), n):
                for s in range(t + 1 if task.ahead == 1 else n):
                    sums[layer, :, labels[s]] += size[:, t, s]
                    pairs[labels[s]] += layer == 0
    mean, overall = sums / np.maximum(pairs, 1), sums.sum(-1) / pairs.sum()
    for c in np.flatnonzero(pairs):
        np.testing.assert_allclose(table(outcome, "gradient", CLASSES[c]), mean[..., c], rtol=2e-3)
        relative = mean[..., c] / overall
        np.testing.assert_allclose(table(outcome, "gradient_relative", CLASSES[c]), relative, rtol=2e-3)
        summed = mean[..., c].sum(1)
        np.testing.assert_allclose(table(outcome, "gradient_sum", CLASSES[c]), summed, rtol=2e-3)
        np.testing.assert_allclose(
            table(outcome, "gradient_sum_relative", CLASSES[c]), summed / overall.sum(1), rtol=2e-3
        )
        if c != OTHER:
            ratio = summed / mean[..., OTHER].sum(1)
            known = outcome.numbers[""]["gradient_over_other"][CLASSES[c]]
            assert known["early"] == pytest.approx(ratio[:2].mean(), rel=2e-3)
            assert known["late"] == pytest.approx(ratio[2:].mean(), rel=2e-3)
    assert (set(np.array(CLASSES)[pairs > 0]) >= {"mask", "sep"}) == (name == "bert")


def sep_looker() -> Any:
    """BERT whose head 0 of layer 1 looks at [SEP] and nothing else, and whose other heads there look at all alike."""
    module = build("bert")
    with torch.no_grad():
        e = module.bert.embeddings
        e.position_embeddings.weight.zero_()
        e.token_type_embeddings.weight.zero_()
        e.word_embeddings.weight[:, 0] = 0
        e.word_embeddings.weight[2] = 0
        e.word_embeddings.weight[2, 0] = 5
        own = module.bert.encoder.layer[0].attention.self
        for linear in (own.query, own.key):
            linear.weight.zero_()
            linear.bias.zero_()
        own.query.bias[0] = 4
        own.key.weight[0, 0] = 4
    return module


def test_a_planted_head_gives_all_to_sep() -> None:
    outcome = TOKEN_CLASSES.run(ground("bert", text(), module=sep_looker()))
    share, entropy = table(outcome, "attention", "sep")[0], table(outcome, "entropy")[0]
    chance = table(outcome, "chance", "sep")[0]
    assert share[0] == pytest.approx(1, abs=1e-5) and entropy[0] == pytest.approx(np.log(2), abs=1e-4)
    assert chance == pytest.approx(2 / T) and share[1:] == pytest.approx(chance, abs=1e-5)
    assert entropy[1:] == pytest.approx(np.log(T), abs=1e-4)
    assert table(outcome, "self_attention")[0, 0] == pytest.approx(1, abs=1e-5)
    numbers = outcome.numbers[""]
    assert (numbers["entropy_narrowest"]["layer"], numbers["entropy_narrowest"]["head"]) == (1, 0)
    assert numbers["format"] == "[CLS] p1 [SEP] p2 [SEP]" and numbers["peak"]["sep"]["layer"] == 1
    assert numbers["layers_over_half"]["sep"] == []


def test_text_in_the_format_of_clark() -> None:
    ids = text(4, 12)
    ids[0, 0], ids[0, -1] = 1, 2  # as a tokenizer gives it
    ids[3, :11] = 2  # one token is left of it
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[2, 8:] = False
    model = load(build("bert"), tokenizer=tokenizer())
    made = paired_text(model, replace(ma.corpus(ids), mask=mask))
    assert made is not None and made.mask is not None
    rows, types = made.inputs["input_ids"], made.inputs["token_type_ids"]
    assert rows.shape == (3, 12)
    assert rows[0].tolist() == [1, *ids[0, 1:6].tolist(), 2, *ids[0, 6:10].tolist(), 2]
    assert rows[1].tolist() == [1, *ids[1, :5].tolist(), 2, *ids[1, 5:9].tolist(), 2]
    assert rows[2].tolist() == [1, *ids[2, :3].tolist(), 2, *ids[2, 3:5].tolist(), 2, 0, 0, 0, 0]
    assert types[0].tolist() == [0] * 7 + [1] * 5 and types[2].tolist() == [0] * 5 + [1] * 3 + [0] * 4
    assert made.mask.sum(1).tolist() == [12, 12, 8]
    assert set(paired_text(load(build("distilbert"), tokenizer=tokenizer()), ma.corpus(ids)).inputs) == {"input_ids"}
    assert paired_text(model, ma.corpus(torch.full((2, 12), 2))) is None
    short = load(build("bert"), tokenizer=tokenizer())
    short.module.config.max_position_embeddings = 8
    assert paired_text(short, ma.corpus(ids)).inputs["input_ids"].shape == (3, 8)


def test_every_position_has_one_class() -> None:
    ids = torch.tensor([11, 1, 2, 3, 5, 6, 7, 9, 12])
    names = [CLASSES[i] for i in TokenLabels(tokenizer()).of(ids, Where(0), 9)]
    assert names == ["first", "cls", "sep", "mask", "period_comma", "period_comma", "delimiter", "delimiter", "other"]
    assert [CLASSES[i] for i in TokenLabels().of(ids, Where(0), 3)] == ["first", "other", "other"]
    at = Where(0, positions=torch.tensor([4, 0, 8]))
    assert [CLASSES[i] for i in TokenLabels(tokenizer()).of(ids, at, 3)] == ["period_comma", "other", "other"]


@pytest.mark.parametrize("mask", [False, True])
def test_a_mask_and_a_learned_sink(mask: bool) -> None:
    """A sliding window hides early keys from late queries, and rows sum to less than one."""
    rng, n, H = torch.Generator().manual_seed(5), 30, 4
    q, k, v = (torch.randn(h, n, 6, generator=rng) for h in (H, 2, 2))
    row, col = torch.arange(n)[:, None], torch.arange(n)
    seen = (row >= col) & (row - col < 5) if mask else row >= col
    added = torch.zeros(n, n).masked_fill(~seen, -torch.inf)
    a = Attended(q, k, v, None, scale=0.5, mask_HTS=added[None] if mask else None, causal=not mask, forward=True,
                 sink_H=torch.randn(H, generator=rng))  # fmt: skip
    ids = text(1, n)
    labels = classes_of(ids[0])
    statistic = ClassShares(lambda where, T: TokenLabels(tokenizer()).of(ids_in({"input_ids": ids})(0), where, T))
    halves = [ClassShares(statistic.labels), ClassShares(statistic.labels)]
    for half in halves:
        half.update(a, Where(0))
        statistic.merge(half)
    found = statistic.result()
    s = torch.einsum("hte,hse->hts", q, k.repeat_interleave(2, 0)) * 0.5 + added
    e = torch.cat([s, a.sink_H[:, None, None].expand(H, n, 1)], -1).softmax(-1).double().numpy()
    p = e[..., :-1]
    assert found["entropy"] == pytest.approx(-(e * np.log(np.where(e > 0, e, 1))).sum(-1)[:, 1:].mean(1), abs=1e-5)
    for c in np.unique(labels):
        mine = [t for t in range(1, n) if seen[t].numpy()[labels == c].any()]
        assert found["queries"][0, c] == 2 * len(mine)
        assert found["share"][:, c] == pytest.approx(p[:, mine][..., labels == c].sum(-1).mean(1), abs=1e-5)
        chance = np.mean([seen[t].numpy()[labels == c].sum() / seen[t].sum().item() for t in mine])
        assert found["chance"][0, c] == pytest.approx(chance, abs=1e-6)


def test_model_is_as_before_and_batches_do_not_matter(runs: Any) -> None:
    g, outcome = runs("bert")
    module, inputs = g.model.module, inputs_of(read_by(g))
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    with torch.no_grad():
        before = module(**inputs).logits
    again = TOKEN_CLASSES.run(replace(g, batch_size=1))
    with torch.no_grad():
        assert torch.equal(before, module(**inputs).logits)
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags and all(flags.values())
    assert all(p.grad is None for p in module.parameters()) and not module.training
    one, other = pd.DataFrame(outcome.rows), pd.DataFrame(again.rows)
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-6)


def test_images_without_labels_have_shares_and_say_why_no_gradients() -> None:
    model = with_attention(load(build("vit")))
    corpus = ma.corpus({"pixel_values": torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))})
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    outcome = TOKEN_CLASSES.run(Ground(model, corpus, scan))
    assert set(outcome.numbers[""]["attention"]) == {"first", "other"}
    assert sum(outcome.numbers[""]["attention"].values()) == pytest.approx(1, abs=1e-5)
    assert outcome.numbers[""]["chance"]["first"] == pytest.approx(1 / 26)
    assert any("no labels" in note for note in outcome.notes) and "gradient_over_other" not in outcome.numbers[""]
    assert not [r for r in outcome.rows if r["metric"].startswith("gradient")]


def test_without_a_tokenizer_only_the_first_position_is_known() -> None:
    model = with_attention(load(build("gpt2")))
    corpus = ma.corpus(text(2))
    outcome = TOKEN_CLASSES.run(Ground(model, corpus, ma.scan(model, corpus, null=False, bos_contrast=False)))
    assert set(outcome.numbers[""]["attention"]) == {"first", "other"}
    assert any("no tokenizer" in note for note in outcome.notes)
    assert set(outcome.numbers[""]["gradient_over_other"]) == {"first"}


def test_a_decoder_that_is_forced_reads_one_position_later() -> None:
    ids = text(2)
    ids[:, 4] = 5
    g = ground("t5", ids, special=False)
    outcome = TOKEN_CLASSES.run(g)
    assert set(outcome.numbers) == {"encoder", "decoder"}
    shifted = g.model.decoder_ids(ids)
    f = pd.DataFrame(outcome.rows)
    f = f[(f["metric"] == "attention") & (f["subject"] == "period_comma") & (f["head"] == 0) & (f["layer"] == 1)]
    n = dict(zip(f["stack"], f["n"], strict=True))
    assert n["encoder"] == ids.numel()  # every query sees the mark that each sequence has
    first = [int(torch.isin(row, torch.tensor([5, 6])).int().argmax()) for row in shifted]
    assert n["decoder"] == sum(T - max(at, 1) for at in first)
    assert {"encoder", "decoder"} == {r["stack"] for r in outcome.rows if r["metric"] == "gradient"}


def test_it_is_declared_and_refuses_a_model_without_attention(runs: Any) -> None:
    g, outcome = runs("gpt2")
    assert CLASSICS["token-classes"] is TOKEN_CLASSES
    whole = classics(g.model, g.corpus, g.scan, which=("token-classes",), batch_size=2)
    assert whole.info.outcomes["token-classes"][""]["attention"] == outcome.numbers[""]["attention"]
    assert len(whole.classics) == len(outcome.rows)
    blind = replace(g.model, anatomy=replace(g.model.anatomy, attentions={}))
    with pytest.raises(Unavailable, match="No self-attention"):
        TOKEN_CLASSES.run(replace(g, model=blind))
