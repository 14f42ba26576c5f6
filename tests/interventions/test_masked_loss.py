"""Losses that are not of every next token: hidden tokens of a masked model, targets from a position on; intervals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import massact as ma
from massact.corpora import Batch
from massact.interventions import drop_first, evaluate
from massact.interventions.effects import Effect, Paired, effects_of
from massact.interventions.predictions import ask, task_of
from massact.models import Model
from massact.trace import Edit
from tests.families import build
from tests.interventions.test_paired import made, naive

CLS, SEP, MASK, PAD = 1, 2, 3, 0
SPECIAL = {CLS, SEP, MASK, PAD}
WAVE = 3 * torch.sin(torch.arange(32).float())


def tokenizer(mask: bool = True) -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(4, 99))]
    known = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w4")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(known), **special,
                                   **({"mask_token": "[MASK]"} if mask else {}))  # fmt: skip


def bert(mask: bool = True) -> Model:
    return ma.load(build("bert"), tokenizer=tokenizer(mask))


def texts(n: int = 6, length: int = 30) -> Tensor:
    """[CLS] words [SEP] words [SEP]."""
    ids = torch.randint(4, 99, (n, length), generator=torch.Generator().manual_seed(5))
    ids[:, 0], ids[:, 12], ids[:, -1] = CLS, SEP, SEP
    return ids


def padded(ids: Tensor, left: bool = False) -> dict[str, Tensor]:
    """Padded with ordinary words, which only the mask tells from the text."""
    mask = torch.zeros_like(ids)
    for row in range(len(ids)):
        n = ids.shape[1] - 4 * row
        mask[row, slice(-n, None) if left else slice(0, n)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """The ids of every forward pass."""
    seen: list[Tensor] = []

    def look(m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].clone())

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def hidden_by(ids: Tensor, model: Model) -> list[list[int]]:
    """The positions that `ask` hides of every sequence."""
    batch = Batch({"input_ids": ids}, tuple(range(len(ids))), (None,) * len(ids))
    return [h.tolist() for h in ask(batch, task_of(model)).hidden]


@torch.no_grad()
def loss(model: Model, ids: Tensor, at: list[int]) -> float:
    """Mean loss of the hidden tokens of one text, written out."""
    given = ids.clone()
    given[at] = MASK
    p = model.module(input_ids=given[None]).logits[0].double().log_softmax(-1)
    return float(-np.mean([float(p[t, ids[t]]) for t in at]))


@contextmanager
def waved(model: Model) -> Iterator[None]:
    layer = model.module.bert.encoder.layer[1]  # type: ignore[union-attr,index]
    handle = layer.register_forward_hook(
        lambda m, a, out: out + WAVE if isinstance(out, Tensor) else (out[0] + WAVE, *out[1:])
    )
    try:
        yield
    finally:
        handle.remove()


EDIT = Edit("wave", "2.resid_post", lambda h, b: h + WAVE)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_is_of_the_hidden_tokens(batch_size: int) -> None:
    model, ids = bert(), texts()
    paired = evaluate(model, ma.corpus(ids), [EDIT], batch_size=batch_size)
    at = hidden_by(ids, model)
    np.testing.assert_allclose(
        paired.baseline["nll"], [loss(model, t, a) for t, a in zip(ids, at, strict=True)], rtol=1e-5
    )
    with waved(model):
        after = [loss(model, t, a) for t, a in zip(ids, at, strict=True)]
    np.testing.assert_allclose(paired.edited["wave"]["nll"], after, rtol=1e-5)
    assert np.abs(paired.edited["wave"]["nll"] - paired.baseline["nll"]).min() > 1e-4
    assert paired.n_targets.tolist() == [len(a) for a in at]


def test_fifteen_percent_are_hidden_and_nothing_special() -> None:
    """Of 27 words 4; which ones differs from text to text."""
    model, ids = bert(), texts(40)
    with watched(model.module) as seen:
        paired = evaluate(model, ma.corpus(ids), [])
    given = torch.cat(seen)
    hidden = given == MASK
    assert hidden.sum(1).tolist() == [round(0.15 * 27)] * 40 == paired.n_targets.tolist()
    assert not SPECIAL & set(ids[hidden].tolist()) and torch.equal(given[~hidden], ids[~hidden])
    assert len({tuple(row.nonzero().flatten().tolist()) for row in hidden}) > 35
    places = hidden.sum(0)
    assert (places[[0, 12, 29]] == 0).all() and (places[[*range(1, 12), *range(13, 29)]] > 0).sum() > 24


def test_the_same_tokens_are_hidden_with_and_without_edits_and_on_every_run() -> None:
    model, ids = bert(), texts()
    runs = []
    for batch_size in (1, 4, 6):
        with watched(model.module) as seen:
            evaluate(model, ma.corpus(ids), [EDIT, drop_first(1)], batch_size=batch_size)
        baseline, wave, dropped = (torch.cat(seen[i::3]) for i in range(3))
        assert torch.equal(baseline, wave) and torch.equal(baseline[:, 1:], dropped)
        runs.append(baseline)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_padding_is_never_hidden(left: bool, batch_size: int) -> None:
    model, given = bert(), padded(texts(), left)
    with watched(model.module) as seen:
        paired = evaluate(model, ma.corpus(given), [EDIT], batch_size=batch_size)
    row = 0
    for ids in seen[::2]:
        for got in ids:
            mask, old = given["attention_mask"][row].bool(), given["input_ids"][row]
            hidden = torch.zeros_like(mask)
            hidden[: len(got)] = got == MASK  # what no row of the batch counts is cut at the right
            free = [t for t in range(30) if mask[t] and int(old[t]) not in SPECIAL]
            assert not hidden[~mask].any() and int(hidden.sum()) == round(0.15 * len(free)) == paired.n_targets[row]
            row += 1
    assert row == 6


def test_a_padded_text_has_the_loss_of_its_own_tokens() -> None:
    model, given = bert(), padded(texts())
    with watched(model.module) as seen:
        paired = evaluate(model, ma.corpus(given), [], batch_size=6)
    for row in range(6):
        n = int(given["attention_mask"][row].sum())
        at = (seen[0][row, :n] == MASK).nonzero().flatten().tolist()
        assert paired.baseline["nll"][row] == pytest.approx(loss(model, given["input_ids"][row, :n], at), rel=1e-5)


def test_a_text_of_special_tokens_has_no_loss() -> None:
    model = bert()
    ids = torch.tensor([[CLS, 9, 10, 11, SEP], [CLS, SEP, SEP, SEP, SEP]])
    paired = evaluate(model, ma.corpus(ids), [EDIT])
    assert paired.n_targets.tolist() == [1, 0] and np.isnan(paired.baseline["nll"]).tolist() == [False, True]
    assert {e.n_sequences for e in effects_of(paired, "wave", np.ones(2, bool))} == {1}


def test_there_is_a_perplexity_of_hidden_tokens() -> None:
    """Weighted by the number of hidden tokens; without a mask token there is none, and no loss."""
    model, given = bert(), padded(texts())
    paired = evaluate(model, ma.corpus(given), [EDIT])
    rows = {e.metric: e for e in effects_of(paired, "wave", np.ones(6, bool))}
    n = paired.n_targets
    assert len(set(n)) > 1
    for side, nll in (("baseline", paired.baseline["nll"]), ("edited", paired.edited["wave"]["nll"])):
        assert getattr(rows["perplexity"], side) == pytest.approx(np.exp((nll * n).sum() / n.sum()))
    without = evaluate(bert(mask=False), ma.corpus(given), [EDIT])
    names = {e.metric for e in effects_of(without, "wave", np.ones(6, bool))}
    assert not {"perplexity", "nll"} & names and "kl" in names


# -------------------------------------------------------------------------------------------- from a position on
def losses(module: nn.Module, ids: Tensor, first: int) -> tuple[int, float]:
    """How many targets there are from a position on, and their mean loss."""
    p = naive(module, ids)
    at = [t for t in range(1, len(ids)) if t >= first]
    return len(at), float(np.mean([-p[t - 1, int(ids[t])] for t in at]))


@pytest.mark.parametrize("since", [0, 1, 2, 9, 23])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_later_targets_count(family: str, since: int) -> None:
    """The target is at this position or behind it; its prediction is one before."""
    module = build(family)
    ids = torch.randint(4, 90, (3, 24), generator=torch.Generator().manual_seed(2))
    edit = Edit("wave", "2.resid_post", lambda h, b: h + WAVE)
    paired = evaluate(ma.load(module), ma.corpus(ids), [edit], since=since, batch_size=2)
    wanted = [losses(module, row, since) for row in ids]
    assert paired.n_targets.tolist() == [n for n, _ in wanted] == [24 - max(since, 1)] * 3
    np.testing.assert_allclose(paired.baseline["nll"], [x for _, x in wanted], rtol=1e-5)
    blocks = module.transformer.h if family == "gpt2" else module.model.layers
    plain = [naive(module, row) for row in ids]
    handle = blocks[1].register_forward_hook(
        lambda m, a, out: out + WAVE if isinstance(out, Tensor) else (out[0] + WAVE, *out[1:])
    )
    np.testing.assert_allclose(paired.edited["wave"]["nll"], [losses(module, row, since)[1] for row in ids], rtol=1e-5)
    after = [naive(module, row) for row in ids]
    handle.remove()
    rows = slice(max(since, 1) - 1, 23)
    kl = [(np.exp(a[rows]) * (a[rows] - b[rows])).sum(-1).mean() for a, b in zip(plain, after, strict=True)]
    np.testing.assert_allclose(paired.edited["wave"]["kl"], kl, atol=2e-6)
    sure = [np.exp(a[rows].max(-1)).mean() for a in plain]
    np.testing.assert_allclose(paired.baseline["top1_probability"], sure, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_only_later_targets_of_padded_prompts_count(left: bool, batch_size: int) -> None:
    """Positions are those of the corpus, padding included. One prompt ends before: it has no numbers."""
    module, since = build("llama"), 9
    ids = torch.randint(4, 90, (3, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    lengths = [24, 15, 8]
    for row, n in enumerate(lengths):
        mask[row, slice(-n, None) if left else slice(0, n)] = 1
    given = ma.corpus({"input_ids": ids, "attention_mask": mask})
    paired = evaluate(ma.load(module), given, [], since=since, batch_size=batch_size)
    for row, n in enumerate(lengths):
        first = max(0, since - (24 - n)) if left else since
        alone = ids[row, 24 - n :] if left else ids[row, :n]
        if not left and n <= since:
            assert paired.n_targets[row] == 0 and np.isnan(paired.baseline["nll"][row])
            continue
        count, nll = losses(module, alone, first)
        assert paired.n_targets[row] == count
        assert paired.baseline["nll"][row] == pytest.approx(nll, rel=1e-5)


def test_later_targets_without_the_first_tokens() -> None:
    """Positions are those of the text as it was, not of what is left of it."""
    module = build("llama")
    ids = torch.randint(4, 90, (3, 24), generator=torch.Generator().manual_seed(2))
    edit = drop_first(2)
    paired = evaluate(ma.load(module), ma.corpus(ids), [edit], since=9, batch_size=3)
    wanted = [losses(module, row[2:], 9 - 2)[1] for row in ids]
    np.testing.assert_allclose(paired.edited[edit.name]["nll"], wanted, rtol=1e-5)


def test_hidden_tokens_lie_behind_a_position() -> None:
    model, ids = bert(), texts()
    with watched(model.module) as seen:
        paired = evaluate(model, ma.corpus(ids), [], since=20)
    hidden = torch.cat(seen) == MASK
    assert not hidden[:, :20].any() and hidden.sum(1).tolist() == [round(0.15 * 9)] * 6 == paired.n_targets.tolist()


# ----------------------------------------------------------------------------------------------------- intervals
BASE = np.random.default_rng(0).normal(3, 0.1, 30)


def effects(after: np.ndarray) -> dict[str, Effect]:
    return {e.metric: e for e in effects_of(made(BASE, after), "e", np.ones(30, bool))}


@pytest.mark.parametrize("many", [1, 2, 30])
def test_an_infinite_loss_is_harmful_and_has_no_interval(many: int) -> None:
    after = BASE + 0.01
    after[:many] = np.inf
    for metric in ("nll", "perplexity", "perplexity_windowed", "kl"):
        effect = effects(after)[metric]
        assert effect.edited == effect.delta == np.inf and np.isnan([effect.ci_low, effect.ci_high]).all(), metric
        assert effect.verdict == ("not judged" if metric == "kl" else "harmful")


def test_a_loss_that_is_no_number_has_no_interval() -> None:
    after = BASE + 0.01
    after[7] = np.nan
    for metric in ("nll", "perplexity", "perplexity_windowed"):
        effect = effects(after)[metric]
        assert np.isnan([effect.edited, effect.delta, effect.ci_low, effect.ci_high]).all(), metric
        assert effect.baseline == pytest.approx(BASE.mean() if metric == "nll" else np.exp(BASE.mean()))


def test_a_finite_interval_is_the_paired_t() -> None:
    after = BASE + np.random.default_rng(1).normal(0.2, 0.3, 30)
    effect, by_hand = effects(after)["nll"], scipy.stats.ttest_rel(after, BASE).confidence_interval()
    assert (effect.ci_low, effect.ci_high) == pytest.approx((by_hand.low, by_hand.high))


def test_infinite_before_and_after_is_unknown() -> None:
    one = Paired(np.arange(3), np.full(3, 5.0), {"nll": np.full(3, np.inf)}, {"e": {"nll": np.full(3, np.inf)}})
    effect = {e.metric: e for e in effects_of(one, "e", np.ones(3, bool))}["nll"]
    assert np.isnan([effect.delta, effect.ci_low, effect.ci_high]).all()
