"""Outlier dims of norms, and what setting their scale and bias to zero does (Kovaleva et al. 2021, BERT Busters).

Works on the norms inside the blocks. In a post-LN model that takes the dim out of the residual stream; where a norm
only feeds attention or MLP, it takes the dim out of what these read.

Shapes: D dims, M norms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from massact.classics.behaviour import behaviour
from massact.classics.works import Classic, Ground, Outcome, Unavailable, row
from massact.explanations.weights import LAYER_SHARE, SIGMA, layers_beyond, scored_norms
from massact.interventions.effects import effect_rows
from massact.interventions.norm_scales import Parameter, parameters_of, silenced
from massact.trace import Together

RELAXED = 2.0  # standard deviations, where the rule of three finds nothing: Kovaleva 2021, RoBERTa
DRAWS = 5  # of random dims
METRICS = ("perplexity", "nll", "kl", "top1_agreement")


@dataclass
class _Trial:
    """The edits of one stack: the subject's, and its controls'."""

    edits: dict[str, Together]  # by kind: subject, random 1.., largest
    dims: dict[str, list[int]]


def _norm_weights(ground: Ground) -> Outcome:
    outcome, trials = Outcome(), {}
    for name in ground.stacks():
        stack = ground.model.anatomy.stack(name)
        norms = scored_norms(ground.model, stack)
        if not norms:
            reason = "its blocks have no norm with a scale of the width of the residual stream"
            outcome.numbers[name] = {"unavailable": reason}
            outcome.notes.append(f"{_called(name)}: {reason}.")
            continue
        passing = {s: layers_beyond(norms, stack.d_model, s) for s in (SIGMA, RELAXED)}
        outlier = {s: _dims(n_D >= LAYER_SHARE * stack.n_layers) for s, n_D in passing.items()}
        massive = ground.massive_dims(name)
        parameters, unsure = parameters_of(ground.model, [n.module for n in norms])
        if unsure:
            outcome.notes.append(f"{_called(name)}: {len(unsure)} norms (such as {unsure[0]}) cannot be run on a "
                                 "vector alone; their scale is taken to be zero where their weight is.")  # fmt: skip
        outcome.numbers[name] = {
            "outlier_dims": outlier[SIGMA],
            "relaxed_dims": outlier[RELAXED],
            "massive_dims": sorted(massive),
            "outlier_and_massive": [d for d in outlier[SIGMA] if d in massive],
            "relaxed_and_massive": [d for d in outlier[RELAXED] if d in massive],
            "n_norms": len(norms),
            "n_parameters": len(parameters),
        }
        for sigma, n_D in passing.items():
            about: dict[str, Any] = {"stack": name, "subject": f"{sigma:g} sigma"}
            outcome.rows.append(row("outlier_dims", len(outlier[sigma]), stack.n_layers, **about))
            told = sorted({*outlier[SIGMA], *outlier[RELAXED], *massive})
            outcome.rows += [row("layers_beyond", n_D[d], stack.n_layers, dim=d, **about) for d in told]
        if trial := _trial(ground, name, parameters, outlier, outcome):
            trials[name] = trial
    if all("unavailable" in numbers for numbers in outcome.numbers.values()):
        raise Unavailable("No norm inside the blocks has a scale of the width of the residual stream.")
    _experiment(ground, trials, outcome)
    return outcome


def _dims(chosen_D: np.ndarray) -> list[int]:
    return np.flatnonzero(chosen_D).tolist()


def _called(stack: str) -> str:
    return f"Stack {stack!r}" if stack else "The stack"


def _trial(
    ground: Ground, stack: str, parameters: list[Parameter], outlier: dict[float, list[int]], outcome: Outcome
) -> _Trial | None:
    """Which dims are set to zero: those of the strict rule, else of the relaxed one, else the massive ones."""
    numbers, massive = outcome.numbers[stack], sorted(ground.massive_dims(stack))
    choices = [("outlier", outlier[SIGMA]), ("relaxed", outlier[RELAXED]), ("massive", massive)]
    which, dims = next(((w, d) for w, d in choices if d), ("", []))
    change_D = np.sum([p.value_D != 0 for p in parameters], axis=0)  # scalars that zero would change
    why = (
        "no dim passes a rule, and the scan has no massive dims" if not dims
        else "their scales are no parameters of the model" if not any(p.scale for p in parameters)
        else "scale and bias are zero there already" if not change_D[dims].any() else ""
    )  # fmt: skip
    if why:
        numbers["harm"] = {"unavailable": why}
        outcome.notes.append(f"{_called(stack)}: no dims are set to zero: {why}.")
        return None
    if which != "outlier":
        instead = f"those beyond {RELAXED:g}" if which == "relaxed" else "the massive ones"
        outcome.notes.append(f"{_called(stack)}: no dim is beyond {SIGMA:g} sigma in half of the layers; {instead} are "
                             "set to zero instead.")  # fmt: skip
    scale_D = np.mean([np.abs(p.value_D) for p in parameters if p.scale], axis=0)
    free = [d for d in _dims(change_D > 0) if d not in {*dims, *outlier[SIGMA]}]
    chosen = {"subject": dims}
    draw, pool = np.random.default_rng((ground.seed, len(outcome.numbers))), sorted(set(free) - set(massive))
    if len(pool) >= len(dims):
        for i in range(1, DRAWS + 1):
            chosen[f"random {i}"] = sorted(draw.choice(pool, len(dims), replace=False).tolist())
    else:
        outcome.notes.append(f"{_called(stack)}: too few other dims for a random control.")
    if len(free) >= len(dims):
        chosen["largest"] = sorted(sorted(free, key=lambda d: (-scale_D[d], d))[: len(dims)])
    numbers |= {"subject": which, "dims": dims, "largest_dims": chosen.get("largest", []),
                "n_scalars": len(dims) * len(parameters)}  # fmt: skip
    n = sum(p.scale for p in parameters)
    outcome.rows.append(row("mean_abs_scale", np.median(scale_D), n, stack=stack, subject="median dim"))
    outcome.rows += [
        row("mean_abs_scale", scale_D[d], n, stack=stack, dim=d, subject=which if kind == "subject" else kind)
        for kind in ("subject", "largest")
        for d in chosen.get(kind, [])
    ]
    words = {k: _edit_name(stack, which if k == "subject" else k, of_kind) for k, of_kind in chosen.items()}
    return _Trial({k: silenced(words[k], parameters, chosen[k]) for k in chosen}, chosen)


def _edit_name(stack: str, kind: str, dims: list[int]) -> str:
    which = ", ".join(map(str, dims[:4])) + " ..." * (len(dims) > 4)
    return f"{f'{stack}: ' if stack else ''}norms zero at {kind} dims {which}"


def _experiment(ground: Ground, trials: dict[str, _Trial], outcome: Outcome) -> None:
    if not trials:
        return
    try:
        paired = behaviour(ground, [e for trial in trials.values() for e in trial.edits.values()])
    except Unavailable as error:
        outcome.notes.append(f"What the dims do to predictions is unavailable: {error.what}")
        for stack in trials:
            outcome.numbers[stack]["harm"] = {"unavailable": error.what}
        return
    for stack, trial in trials.items():
        here = replace(paired, fired={e.name: paired.fired[e.name] for e in trial.edits.values()})
        rows = effect_rows(here, stack=stack, only=METRICS)
        outcome.effects += rows
        kinds = {e.name: kind for kind, e in trial.edits.items()}
        outcome.numbers[stack]["harm"] = {
            metric: _harm(metric, {kinds[str(r["edit"])]: r for r in rows if r["metric"] == metric})
            for metric in METRICS
            if any(r["metric"] == metric for r in rows)
        }


def _harm(metric: str, by_kind: dict[str, Any]) -> dict[str, float]:
    """What the subject changes, beside the mean and the worst of the random draws, and the largest scales."""
    random = [r["delta"] for kind, r in by_kind.items() if kind.startswith("random")]
    told = {"baseline": by_kind["subject"]["baseline"], "subject": by_kind["subject"]["delta"]}
    if random:
        worst = min if metric == "top1_agreement" else max
        told |= {"random": float(np.mean(random)), "random_worst": worst(random)}
    return told | ({"largest": by_kind["largest"]["delta"]} if "largest" in by_kind else {})


NORM_WEIGHTS = Classic(
    "norm-weights", "Kovaleva et al. 2021", "Do a few scales and biases of the norms hold the model together?",
    _norm_weights,
)  # fmt: skip
