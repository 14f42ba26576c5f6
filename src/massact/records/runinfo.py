"""What a run was: the record that goes into run.json."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

from massact.records.answer import Answer, read_as
from massact.records.errors import UserError

SCHEMA_VERSION = 3  # 2: modality of the tokens; 3: clusters, and all criteria in one table
STATUSES = ("running", "ok", "failed", "interrupted")


@dataclass(frozen=True)
class ModelInfo:
    """Which model was measured. Dictionaries are keyed by the name of the stack ("" for a single one).

    Args:
        id: what it was loaded by; name: for people (the last part of a path); revision: of a Hub model.
        architecture: class name; model_type: family name of transformers, or None.
        n_layers, d_model, stacks (path of the list of blocks), post_norm: per stack.
        dtype: of the weights; attention: implementation in use.
        weights_sha256: over names, dtypes, shapes and bytes of all weights.
        proof: numbers of the closure proof.
        gguf: of a model from a GGUF file: its name, SHA-256, architecture, number of tensors of each type, that they
            were unpacked (dequantised), settings put right (settled), notes.
        quantised: how its weights were quantised, see `massact.records.weight_types`; None where they were not.
        vectors_sha256: over the values of norms and biases, which a model shares with its quantised forms.
        asked: what it was loaded with where that was asked for: trust_remote_code, allow_pickle.
        streams: of a stack that is what blocks read of several streams, the stacks that hold these.
        adapters: their state, see `massact.records.adapter_states`; None where the model has none.
    """

    id: str
    name: str
    revision: str | None
    architecture: str
    model_type: str | None
    n_layers: dict[str, int]
    d_model: dict[str, int]
    stacks: dict[str, str]
    post_norm: dict[str, bool]
    dtype: str
    n_parameters: int
    weights_sha256: str
    proof: dict[str, Any]
    attention: str | None = None
    gguf: dict[str, Any] | None = None
    quantised: dict[str, Any] | None = None
    vectors_sha256: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, list[str]] = field(default_factory=dict)
    adapters: dict[str, Any] | None = None


@dataclass
class RunInfo:
    """The record of a run: what was asked, of what, on what, and how it ended.

    Args:
        verb: which command made the directory ("scan").
        status: running, ok, failed or interrupted.
        config: every option as it was resolved, thresholds included.
        model, corpus: what was measured, on what; with hashes.
        criterion: name, formula, thresholds and source of the rule behind the findings.
        answer: the result in numbers, from which the words are made.
        notes: what a reader must know (unavailable statistics, skipped parts), one sentence each.
        wall_s: seconds from start to end; error: the message of a failed run.
    """

    verb: str
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    criterion: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    device: str = ""
    seed: int = 0
    status: str = "running"
    error: str | None = None
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    wall_s: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(jsonable(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "run.json") -> RunInfo:
        """Parse a run.json.

        Raises:
            UserError: not JSON, not a run, damaged, or written by a newer massact.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise UserError(
                f"{where} is not valid JSON.", str(error), "The run directory is damaged: scan again."
            ) from None
        if not isinstance(data, dict) or "schema_version" not in data or "verb" not in data:
            raise UserError(f"{where} is not the record of a massact run.", do="Give a directory that massact wrote.")
        version = data["schema_version"]
        if not isinstance(version, int) or version < 1 or version > SCHEMA_VERSION:
            raise UserError(
                f"{where} has schema version {version!r}; this massact reads 1 to {SCHEMA_VERSION}.",
                do="Install a newer massact, or scan again.",
            )
        hints, names = get_type_hints(cls), {f.name for f in fields(cls)}
        try:
            info = cls(**{k: read_as(hints[k], v) for k, v in data.items() if k in names})
            if info.answer:
                Answer.from_dict(info.answer)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is damaged.", f"{error}.", "Scan again.") from None
        return info


def jsonable(value: Any) -> Any:
    """A copy that JSON can hold: NaN and Inf become the strings "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value


def duration(seconds: float) -> str:
    """'50 s', '3 min', '2.5 h': less than one and a half of a unit is told in the smaller one."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in ("massact", "torch", "transformers", "numpy", "pandas", "pyarrow", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> dict[str, Any]:
    """Commit of the checkout that massact runs from, and whether it is modified; {} outside a checkout."""
    here = Path(__file__).resolve().parent

    def ask(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    top = ask("rev-parse", "--show-toplevel")
    if not top or not (Path(top) / "src" / "massact").is_dir():
        return {}
    return {"commit": ask("rev-parse", "HEAD"), "modified": bool(ask("status", "--porcelain", "--untracked-files=no"))}
