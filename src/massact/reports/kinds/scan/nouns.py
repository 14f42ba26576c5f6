"""What the inputs of a run are called: a prompt has tokens, an image patches, a recording frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Nouns:
    """What one sequence and one position are called."""

    sequence: str = "prompt"
    position: str = "token"

    def the(self) -> str:
        """What is looked at closely: 'the prompt', 'the first image'."""
        return "the prompt" if self.sequence == "prompt" else f"the first {self.sequence}"

    def plural(self) -> str:
        """Of positions."""
        return f"{self.position}{'es' if self.position.endswith('ch') else 's'}"

    def title(self) -> str:
        """Of a position, over an axis."""
        return self.position.capitalize()


OF_SOURCES = {"images": Nouns("image", "patch"), "recordings": Nouns("recording", "frame"),
              "pairs": Nouns("sequence", "position")}  # fmt: skip
OF_NAMES = {"patch (": "images", "frame ": "recordings"}


def nouns_of(corpus: Mapping[str, Any] | None, tokens: Iterable[Any] = ()) -> Nouns:
    """The nouns of a corpus.

    Args:
        corpus: its record in a run.
        tokens: names of positions of one sequence, which tell where the record does not say what was read.
    """
    record = corpus or {}
    source = record.get("source")
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind not in OF_SOURCES and record.get("kind") == "tensors":
        names = [str(token) for token in tokens]
        kind = next((of for start, of in OF_NAMES.items() if any(name.startswith(start) for name in names)), None)
        return OF_SOURCES.get(str(kind), Nouns("sequence", "position"))
    return OF_SOURCES.get(str(kind), Nouns())
