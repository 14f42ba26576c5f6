"""Number formats: what they hold, and how fine they are."""

from __future__ import annotations

import math

# Largest finite values: IEEE half, bfloat16, OCP fp8 E4M3.
MAXIMA = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp8_e4m3": 448.0}
_FRACTION = {"fp16": (10, -14), "bf16": (7, -126), "fp8_e4m3": (3, -6)}  # bits behind the point, least exponent


def step_at(name: str, value: float) -> float:
    """Distance from |value| to the next number of a format away from zero: 128 at 23,000 in bf16.

    Args:
        name: one of `MAXIMA`.

    Returns:
        NaN where the format cannot hold the value.
    """
    size = abs(value)
    if not size <= MAXIMA[name]:
        return float("nan")
    bits, least = _FRACTION[name]
    return 2.0 ** (max(math.frexp(size)[1] - 1 if size else least, least) - bits)
