"""A slot that depends on the query and adds a value: everything from the log-sum-exp equals the softmax written out."""

from __future__ import annotations

import pytest
import torch

from massact.stats.attention_call import Attended, fused_attention

H, K, T, E = 4, 2, 9, 8


def call(causal: bool, given: bool) -> tuple[Attended, torch.Tensor, torch.Tensor]:
    """The call, and probabilities (H, T, 1 + T) with the slot in front and the output, float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v, value = (torch.randn(n, T, E, generator=g) for n in (H, K, K, H))
    slot, value = torch.randn(H, T, generator=g), value[:, 0]
    z = 0.3 * q.double() @ k.double().repeat_interleave(H // K, 0).transpose(1, 2)
    if causal:
        z = z.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    p = torch.cat([slot.double()[..., None], z], -1).softmax(-1)
    out = p[..., 1:] @ v.double().repeat_interleave(H // K, 0) + p[..., :1] * value.double()[:, None]
    fused = fused_attention(q[None], k[None], v[None], None, causal, 0.3)
    assert fused is not None
    lse = fused[1][0] if given else None
    a = Attended(q, k, v, out.float(), lse, 0.3, causal=causal, forward=causal, slot_logit_HT=slot,
                 slot_value_HTF=value[:, None])  # fmt: skip
    return a, p, out


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_probabilities_masses_entropy_and_update(causal: bool, given: bool) -> None:
    a, p, out = call(causal, given)
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    assert a.slot_HT is not None
    torch.testing.assert_close(a.slot_HT, p[..., 0], **close)
    torch.testing.assert_close(a.probs(torch.arange(T)), p[..., 1:], **close)
    mass, entropy = a.columns()
    torch.testing.assert_close(mass, p[..., 1:].sum(1), **close)
    torch.testing.assert_close(entropy, -torch.special.xlogy(p, p).sum(-1).mean(-1), **close)
    whole = torch.matmul(a.probs(torch.arange(T)), a.values(torch.arange(T))) + a.slot_update()
    torch.testing.assert_close(whole, out, **close)
    torch.testing.assert_close(a.slot_update(torch.tensor([2, 5])), a.slot_update()[:, [2, 5]])


def test_a_trimmed_call_keeps_the_slots_of_its_queries() -> None:
    a, p, _ = call(True, True)
    rows = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(a.trimmed(rows).slot_HT, p[:, :4, 0].float())


def test_one_logit_for_a_head_is_the_same_logit_for_every_query() -> None:
    a, _, _ = call(True, True)
    sink = torch.randn(H, generator=torch.Generator().manual_seed(2))
    one = Attended(a.q_HTE, a.k_KSE, a.v_KSF, None, a.lse_given_HT, 0.3, causal=True, sink_H=sink)
    two = Attended(a.q_HTE, a.k_KSE, a.v_KSF, None, a.lse_given_HT, 0.3, causal=True,
                   slot_logit_HT=sink[:, None].expand(H, T))  # fmt: skip
    torch.testing.assert_close(one.norm_HT, two.norm_HT)
    for x, y in zip(one.columns(), two.columns(), strict=True):
        torch.testing.assert_close(x, y)
