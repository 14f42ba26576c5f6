"""What the classic outlier works find on one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from massact.records.kinds.intervention import TABLES as EFFECTS
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

TABLES: dict[str, Columns] = {
    "classics": {
        "classic": ("string", "name of the entry"),
        "stack": ("string", "name of the stack; empty where there is one, or for the whole model"),
        "site": ("string", "point where it was measured"),
        "layer": ("int64", "layer; -1 for all of them"),
        "head": ("int64", "0-based; -1 where it is not about a head"),
        "dim": ("int64", "coordinate; -1 where it is not about one"),
        "subject": ("string", "what else it is about: a class of tokens, a parameter, a part of the text"),
        "metric": ("string", "what was measured, see the entry"),
        "value": ("float64", "its value; NaN where it is unavailable"),
        "n": ("int64", "how many sequences, tokens or pairs it is over"),
    },
}
TABLES["classic_effects"] = {"classic": ("string", "name of the entry"), **EFFECTS["effects"]}


@dataclass
class ClassicsInfo(Sidecar):
    """The record of the classics: classics.json.

    Args:
        outcomes: name of the entry -> its numbers by name, or {"unavailable": reason}.
        sources: name of the entry -> the work it is from.
    """

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    schema_version: int = 3  # 2: number of targets of its effects; 3: their nats and verdicts


@dataclass(repr=False)
class Classics(Result):
    """What the works that the paper grew from find on one model.

    Args:
        info: what was asked, and the outcome of every entry.
        classics: what was measured, see `TABLES`.
        classic_effects: what the entries' edits did.
    """

    KIND: ClassVar[str] = "classics"
    VERB: ClassVar[str] = "classics"
    FILE: ClassVar[str] = "classics.json"
    INFO: ClassVar[type[Any]] = ClassicsInfo
    TABLES: ClassVar = TABLES
    AGAIN: ClassVar[str] = "Run them again."
    PLACE: ClassVar[int] = 3

    info: ClassicsInfo
    classics: pd.DataFrame = table("classics")
    classic_effects: pd.DataFrame = table("classic_effects")
