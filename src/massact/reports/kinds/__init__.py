"""How each kind of result is read: its words, its sections, its figures; one file or one package a kind.

An entry point `KIND = "package.module:READING"` of the group `massact.readings` names the `Reading` of a kind of
another package; without one its notes and its tables are shown.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points

from massact.records.errors import UserError
from massact.records.extensions import modules_in
from massact.reports.kinds import foreign
from massact.reports.readings import Reading
from massact.reports.vocabulary import spoken

# Each file (or folder) is called as the kind that it reads; what `foreign` reads is a kind of another package.
READINGS: dict[str, Reading] = {
    name: spoken(module.READING) for name, module in modules_in(sys.modules[__name__]).items() if module is not foreign
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
