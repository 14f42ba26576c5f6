"""Steps of number formats, as torch's own numbers have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from massact.records.formats import MAXIMA, step_at

KINDS = {"fp16": (torch.float16, torch.int16), "bf16": (torch.bfloat16, torch.int16),
         "fp8_e4m3": (torch.float8_e4m3fn, torch.int8)}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_step_is_that_of_the_format(name: str) -> None:
    """Of all positive numbers of a format: the distance to the next one, subnormals and zero included."""
    kind, bits = KINDS[name]
    all_numbers = torch.arange(0, torch.iinfo(bits).max, dtype=bits).view(kind).double().numpy()
    finite = all_numbers[np.isfinite(all_numbers) & (all_numbers <= MAXIMA[name])]
    steps = np.diff(finite)
    assert finite[-1] == pytest.approx(MAXIMA[name], rel=1e-12)
    for value, step in zip(finite[:-1].tolist(), steps.tolist(), strict=True):
        assert step_at(name, value) == step_at(name, -value) == step


def test_what_a_format_cannot_hold_has_no_step() -> None:
    assert step_at("bf16", 23_000.0) == 128 and step_at("fp16", 23_000.0) == 16
    assert math.isnan(step_at("fp16", 70_000.0)) and math.isnan(step_at("fp8_e4m3", 449.0))
    assert math.isnan(step_at("bf16", math.inf)) and math.isnan(step_at("bf16", math.nan))
