"""HiddenStats against float64 NumPy: hard streams, odd sizes, NaN and Inf, both paths."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from massact.stats import DimMoments, HiddenStats, Where, row_blocks, selection
from tests.stats.oracle import DTYPES, WIDE, Seen, check_hidden, hard_stream, hidden_oracle, wide_stream

PATHS = {"cpu": None, "accelerator": False}


def measure(stream: list[Seen], **options) -> HiddenStats:
    stats = HiddenStats(**options)
    for seen in stream:
        stats.update(seen.h_TD, Where(seen.sequence, positions=torch.from_numpy(seen.positions_T)))
    return stats


def one(h_TD: torch.Tensor) -> list[Seen]:
    return [Seen(0, h_TD, np.arange(len(h_TD)))]


def check(stream: list[Seen], top_k: int = 5, hit: float = 6.0, mad: bool = True, blocked: bool | None = None):
    result = measure(stream, top_k=top_k, hit=hit, mad=mad, blocked=blocked).result()
    check_hidden(result, hidden_oracle(stream, top_k, hit, mad))
    return result


@pytest.fixture(params=["large blocks", "small blocks"])
def block_size(request, monkeypatch):
    """Small inputs must also go through many blocks, and through the bracket instead of the whole sample."""
    if request.param == "small blocks":
        monkeypatch.setattr(row_blocks, "BLOCK_VALUES", 40)
        monkeypatch.setattr(selection, "SMALL", 64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    D=st.integers(1, 33),
    top_k=st.integers(1, 20),
    hit=st.sampled_from([6.0, 0.1, 900.0, 1e9]),
    mad=st.booleans(),
)
def test_equals_float64_numpy_on_hard_streams(block_size, path, dtype, seed, lengths, D, top_k, hit, mad):
    check(hard_stream(seed, lengths, D, dtype), top_k, hit, mad, PATHS[path])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 5), T=st.integers(1, 40), D=st.integers(1, 33), mad=st.booleans())
def test_sequences_at_once_equal_float64_numpy_and_one_by_one(block_size, dtype, seed, B, T, D, mad):
    stream = hard_stream(seed, [T] * B, D, dtype)
    together, apart = HiddenStats(5, 6.0, mad), measure(stream, top_k=5, hit=6.0, mad=mad)
    together.update_all(torch.stack([s.h_TD for s in stream]), [Where(s.sequence) for s in stream])
    check_hidden(together.result(), hidden_oracle(stream, 5, 6.0, mad))
    a, b = together.result(), apart.result()
    for name in ("sequence", "top_value", "top_pos", "top_dim", "median", "max", "token_max", "dim_max", "dim_hits"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_size_with_massive_activations(path, dtype):
    torch.manual_seed(0)
    h_TD = torch.randn(700, 384) * torch.rand(384)
    h_TD[0, 5], h_TD[33, 5], h_TD[0, 7] = -2600, 1500, 470
    result = check(one(h_TD.to(dtype)), top_k=16, blocked=PATHS[path])
    assert list(zip(result.top_pos[0, :3], result.top_dim[0, :3], strict=True)) == [(0, 5), (33, 5), (0, 7)]
    assert result.top_value[0, 0] == h_TD[0, 5].to(dtype).item()
    assert result.median[0] == h_TD.to(dtype).abs().flatten().median().item()


@pytest.mark.parametrize("blocked", [None, False])
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3, 3e4, 1e6])
def test_the_spread_survives_a_mean_that_dwarfs_it(blocked, mean):
    torch.manual_seed(1)
    h_TD = torch.randn(600, 50).exp() + mean  # skewed
    result = check(one(h_TD), blocked=blocked)
    h = h_TD.double().numpy()
    np.testing.assert_allclose(result.dim_std, h.std(0), rtol=1e-5)
    np.testing.assert_allclose(result.std, h.std(), rtol=1e-5)
    assert np.all(np.isfinite(result.osp_kurtosis))


def test_drift_between_sequences_and_blocks_costs_no_digits():
    stats, rows = DimMoments(), []
    for sequence in range(20):
        torch.manual_seed(sequence)
        rows.append(torch.randn(300, 8) + 50.0 * sequence + torch.linspace(0, 40, 300)[:, None])
        stats.update(rows[-1], Where(sequence))
    h = torch.cat(rows).double().numpy()
    np.testing.assert_allclose(stats.result().mean, h.mean(0), rtol=1e-7)
    np.testing.assert_allclose(stats.result().std, h.std(0), rtol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, D", [(1, 1), (1, 7), (7, 1), (3, 2), (300, 1), (2, 5000)])
def test_odd_sizes(path, dtype, T, D):
    torch.manual_seed(T * D)
    check(one(torch.randn(T, D).to(dtype)), top_k=16, blocked=PATHS[path])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_zeros_constants_and_ties(block_size, path, dtype):
    for h_TD in (torch.zeros(9, 12), torch.full((9, 12), -2.5), torch.arange(240.0).reshape(20, 12) % 3 - 1):
        check(one(h_TD.to(dtype)), top_k=7, blocked=PATHS[path])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.502, 0.7])
def test_the_median_of_many_zeros(share):
    """Ties on the edge of the bracket (activations after a ReLU)."""
    torch.manual_seed(2)
    h_TD = torch.rand(400, 300)
    h_TD.view(-1)[torch.randperm(h_TD.numel())[: int(share * h_TD.numel())]] = 0
    check(one(h_TD))
    check(one(h_TD), blocked=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_counted_and_left_out(block_size, path, dtype):
    torch.manual_seed(3)
    clean, dirty, dead = torch.randn(10, 6), torch.randn(12, 6), torch.full((3, 6), math.nan)
    dirty[0, :] = math.nan  # a token with nothing
    dirty[:, 2] = math.inf  # a dim with nothing in this sequence
    dirty[5, 3], dirty[6, 3] = -math.inf, math.nan
    stream = [Seen(i, h.to(dtype), np.arange(len(h))) for i, h in enumerate((clean, dirty, dead))]
    result = check(stream, top_k=100, hit=0.5, blocked=PATHS[path])
    assert list(result.n_nan) == [0, 6, 18] and list(result.n_inf) == [0, 13, 0]
    assert np.isnan(result.token_max[10]) and np.isnan(result.median[2])
    assert result.dim_n[2] == 10 and np.all(np.isfinite(result.dim_mean))


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_ranks_below_zero(path):
    h_TD = torch.tensor([[math.nan, 0.0], [math.inf, 1.0], [0.0, -math.inf]])
    result = check(one(h_TD), top_k=4, blocked=PATHS[path])
    assert result.top_pos.tolist() == [[1, 0, 2, -1]] and result.token_max.tolist() == [0, 1, 0]


def test_a_dim_that_never_had_a_finite_value_is_nan():
    h_TD = torch.ones(4, 3)
    h_TD[:, 1] = math.nan
    for blocked in (None, False):
        result = check(one(h_TD), blocked=blocked)
        assert [math.isnan(x) for x in result.dim_mean] == [False, True, False]
        assert [math.isnan(x) for x in result.dim_max] == [False, True, False]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e12, 1e30])
def test_values_whose_fourth_power_leaves_float32(path, scale):
    torch.manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        result = check(one((torch.randn(50, 20) * scale).to(dtype)), blocked=PATHS[path])
        assert 2 < result.kurtosis[0] < 4
    moments = DimMoments()
    moments.update(torch.randn(50, 20) * scale, Where(0))
    assert np.all(moments.result().std > 0.3 * scale) and np.all(moments.result().std < 3 * scale)


@pytest.mark.parametrize("path", PATHS)
def test_positions(path):
    h_TD = torch.tensor([[1.0, -9.0], [5.0, 2.0], [-7.0, 3.0]])
    stats = HiddenStats(top_k=2, blocked=PATHS[path])
    stats.update(h_TD, Where(4, start=10))
    stats.update(h_TD, Where(2, positions=torch.tensor([3, 30, 300])))
    result = stats.result()
    assert list(result.sequence) == [2, 4]
    assert result.top_pos.tolist() == [[3, 300], [10, 12]] and result.top_dim.tolist() == [[1, 0], [1, 0]]
    assert result.top_value.tolist() == [[-9, -7], [-9, -7]]
    assert result.token_pos.tolist() == [3, 30, 300, 10, 11, 12]
    assert [x.tolist() for x in result.tokens(1)] == [[10, 11, 12], result.token_norm[3:].tolist(), [9, 5, 7]]
    with pytest.raises(ValueError, match="positions"):
        stats.update(h_TD, Where(5, positions=torch.tensor([1, 2])))


def test_positions_are_copied_not_borrowed():
    positions = torch.tensor([5, 6])
    stats = HiddenStats(top_k=1)
    stats.update(torch.ones(2, 2), Where(0, positions=positions))
    positions.fill_(0)
    assert stats.result().token_pos.tolist() == [5, 6]


def test_hits_are_tokens_at_or_above_the_threshold():
    h_TD = torch.tensor([[6.0, 5.99], [-6.0, 0.0], [7.0, 1.0]])
    stats = HiddenStats(hit=6.0)
    stats.update(h_TD, Where(0))
    stats.update(torch.full((600, 2), 6.0), Where(1))  # more rows than a byte counts
    assert stats.result().dim_hits.tolist() == [603, 600]


def test_the_input_is_not_changed_and_any_layout_will_do():
    torch.manual_seed(5)
    big = torch.randn(2, 70, 40)
    for h_TD in (big[1], big[1, 3:60], big[:, 5, :], big[1].t(), big[1, ::3, 2:9]):
        for dtype in (torch.float32, torch.bfloat16):
            x_TD = h_TD.to(dtype) if dtype != torch.float32 else h_TD
            before = x_TD.clone()
            check(one(x_TD))
            check(one(x_TD), blocked=False)
            assert torch.equal(x_TD, before)


def test_it_works_under_autograd_inference_mode_autocast_and_again_outside(monkeypatch):
    monkeypatch.setattr(row_blocks, "_BUFFERS", threading.local())  # buffers first made in inference mode
    h_TD = torch.randn(30, 20)
    expected = hidden_oracle(one(h_TD), 5, 6.0, True)
    with torch.inference_mode():
        stats = measure(one(h_TD.clone()), top_k=5, mad=True)
    check_hidden(stats.result(), expected)
    stats.update(h_TD, Where(1))  # tensors made in inference mode must not block later updates
    assert stats.result().n_tokens_total == 60
    check_hidden(measure(one(h_TD.clone().requires_grad_()), top_k=5, mad=True).result(), expected)
    for blocked in (None, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_hidden(measure(one(h_TD), top_k=5, mad=True, blocked=blocked).result(), expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="tokens, dims"):
        HiddenStats().update(torch.ones(2, 3, 4), Where(0))
    with pytest.raises(ValueError, match="tokens, dims"):
        HiddenStats().update(torch.ones(2, 3, dtype=torch.int64), Where(0))
    with pytest.raises(ValueError, match="top_k"):
        HiddenStats(top_k=0)
    stats = HiddenStats()
    stats.update(torch.ones(2, 3), Where(0))
    with pytest.raises(ValueError, match="dims"):
        stats.update(torch.ones(2, 4), Where(1))
    with pytest.raises(ValueError, match="options"):
        stats.merge(HiddenStats(hit=5.0))


def test_nothing_and_an_empty_sequence():
    result = HiddenStats(top_k=3).result()
    assert result.top_value.shape == (0, 3) and result.dim_max.shape == (0,) and result.token_offsets.tolist() == [0]
    stats = HiddenStats(top_k=3)
    stats.update(torch.ones(0, 4), Where(0))
    stats.update(torch.ones(2, 4), Where(1))
    result = stats.result()
    assert result.n_tokens.tolist() == [0, 2] and np.isnan(result.median[0]) and result.n_nan.tolist() == [0, 0]
    assert result.top_pos[0].tolist() == [-1, -1, -1] and result.n_tokens_total == 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", WIDE)
def test_tiny_values_beside_ordinary_ones(block_size, path, kind):
    """No square or fourth power of theirs is lost: norms, stds and kurtosis of single tokens and dims are right."""
    for seed in range(3):
        seen = wide_stream(kind, seed)
        result = check([seen], blocked=PATHS[path])
        wanted = hidden_oracle([seen], 5, 6.0, True)
        for name in ("token_norm", "dim_std", "dim_mean_abs"):  # each relative to itself, however small
            np.testing.assert_allclose(getattr(result, name), wanted[name], rtol=2e-5, atol=0, err_msg=name)
    moments = DimMoments()
    moments.update(seen.h_TD, Where(0))
    np.testing.assert_allclose(moments.result().std, wanted["dim_std"], rtol=2e-5, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tokens_dims_and_sequences_without_a_finite_value(path, value):
    """None of their statistics is known; those beside them are as if they were not there."""
    h_TD = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    h_TD[4], h_TD[:, 7], h_TD[0, 0] = value, value, value
    whole = Seen(1, torch.full((6, 12), value), np.arange(6))
    result = check([*one(h_TD), whole], blocked=PATHS[path])
    assert np.isnan(result.token_norm[4]) and np.isnan(result.token_max[4]) and np.isnan(result.dim_std[7])
    assert np.isnan(result.dim_max[7]) and result.dim_n[7] == 0
    for name in ("median", "mad", "mean", "std", "rms", "mean_abs", "max", "kurtosis", "osp_kurtosis"):
        assert np.isfinite(getattr(result, name)[0]) and np.isnan(getattr(result, name)[1]), name
    assert np.isnan(result.top_value[1]).all() and (result.top_pos[1] == -1).all()
    assert (result.n_nan + result.n_inf).tolist() == [12 + 19 + 1, 72]
