"""The answer of a scan in numbers; `reports` puts it into words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 says too little of itself


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
        onset, offset: of its largest cluster; None without findings.
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
        modalities: (modality, count) of the findings at the peak layer, most frequent first; [] for a stack that
            reads only one modality.
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
    modalities: list[tuple[str, int]] = field(default_factory=list)

    @property
    def shown_layer(self) -> int:
        """The layer of the largest finding, else of the largest ratio: the one that figures and tables show."""
        best = self.peak if self.peak is not None and self.peak.layer >= 0 else self.largest
        return best.layer if best is not None else self.n_layers


@dataclass(frozen=True)
class Answer:
    """The answer of a scan.

    Args:
        found: whether anything passes the criterion.
        stacks: one answer for each stack.
        null: the same for a random-init twin: {"n_findings", "largest_ratio", "largest_magnitude"}, or
            {"unavailable": reason}.
        bos: with and without BOS, each {"n_findings", "onset", "dims", "classes", "largest_ratio"}, or
            {"unavailable": reason}. Both say what they read: the first `n_tokens` (None: all) of `n_sequences`.
    """

    found: bool
    stacks: list[StackAnswer]
    null: dict[str, Any] = field(default_factory=dict)
    bos: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answer:
        """The answer that `as_dict` came from, read from JSON.

        Raises:
            ValueError: something is missing, or not of its kind.
        """
        answer = read_as(cls, {"null": {}, "bos": {}} | data)
        read_as(Short, answer.null)
        read_as(Short if "unavailable" in answer.bos else dict[str, Short], answer.bos)
        return answer


class Short(TypedDict, total=False):
    """What a control says; see `Answer`."""

    unavailable: str
    n_findings: int
    onset: int | None
    dims: list[int]
    classes: dict[str, int]
    largest_ratio: float
    largest_magnitude: float
    n_sequences: int
    n_tokens: int | None


_adapter = cache(TypeAdapter)  # making one costs 10 ms, and a run is opened with a dozen kinds


def read_as(kind: Any, value: Any) -> Any:
    """What JSON holds as an annotated type; NaN and Inf are the words "nan", "inf" and "-inf" there.

    What a record has beyond its fields is left out: a newer massact may have written it.

    Raises:
        ValueError: it is not of that type.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or getattr(kind, "__name__", str(kind))
        raise ValueError(f"{where}: {first['msg']}") from None
