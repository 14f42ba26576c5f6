"""What other packages add: objects that their entry points name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from massact.records.errors import UserError


def extensions(group: str, kind: type, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Ours by name, and behind them what installed packages name, by its own `name`.

    Args:
        group: of entry points, `NAME = "package.module:object"`.
        kind: what each must be.

    Raises:
        UserError: one is of another kind, or called like another.
    """
    known = dict(ours)
    for entry in entry_points(group=group):
        found = entry.load()
        if not isinstance(found, kind) or known.get(found.name, found) is not found:
            raise UserError(
                f"{entry.value} is no {kind.__name__}, or is called like another one.",
                f"An installed package names it as one (entry point {group}).",
            )
        known[found.name] = found
    return known
