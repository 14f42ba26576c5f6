"""Who reads a checkpoint whose config.json tells of changes: `training/` does, this room does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reader = Callable[[str, Any, Any, dict[str, Any]], Any]  # as `massact.models.pretrained.read_module`
READERS: list[Reader] = []


def read_changed_with(reader: Reader) -> None:
    """Say who reads a model whose config.json tells of changes (attention variants, other norms)."""
    READERS[:] = [reader]
