"""The spectrum of hidden states: of every sequence, and of a corpus, from Gram matrices.

Shapes: T tokens, D dims, N = min(T, D), S sets of tokens, M metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.stats.groups import Chosen, rows_at
from massact.stats.protocol import Where, check_2d, check_same, to_numpy

SETS = ("all", "without", "centred")  # without: the chosen tokens; centred: these too, and the mean of the others off
METRICS = ("p1", "entropy_bits", "effective_rank", "participation", "anisotropy")
BOUND = ("bound", "c", "alpha")
LEAST = (2, 2, 3)  # tokens: of one, or of two around their mean, there is one direction whatever they are


@dataclass(frozen=True)
class GramResult:
    """What `GramStats` measured at one site; NaN where it is unavailable.

    Args:
        sequence: (n,) indices.
        left_out: (n,) chosen tokens of each sequence.
        values: (n, S, M), see `SETS` and `METRICS`.
        null: (n, S, M) the same of random directions with the same norms; NaN of sequences that have none drawn.
        bound: (n, 3) lower bound of p_1 of all tokens, c and alpha.
        corpus: (S, M - 1) of all sequences as one matrix, without the anisotropy; None where it was not asked for.
    """

    sequence: np.ndarray
    left_out: np.ndarray
    values: np.ndarray
    null: np.ndarray
    bound: np.ndarray
    corpus: np.ndarray | None


@dataclass
class _Row:
    sequence: int
    left_out: int
    numbers: Tensor  # (2 S M + 3,): values, null, bound


class GramStats:
    """Spectrum of the states X (T, D) of every sequence, uncentred, in float64, from the smaller of X X^T and X^T X.

    With the singular values s of X and p_i = s_i^2 / sum s^2:
        entropy H = -sum p log2 p,  effective rank 2^H (Roy and Vetterli 2007),  participation 1 / sum p^2,
        anisotropy = mean cosine of two tokens (Ethayarajh 2019)
    For any token x_0, v = x_0 / |x_0|, R = sum_{i > 0} |x_i|^2, c = |x_0|^2 / R, alpha = sum_{i > 0} (x_i.v)^2 / R:
        p_1 >= (c + alpha) / (c + 1)
    since p_1 is the greatest share that any direction has. x_0 is the chosen token of greatest norm; the longest of
    all where none is chosen.

    Args:
        chosen: sequence -> positions that the second and the third set leave out.
        corpus: also of all sequences together: O(D^2) memory.
        n_null: of the sequences 0, 1, ... so many also get random directions of the same norms; seed: of these.
    """

    def __init__(self, chosen: Chosen, corpus: bool = False, n_null: int = 1, seed: int = 0) -> None:
        self.chosen, self.corpus, self.n_null, self.seed = chosen, corpus, n_null, seed
        self._rows: list[_Row] = []
        self._rest: list[Tensor] = []  # of the tokens that are not chosen: X^T X (D, D), sum x (D,), count ()
        self._massive: list[Tensor] = []  # the chosen tokens, (C, D)

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence."""
        check_2d(h_TD)
        x_TD = h_TD.detach()
        x_TD = (x_TD.cpu() if x_TD.device.type == "mps" else x_TD).double()  # no eigenvalues there
        T, D = x_TD.shape
        left = sorted(set(rows_at(where, T, self.chosen.get(where.sequence, ()))))
        kept_T = torch.ones(T, dtype=torch.bool)
        kept_T[left] = False
        seen = _Tokens(x_TD, kept_T.to(x_TD.device)) if T <= D else _Dims(x_TD, kept_T.to(x_TD.device))
        values_SM = seen.spectra()
        null_SM = torch.full_like(values_SM, torch.nan)
        if where.sequence < self.n_null and T:
            null_SM = seen.random(_directions(T, D, self.seed, where.sequence).to(x_TD)).spectra()
        whole = seen.finite_T.all()
        fine_S1 = torch.stack([whole, *((seen.finite_T | ~seen.kept_T).all(),) * 2])[:, None]
        numbers = [torch.where(fine_S1, x, torch.nan).flatten() for x in (values_SM, null_SM)]
        bound = seen.bound(left) if T >= LEAST[0] else x_TD.new_full((len(BOUND),), torch.nan)
        row = torch.cat([*numbers, torch.where(whole, bound, torch.nan)])
        self._rows.append(_Row(where.sequence, len(left), row))
        if self.corpus:
            self._add(torch.where(seen.finite_T[:, None], x_TD, 0.0), seen.kept_T, left, whole)

    def _add(self, x_TD: Tensor, kept_T: Tensor, left: Sequence[int], fine: Tensor) -> None:
        rest_TD = torch.where(kept_T[:, None], x_TD, 0.0)
        n = torch.where(fine, kept_T.sum().to(x_TD.dtype), torch.nan)
        self._join([rest_TD.T @ rest_TD, rest_TD.sum(0), n])
        if left:
            self._massive.append(x_TD[list(left)])

    def _join(self, sums: list[Tensor]) -> None:
        if self._rest:
            for held, new in zip(self._rest, sums, strict=True):
                held += new.to(held.device)
        else:
            self._rest = [x.clone() for x in sums]

    def merge(self, other: GramStats) -> None:
        """Add what another one has seen."""
        check_same("GramStats", self._options(), other._options())
        self._rows.extend(other._rows)
        self._massive.extend(other._massive)
        if other._rest:
            self._join(other._rest)

    def _options(self) -> tuple[bool, int, int]:
        return self.corpus, self.n_null, self.seed

    def result(self) -> GramResult:
        """Everything measured so far."""
        rows = sorted(self._rows, key=lambda row: row.sequence)
        width = len(SETS) * len(METRICS)
        numbers = np.stack([to_numpy(r.numbers) for r in rows]) if rows else np.zeros((0, 2 * width + len(BOUND)))
        shape = (len(rows), len(SETS), len(METRICS))
        return GramResult(
            sequence=np.array([r.sequence for r in rows], np.int64),
            left_out=np.array([r.left_out for r in rows], np.int64),
            values=numbers[:, :width].reshape(shape),
            null=numbers[:, width : 2 * width].reshape(shape),
            bound=numbers[:, 2 * width :],
            corpus=self._corpus(),
        )

    def _corpus(self) -> np.ndarray | None:
        if not self._rest:
            return None
        rest_DD, sum_D, n = self._rest
        massive_CD = torch.cat([x.to(rest_DD.device) for x in self._massive]) if self._massive else None
        all_DD = rest_DD if massive_CD is None else rest_DD + massive_CD.T @ massive_CD
        n_all = n + (0 if massive_CD is None else len(massive_CD))
        centred_DD = rest_DD - torch.outer(sum_D, sum_D) / torch.where(n >= 1, n, 1.0)  # n is NaN where a value was
        made = [
            torch.where(count >= least, _moments(gram), torch.nan)
            for gram, count, least in zip((all_DD, rest_DD, centred_DD), (n_all, n, n), LEAST, strict=True)
        ]
        return to_numpy(torch.stack(made))

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for `np.savez`."""
        held = {"options": np.array(self._options(), np.int64)}
        held["places"] = np.array([(r.sequence, r.left_out) for r in self._rows], np.int64).reshape(-1, 2)
        held["numbers"] = np.array([to_numpy(r.numbers) for r in self._rows])
        held |= {f"rest{i}": to_numpy(x) for i, x in enumerate(self._rest)}
        if self._massive:
            held["massive"] = to_numpy(torch.cat([x.cpu() for x in self._massive]))
        return held

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The sums that `state()` came from; it can be merged into one that knows its tokens."""
        corpus, n_null, seed = (int(x) for x in state["options"])
        self = cls({}, bool(corpus), n_null, seed)
        for (sequence, left), numbers in zip(state["places"], state["numbers"], strict=True):
            self._rows.append(_Row(int(sequence), int(left), torch.from_numpy(np.array(numbers))))
        if "rest0" in state:
            self._rest = [torch.from_numpy(np.array(state[f"rest{i}"])) for i in range(3)]
        if "massive" in state:
            self._massive = [torch.from_numpy(np.array(state["massive"]))]
        return self


@lru_cache(maxsize=1)
def _directions(T: int, D: int, seed: int, sequence: int) -> Tensor:
    """Unit vectors without any structure; the same at every site, so that they are drawn once."""
    draw = torch.Generator().manual_seed(1_000_003 * seed + sequence)
    x_TD = torch.randn(T, D, dtype=torch.float64, generator=draw)
    return x_TD / x_TD.norm(dim=1, keepdim=True)


class _Tokens:
    """A sequence of no more tokens than dims, as X X^T: rows of zeros add eigenvalues of zero.

    Args:
        x_TD: float64; kept_T: which tokens are not chosen.
    """

    def __init__(self, x_TD: Tensor, kept_T: Tensor) -> None:
        self.kept_T, self.n = kept_T, kept_T.sum()
        self._hold(x_TD @ x_TD.T)

    def _hold(self, gram_TT: Tensor) -> None:
        self.finite_T = gram_TT.diagonal().isfinite()  # what is not finite is not so in its own square either
        self.gram_TT = torch.where(self.finite_T[:, None] & self.finite_T, gram_TT, 0.0)
        self.squares_T = self.gram_TT.diagonal().clamp(min=0)

    def random(self, unit_TD: Tensor) -> _Tokens:
        """Other directions for tokens of these norms."""
        other = copy(self)
        norm_T = self.squares_T.sqrt()
        other._hold(norm_T[:, None] * (unit_TD @ unit_TD.T) * norm_T)
        return other

    def spectra(self) -> Tensor:
        """(S, M); NaN where a set has too few tokens."""
        if not len(self.kept_T):
            return self.gram_TT.new_full((len(SETS), len(METRICS)), torch.nan)
        counts = (torch.full_like(self.n, len(self.kept_T)), self.n, self.n)
        return torch.stack([
            torch.where(count >= least, torch.cat([_moments(gram), cosine[None]]), torch.nan)
            for (gram, cosine), count, least in zip(self.sets(), counts, LEAST, strict=True)
        ])  # fmt: skip

    def sets(self) -> list[tuple[Tensor, Tensor]]:
        """The Gram matrix of each set, and the mean cosine of pairs."""
        both_TT, n = self.kept_T[:, None] & self.kept_T, self.n.clamp(min=1)
        rest_TT = torch.where(both_TT, self.gram_TT, 0.0)
        mean_T = rest_TT.sum(0) / n  # x_i . mean
        centred_TT = torch.where(both_TT, rest_TT - mean_T - mean_T[:, None] + mean_T.sum() / n, 0.0)
        made = []
        for gram in (self.gram_TT, rest_TT, centred_TT):
            norm_T = gram.diagonal().clamp(min=0).sqrt()
            weight_T = torch.where(norm_T > 0, 1 / norm_T, 0.0)
            made.append((gram, _mean_cosine(weight_T @ gram @ weight_T, norm_T)))
        return made

    def along(self, first: Tensor) -> Tensor:
        """(x_i . v)^2 (T,), v the direction of one token."""
        return self.gram_TT.index_select(0, first)[0].square() / self.squares_T[first]

    def bound(self, chosen: Sequence[int]) -> Tensor:
        """(c + alpha) / (c + 1), c and alpha of the longest of the chosen tokens, or of all."""
        among = torch.tensor(list(chosen) or list(range(len(self.kept_T))), device=self.kept_T.device)
        first = among[self.squares_T[among].argmax(0, keepdim=True)]
        # The sum without the first token, not the whole less it: beside a massive token the rest is small.
        others_T = torch.arange(len(self.kept_T), device=self.kept_T.device) != first
        rest = torch.where(others_T, self.squares_T, 0.0).sum()
        alpha = torch.where(others_T, self.along(first), 0.0).sum() / rest
        c = self.squares_T[first][0] / rest
        return torch.where(rest > 0, torch.stack([(c + alpha) / (c + 1), c, alpha]), torch.nan)


class _Dims(_Tokens):
    """A sequence of more tokens than dims, as X^T X."""

    def __init__(self, x_TD: Tensor, kept_T: Tensor) -> None:
        self.kept_T, self.n = kept_T, kept_T.sum()
        self._hold(x_TD)

    def _hold(self, x_TD: Tensor) -> None:
        self.finite_T = x_TD.isfinite().all(1)
        self.x_TD = torch.where(self.finite_T[:, None], x_TD, 0.0)
        self.squares_T = self.x_TD.square().sum(1)

    def random(self, unit_TD: Tensor) -> _Tokens:
        other = copy(self)
        other._hold(self.squares_T.sqrt()[:, None] * unit_TD)
        return other

    def sets(self) -> list[tuple[Tensor, Tensor]]:
        kept_T1 = self.kept_T[:, None]
        rest_TD = torch.where(kept_T1, self.x_TD, 0.0)
        massive_TD = torch.where(kept_T1, 0.0, self.x_TD)
        centred_TD = torch.where(kept_T1, rest_TD - rest_TD.sum(0) / self.n.clamp(min=1), 0.0)
        rest_DD = rest_TD.T @ rest_TD
        grams = (rest_DD + massive_TD.T @ massive_TD, rest_DD, centred_TD.T @ centred_TD)
        made = []
        for gram, rows_TD in zip(grams, (self.x_TD, rest_TD, centred_TD), strict=True):
            norm_T = rows_TD.norm(dim=1)
            unit_TD = rows_TD / torch.where(norm_T > 0, norm_T, 1.0)[:, None]
            made.append((gram, _mean_cosine(unit_TD.sum(0).square().sum(), norm_T)))
        return made

    def along(self, first: Tensor) -> Tensor:
        v_D = self.x_TD.index_select(0, first)[0] / self.squares_T[first].sqrt()
        return (self.x_TD @ v_D).square()


def _moments(gram_NN: Tensor) -> Tensor:
    """p_1, entropy in bits, effective rank and participation of the eigenvalues of a Gram matrix; NaN of zeros."""
    p_N = torch.linalg.eigvalsh(gram_NN).clamp(min=0)
    p_N = p_N / p_N.sum()
    entropy = -torch.special.xlogy(p_N, p_N).sum() / np.log(2)
    return torch.stack([p_N[-1], entropy, torch.exp2(entropy), 1 / p_N.square().sum()])


def _mean_cosine(square: Tensor, norm_T: Tensor) -> Tensor:
    """Of all pairs of rows that are not zero, from |sum of their unit vectors|^2; NaN below two."""
    n = (norm_T > 0).sum()
    return torch.where(n > 1, (square - n) / (n * (n - 1)), torch.nan)
