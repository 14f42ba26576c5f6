"""Which keys a query can see, where masks are finite numbers, and entropies of attention with large scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from massact.stats.attention_call import Attended

H, T, E = 4, 40, 16
MASKS = {"-inf": -torch.inf, "float32": torch.finfo(torch.float32).min, "1e9": -1e9, "bert": -1e4}


def windows(width: int = 6) -> Tensor:
    """Whether query t sees key k: the last `width` keys up to its own."""
    t, k = torch.arange(T)[:, None], torch.arange(T)
    return (k <= t) & (k > t - width)


def drawn(size: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(H, T, E, generator=rng) for _ in range(3))
    return q * size, k * size, v


def written_out(size: float, hidden: float) -> Attended:
    """Attention of which only the logits were seen, to which the mask was added."""
    q, k, v = drawn(size)
    s = q @ k.transpose(1, 2) * E**-0.5 + torch.zeros(T, T).masked_fill(~windows(), hidden)
    return Attended(None, None, v, s.softmax(-1) @ v, scores_HTS=s)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_was_added_to_the_logits_hides(name: str) -> None:
    """Half of the logits that -10,000 was added to are greater than -10,000."""
    a = written_out(1.0, MASKS[name])
    assert torch.equal(a.sees(), windows().expand(H, T, T))
    assert torch.equal(a.viewers_HS, windows().sum(0).expand(H, T))
    some = torch.tensor([0, 7])
    assert torch.equal(a.sees([5, 12], some), windows()[[5, 12]][:, some].expand(H, 2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["-inf", "float32", "1e9"])
def test_a_score_however_low_is_no_mask(name: str) -> None:
    a = written_out(200.0, MASKS[name])
    lowest = a.scores_HTS[:, windows()].min()  # type: ignore[index]
    assert lowest < -3e4
    assert torch.equal(a.sees(), windows().expand(H, T, T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ten_thousand_hides_in_every_dtype(dtype: torch.dtype) -> None:
    """In bfloat16 it is 9,984."""
    q, k, v = (x.to(dtype) for x in drawn(1.0))
    mask = torch.zeros(1, T, T, dtype=dtype).masked_fill(~windows(), -1e4)
    a = Attended(q, k, v, None, scale=E**-0.5, mask_HTS=mask)
    assert torch.equal(a.sees(), windows()[None])


@pytest.mark.parametrize("size", [1.0, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entropy_with_large_scores(dtype: torch.dtype, size: float) -> None:
    """A kernel's 16-bit output times a key of a large score is off by tenths of a nat where the entropy is 0.01."""
    q, k, v = (x.to(dtype) for x in drawn(size))
    a = Attended(q, k, v, None, scale=E**-0.5, causal=True, forward=True)
    s = np.einsum("hte,hse->hts", q.double().numpy(), k.double().numpy()) * E**-0.5
    s[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want = -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(-1)
    found = a.columns()[1].double().numpy()
    assert (found >= 0).all()
    np.testing.assert_allclose(found, want, atol=2e-3 if dtype == torch.float32 else 0.01)
