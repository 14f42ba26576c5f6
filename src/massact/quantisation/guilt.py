"""Guilt: which sites have to stay in full precision for a scheme to cost no more than a target, the worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from massact.interventions.effects import Paired, effects_of, evaluate
from massact.quantisation.deviations import Local, local_deviations
from massact.quantisation.linears import point_of
from massact.quantisation.roundings import edit_of
from massact.quantisation.schemes import Scheme
from massact.records.sites import Site
from massact.records.verdicts import HARMFUL

if TYPE_CHECKING:
    from massact.quantisation.job import Work

STRIDES = (1, 4, 16, 64, 256, 1024)  # sites left out


def guilty_rows(
    work: Work, schemes: Sequence[Scheme], paired: Paired, local: dict[tuple[str, Site], Local]
) -> list[dict[str, object]]:
    """Rows of the table `guilty_sites`: the loss as the sites with the greatest local error stay in full precision.

    Greedy, by the error of all tokens but the massive ones at the end of the block; until the interval of the loss
    reaches down to the target, or no site is left. No row where no scheme is to blame.
    """
    chosen = _chosen(work, schemes, paired)
    if chosen is None:
        return []
    mine = {site: found for (name, site), found in local.items() if name == chosen.name}
    if not mine:
        head = work.calibration.head(min(work.config.local_sequences, work.calibration.n_sequences))
        found = local_deviations(work.ready, head, [chosen], lambda: None)
        mine = {site: one for (_, site), one in found.items()}
    order = sorted(mine, key=lambda s: -_known(mine[s].deviation.rest.error))
    losses = _losses(work, chosen, order)
    rows = []
    for left_out in range(len(order) + 1):
        site = order[left_out - 1] if left_out else None
        rows.append({
            "scheme": chosen.name, "left_out": left_out, "layer": 0 if site is None else site.layer,
            "site": "" if site is None else site.point,
            "local_rest": math.nan if site is None else mine[site].deviation.rest.error,
        } | losses.get(left_out, {}))  # fmt: skip
    return rows


def _known(error: float) -> float:
    return -1.0 if math.isnan(error) else error


def _chosen(work: Work, schemes: Sequence[Scheme], paired: Paired) -> Scheme | None:
    """The scheme that was named, or of those whose scale serves a whole tensor the worst, if it is harmful."""
    if work.config.guilty is not None:
        return work.guilty
    everyone = np.ones(len(paired.n_targets), bool)
    worst: tuple[float, Scheme] | None = None
    for one in schemes:
        remedied = one != one.plain() or not one.sites or one.weights is not None
        if remedied or any(p.form.sharing != "tensor" for p in one.parts):
            continue
        found = next((e for e in effects_of(paired, one.name, everyone, work.config.margin) if e.metric == "nll"), None)
        if found is not None and found.verdict == HARMFUL and (worst is None or found.delta > worst[0]):
            worst = found.delta, one
    return None if worst is None else worst[1]


def _losses(work: Work, chosen: Scheme, order: Sequence[Site]) -> dict[int, dict[str, object]]:
    """Sites left out -> loss: none, then in strides until one meets the goal, then halfway back to one that did not."""
    found: dict[int, dict[str, object]] = {}

    def run(numbers: Sequence[int]) -> None:
        edits = {k: edit_of(work.held, chosen.without((s.layer, point_of(s)) for s in order[:k]), f"{k} left out")
                 for k in numbers}  # fmt: skip
        paired = evaluate(work.held.model, work.text, list(edits.values()), batch_size=work.config.batch_size)
        everyone = np.ones(len(paired.n_targets), bool)
        for k, edit in edits.items():
            effect = next(e for e in effects_of(paired, edit.name, everyone, work.config.margin) if e.metric == "nll")
            row = effect.row()
            found[k] = {name: row[name] for name in ("delta_nats", "nats_low", "nats_high", "verdict")}
        work.say("guilt", len(found), len(found) + 1)

    def meets(k: int) -> bool:
        return not float(str(found[k]["nats_low"])) > work.config.goal

    strides = [k for k in STRIDES if k < len(order)]
    run([0, *strides[:1]])
    for k in strides[1:]:
        if meets(max(found)):
            break
        run([k])
    while (most := [k for k in found if meets(k)]) and (missed := [k for k in found if not meets(k)]):
        low, high = max(missed), min(k for k in most if k > max(missed)) if max(most) > max(missed) else 0
        if high - low <= max(1, high // 8):
            break
        run([(low + high) // 2])
    return found
