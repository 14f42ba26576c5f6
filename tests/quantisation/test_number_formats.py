"""Number formats against formulas written out, and against compressed-tensors where its presets are meant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from massact.quantisation.number_formats import Format, fake_quantised, of_arguments, preset, scale_of
from massact.records.errors import UserError

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def drawn(*shape: int, seed: int = 0, spike: float = 300.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0, 3] = spike
    return x


def integers(x: Tensor, amax: Tensor, most: int = 127, least: int = -128) -> Tensor:
    """round(x / s) s, s = amax / ((most - least) / 2)."""
    s = amax / ((most - least) / 2)
    return (x / s).round().clamp(least, most) * s


def nearest_e2m1(x: Tensor) -> Tensor:
    """Nearest of the eight values with a sign, to the even mantissa in the middle."""
    mag = x.abs().clamp(max=6.0)
    off = (mag[..., None] - E2M1).abs()
    least = off.amin(-1, keepdim=True)
    tied = off == least  # of two as near the one with an even mantissa: an even place in the list
    even = torch.arange(8) % 2 == 0
    place = torch.where(tied & even, 2, torch.where(tied, 1, 0)).argmax(-1)
    return E2M1[place] * x.sign()


@pytest.mark.parametrize(
    ("sharing", "dims"), [("tensor", (0, 1)), ("token", (1,)), ("channel", (0,))], ids=lambda v: str(v)
)
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_the_formula(sharing: str, dims: tuple[int, ...], bits: int) -> None:
    x, most = drawn(7, 48), (1 << (bits - 1)) - 1
    want = integers(x, x.abs().amax(dims, keepdim=True), most, -most - 1)
    torch.testing.assert_close(fake_quantised(x, Format("int", bits, sharing)), want, rtol=1e-6, atol=0)


def test_groups_have_a_scale_each() -> None:
    x = drawn(5, 64)
    want = integers(x.reshape(5, 4, 16), x.reshape(5, 4, 16).abs().amax(-1, keepdim=True), 7, -8).reshape(5, 64)
    torch.testing.assert_close(fake_quantised(x, Format("int", 4, "group", 16)), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("sharing", "dims"), [("tensor", (0, 1, 2)), ("head", (1, 2)), ("token", (2,)), ("channel", (1,))]
)
def test_keys_and_values_have_heads(sharing: str, dims: tuple[int, ...]) -> None:
    k = drawn(3, 10, 8)
    want = integers(k, k.abs().amax(dims, keepdim=True), 7, -8)
    torch.testing.assert_close(fake_quantised(k, Format("int", 4, sharing)), want, rtol=1e-6, atol=0)


def test_a_static_scale_is_that_of_other_text_and_saturates() -> None:
    x = drawn(6, 32, spike=900.0)
    want = integers(x, torch.tensor(254.0))
    got = fake_quantised(x, Format("int", 8, "tensor", static=True), torch.tensor(254.0))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert got[0, 3] == pytest.approx(254.0 * 127 / 127.5)
    channels = torch.linspace(1, 9, 32)
    got = fake_quantised(x, Format("int", 8, "channel", static=True), channels)
    torch.testing.assert_close(got, integers(x, channels), rtol=1e-6, atol=0)


def test_fp8_has_its_scale_or_none_and_never_gives_nan() -> None:
    x = drawn(6, 32, spike=23_128.0)
    s = x.abs().amax() / 448
    want = (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
    torch.testing.assert_close(fake_quantised(x, Format("fp8")), want, rtol=1e-6, atol=0)
    bare = fake_quantised(x, Format("fp8", sharing="none"))
    torch.testing.assert_close(bare, x.clamp(-448, 448).to(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    assert bare[0, 3] == 448


def test_mxfp4_is_six_lines() -> None:
    x = drawn(4, 96)
    blocks = x.reshape(4, 3, 32)
    power = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2  # the greatest exponent of e2m1 is 2
    want = (nearest_e2m1(blocks / 2**power) * 2**power).reshape(4, 96)
    torch.testing.assert_close(fake_quantised(x, Format("mxfp4", 4, "block")), want, rtol=0, atol=0)


def test_nvfp4_is_six_lines() -> None:
    x = drawn(4, 96)
    whole = x.abs().amax() / (448 * 6)
    blocks = x.reshape(4, 6, 16)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / whole).clamp(2.0**-9, 448).to(
        torch.float8_e4m3fn
    ).float() * whole
    want = (nearest_e2m1(blocks / scale) * scale).reshape(4, 96)
    torch.testing.assert_close(fake_quantised(x, Format("nvfp4", 4, "block")), want, rtol=1e-5, atol=1e-6)


FORMATS = [
    Format("int", 8), Format("int", 4, "token"), Format("int", 8, "channel"), Format("int", 4, "group", 16),
    Format("fp8"), Format("fp8", sharing="token"), Format("mxfp4", 4, "block"), Format("nvfp4", 4, "block"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.name}-{f.sharing}")
def test_zeros_stay_and_rows_of_zeros_do_no_harm(form: Format) -> None:
    assert torch.equal(fake_quantised(torch.zeros(4, 32), form), torch.zeros(4, 32))
    x = drawn(4, 32)
    x[1] = 0
    got = fake_quantised(x, form)
    assert torch.equal(got[1], torch.zeros(32))
    assert bool(got.isfinite().all())
    assert fake_quantised(x.bfloat16(), form).dtype == torch.bfloat16
    assert fake_quantised(x[:0], form).shape == (0, 32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([f for f in FORMATS if f.kind != "nvfp4"]))
def test_a_second_rounding_by_the_same_scale_changes_nothing(seed: int, form: Format) -> None:
    """By a scale of its own it may: that is of the greatest value, which has saturated."""
    x = drawn(4, 32, seed=seed, spike=9.0)
    amax = None
    if form.kind != "mxfp4":
        shape = {"tensor": (), "token": (4,), "channel": (32,), "group": (4, 2)}[form.sharing]
        blocks = x.reshape(4, 2, 16) if form.sharing == "group" else x
        dims = {"tensor": (0, 1), "token": (1,), "channel": (0,), "group": (2,)}[form.sharing]
        amax = blocks.abs().amax(dims).reshape(shape)
    once = fake_quantised(x, form, amax)
    torch.testing.assert_close(fake_quantised(once, form, amax), once, rtol=1e-5, atol=1e-7)


def test_the_greatest_of_a_planted_token_decides_what_is_left_of_the_rest() -> None:
    """Error of the rest = what one scale makes of numbers that are all below half of its step: all of it."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    x[0, 5] = 2e4
    got = fake_quantised(x, Format("int", 8))
    assert scale_of(Format("int", 8), x.abs().amax()) == pytest.approx(2e4 / 127.5)
    assert not bool(got[1:].any())  # half of a step is 79
    rest = fake_quantised(x[1:], Format("int", 8))
    step = float(x[1:].abs().amax()) / 127.5
    error = float((rest - x[1:]).square().mean().sqrt())
    assert error == pytest.approx(step / 12**0.5, rel=0.02)  # of a uniform error


@pytest.mark.parametrize("name", ["W8A8", "W4A16", "FP8", "FP8_DYNAMIC", "W4A8"])
def test_presets_round_as_compressed_tensors_does(name: str) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    given_scheme = preset(name)
    w = drawn(6, 256, spike=4.0)
    args = given_scheme.weights
    form = of_arguments(args, True)
    groups = w.reshape(6, -1, form.group) if form.sharing == "group" else w.reshape(6, 1, -1)
    if form.sharing == "tensor":
        groups = w.reshape(1, 1, -1)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    want = fake_quantize(
        w,
        scale.squeeze() if form.sharing == "tensor" else scale,
        zero.squeeze() if form.sharing == "tensor" else zero,
        args,
    )
    torch.testing.assert_close(fake_quantised(w, form), want, rtol=1e-5, atol=1e-6)


def test_groups_that_do_not_divide_are_refused_with_sizes_that_do() -> None:
    with pytest.raises(UserError) as refused:
        Format("int", 4, "group", 128).check(576, "1.attn_in")
    assert "576" in refused.value.what and "64" in refused.value.do
    Format("int", 4, "group", 64).check(576, "1.attn_in")
