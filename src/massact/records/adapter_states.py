"""The state of adapters (LoRA and its kin) as a run records it, and in words.

A record has `states` (each with active, disabled, merged, scaling and n_modules, the most frequent first), `types`
(adapted modules of each class), and `base`, the model that an adapter folder names, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(adapters: Mapping[str, Any] | None) -> list[str]:
    """What adapters a model has, and in which state it was measured: a sentence each."""
    if not isinstance(adapters, Mapping):
        return []
    types = ", ".join(f"{n:,} x {name}" for name, n in dict(adapters.get("types") or {}).items())
    base = f" of {adapters['base']}" if adapters.get("base") else ""
    states = [f"{state_in_words(s)} in {s.get('n_modules'):,} modules" for s in adapters.get("states") or ()
              if isinstance(s, Mapping) and isinstance(s.get("n_modules"), int)]  # fmt: skip
    return [f"Measured is the model{base} with its adapters ({types}): {'; '.join(states)}."]


def state_in_words(state: Mapping[str, Any]) -> str:
    """default (scale 2) active."""
    merged, active = list(state.get("merged") or ()), list(state.get("active") or ())
    scaling = dict(state.get("scaling") or {})
    if merged:
        return f"{_named(merged, scaling)} merged into the weights"
    if state.get("disabled") or not active:
        return "none active"
    return f"{_named(active, scaling)} active"


def _named(names: list[Any], scaling: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} (scale {scaling[n]:.4g})" if isinstance(scaling.get(n), int | float) else str(n)
                     for n in names)  # fmt: skip


def difference(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str:
    """In what two states differ, in words; "" where they are the same."""
    mine, others = ([state_in_words(s) for s in (a or {}).get("states") or ()] for a in (ours, theirs))
    if ours == theirs or mine == others:
        return ""
    told = [" and ".join(dict.fromkeys(words)) or "none" for words in (mine, others)]
    return f"Adapters now: {told[0]}; in the scan: {told[1]}."
