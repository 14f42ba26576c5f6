"""How a result shows itself in a notebook: `reports/` writes it, this room does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WRITERS: list[Callable[[Any], str]] = []


def shown_by(writer: Callable[[Any], str]) -> None:
    """Say who writes the HTML of a result."""
    WRITERS[:] = [writer]


class ShownInNotebooks:
    """A result that a notebook shows as words and the first rows of its main table."""

    def _repr_html_(self) -> str:
        return WRITERS[0](self)
