"""Which lists of modules are stacks of blocks, and what each stack is called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from massact.records.errors import ProofError
from massact.trace.watch import Call, Watch

NO_BLOCKS = "Give the path of the list of blocks: load(model, blocks='path.to.blocks', inputs={...})."


def find_stacks(watch: Watch, blocks: Iterable[str] | None, counts: set[int]) -> list[tuple[str, list[Call]]]:
    """The lists of blocks of a watched model, outermost first, each with its calls in the order they ran.

    Args:
        watch: a watched forward pass.
        blocks: paths given by the user; None to search.
        counts: numbers of layers that the configuration names; {} when unknown.
    """
    lists: dict[str, list[Call]] = defaultdict(list)
    for call in watch.calls:
        parent = call.name.rpartition(".")[0]
        if call.name and _maps_stream(call):
            lists[parent].append(call)
    if blocks is not None:
        return [_given(watch, path, lists) for path in blocks]
    containers = {name for name, m in watch.root.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    found = {
        p: calls
        for p, calls in lists.items()
        if p in containers and _one_after_another(calls) and any(c.module.parameters() for c in calls)
    }
    outer = {p: calls for p, calls in found.items() if not any(p.startswith(q + ".") for q in found if q != p)}
    if counts:
        outer = {p: calls for p, calls in outer.items() if len(calls) in counts} or outer
    return sorted(outer.items(), key=lambda item: watch.calls.index(item[1][0]))


def _maps_stream(call: Call) -> bool:
    shapes = [s.shape for s in call.inputs if len(s.shape) == 3]
    return any(s.shape in shapes for s in call.outputs) and any(True for _ in call.module.parameters())


def _one_after_another(calls: list[Call]) -> bool:
    return all(not a.inside(b) and not b.inside(a) for a, b in zip(calls, calls[1:], strict=False))


def _given(watch: Watch, path: str, lists: dict[str, list[Call]]) -> tuple[str, list[Call]]:
    names = dict(watch.root.named_modules())
    if path not in names:
        raise ProofError(
            f"The model has no module {path!r}.",
            do="Module lists in it: "
            + ", ".join(n for n, m in names.items() if isinstance(m, (nn.ModuleList, nn.Sequential)))
            + ".",
        )
    if not lists.get(path):
        raise ProofError(f"No child of {path!r} takes and gives a (batch, tokens, width) tensor.", do=NO_BLOCKS)
    return path, lists[path]


def stack_names(paths: list[str]) -> list[str]:
    """The shortest word of each path that tells the stacks apart; "" for a single stack."""
    if len(paths) == 1:
        return [""]
    parts = [p.split(".") for p in paths]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    names = [p[shared] if shared < len(p) else p[-1] for p in parts]
    return names if len(set(names)) == len(names) else paths


def layer_counts(config: Any) -> set[int]:
    """Every number of layers that a configuration (and its sub-configurations) names."""
    words = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
             "num_decoder_layers", "decoder_num_hidden_layers", "depth")  # fmt: skip
    counts: set[int] = set()
    for holder in (config, *(getattr(config, k, None) for k in getattr(config, "sub_configs", {}))):
        counts |= {v for w in words if isinstance(v := getattr(holder, w, None), int)}
    return counts
