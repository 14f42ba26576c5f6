"""The answer of a scan in numbers; `reports` puts it into words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peak:
    """One activation: where it is and how large."""

    layer: int
    pos: int
    dim: int
    value: float
    magnitude: float
    median: float
    ratio: float
    token: str
    sequence: int
    position_class: str


@dataclass(frozen=True)
class StackAnswer:
    """What a scan says about one stack of blocks.

    Args:
        stack, site: what was looked at.
        n_layers: L.
        n_findings: activations that pass the criterion, over all sequences and layers.
        layers: the layers that have any, ascending.
        onset, offset: first and last layer with findings; None without findings.
        onset_module: dotted path of the onset block.
        onset_jump: max|h| after the onset block / max|h| before it; None at layer 0.
        dims: dims of the findings, most frequent first, with their share of all findings.
        tokens: (token, position_class, count), most frequent first, at the peak layer.
        group: "start", "start and first delimiter", "start, delimiters and others",
            "start and others", "not at the start", "none".
        per_sequence: findings per sequence at the peak layer, mean.
        peak: the largest finding, or None.
        spread: std / |mean| of the most frequent coordinate at the peak layer.
        largest: the activation with the largest ratio, whether it passes or not.
        largest_magnitude: the activation with the largest |h|.
        headroom: {"fp16": (smallest headroom, layer), "bf16": ..., "fp8_e4m3": ...}.
        nonfinite: count of NaN and Inf in all layers.
    """

    stack: str
    site: str
    n_layers: int
    n_findings: int
    layers: list[int]
    onset: int | None
    offset: int | None
    onset_module: str | None
    onset_jump: float | None
    dims: list[tuple[int, float]]
    tokens: list[tuple[str, str, int]]
    group: str
    per_sequence: float
    peak: Peak | None
    spread: float | None
    largest: Peak | None
    largest_magnitude: Peak | None
    headroom: dict[str, tuple[float, int]]
    nonfinite: int


@dataclass(frozen=True)
class Answer:
    """The answer of a scan.

    Args:
        found: whether anything passes the criterion.
        stacks: one answer for each stack.
        null: the same for a random-init twin: {"n_findings", "largest_ratio", "largest_magnitude"}, or
            {"unavailable": reason}.
        bos: with and without BOS, each {"n_findings", "onset", "dims", "classes", "largest_ratio"}, or
            {"unavailable": reason}.
    """

    found: bool
    stacks: list[StackAnswer]
    null: dict[str, Any] = field(default_factory=dict)
    bos: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answer:
        def peak(value: dict[str, Any] | None) -> Peak | None:
            return Peak(**{k: v if k in _WORDS else _number(v) for k, v in value.items()}) if value else None

        def numbers(value: Any) -> Any:
            """Words that JSON has for NaN and Inf back into numbers."""
            if isinstance(value, dict):
                return {k: numbers(v) for k, v in value.items()}
            return [numbers(v) for v in value] if isinstance(value, list) else _number(value)

        stacks = [
            StackAnswer(
                **{
                    **{k: v if k in _WORDS else numbers(v) for k, v in s.items()},
                    "peak": peak(s["peak"]),
                    "largest": peak(s["largest"]),
                    "largest_magnitude": peak(s["largest_magnitude"]),
                }
            )
            for s in data["stacks"]
        ]
        return cls(data["found"], stacks, data.get("null", {}), data.get("bos", {}))


def _number(value: Any) -> Any:
    """NaN and Inf are words in JSON."""
    return float(value) if value in ("nan", "inf", "-inf") else value


# Fields that hold text: a token may well be the word "nan".
_WORDS = ("stack", "site", "token", "tokens", "position_class", "group", "onset_module")
