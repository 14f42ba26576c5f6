"""How each kind of result is read: its words, its sections, its figures; one file or one package a kind.

An entry point `KIND = "package.module:READING"` of the group `massact.readings` names the `Reading` of a kind of
another package; without one its notes and its tables are shown.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points

from massact.records.errors import UserError
from massact.reports.kinds import (
    classics,
    comparison,
    explanation,
    foreign,
    intervention,
    lab,
    reproduction,
    scan,
    training,
    trajectory,
)
from massact.reports.readings import Reading

READINGS: dict[str, Reading] = {
    "scan": scan.READING,
    "explanation": explanation.READING,
    "intervention": intervention.READING,
    "classics": classics.READING,
    "reproduction": reproduction.READING,
    "training": training.READING,
    "trajectory": trajectory.READING,
    "lab": lab.READING,
    "comparison": comparison.READING,
}


def reading_of(kind: str) -> Reading:
    """How a kind is read: ours, one that another package names, or by its notes and tables.

    Raises:
        UserError: what another package names is no `Reading`.
    """
    if kind in READINGS:
        return READINGS[kind]
    for entry in entry_points(group="massact.readings", name=kind):
        found = entry.load()
        if not isinstance(found, Reading):
            raise UserError(
                f"{entry.value} is no reading of a kind of result.",
                "An installed package names it as one (entry point massact.readings).",
            )
        return found if found.sections else replace(found, sections=(partial(foreign.section, tell=found.words),))
    return foreign.READING
