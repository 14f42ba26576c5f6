"""The experiments of the founding paper on one model, and how they compare with what was published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

AGREES, DIFFERS, UNPUBLISHED = "agrees", "differs", "no published value"
NOTHING, NOT_APPLICABLE, NOT_RUN, FAILED = "nothing to show", "not applicable", "not run", "failed"
VERDICTS = (AGREES, DIFFERS, UNPUBLISHED, NOTHING, NOT_APPLICABLE, NOT_RUN, FAILED)
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told"
CLAIM_VERDICTS = (HOLDS, FAILS, UNTOLD)
BEYOND = "beyond the paper"  # in place of a section of it
NOT_RECORDED = "not recorded"  # of a record that is older than claims

TABLES: dict[str, Columns] = {
    "reproduced": {
        "experiment": ("string", "E1 to E25, or X1, X2, ... beyond the paper; see reproduce.md"),
        "quantity": ("string", "what was measured; empty where an experiment has no number, for which see reason"),
        "stack": ("string", "name of the stack; empty for a model with one"),
        "layer": ("int64", "layer; -1 where it is not about one"),
        "place": ("string", "where: a dim, a class of positions, a prompt, a text, a register"),
        "unit": ("string", "of the number"),
        "ours": ("float64", "what was found here; NaN where there is no number, never zero for it"),
        "ours_text": ("string", "what was found here, where it is a list or a word"),
        "published": ("float64", "what was published of this model; NaN where nothing was"),
        "published_text": ("string", "the same, where it is a list, a word or a bound"),
        "tag": ("string", "how the published value is known: confirmed, replicated (by others), memory or derived"),
        "source": ("string", "where it was published"),
        "tolerance": ("float64", "relative difference that still agrees (of a published zero: absolute)"),
        "verdict": ("string", f"{', '.join(VERDICTS[:-1])} or {FAILED}"),
        "reason": ("string", "why there is nothing, what would run it, or what makes the comparison uncertain"),
        "headline": ("bool", "whether the line of the experiment says it"),
    },
    "claims": {
        "experiment": ("string", "as in reproduced"),
        "part": ("string", "what was tested of its claim; empty where nothing could be, for which see reason"),
        "stack": ("string", "name of the stack; empty for a model with one"),
        "value": ("float64", "what was found; NaN where there is no number"),
        "low": ("float64", "its 95 % interval over the sequences; as the value where it is a count of all of them"),
        "high": ("float64", "its upper end"),
        "n": ("int64", "how many it is over"),
        "of": ("string", "of what: sequences, prompts, images, questions, trainings"),
        "unit": ("string", "of the number"),
        "bound": ("string", "what it has to keep for the claim to hold"),
        "n_needed": ("float64", "how many would settle it, were they like these; inf: no number would; NaN: unknown"),
        "verdict": ("string", f"{HOLDS}, {FAILS} or {UNTOLD}"),
        "reason": ("string", "why it cannot be told"),
    },
}


@dataclass
class ReproduceInfo(Sidecar):
    """The record of a reproduction: reproduce.json.

    Args:
        published: {"name", "by"}: as which model published values count, and why; or {"unavailable": reason}.
        steps: name of the step -> {"state": done, kept, not run, not applicable, nothing to show or failed, "why",
            "wall_s"}.
        experiments: E1 to E25, X1, ... -> {"title", "section" (or "beyond the paper"), "says" (the paper, or what is
            expected, one sentence), "computation", "verdict", "reason", "figures" (files below the run), "claim" (its
            verdict), "claim_reason", "fails_if"}.
    """

    published: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema_version: int = 2  # 2: verdicts on claims

    def having(self, state: str) -> list[str]:
        """Names of the steps in a state."""
        return [name for name, step in self.steps.items() if step.get("state") == state]


@dataclass(repr=False)
class Reproduction(Result):
    """The experiments of the paper on one model.

    Args:
        info: what was asked, which steps there were, and the verdict of every experiment.
        reproduced: one row for each quantity, see `TABLES`.
        claims: one row for each part of the claim of each experiment; none in a record that is older than claims.
    """

    KIND: ClassVar[str] = "reproduction"
    VERB: ClassVar[str] = "reproduce"
    FILE: ClassVar[str] = "reproduce.json"
    INFO: ClassVar[type[Any]] = ReproduceInfo
    TABLES: ClassVar = TABLES
    SOME: ClassVar[frozenset[str]] = frozenset({"claims"})
    AGAIN: ClassVar[str] = "Run it again: massact reproduce."
    PLACE: ClassVar[int] = 4

    info: ReproduceInfo
    reproduced: pd.DataFrame = table("reproduced")
    claims: pd.DataFrame = table("claims")
