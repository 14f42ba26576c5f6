"""How the weights of a model are quantised, as a run records it, and in words.

A record has the keys `method` (gguf, compressed-tensors, torchao, ...), `weights`, `activations` (lists of schemes,
each with type, bits, strategy, group_size, symmetric, dynamic and n_modules; None: whether these are is not known),
`kv_cache` (a scheme, or None), `ignored` (names of linear maps in full precision), `types` (tensors of each type),
`dequantised` (unpacked before anything ran).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = {"F64", "F32", "F16", "BF16"}  # types of GGUF that are not quantised
_EACH = {"tensor": "one scale a tensor", "channel": "one scale an output channel", "token": "one scale a token",
         "attn_head": "one scale a head"}  # fmt: skip
_NAMED = 4


def of_gguf(gguf: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The record of a model from a GGUF file, in the shape of all others; None where no tensor of it was quantised.

    Args:
        gguf: what a run keeps of the file, see `ModelInfo`.
    """
    types = gguf.get("types") if gguf is not None else None
    if not isinstance(types, Mapping) or not set(types) - PLAIN:
        return None
    return {"method": "gguf", "weights": [], "activations": [], "kv_cache": None, "ignored": [],
            "types": dict(types), "dequantised": True}  # fmt: skip


def packing_of(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights of a model were quantised, from what a run records of it; None where they were not."""
    found = model.get("quantised")
    if isinstance(found, Mapping):
        return dict(found)
    gguf = model.get("gguf")
    return of_gguf(gguf if isinstance(gguf, Mapping) else None)


def scheme_in_words(scheme: Mapping[str, Any]) -> str:
    """int8, one scale an output channel."""
    strategy, size = scheme.get("strategy"), scheme.get("group_size")
    each = f"one scale for {size} values in a row" if size else _EACH.get(str(strategy), str(strategy))
    kind = f"{scheme.get('type')}{scheme.get('bits')}"
    return kind if strategy is None else f"{kind}, {each}"


def packing_in_words(packing: Mapping[str, Any] | None) -> list[str]:
    """What is quantised in a model, how, and whether its activations are as well: a sentence each."""
    if packing is None or packing.get("method") == "gguf":
        return []  # its types are told with the file
    weights, ignored = _schemes(packing.get("weights")), list(packing.get("ignored") or ())
    others = listed_few(ignored)
    said = [f"The weights were quantised by {packing.get('method')}: {weights or 'how is not known'}"
            + (f"; in full precision {len(ignored):,} ({others})" if ignored else "") + "."]  # fmt: skip
    active = _schemes(packing.get("activations"), "fixed beforehand")
    if active:
        said.append(
            f"As it runs the inputs of linear maps are quantised too ({active}): measured is the quantised model."
        )
    elif weights and packing.get("activations", ()) is None:
        said.append("Whether its activations are quantised as it runs is not known.")
    elif weights:
        said.append("Its activations are not quantised: measured is what the quantised weights do.")
    if isinstance(packing.get("kv_cache"), Mapping):
        said.append(
            f"Keys and values are quantised before attention ({_scheme(packing['kv_cache'], 'fixed beforehand')})."
        )
    return said


def listed_few(names: list[Any]) -> str:
    """The first names of many."""
    return ", ".join(map(str, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def _schemes(schemes: Any, fixed: str = "") -> str:
    found = [(s.get("n_modules"), _scheme(s, fixed)) for s in schemes or () if isinstance(s, Mapping)]
    return "; ".join(f"{n:,} linear maps in {said}" if isinstance(n, int) else said for n, said in found)


def _scheme(scheme: Mapping[str, Any], fixed: str = "") -> str:
    when = "of each pass" if scheme.get("dynamic") else fixed
    return scheme_in_words(scheme) + (f", {when}" if when else "")
