"""Window attention against eager copies of whole models with an explicit mask, and at its edges."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.interventions import evaluate
from massact.interventions.window import window
from massact.models import with_attention
from massact.records.errors import UserError, WorkError
from massact.stats.attention_call import Attended
from massact.trace import edited
from massact.trace.attention import AttentionCall, attending
from tests.families import build

T = 24


def tokens(n: int = 2, length: int = T) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(3))


def sees(width: int, keep: int, length: int = T) -> np.ndarray:
    """(T, S) bool, one entry at a time."""
    return np.array([[s <= t and (s < keep or t - s < width - keep) for s in range(length)] for t in range(length)])


def masked(module: nn.Module, ids: Tensor, seen: np.ndarray) -> Tensor:
    """Logits of an eager copy with an additive 4-d mask, its own sliding layers kept."""
    eager = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager").eval()
    eager.load_state_dict(module.state_dict())

    def additive(seen: np.ndarray) -> Tensor:
        mask = torch.zeros(seen.shape).masked_fill(~torch.from_numpy(seen), torch.finfo(torch.float32).min)
        return mask[None, None].expand(len(ids), 1, -1, -1)

    mask: Any = additive(seen)
    if getattr(module.config, "sliding_window", None) and "sliding_attention" in module.config.layer_types:
        slides = sees(module.config.sliding_window, 0, ids.shape[1])
        mask = {"full_attention": mask, "sliding_attention": additive(seen & slides)}
    with torch.no_grad():
        return eager(ids, attention_mask=mask).logits


def sharpened(name: str) -> nn.Module:
    """Greater weights than at initialisation, so that attention is far from uniform."""
    module = build(name)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.mul_(6)
    return module


@pytest.mark.parametrize(("width", "keep"), [(6, 0), (6, 1), (7, 3), (5, 5), (T - 1, 2)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "gemma2", "gpt_neox"])
def test_a_window_is_that_of_an_explicit_mask(name: str, width: int, keep: int) -> None:
    """GQA (llama), learned sinks and sliding layers (gpt_oss), soft-capping (gemma2)."""
    module, ids = sharpened(name), tokens()
    model = with_attention(ma.load(module))
    with torch.no_grad(), edited(model, window(width, keep)):
        got = module(ids).logits
    wanted, plain = masked(module, ids, sees(width, keep)), masked(module, ids, sees(T, 0))
    scale = float(wanted.abs().max())
    if name == "gemma2" and keep == width:
        # From 12 on a sliding layer (of 8) sees none of the 5 keys, which an eager copy makes uniform: ours gives zero.
        assert float((got - wanted)[:, 12:].abs().max()) > 1e-3 * scale
        wanted, got, plain = (x[:, :12] for x in (wanted, got, plain))
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=2e-5 * scale)
    if width < T - 1:
        assert float((wanted - plain).abs().max()) > 1e-3 * scale  # the mask matters


@pytest.mark.parametrize("keep", [0, 2, 6])
def test_a_window_over_logits_with_position_biases(keep: int) -> None:
    """Bloom writes attention out, with ALiBi: only its logits and values are seen."""
    module, ids = sharpened("bloom"), tokens()
    model = with_attention(ma.load(module))
    place = next(iter(model.anatomy.attentions.values()))
    calls: list[AttentionCall] = []
    with torch.no_grad(), attending(module, {place: calls.append}) as heads:  # type: ignore[dict-item]
        heads.begin()
        module(ids)
    assert calls[0].q_BHTE is None
    for b in range(2):
        a = calls[0].split(2).of(b, place)
        s, v = a.scores_HTS.double().numpy(), a.v_KSF.double().numpy()  # type: ignore[union-attr]
        p = np.where(sees(6, keep), np.exp(s - s.max(-1, keepdims=True)), 0)
        got = window(6, keep).apply(a)
        np.testing.assert_allclose(got.numpy(), p @ v / p.sum(-1, keepdims=True), atol=1e-5)
        assert torch.equal(got[:, :6], a.out_HTF[:, :6])  # type: ignore[index]
        assert float((got - a.out_HTF)[:, 6:].abs().max()) > 1e-3


def call(H: int = 4, K: int = 2, length: int = 40, **given: Any) -> Attended:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, length, 8, generator=draw) for n in (H, K, K))
    out = torch.full((H, length, 8), 7.0)
    return Attended(q, k, v, out, scale=0.7, causal=True, forward=True, **given)


@pytest.mark.parametrize(("width", "keep"), [(1, 0), (1, 1), (3, 1), (8, 4), (39, 0)])
@pytest.mark.parametrize("sink", [False, True])
def test_one_call_against_a_loop(width: int, keep: int, sink: bool) -> None:
    """Query by query, in blocks smaller than the text; rows that lose nothing keep what the model gave."""
    b = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sink else None
    a = call(sink_H=b)
    got = window(width, keep).apply(a).numpy()
    q, k, v = (x.double().numpy() for x in (a.q_HTE, a.k_KSE, a.v_KSF))  # type: ignore[union-attr]
    for h in range(4):
        for t in range(40):
            keys = [s for s in range(t + 1) if s < keep or s > t - (width - keep)]
            if len(keys) == t + 1:
                assert (got[h, t] == 7).all()
                continue
            e = np.exp(0.7 * k[h // 2, keys] @ q[h, t])
            wanted = e @ v[h // 2, keys] / (e.sum() + (np.exp(float(b[h])) if b is not None else 0))
            np.testing.assert_allclose(got[h, t], wanted, atol=1e-5)


def test_a_row_that_its_own_mask_leaves_nothing_gives_zero() -> None:
    """Keys 0 .. 2 kept alone, of a layer that hides all but the last 4; rows that lose nothing are left as they are."""
    seen = torch.from_numpy(sees(4, 0, 40))
    mask = torch.zeros(1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
    a = replace(call(), causal=False, mask_HTS=mask)
    got = window(3, 3).apply(a)
    assert (got[:, :3] == 7).all() and (got[:, 6:] == 0).all() and got.isfinite().all()
    assert (got[:, 3:6] != 7).any() and (got[:, 3:6] != 0).any()
    assert (window(6, 2).apply(a) == 7).all()  # the layer's own window of 4 is no wider: nothing is lost


def test_a_window_as_wide_as_the_text_changes_nothing() -> None:
    module, ids = sharpened("llama"), tokens()
    model = with_attention(ma.load(module))
    with torch.no_grad():
        plain = module(ids).logits
        with pytest.raises(WorkError, match="changed nothing"), edited(model, window(T, 4)):
            assert torch.equal(module(ids).logits, plain)
        with pytest.raises(WorkError, match="changed nothing"):
            evaluate(model, ma.corpus(ids), [window(T + 5, 0)])


@pytest.mark.parametrize(("width", "keep"), [(0, 0), (4, 5), (4, -1)])
def test_widths_out_of_range_are_refused(width: int, keep: int) -> None:
    with pytest.raises(UserError, match="window"):
        window(width, keep)


def test_what_has_no_window_says_why() -> None:
    apply = window(4, 1).apply
    with pytest.raises(UserError, match="behind them"):
        apply(replace(call(), causal=False, forward=False))
    with pytest.raises(UserError, match="values"):
        apply(replace(call(), v_KSF=None))
    a = call()
    with pytest.raises(UserError, match="a cache"):
        apply(replace(a, k_KSE=a.k_KSE[:, :9], causal=False))  # type: ignore[index]
    model = with_attention(ma.load(build("bert")))
    with pytest.raises(UserError, match="behind them"):
        evaluate(model, ma.corpus(tokens()), [window(4)])
