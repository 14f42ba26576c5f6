"""Registries: what lies in a folder of ours, one file each, and what entry points of other packages name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from massact.records.errors import UserError


def modules_in(package: ModuleType) -> dict[str, ModuleType]:
    """Name -> module, of the files and folders of a package."""
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def extensions(group: str, kind: type, ours: Mapping[str, Any], called: str = "name") -> dict[str, Any]:
    """Ours by name, and behind them what installed packages name.

    Args:
        group: of entry points, `NAME = "package.module:object"`.
        kind: what each must be, or a subclass of.
        called: the attribute that is its name.

    Raises:
        UserError: one is of another kind, or called like another.
    """
    known = dict(ours)
    for entry in entry_points(group=group):
        found = entry.load()
        fits = issubclass(found, kind) if isinstance(found, type) else isinstance(found, kind)
        if not fits or known.get(getattr(found, called), found) is not found:
            raise UserError(
                f"{entry.value} is no {kind.__name__}, or is called like another one.",
                f"An installed package names it as one (entry point {group}).",
            )
        known[getattr(found, called)] = found
    return known
