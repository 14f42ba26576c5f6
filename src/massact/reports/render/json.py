"""A result as JSON: what `--json` prints."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd


def to_json(result: Any) -> str:
    """What `--json` prints: `result.as_dict()`; NaN and Inf are strings, and all is ASCII for any pipe."""
    return json.dumps(result.as_dict(), indent=2, allow_nan=False, default=_missing)


def _missing(value: Any) -> None:
    """Pandas' missing value is null; anything else that JSON lacks is a mistake of ours."""
    if value is pd.NA or value is pd.NaT:
        return None
    raise TypeError(f"{type(value).__name__} in a result cannot be JSON")
