"""How a result shows itself in a notebook and at a prompt: `reports/` writes the HTML, this room does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pandas as pd

WRITERS: list[Callable[[Any], str]] = []


def shown_by(writer: Callable[[Any], str]) -> None:
    """Say who writes the HTML of a result."""
    WRITERS[:] = [writer]


class ShownInNotebooks:
    """A result that a notebook shows as words and the first rows of its main table, a prompt by its tables."""

    def __repr__(self) -> str:
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        rows = [f"{name}: {len(t):,} rows" for name, t in held.items() if isinstance(t, pd.DataFrame) and len(t)]
        return f"{type(self).__name__}({', '.join(rows)})"

    def _repr_html_(self) -> str:
        return WRITERS[0](self)
