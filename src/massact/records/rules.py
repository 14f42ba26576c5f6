"""Published rules that several rooms go by: their constants, their words and what they say, once."""

from __future__ import annotations

from typing import Any

# Sun et al. 2024, arXiv 2402.17762, Section 2: a massive activation.
MAGNITUDE, RATIO = 100.0, 1000.0
WORDS = f"|h| > {MAGNITUDE:,.0f} and |h| >= {RATIO:,.0f} x median"

# Gu et al. 2025: a key is a sink of a head from this mean attention on it on.
SINK = 0.3

# Fesser et al. 2026: what the norm of a sink's value, over that of other values, says of the head. Their broadcasting
# heads have about 1; BROADCAST is where we draw the line.
NOP, BROADCAST = 0.2, 0.5

# Dettmers et al. 2022, arXiv 2208.07339, Section 4: an outlier feature is a dim with |x| >= HIT at so many of the
# tokens, in so many of the layers; of the model, in so many of the sequences (Sun 2024, Section 2.3).
HIT, OF_TOKENS, OF_LAYERS, OF_SEQUENCES = 6.0, 0.06, 0.25, 0.90

# Kang et al. 2025, arXiv 2503.03321: |h_j| / rms(h) of a token beyond this.
TAU = 20.0


def massive(magnitude: Any, median: Any, least: float = MAGNITUDE, ratio: float = RATIO) -> Any:
    """`|h| > least and |h| >= ratio x median|h|`, of numbers, arrays, tensors and columns alike (Sun 2024).

    Args:
        magnitude: |h|.
        median: of |h| over all entries of that hidden state.
    """
    return (magnitude > least) & (magnitude >= ratio * median)


def is_sink(alpha: Any, eps: float = SINK) -> Any:
    """Whether a key is a sink of a head, `alpha > eps`; False where alpha is NaN (Gu 2025).

    Args:
        alpha: mean attention on the key over the queries that see it.
    """
    return alpha > eps
