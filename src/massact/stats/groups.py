"""How alike some tokens are, and how sparse: the tokens with massive activations beside others.

Shapes: T tokens, D dims, N chosen tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.intervals import Interval, pseudo_interval
from massact.stats.protocol import Where, check_2d, check_same, to_numpy

Chosen = Mapping[int, Sequence[int]]  # sequence -> positions
_VALUES = 1 << 20  # of the tokens of a group, at a time
FOLDS = 8  # of the sequences, for an interval


def rows_at(where: Where, n_tokens: int, positions: Sequence[int]) -> list[int]:
    """Rows of one call that hold some positions; positions that the call does not hold are left out."""
    if where.positions is None:
        return [p - where.start for p in positions if 0 <= p - where.start < n_tokens]
    held = {int(p): i for i, p in enumerate(where.positions.tolist())}
    return [held[p] for p in positions if p in held]


@dataclass(frozen=True)
class GroupResult:
    """What a group of tokens has in common.

    Args:
        n_tokens: how many.
        cosine: mean cosine of all pairs, (|sum of unit vectors|^2 - n) / (n (n - 1)); NaN below two tokens.
        cosine_low, cosine_high: its 95 % interval over sequences, a jackknife of its arctanh over `FOLDS` folds of
            them; NaN where it leaves fewer than two tokens.
        n_folds: folds that have tokens.
        row_variance: 1 - |mean|^2 / mean |x|^2: 0 for equal rows, about 1 for unrelated ones.
        sparsity: mean of Hoyer's (sqrt D - |x|_1 / |x|_2) / (sqrt D - 1): 0 even, 1 a single entry.
        share: mean share of |x|^2 in the chosen dims; NaN where none were chosen. Like the cosine and the sparsity
            it is over the tokens that are not zero.
        max, norm: mean greatest |x|, mean L2 norm.
        mean: (D,) mean vector.
    """

    n_tokens: int
    cosine: float
    row_variance: float
    sparsity: float
    share: float
    max: float
    norm: float
    mean: np.ndarray
    cosine_low: float = float("nan")
    cosine_high: float = float("nan")
    n_folds: int = 0


class GroupStats:
    """Similarity and sparsity of chosen tokens, streamed in float64 (Sun 2024, Fig. 7; Hurley and Rickard 2009).

    Args:
        groups: name -> (sequence -> positions).
        dims: whose share of the squared norm is measured.
    """

    def __init__(self, groups: Mapping[str, Chosen], dims: Sequence[int] = ()) -> None:
        self.groups, self.dims = groups, tuple(dims)
        self._sums: dict[tuple[str, int], list[Tensor]] = {}  # of each group and fold

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence."""
        check_2d(h_TD)
        for name, chosen in self.groups.items():
            rows = rows_at(where, len(h_TD), chosen.get(where.sequence, ()))
            if not rows:
                continue
            for rows_N in torch.tensor(rows, device=h_TD.device).split(max(1, _VALUES // h_TD.shape[1])):
                x_ND = h_TD[rows_N].detach()
                self._add(
                    (name, where.sequence % FOLDS),
                    _sums(x_ND.float() if h_TD.device.type == "mps" else x_ND.double(), self.dims),
                )

    def _add(self, key: tuple[str, int], sums: list[Tensor]) -> None:
        held = self._sums.get(key)
        self._sums[key] = sums if held is None else [a.to(b.device) + b for a, b in zip(held, sums, strict=True)]

    def merge(self, other: GroupStats) -> None:
        """Add what another one has seen."""
        check_same("GroupStats", (self.dims, set(self.groups)), (other.dims, set(other.groups)))
        for key, sums in other._sums.items():
            self._add(key, sums)

    def result(self) -> dict[str, GroupResult]:
        """Every group that had tokens."""
        folds: dict[str, list[list[np.ndarray]]] = {name: [] for name in self.groups}
        for (name, _), sums in sorted(self._sums.items(), key=lambda item: item[0]):
            folds[name].append([to_numpy(x) for x in sums])
        return {name: _result(held, bool(self.dims)) for name, held in folds.items() if held}

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        held = {f"{n}:{k}:{i}": to_numpy(x) for (n, k), sums in self._sums.items() for i, x in enumerate(sums)}
        return {"dims": np.array(self.dims, np.int64), "groups": np.array(list(self.groups), np.str_)} | held

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The sums that `state()` came from; it can be merged into one that knows its groups."""
        self = cls(dict.fromkeys(state["groups"].tolist(), {}), state["dims"].tolist())
        for held in {key.rpartition(":")[0] for key in state if ":" in key}:
            name, _, fold = held.rpartition(":")
            sums = [torch.from_numpy(np.array(state[f"{held}:{i}"])) for i in range(_N_SUMS)]
            self._sums[name, int(fold)] = sums
        return self


_N_SUMS = 4
ALIKE = 1e-12  # of a cosine to 1: what sums in float64 leave of directions that are the same


def _sums(x_ND: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Sums over the tokens: (n, |x|^2, sparsity, share, max, |x|), x (D,), x / |x| (D,), and of nothing else."""
    D = x_ND.shape[1]
    norm_N = x_ND.norm(dim=1)
    safe_N = norm_N.clamp(min=torch.finfo(x_ND.dtype).tiny)
    root = D**0.5
    # Tokens of zeros have no sparsity, no share and no direction: they add nothing here, and are counted on their own.
    real_N = (norm_N > 0).to(x_ND.dtype)
    unit_ND = x_ND / safe_N[:, None]
    sparsity_N = real_N * (root - unit_ND.abs().sum(1)) / (root - 1) if D > 1 else torch.zeros_like(norm_N)
    share_N = unit_ND[:, list(dims)].square().sum(1) if dims else torch.full_like(norm_N, float("nan"))
    one_N = torch.ones_like(norm_N)
    of_tokens = [one_N, norm_N.square(), sparsity_N, share_N, x_ND.abs().amax(1), norm_N]
    return [torch.stack(of_tokens).sum(1), x_ND.sum(0), unit_ND.sum(0), real_N.sum()[None]]


def _result(folds: list[list[np.ndarray]], has_dims: bool) -> GroupResult:
    tokens, total_D, unit_D, (nonzero,) = (np.sum(x, axis=0) for x in zip(*folds, strict=True))
    n, square = tokens[0], tokens[1] / tokens[0]
    mean_D = total_D / n
    pairs = _cosine(unit_D, nonzero)
    apart = [_cosine(unit_D - unit, nonzero - k) for _, _, unit, (k,) in folds if k]
    around = _around(pairs, apart)
    return GroupResult(
        n_tokens=int(n),
        cosine=float(pairs),
        row_variance=float(max(0.0, 1 - mean_D @ mean_D / square)) if square > 0 else float("nan"),
        sparsity=float(tokens[2] / nonzero) if nonzero else float("nan"),
        share=float(tokens[3] / nonzero) if has_dims and nonzero else float("nan"),
        max=float(tokens[4] / n),
        norm=float(tokens[5] / n),
        mean=mean_D,
        cosine_low=float(around.low),
        cosine_high=float(around.high),
        n_folds=len(folds),
    )


def _cosine(unit_D: np.ndarray, n: float) -> float:
    """Mean cosine of all pairs of n vectors whose directions sum up to this; 1 where rounding alone keeps it off."""
    cosine = float((unit_D @ unit_D - n) / (n * (n - 1))) if n > 1 else float("nan")
    return round(cosine) if 1 - abs(cosine) < ALIKE else cosine


def _around(cosine: float, apart: list[float]) -> Interval:
    """The interval of a cosine, from those without each fold; of directions that are all the same it has no width."""
    if len(apart) > 1 and {cosine, *apart} == {1.0}:
        return Interval(1.0, 1.0, 1.0)
    with np.errstate(all="ignore"):  # on Fisher's scale: a cosine near 1 varies to one side
        around = pseudo_interval(float(np.arctanh(cosine)), np.arctanh(apart))
    return Interval(cosine, np.tanh(around.low), np.tanh(around.high))


class Gather:
    """The values of chosen (position, dim) entries of every sequence, exactly as they are.

    Args:
        chosen: sequence -> positions.
        dims: which dims; None for all.
    """

    def __init__(self, chosen: Chosen, dims: Sequence[int] | None = None) -> None:
        self.chosen, self.dims = chosen, None if dims is None else tuple(dims)
        self._rows: list[tuple[int, int, Tensor]] = []

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence."""
        check_2d(h_TD)
        wanted = self.chosen.get(where.sequence, ())
        for pos in wanted:
            for row in rows_at(where, len(h_TD), [pos]):
                x_D = h_TD[row].detach()
                kept = x_D.clone() if self.dims is None else x_D[list(self.dims)]
                self._rows.append((where.sequence, int(pos), kept))

    def merge(self, other: Gather) -> None:
        """Add what another one has seen."""
        check_same("Gather", (self.dims,), (other.dims,))
        self._rows.extend(other._rows)

    def result(self) -> dict[tuple[int, int], np.ndarray]:
        """(sequence, position) -> values (D,), float64, in order."""
        return {(s, p): to_numpy(x) for s, p, x in sorted(self._rows, key=lambda row: row[:2])}

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        held = self.result()
        return {
            "all_dims": np.array(self.dims is None),
            "dims": np.array(self.dims or (), np.int64),
            "places": np.array(list(held), np.int64).reshape(-1, 2),
            "values": np.array(list(held.values())),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The statistic that `state()` came from."""
        places = [tuple(map(int, p)) for p in state["places"]]
        chosen: dict[int, list[int]] = {}
        for sequence, pos in places:
            chosen.setdefault(sequence, []).append(pos)
        self = cls(chosen, None if state["all_dims"] else state["dims"].tolist())
        self._rows = [(s, p, torch.from_numpy(v)) for (s, p), v in zip(places, state["values"], strict=True)]
        return self
