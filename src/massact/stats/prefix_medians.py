"""The median |h| of a hidden state as far as a token, of chosen tokens: what a model that generates has seen by then.

Shapes: T tokens, D dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from massact.stats.protocol import PerSequence, Where, check_2d


class PrefixMedians(PerSequence):
    """Lower median of |h| over all finite values at positions 0 .. t, exactly, for each chosen t of a sequence.

    O(t D) work for each chosen token, and one temporary of that size; what is kept is one number for each.

    Args:
        chosen: sequence -> positions.
    """

    def __init__(self, chosen: Mapping[int, Sequence[int]]) -> None:
        super().__init__()
        self.chosen = chosen

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the valid tokens (T, D) of one sequence."""
        check_2d(h_TD)
        wanted, pos_T = self.chosen.get(where.sequence, ()), where.rows(len(h_TD))
        found: dict[int, float] = {}
        for pos in wanted:
            size = h_TD[(pos_T <= pos).to(h_TD.device)].float().abs()
            finite = size[size.isfinite()]
            found[int(pos)] = float(finite.median()) if finite.numel() else float("nan")
        self.rows[where.sequence] = found
