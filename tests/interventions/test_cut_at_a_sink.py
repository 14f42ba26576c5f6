"""Cutting the attention on a sink: what is left of a row is tiny, and is what counts (p = 1 - 1e-13 among others)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import massact as ma
from massact.interventions import cut_attention
from massact.interventions.sinks import SINK_METRICS
from massact.models import with_attention
from massact.stats.attention_call import Attended
from massact.trace import edited

T = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_the_output_without_some_keys_is_the_softmax_over_the_others(
    written: bool, slot: bool, dtype: torch.dtype
) -> None:
    """Scores of a sink up to 40 above the others; a window of 7 keys; queries that do not see it keep their output."""
    torch.manual_seed(0)
    H, E = 3, 8
    q, k, v = (torch.randn(H, T, E).to(dtype) for _ in range(3))
    k[:, 2], q[..., 0] = torch.eye(E)[0].to(dtype) * 4, torch.linspace(0, 28, H * T).reshape(H, T).to(dtype)
    sink = torch.tensor([0.5, -3.0, 2.0]) if slot else None
    mask = torch.full((1, T, T), -torch.inf).triu(1) + torch.full((T, T), -torch.inf).tril(-7)
    scores = q.double() @ k.double().mT * E**-0.5 + mask
    if written:
        scores = scores.float().double()

    def out(s: Tensor) -> Tensor:
        column = torch.full((H, T, 1), -torch.inf) if sink is None else sink[:, None, None].expand(H, T, 1)
        return torch.cat([s, column.double()], -1).softmax(-1).nan_to_num(0.0)[..., :T] @ v.double()

    cut = scores.clone()
    cut[..., [2, 3]] = -torch.inf
    given = out(scores).to(dtype)
    call = (
        Attended(None, None, v, given, scores_HTS=scores.float().masked_fill(scores == -torch.inf, -1e38), sink_H=sink)
        if written
        else Attended(q, k, v, given, None, E**-0.5, mask, sink_H=sink)
    )
    got = call.without(torch.tensor([2, 3]))
    untouched = (torch.arange(T) < 2) | (torch.arange(T) > 9)
    wanted = torch.where(untouched[:, None], given.double(), out(cut))
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)
    p_HT = scores.softmax(-1)[..., 2]
    assert float((1 - p_HT)[:, 2:9].min()) < 1e-12


def test_the_embedded_model_without_attention_on_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of its rows leave less than 1e-6 to all other keys. The truth is a softmax in float64."""
    torch.manual_seed(0)
    model = with_attention(ma.load())
    ids = torch.randint(5, 200, (4, T))

    def logits() -> Tensor:
        with torch.inference_mode():
            return model.module(input_ids=ids).logits.clone()

    with edited(model, cut_attention([0])):
        got = logits()
    tiny = []

    def naive(q: Tensor, k: Tensor, v: Tensor, *_: object, scale: float | None = None, **__: object) -> Tensor:
        s = q.double() @ k.double().mT * (scale or q.shape[-1] ** -0.5)
        s = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        tiny.append(1 - s.softmax(-1)[:, :, 1:, 0] < 1e-6)
        s[..., 0] = -torch.inf
        return (s.softmax(-1).nan_to_num(0.0) @ v.double()).to(v.dtype)

    monkeypatch.setattr(F, "scaled_dot_product_attention", naive)
    wanted = logits()
    assert torch.stack(tiny).float().mean() > 0.5
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=1e-3)
    assert (
        float(F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1).max())
        < 1e-4
    )


def test_attention_under_a_cut_is_unavailable_and_said() -> None:
    """It is seen before the cut: 0.76 on a key that nobody attends to. Values are what they are; a cut of one layer
    leaves means over those behind it, on both sides."""
    torch.manual_seed(0)
    model = ma.load()
    corpus = ma.corpus(torch.randint(5, 200, (4, T)))
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    done = ma.intervene(model, corpus, scan, sets=("zero", "cut-first"), more=(cut_attention([0], "3.attention"),),
                        repetition=False)  # fmt: skip
    metrics = {name: set(rows.metric) for name, rows in done.effects.groupby("edit")}
    cut, one = (n for n in metrics if "not attended to" in n)
    of_values = {"value_norm_first", "value_norm_ratio"}
    assert metrics[cut] & set(SINK_METRICS) == of_values
    assert metrics[one] == metrics["zero"] >= {"attention_first", "sink_rate"}
    assert any("not given under" in note and cut in note and "zero" not in note for note in done.info.notes)

    rows = done.effects[(done.effects.edit == one) & (done.effects.metric == "attention_first")]
    heads = ma.explain(model, corpus, scan).heads
    assert rows.baseline.item() == pytest.approx(heads[heads.layer > 3].mass_first.mean(), abs=1e-6)


def test_an_effect_of_a_cut_is_the_same_whether_or_not_sinks_are_looked_at() -> None:
    """Both ways the text gets as much worse, over as many cut weights."""
    model, corpus = ma.load(), ma.corpus(None, seq_len=48, n_sequences=2)
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    seen = []
    for sinks in (True, False):
        effects = ma.intervene(model, corpus, scan, sets=("cut-first",), sinks=sinks, repetition=False).effects
        seen.append(effects[effects.metric == "perplexity"][["edited", "n_elements"]].to_numpy().ravel().tolist())
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
