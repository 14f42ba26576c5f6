"""What the heads of one layer do with chosen tokens: concentration, value drain, and the bias that they add.

Shapes: H heads, K key-value heads, T queries, S keys, E width of q and k, F width of v, C chosen keys, R sampled
queries, D width of the residual stream, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from massact.records.rules import SINK, is_sink
from massact.stats.attention_call import Attended, Sight
from massact.stats.dims import sum_dtype
from massact.stats.groups import Chosen, GroupResult, GroupStats, rows_at
from massact.stats.own_keys import diagonal
from massact.stats.protocol import Where, to_numpy

LEAST_QUERIES = 16  # of a key that fewer queries see it is not said whether it is a sink: its mean is over too few
SAMPLED_QUERIES = 128  # of the decomposition, evenly spaced
CHECKED_QUERIES = 8  # of which the rest is also computed on its own
LARGEST = 1 << 20  # probabilities held at a time

# One number per head and sequence each.
PER_HEAD = (
    *("mass_first", "mass_findings", "mass_random", "slot_mass", "entropy", "alpha_first", "secondary"),
    *("mass_first_uniform", "mass_findings_uniform", "mass_random_uniform"),
    *("value_norm_first", "value_norm_findings", "mass_diagonal", "mass_diagonal_uniform"),
)
PARTS = ("head", "concat", "projected")
SETS = ("findings", "random")
# One number per sequence each, for every part and set.
PER_PART = ("constancy", "cosine", "energy_share")


@dataclass(frozen=True)
class Targets:
    """Which tokens of every sequence are looked at.

    Args:
        findings: sequence -> positions with massive activations.
        random: as many other positions, drawn at random: the null.
        others: ordinary tokens to compare with.
    """

    findings: Chosen
    random: Chosen
    others: Chosen


@dataclass
class Queries:
    """Which queries the means of one layer are over, so that another pass can be over the same ones.

    Args:
        among: sequence -> name -> positions that may count; None for all.
        used: the same of those that did, filled as calls are seen. Names: every (entropy, slot, alpha of all keys),
            counted (rank of the updates), alpha (of the first key), first and findings (mass on them).
    """

    among: Mapping[int, Mapping[str, Set[int]]] | None = None
    used: dict[int, dict[str, set[int]]] = field(default_factory=dict)

    def narrowed(self, rows: Mapping[str, Sequence[int]], where: Where, n: int) -> dict[str, list[int]]:
        """Those of the rows of each name that may count."""
        at = where.rows(n).tolist()
        may = None if self.among is None else self.among.get(where.sequence, {})
        left = {name: [t for t in mine if may is None or at[t] in may.get(name, ())] for name, mine in rows.items()}
        self.used[where.sequence] = {name: {at[t] for t in mine} for name, mine in left.items()}
        return left


@dataclass(frozen=True)
class HeadOptions:
    """What is measured.

    Args:
        columns: also the mass on every key and the entropy: one more call of the kernel.
        eps: a key is a sink of a head if its mean mass exceeds this (Gu 2025: 0.3).
        bias: the decomposition; project: the output projection W_O without its bias, (R, H * F) -> (R, D), or None.
        queries: which queries all but the decomposition are over; None: all.
    """

    columns: bool = True
    eps: float = SINK
    bias: bool = True
    project: Callable[[Tensor], Tensor] | None = None
    queries: Queries | None = None


@dataclass(frozen=True)
class HeadResult:
    """What `HeadStats` measured in one layer; NaN where a statistic is not available.

    Args:
        sequence: (N,).
        per_head: name of `PER_HEAD` -> (N, H).
        stable_rank: (H,) |U|_F^2 / |U|_2^2 of the updates of all queries that are no chosen token.
        alpha: N arrays (S,), mean over heads of Gu's alpha_k; alpha_max: the greatest head's; sinks: the share of
            heads with alpha_k > eps. Empty without columns.
        parts: (part, set, name of `PER_PART`) -> (N,).
        residual: (N,) greatest |U_C + U_rest - output| over |output|, of sampled queries, U_rest on its own.
        off: (N,) the same of every sequence, with the whole row on its own where nothing was chosen.
        score_size: (N,) of these queries, see `rounding_allowed`: how much of `off` may be rounding.
        between: set -> mean cosine of the sequences' mean projected updates.
        groups: "q", "k", "v" -> group -> `GroupResult`.
    """

    sequence: np.ndarray
    per_head: dict[str, np.ndarray]
    stable_rank: np.ndarray
    alpha: list[np.ndarray]
    alpha_max: list[np.ndarray]
    sinks: list[np.ndarray]
    parts: dict[tuple[str, str, str], np.ndarray]
    residual: np.ndarray
    off: np.ndarray
    score_size: np.ndarray
    between: dict[str, float]
    groups: dict[str, dict[str, GroupResult]]


@dataclass
class _Row:
    sequence: int
    per_head: Tensor  # (len(PER_HEAD), H)
    parts: Tensor  # (PARTS, SETS, PER_PART)
    residual: Tensor  # (3,): of the parts, of the whole, and the size of the scores
    columns: Tensor | None  # (3, S)


class HeadStats:
    """Concentration, value drain and implicit bias of one attention layer, streamed.

    For a query t outside the chosen tokens (and not the first one of a causal model, which sees nothing else):
        mass_C = mean over t that can see a token of C of sum over C of p_t
        alpha_k = mean over all queries that can see k of p_t[k]: with causal attention those from k on (Gu 2025)
    (what a query can see is what mask, window or chunk leave it; a mean over none is NaN)
        mass_diagonal = mean over the same t, of those that see more than one key, of p_t[t]
        mass_C_uniform = mean over the same t of |C that t can see| / |keys that t can see|: of a uniform head
        u_t = sum over C of p_t v,  constancy = mean |u_t - mean u| / |mean u|,  energy share = sum |u|^2 / sum |out|^2

    Args:
        targets: which tokens.
        options: what is measured.
    """

    def __init__(self, targets: Targets, options: HeadOptions = HeadOptions()) -> None:  # noqa: B008
        self.targets, self.options = targets, options
        self._rows: list[_Row] = []
        self._gram_HFF: Tensor | None = None
        self._means: dict[str, list[Tensor]] = {}
        groups = {"findings": targets.findings, "random": targets.random, "others": targets.others}
        self._groups = {name: GroupStats(groups) for name in ("q", "k", "v")}

    @torch.no_grad()
    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        H, T, S = a.shape
        chosen = {
            "findings": rows_at(where, min(T, S), self.targets.findings.get(where.sequence, ())),
            "random": rows_at(where, min(T, S), self.targets.random.get(where.sequence, ())),
        }
        if T != S:  # the keys of cross-attention are another sequence, of which nothing was found
            chosen = {"findings": [], "random": []}
        sight = a.shares({**chosen, "first": [0]})
        found = set(chosen["findings"])
        counted: Sequence[int] = [t for t in range(int(a.forward), T) if t not in found]
        none_H = torch.full((H,), float("nan"), device=a.device)
        head = dict.fromkeys(PER_HEAD, none_H)
        rows = {"every": range(T), "counted": counted, "alpha": range(T), "first": range(1, T), "findings": counted}
        if self.options.queries is not None:
            rows = self._same(rows, sight, where)
            counted = rows["counted"]
        rows["random"] = counted
        for name, mine in sight.items():
            if len(rows[name]):
                head[f"mass_{name}"], head[f"mass_{name}_uniform"] = mine.mean(rows[name])
        if a.slot_HT is not None:
            head["slot_mass"] = a.slot_HT[:, rows["every"]].mean(1)
        self._own(a, counted, head)
        columns = self._columns(a, head, rows["every"]) if self.options.columns else None
        if columns is not None and self.options.queries is not None:
            head["alpha_first"] = sight["first"].mean(rows["alpha"])[0]
        self._drain(a, chosen["findings"], head)
        if a.out_HTF is not None and counted:
            self._add_gram(a.out_HTF, sorted(set(range(T)) - set(counted)))
        bias = _Bias(a, chosen, sight, self.options.project) if self.options.bias else None
        parts = torch.full((len(PARTS), len(SETS), len(PER_PART)), float("nan"), device=a.device)
        residual = torch.full((3,), float("nan"), device=a.device)
        if bias is not None and bias.available:
            residual = bias.residual()
        if bias is not None and bias.available and T == S:
            parts = bias.parts()
            for name, mean_D in bias.means.items():
                self._means.setdefault(name, []).append(mean_D)
        self._rows.append(_Row(where.sequence, torch.stack([head[n] for n in PER_HEAD]), parts, residual, columns))
        for name, x in (("q", a.q_HTE), ("k", a.k_KSE), ("v", a.v_KSF)):
            if x is not None and T == S:
                self._groups[name].update(x.transpose(0, 1).reshape(x.shape[1], -1), where)

    def _same(
        self, rows: Mapping[str, Sequence[int]], sight: Mapping[str, Sight], where: Where
    ) -> dict[str, Sequence[int]]:
        """The rows of each name that can see what it is about and may count."""
        assert self.options.queries is not None
        seen = {"alpha": "first", "first": "first", "findings": "findings"}
        can = {name: (sight[of].n_HT > 0).any(0).tolist() for name, of in seen.items() if of in sight}
        able = {name: [t for t in mine if name not in can or can[name][t]] for name, mine in rows.items()}
        if "findings" not in sight:
            able["findings"] = []
        return dict(self.options.queries.narrowed(able, where, len(rows["every"])))

    def _columns(self, a: Attended, head: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        """Gu's alpha_k for all k, sinks, and the entropy."""
        H, T, S = a.shape
        rows_R = None if len(rows) == T else torch.tensor(rows, device=a.device, dtype=torch.long)
        mass_HS, head["entropy"] = a.columns(rows_R)
        viewers_HS = (a.viewers_HS if rows_R is None else a.viewers_among(rows_R)).expand(H, S)
        alpha_HS = mass_HS / viewers_HS  # 0 / 0 = NaN where no query sees the key
        head["alpha_first"] = alpha_HS[:, 0]
        # In a window of few keys every key is seen by few.
        many_HS = viewers_HS >= viewers_HS.amax(1, keepdim=True).clamp(max=LEAST_QUERIES)
        if S > 1:
            head["secondary"] = _greatest(torch.where(many_HS, alpha_HS, float("nan"))[:, 1:], 1)
        sink_HS = torch.where(many_HS & (viewers_HS > 0), is_sink(alpha_HS, self.options.eps).float(), float("nan"))
        return torch.stack([alpha_HS.nanmean(0), _greatest(alpha_HS, 0), sink_HS.nanmean(0)])

    def _own(self, a: Attended, counted: Sequence[int], head: dict[str, Tensor]) -> None:
        """What queries give to their own key, where they see others too, and what a uniform head would give."""
        own_HT = diagonal(a)
        if own_HT is None or not counted:
            return
        rows_R = torch.tensor(counted, device=a.device)
        seen_HR = a.seen_HT[:, rows_R].expand(len(own_HT), -1)
        more_HR = seen_HR > 1
        n_H = more_HR.sum(1)
        for name, x_HR in (("mass_diagonal", own_HT[:, rows_R]), ("mass_diagonal_uniform", 1 / seen_HR)):
            head[name] = torch.where(more_HR, x_HR, 0.0).sum(1) / n_H  # 0 / 0 = NaN where none sees another

    def _drain(self, a: Attended, rows: list[int], head: dict[str, Tensor]) -> None:
        """Value norms of the first and of the chosen tokens over the mean norm of all others."""
        if a.v_KSF is None or a.v_KSF.shape[1] < 2:
            return
        norm_KS = torch.linalg.vector_norm(a.v_KSF, dim=-1, dtype=torch.float32)
        for name, at in (("first", [0]), ("findings", rows)):
            if not at or len(at) >= norm_KS.shape[1]:
                continue
            total_K, mine_K = norm_KS.sum(1), norm_KS[:, at].sum(1)
            ratio_K = mine_K / len(at) / ((total_K - mine_K) / (norm_KS.shape[1] - len(at)))
            head[f"value_norm_{name}"] = ratio_K.repeat_interleave(a.shape[0] // len(norm_KS))

    def _add_gram(self, out_HTF: Tensor, left: list[int]) -> None:
        """Sum of u u^T over the queries but those left out, from which the stable rank of all of them follows."""
        out_HTF = out_HTF.float()
        gram_HFF = torch.matmul(out_HTF.transpose(1, 2), out_HTF).double()
        if left:
            x_HCF = out_HTF[:, left].double()
            gram_HFF -= torch.matmul(x_HCF.transpose(1, 2), x_HCF)
        self._gram_HFF = gram_HFF if self._gram_HFF is None else self._gram_HFF.to(gram_HFF.device) + gram_HFF

    def merge(self, other: HeadStats) -> None:
        """Add what another one has seen."""
        self._rows.extend(other._rows)
        for name, means in other._means.items():
            self._means.setdefault(name, []).extend(means)
        if other._gram_HFF is not None:
            held = self._gram_HFF
            self._gram_HFF = other._gram_HFF if held is None else held.to(other._gram_HFF.device) + other._gram_HFF
        for name, groups in self._groups.items():
            groups.merge(other._groups[name])

    def result(self) -> HeadResult:
        """Everything measured so far."""
        rows = sorted(self._rows, key=lambda row: row.sequence)
        heads = np.stack([to_numpy(r.per_head) for r in rows]) if rows else np.zeros((0, len(PER_HEAD), 0))
        parts = np.stack([to_numpy(r.parts) for r in rows]) if rows else np.zeros((0, len(PARTS), len(SETS), 3))
        columns = [to_numpy(r.columns) for r in rows if r.columns is not None]
        return HeadResult(
            sequence=np.array([r.sequence for r in rows], np.int64),
            per_head={name: heads[:, i] for i, name in enumerate(PER_HEAD)},
            stable_rank=_stable_rank(self._gram_HFF, heads.shape[2]),
            alpha=[c[0] for c in columns],
            alpha_max=[c[1] for c in columns],
            sinks=[c[2] for c in columns],
            parts={
                (part, of, name): parts[:, i, j, k]
                for i, part in enumerate(PARTS)
                for j, of in enumerate(SETS)
                for k, name in enumerate(PER_PART)
            },
            residual=np.array([float(r.residual[0]) for r in rows]),
            off=np.array([float(r.residual[1]) for r in rows]),
            score_size=np.array([float(r.residual[2]) for r in rows]),
            between={name: _mean_cosine(np.stack([to_numpy(m) for m in means])) for name, means in self._means.items()},
            groups={name: groups.result() for name, groups in self._groups.items()},
        )


def _stable_rank(gram_HFF: Tensor | None, H: int) -> np.ndarray:
    if gram_HFF is None:
        return np.full(H, np.nan)
    gram = to_numpy(gram_HFF)
    if not np.isfinite(gram).all():  # eigenvalues of NaN do not converge
        return np.full(H, np.nan)
    trace_H, top_H = np.trace(gram, axis1=1, axis2=2), np.linalg.eigvalsh(gram)[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(top_H > 0, trace_H / top_H, np.nan)


def _mean_cosine(x_ND: np.ndarray) -> float:
    """Mean cosine of all pairs of rows that are not zero; NaN below two."""
    norm = np.linalg.norm(x_ND, axis=1)
    unit, n = x_ND[norm > 0] / norm[norm > 0, None], int((norm > 0).sum())
    total = unit.sum(0) if n else np.zeros(x_ND.shape[1])
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else float("nan")


def _greatest(x: Tensor, dim: int) -> Tensor:
    """The greatest of what is known; NaN where nothing is."""
    known = ~x.isnan()
    return torch.where(known.any(dim), torch.where(known, x, -torch.inf).amax(dim), float("nan"))


class _Bias:
    """The update that chosen tokens write to sampled queries, beside the whole update (Sun 2024, Eq. 2, Fig. 8)."""

    def __init__(
        self,
        a: Attended,
        chosen: Mapping[str, list[int]],
        sight: Mapping[str, Sight],
        project: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.a, self.chosen, self.project = a, chosen, project
        self.means: dict[str, Tensor] = {}
        self.available = a.v_KSF is not None and a.out_HTF is not None
        sampled = {name: _sampled(a, rows, sight[name]) for name, rows in chosen.items() if rows}
        self.queries = {name: rows for name, rows in sampled.items() if rows}

    def update(self, name: str, rows_R: Tensor) -> Tensor:
        """u (H, R, F) of one set of tokens, to some queries."""
        keys_C = torch.tensor(self.chosen[name], device=self.a.device)
        v_HCF = self.a.values(keys_C)
        parts = rows_R.split(max(1, LARGEST // v_HCF[..., 0].numel()))
        return torch.cat([torch.matmul(self.a.probs(keys_C, part), v_HCF) for part in parts], dim=1)

    def parts(self) -> Tensor:
        """(PARTS, SETS, PER_PART)."""
        table = torch.full((len(PARTS), len(SETS), len(PER_PART)), float("nan"), device=self.a.device)
        assert self.a.out_HTF is not None
        for j, name in enumerate(SETS):
            if name not in self.queries:
                continue
            rows_R = torch.tensor(self.queries[name], device=self.a.device)
            u_HRF, out_HRF = self.update(name, rows_R), self.a.out_HTF[:, rows_R].float()
            u_RX, out_RX = _joined(u_HRF), _joined(out_HRF)
            table[0, j] = torch.stack([_alike(u, out) for u, out in zip(u_HRF, out_HRF, strict=True)]).nanmean(0)
            table[1, j] = _alike(u_RX, out_RX)
            written = u_RX
            if self.project is not None:
                written = _scaled(self.project, u_RX)
                table[2, j] = _alike(written, self.project(out_RX))
            self.means[name] = written.mean(0)
        return table

    def residual(self) -> Tensor:
        """How far what is written out is from the output, over |output|, of a few queries, and their score size: (3,).

        First of the update from the tokens with findings and the rest, computed on its own (NaN where no query sees
        them), then of whichever of the two there is: these parts, or the whole row.
        """
        a, known = self.a, "findings" in self.queries
        assert a.out_HTF is not None
        queries = self.queries["findings"] if known else list(range(a.shape[1]))
        every = max(1, len(queries) // CHECKED_QUERIES)
        at_R = torch.tensor(queries[::every], device=a.device)
        p_HRS = (a.logits(at_R) - a.norm_HT[:, at_R, None]).exp()
        size = a.score_size(p_HRS, at_R)
        if known:
            p_HRS[:, :, self.chosen["findings"]] = 0
        whole = torch.matmul(p_HRS, a.values(torch.arange(a.shape[2], device=a.device))) + a.slot_update(at_R)
        whole = whole + self.update("findings", at_R) if known else whole
        out = a.out_HTF[:, at_R].float()
        off = (whole - out).abs().max() / out.abs().max()
        return torch.stack([off if known else torch.full_like(off, float("nan")), off, size])


def _joined(x_HRF: Tensor) -> Tensor:
    """Heads side by side, as the output projection reads them: (R, H * F)."""
    return x_HRF.transpose(0, 1).reshape(x_HRF.shape[1], -1)


def _sampled(a: Attended, rows: list[int], sight: Sight) -> list[int]:
    """Evenly spaced queries that can see all chosen keys, or one of them where few see all; they are none of these."""
    T, left = a.shape[1], set(rows)
    # Which keys a mask leaves is known on the device alone; of a flag it is known here.
    masked = a.mask_HTS is not None or a.scores_HTS is not None
    n_T = sight.n_HT.amax(0).tolist() if masked or not a.causal else None

    def behind(key: int, least: int) -> list[int]:
        if n_T is None:
            return [t for t in range(key + 1, T) if t not in left]
        return [t for t in range(T) if n_T[t] >= least and t not in left]

    found = behind(max(rows), len(rows))
    if len(found) < min(LEAST_QUERIES, T // 2):
        found = behind(min(rows), 1)
    return found[:: -(-len(found) // SAMPLED_QUERIES)] if found else []


def _scaled(project: Callable[[Tensor], Tensor], u_RX: Tensor) -> Tensor:
    """A linear map of updates that may be as small as the probability of a token that nobody looks at.

    Row by row: a map with a bias takes it off again, which costs what is small beside the bias its digits.
    """
    size_R1 = u_RX.abs().amax(1, keepdim=True).clamp(min=torch.finfo(u_RX.dtype).tiny)
    return project(u_RX / size_R1).to(sum_dtype(u_RX.device)) * size_R1


def _alike(u_RX: Tensor, out_RX: Tensor) -> Tensor:
    """(constancy, mean pairwise cosine, energy share) of updates beside the whole outputs."""
    u_RX, out_RX = u_RX.to(sum_dtype(u_RX.device)), out_RX.to(sum_dtype(u_RX.device))
    mean_X = u_RX.mean(0)
    constancy = (u_RX - mean_X).norm(dim=1).mean() / mean_X.norm()
    constancy = constancy if len(u_RX) > 1 else torch.full_like(constancy, float("nan"))  # one alone differs from none
    norm_R = u_RX.norm(dim=1)
    real = (norm_R > 0).sum()
    unit_X = (u_RX / norm_R.clamp(min=torch.finfo(u_RX.dtype).tiny)[:, None]).sum(0)
    cosine = (unit_X.square().sum() - real) / (real * (real - 1))
    cosine = torch.where(real > 1, cosine, float("nan"))  # one update alone: a rounding over zero is no cosine
    return torch.stack([constancy, cosine, u_RX.square().sum() / out_RX.square().sum()])
