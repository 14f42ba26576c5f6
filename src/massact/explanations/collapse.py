"""Norm collapse: what the norms of every block make of the massive tokens, and how alike they must be behind them.

With x = a u + r, r orthogonal to the unit vector u, and sin theta = |r| / |x|, two tokens of one sign have
    cos(n(x_1), n(x_2)) >= cos(theta_1 + theta_2)
(the triangle inequality of angles), for any u. Here u is the mean direction behind the gain of one half of the
sequences, and the angles are those of the other half. LayerNorm has x - mean(x) in place of x, and its bias is part of
what is compared. Whatever the magnitude, |n(x)_j| <= sqrt(D) |g_j| + |b_j|.

Shapes: N tokens, D dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from massact.anatomy import norms_of
from massact.anatomy.examples import device_of
from massact.explanations.writers import Coordinate
from massact.models import Model, held
from massact.records.anatomy import Block, Stack
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats.groups import Gather
from massact.stats.intervals import mean_interval
from massact.trace import Measurements, Probe, unchanged

MOST_TOKENS = 32  # of one class, spread over the sequences: whole rows of d_model are kept at every norm
HOLDS_MOST, OFF = 0.5, 0.01  # one-hot shares: a dim that holds most of a token, and one that is switched off
LARGE = 1e4  # beside it the eps of a norm is nothing
LEAST = 4  # sequences: two of each half
SAME = 1e-6  # relative: two states that rounding alone tells apart
TOLERANCE = 1e-4  # relative, of what a norm makes of the stream to what was measured; in 16 bits eight roundings

Token = tuple[int, int]  # (sequence, position)


@dataclass(frozen=True)
class Collapsing:
    """The massive tokens of one class of positions, and as many random ones.

    Args:
        coordinate: the largest one of the class; its dim is j.
        tokens: those of it that are looked at; random: ordinary tokens of the same sequences.
    """

    coordinate: Coordinate
    tokens: tuple[Token, ...]
    random: tuple[Token, ...]


def collapsing(
    coordinates: Sequence[Coordinate], random: Mapping[str, Mapping[int, Sequence[int]]]
) -> list[Collapsing]:
    """The largest coordinate of every stack and class of positions, with its tokens, one a sequence in turn.

    Args:
        coordinates: the largest first.
        random: stack -> sequence -> positions of random ordinary tokens.
    """
    first: dict[tuple[str, str], Coordinate] = {}
    for c in coordinates:
        first.setdefault((c.stack, c.position_class), c)
    made = []
    for c in first.values():
        tokens = spread(c.tokens)
        drawn = spread([(s, p) for s in sorted({s for s, _ in tokens}) for p in random[c.stack].get(s, ())])
        made.append(Collapsing(c, tokens, drawn[: len(tokens)]))
    return made


def spread(tokens: Sequence[Token]) -> tuple[Token, ...]:
    """At most `MOST_TOKENS` of some tokens: first one of every sequence, then a second one, ..."""
    seen: dict[int, int] = {}
    turns = []
    for sequence, pos in sorted(tokens):
        seen[sequence] = seen.get(sequence, -1) + 1
        turns.append((seen[sequence], sequence, pos))
    return tuple((s, p) for _, s, p in sorted(turns)[:MOST_TOKENS])


def by_sequence(tokens: Iterable[Token]) -> dict[int, list[int]]:
    """sequence -> positions of some tokens."""
    chosen: dict[int, set[int]] = {}
    for sequence, pos in tokens:
        chosen.setdefault(sequence, set()).add(pos)
    return {s: sorted(p) for s, p in chosen.items()}


def norm_points(block: Block) -> list[tuple[str, str]]:
    """(point of the stream, point behind a norm) of a block: what sublayers read, and norms of the stream itself."""
    pairs = [
        (s.start, reads)
        for s in block.sums
        for write in s.writes
        for reads in (write.replace("_out", "_in"),)
        if reads != write and reads in block.places
    ]
    return [*pairs, *((c.start, c.end) for c in block.changes if c.how == "norm")]


def collapse_probes(stack: Stack, groups: Sequence[Collapsing]) -> list[Probe]:
    """Probes that keep the states of the tokens before and behind every norm."""
    wanted = by_sequence(token for g in groups for token in (*g.tokens, *g.random))
    head = f"{stack.name}/" if stack.name else ""
    points = {point for block in stack.blocks for pair in norm_points(block) for point in pair}
    return [Probe("collapse", f"{head}[0-9]*.{point}", lambda: Gather(wanted)) for point in sorted(points)]


@dataclass(frozen=True)
class Norm:
    """What a norm does, as it was seen doing it: n(x) = g (x - mean) / rms(x - mean) + b.

    Args:
        module: dotted path; "" for one without parameters.
        gain_D, bias_D: (D,).
        subtracts_mean: LayerNorm; else RMSNorm, and x is normed as it is.
        error: greatest relative difference of its outputs to what was measured.
    """

    module: str
    gain_D: np.ndarray
    bias_D: np.ndarray
    subtracts_mean: bool
    error: float

    def of(self, x_ND: np.ndarray) -> np.ndarray:
        """What it makes of tokens, without its eps."""
        x_ND = self.centred(x_ND)
        return self.gain_D * x_ND * x_ND.shape[1] ** 0.5 / np.linalg.norm(x_ND, axis=1, keepdims=True) + self.bias_D

    def centred(self, x_ND: np.ndarray) -> np.ndarray:
        """What it norms."""
        return x_ND - x_ND.mean(1, keepdims=True) if self.subtracts_mean else x_ND


def norm_between(model: Model, paths: Sequence[str], x_ND: np.ndarray, y_ND: np.ndarray) -> Norm | None:
    """The norm that makes y of x: of some modules the one that does, or one without parameters; None if none does.

    What a norm does is asked of it, not read off its name: n(0) = b, n(c 1) = g + b for an RMSNorm and b for a
    LayerNorm, and n of alternating signs = +-g + b for both. So a gain of 1 + weight is one like any other.
    """
    size = np.linalg.norm(y_ND, axis=1)
    size, eps = np.where(size > 0, size, size.max()), max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps)
    best: Norm | None = None
    plain = np.ones(x_ND.shape[1]), np.zeros(x_ND.shape[1])
    known: list[Norm] = [Norm("", *plain, mean, np.nan) for mean in (False, True)]
    for path in paths:
        module = model.module.get_submodule(path)
        given = _called(module, x_ND)
        if given is not None and given.shape == y_ND.shape:
            error = float((np.linalg.norm(given - y_ND, axis=1) / size).max())
            if best is None or error < best.error:
                best = Norm(path, *_does(module, x_ND.shape[1]), error)
    for norm in known:
        error = float((np.linalg.norm(norm.of(x_ND) - y_ND, axis=1) / size).max())
        if best is None or error < best.error:
            best = Norm("", *plain, norm.subtracts_mean, error)
    return best if best is not None and best.error <= max(TOLERANCE, 8 * eps) else None


def gain_of(module: nn.Module, D: int) -> np.ndarray | None:
    """What a norm multiplies each dim by, (D,); None where it cannot be called with rows alone."""
    return None if _called(module, np.ones((1, D))) is None else _does(module, D)[0]


def _called(module: nn.Module, x_ND: np.ndarray) -> np.ndarray | None:
    """What a module makes of rows; None where it wants more than these."""
    weight = held(module)
    try:
        with torch.inference_mode(), unchanged(module):
            x = torch.from_numpy(x_ND).to(device_of(module), weight.dtype)
            given = module.forward(x)  # its taps are for the model's own calls
    except (TypeError, RuntimeError, ValueError):
        return None
    return given.detach().double().cpu().numpy() if isinstance(given, Tensor) else None


def _does(module: nn.Module, D: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gain, bias, and whether it takes the mean off."""
    signs_D = np.where(np.arange(D) % 2 == 0, 1.0, -1.0)
    signs_D[D - D % 2 :] = 0  # of an odd number the last one, so that the mean is zero
    asked = np.stack([np.zeros(D), np.full(D, LARGE), LARGE * signs_D, LARGE * signs_D[::-1]])
    given = _called(module, asked)
    assert given is not None, "it was called with the tokens"
    bias_D = given[0]
    ones_D, pairs_D, turned_D = given[1:] - bias_D
    subtracts = bool(np.linalg.norm(ones_D) < 0.1 * np.linalg.norm(pairs_D))
    gain_D = np.where(signs_D != 0, pairs_D * signs_D, turned_D * signs_D[::-1]) * np.sqrt((signs_D**2).mean())
    gain_D = gain_D if subtracts else ones_D
    weight_D = held(module).detach().double().cpu().numpy()
    for exact_D in (weight_D, 1 + weight_D):  # to the last digit, where that is what it does
        if np.allclose(exact_D, gain_D, rtol=0.02, atol=1e-3 * np.abs(gain_D).max()):
            return exact_D, bias_D, subtracts
    return gain_D, bias_D, subtracts


def collapse_table(
    model: Model,
    stacks: Mapping[str, Stack],
    groups: Sequence[Collapsing],
    measured: Measurements,
    writers: pd.DataFrame,
) -> tuple[pd.DataFrame, list[str]]:
    """One row for each class of massive tokens and norm, and notes on what could not be compared.

    Args:
        writers: who writes the coordinates: which sublayer takes them away.
    """
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    for g in groups:
        stack = stacks[g.coordinate.stack]
        made = list(_stack_rows(model, stack, g, measured, writers))
        rows += made
        what = f"{g.coordinate.dim}@{g.coordinate.position_class}"
        if not made:
            where = f" of stack {stack.name!r}" * bool(stack.name)
            notes.append(f"Collapse of {what}{where} is unavailable: no norm was found that makes what a block reads "
                         "of the residual stream.")  # fmt: skip
        elif all(np.isnan(float(r["bound"])) for r in made):  # type: ignore[arg-type]
            n = len({s for s, _ in g.tokens})
            why = ("it takes a direction from one half of the sequences and two tokens of the other; "
                   f"{n:,} of them ha{'s' if n == 1 else 've'} these tokens") if n < LEAST else (
                   "in all sequences these tokens are one vector before the norm already")  # fmt: skip
            notes.append(f"The bound on cosines of {what} is unavailable: {why}.")
    return frame("collapse", rows), list(dict.fromkeys(notes))


def _stack_rows(
    model: Model, stack: Stack, g: Collapsing, measured: Measurements, writers: pd.DataFrame
) -> Iterator[dict[str, object]]:
    c, paths = g.coordinate, dict[int, list[str]]()
    for layer, path in norms_of(model.module, stack):
        paths.setdefault(layer, []).append(path)
    mine = writers[(writers["stack"] == c.stack) & (writers["dim"] == c.dim)]
    down = mine[(mine["position_class"] == c.position_class) & (mine["role"] == "down")]
    removing = set(zip(down["layer"], down["submodule"], strict=True))
    for block in stack.blocks:
        for before, behind in norm_points(block):
            x, y = (measured.result("collapse", Site(stack.name, block.layer, point)) for point in (before, behind))
            tokens = [t for t in (*g.tokens, *g.random) if t in x and t in y]
            every = [np.stack([of[t] for t in tokens]) for of in (x, y)] if tokens else []
            if not every or not all(np.isfinite(of).all() and of.any() for of in every):
                continue
            if np.array_equal(every[0], every[1]):  # no norm stands between
                continue
            norm = norm_between(model, paths.get(block.layer, ()), *every)
            if norm is not None:
                yield {
                    "stack": stack.name, "layer": block.layer, "norm": behind, "module": norm.module,
                    "subtracts_mean": norm.subtracts_mean, "dim": c.dim, "position_class": c.position_class,
                    "removes": (block.layer, behind.replace("_in", "_out")) in removing, "error": norm.error,
                    **_numbers(norm, c.dim, {t: x[t] for t in tokens}, {t: y[t] for t in tokens}, g),
                }  # fmt: skip


def _numbers(
    norm: Norm, j: int, x: Mapping[Token, np.ndarray], y: Mapping[Token, np.ndarray], g: Collapsing
) -> dict[str, object]:
    """The columns of one norm.

    Args:
        x, y: tokens before the norm and behind it.
    """
    sign = np.sign(sum(np.sign(x[t][j]) for t in g.tokens if t in x)) or 1.0
    massive = [t for t in g.tokens if t in x and np.sign(x[t][j]) == sign]
    random = [t for t in g.random if t in x]
    D, gain = len(norm.gain_D), np.abs(norm.gain_D)
    before, behind = (_shares(norm, x, massive, j, with_gain) for with_gain in (False, True))
    of_sequence = pd.Series(behind, [s for s, _ in massive], dtype=float).groupby(level=0).mean()
    around = mean_interval(of_sequence.to_numpy()) if len(of_sequence) > 1 else None
    onehot_before = float(np.mean(before)) if massive else np.nan
    onehot = float(np.mean(behind)) if massive else np.nan
    one_D = np.zeros((1, D))
    one_D[0, j] = sign
    checked = _checked(massive, x)
    x_checked = norm.centred(np.stack([x[t] for t in checked])) if checked else np.zeros((0, D))
    image_D = norm.of(one_D)[0]
    return {
        "gain": norm.gain_D[j], "n_dims": D,
        "gain_rank": float(1 + (gain > gain[j]).sum()) if np.ptp(gain) > 0 else np.nan,
        "onehot_before": onehot_before, "onehot": onehot,
        "onehot_low": around.low if around else np.nan, "onehot_high": around.high if around else np.nan,
        "onehot_random": float(np.mean(_shares(norm, x, random, j, True))) if random else np.nan,
        "min_cosine_before": least_cosine(x_checked), "bound_before": cosine_bound(x_checked, norm.centred(one_D)[0]),
        **dict(zip(("min_cosine", "bound"), _halves(x, y, massive), strict=True)),
        "bound_dim": cosine_bound(np.stack([y[t] for t in checked]), image_D) if checked else np.nan,
        **dict(zip(("min_cosine_random", "bound_random"), _halves(x, y, random), strict=True)),
        "entry": float(max((abs(y[t][j]) for t in massive), default=np.nan)),
        "entry_bound": float(D**0.5 * gain[j] + abs(norm.bias_D[j])),
        "role": role_of(onehot_before, onehot), "n_tokens": len(massive), "n_checked": len(checked),
        "n_random": len(random), "n_sequences": len({s for s, _ in massive}),
    }  # fmt: skip


def role_of(before: float, behind: float) -> str:
    """Whether a norm lets a dim through that holds most of a token: on, dimmed or off; empty where it does not."""
    if not before >= HOLDS_MOST:
        return ""
    return "on" if behind >= HOLDS_MOST else "off" if behind < OFF else "dimmed"


def _shares(norm: Norm, x: Mapping[Token, np.ndarray], tokens: Sequence[Token], j: int, with_gain: bool) -> list[float]:
    """x_j^2 / |x|^2 of each token as it is normed, times the gain or not; NaN of a token that the gain takes away."""
    shares = []
    for t in tokens:
        one_D = norm.centred(x[t][None])[0] * (norm.gain_D if with_gain else 1.0)
        square = float(one_D @ one_D)
        shares.append(float(one_D[j] ** 2) / square if square > 0 else np.nan)
    return shares


def _checked(tokens: Sequence[Token], x: Mapping[Token, np.ndarray]) -> list[Token]:
    """Those of every second sequence that has any: the half on which a direction of the other half is checked.

    Tokens that are one vector before the norm, as the first of all sequences is with a BOS, count once: that the norm
    gives one vector of them says nothing.
    """
    order, kept = {s: i for i, s in enumerate(sorted({s for s, _ in tokens}))}, list[Token]()
    for t in tokens:
        new = all(np.linalg.norm(x[t] - x[k]) > SAME * np.linalg.norm(x[t]) for k in kept)
        kept += [t] if order[t[0]] % 2 and new else []
    return kept


def _halves(
    x: Mapping[Token, np.ndarray], y: Mapping[Token, np.ndarray], tokens: Sequence[Token]
) -> tuple[float, float]:
    """The least cosine of two tokens of the checked half, and its bound by the mean direction of the other half."""
    checked = _checked(tokens, x)
    halved = {s: i % 2 for i, s in enumerate(sorted({s for s, _ in tokens}))}
    fitted = [t for t in tokens if not halved[t[0]]]
    if len(checked) < 2:
        return np.nan, np.nan
    y_ND, fit_ND = (np.stack([y[t] for t in of]) for of in (checked, fitted))
    return least_cosine(y_ND), cosine_bound(y_ND, _unit(fit_ND).mean(0))


def _unit(x_ND: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def least_cosine(x_ND: np.ndarray) -> float:
    """The least cosine of two rows; NaN below two rows, or where one is zero."""
    if len(x_ND) < 2:
        return np.nan
    unit_ND = _unit(x_ND)
    return float((unit_ND @ unit_ND.T)[np.triu_indices(len(x_ND), 1)].min())


def cosine_bound(x_ND: np.ndarray, u_D: np.ndarray) -> float:
    """cos(theta_1 + theta_2) of the two greatest angles of rows to a direction: no two rows have a cosine below it.

    -1 where the angles add up to more than pi: there it says nothing. NaN below two rows, or without a direction.
    """
    size = np.linalg.norm(u_D)
    if len(x_ND) < 2 or not size > 0 or np.isnan(size):
        return np.nan
    along_N = x_ND @ (u_D / size)
    across_N = np.linalg.norm(x_ND - along_N[:, None] * (u_D / size), axis=1)
    widest = np.sort(np.arctan2(across_N, along_N))[-2:].sum()
    return float(np.cos(min(widest, np.pi)))
