"""The rule of Sun et al. 2024 (arXiv 2402.17762, Section 2) for a massive activation: its constants and its words."""

from __future__ import annotations

from typing import Any

MAGNITUDE, RATIO = 100.0, 1000.0
WORDS = f"|h| > {MAGNITUDE:,.0f} and |h| >= {RATIO:,.0f} x median"


def massive(magnitude: Any, median: Any, least: float = MAGNITUDE, ratio: float = RATIO) -> Any:
    """`|h| > least and |h| >= ratio x median|h|`, of numbers, arrays, tensors and columns alike.

    Args:
        magnitude: |h|.
        median: of |h| over all entries of that hidden state.
    """
    return (magnitude > least) & (magnitude >= ratio * median)
