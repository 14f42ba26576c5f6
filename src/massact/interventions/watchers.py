"""Watchers: what else is to be seen of the passes of a paired evaluation."""

from __future__ import annotations

from typing import Protocol

from massact.models import Model
from massact.trace import Measurements, Probe


class Watcher(Protocol):
    """What looks at the passes of `evaluate` as well: of every batch first at the one without an edit."""

    def probes(self, model: Model, edit: str | None) -> list[Probe]:
        """What to look at in a pass, without an edit (None) or under the one of a name."""
        ...

    def take(self, edit: str | None, seen: Measurements) -> None:
        """What was seen of it."""
        ...


class Whole:
    """A watcher that sees nothing: every pass is run from the first block, as for any watcher."""

    def probes(self, model: Model, edit: str | None) -> list[Probe]:
        """None."""
        return []

    def take(self, edit: str | None, seen: Measurements) -> None:
        """Nothing."""
