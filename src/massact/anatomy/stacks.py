"""Which lists of modules are stacks of blocks, and what each stack is called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

from torch import nn

from massact.records.errors import ProofError
from massact.trace.watch import Call, Watch

NO_BLOCKS = "Give the path of the list of blocks: load(model, blocks='path.to.blocks', inputs={...})."

_PART = 0.05  # of a model's parameters: less than that is no part of it that must be told
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


Listed = tuple[str, list[Call]]  # the path of a list of modules, and the calls of them in the order they ran


def find_stacks(
    watch: Watch, blocks: Iterable[str] | None, counts: set[int], without: Container[str] = ()
) -> list[Listed]:
    """The outermost lists of blocks of a watched model.

    Args:
        watch: a watched forward pass.
        blocks: paths given by the user; None to search.
        counts: numbers of layers that the configuration names; {} when unknown.
        without: paths of lists that hold no streams although their tensors have four axes.
    """
    if blocks is not None:
        lists = _lists(watch, 4) | _lists(watch)
        return [_given(watch, path, lists) for path in dict.fromkeys(blocks)]
    outer = lists_inside(watch)
    named = [(p, calls) for p, calls in outer if len(calls) in counts]
    # A tower that takes images of any size has the patches of all of them in one row. Many other modules map (rows,
    # width) tensors, so that only lists of a length that the configuration names are taken for such a tower.
    rows = [(p, calls) for p, calls in lists_inside(watch, rank=2) if len(calls) in counts]
    apart = [(p, c) for p, c in rows if not any(p == q or _below(p, q) or _below(q, p) for q, _ in outer)]
    # Of rank 4 are blocks of several streams, and images that keep rows and columns apart.
    several = [(p, c) for p, c in lists_inside(watch, rank=4) if len(c) in counts and p not in without]
    several = [(p, c) for p, c in several if not any(p == q or _below(p, q) for q, _ in named)]
    outer, named = ([(p, c) for p, c in of if not any(_below(p, q) for q, _ in several)] for of in (outer, named))
    found = [*(named or ([] if several else outer)), *apart, *several] or _of_images(watch, without)
    return sorted(found, key=lambda item: watch.calls.index(item[1][0]))


def _of_images(watch: Watch, without: Container[str]) -> list[Listed]:
    """The innermost lists on (batch, width, rows, columns) whose children read patches as tokens: no convolutions."""
    lists = {
        path: calls
        for path, calls in _lists(watch, 4).items()
        if path not in without and any(_reads_tokens(watch, call) for call in calls)
    }
    return [(p, calls) for p, calls in lists.items() if not any(_below(q, p) for q in lists)]


def _reads_tokens(watch: Watch, call: Call) -> bool:
    """Whether a module inside takes (batch, rows x columns, width) of what the call takes."""
    tokens = {
        (b, rows * columns, width) for b, width, rows, columns in (s.shape for s in call.inputs if len(s.shape) == 4)
    }
    return any(s.shape in tokens for inner in watch.calls if inner.inside(call) for s in inner.inputs)


def unnamed_lists(watch: Watch, chosen: Iterable[Listed]) -> list[str]:
    """A sentence for each list that is no stack, since the configuration names others, and holds a part of a model."""
    taken = [path for path, _ in chosen]
    total = sum(p.numel() for p in watch.root.parameters())
    found = []
    for path, calls in lists_inside(watch):
        size = sum(p.numel() for p in watch.root.get_submodule(path).parameters())
        if size < _PART * total or any(path == t or _below(path, t) or _below(t, path) for t in taken):
            continue
        found.append(
            f"{path} was left out. It runs {len(calls)} modules on (batch, tokens, width) tensors, and the "
            f"configuration names no list of that length. To have it read as well, give blocks={[*taken, path]!r}."
        )
    return found


def _below(path: str, above: str) -> bool:
    return path != above and (not above or path.startswith(above + "."))


def _lists(watch: Watch, rank: int = 3) -> dict[str, list[Call]]:
    lists: dict[str, list[Call]] = defaultdict(list)
    for call in watch.calls:
        if call.name and _maps_stream(call, rank):
            lists[call.name.rpartition(".")[0]].append(call)
    return lists


def lists_inside(watch: Watch, path: str | None = None, rank: int = 3) -> list[Listed]:
    """The outermost lists below a path whose children take and give a residual stream, in the order they ran.

    Args:
        rank: of its tensors: 3 for (batch, tokens, width), 2 for (tokens of all images, width).
    """
    containers = {name for name, m in watch.root.named_modules() if isinstance(m, _LISTS)}
    found = {
        p: calls
        for p, calls in _lists(watch, rank).items()
        if p in containers and _one_after_another(calls) and (path is None or _below(p, path))
    }
    outer = {p: calls for p, calls in found.items() if not any(_below(p, q) for q in found)}
    return sorted(outer.items(), key=lambda item: watch.calls.index(item[1][0]))


def is_of_several(calls: list[Call]) -> bool:
    """Whether blocks hand on several streams at once: tensors of four axes, and none of three."""
    return not any(_maps_stream(call, 3) or _maps_stream(call, 2) for call in calls)


def _maps_stream(call: Call, rank: int) -> bool:
    shapes = [s.shape for s in call.inputs if len(s.shape) == rank]
    # A module without children cannot be a block: every write is the output of a module inside it.
    made = any(True for _ in call.module.children()) and any(True for _ in call.module.parameters())
    return made and any(s.shape in shapes for s in call.outputs)


def _one_after_another(calls: list[Call]) -> bool:
    return all(not a.inside(b) and not b.inside(a) for a, b in zip(calls, calls[1:], strict=False))


def _given(watch: Watch, path: str, lists: dict[str, list[Call]]) -> tuple[str, list[Call]]:
    names = dict(watch.root.named_modules())
    if path not in names:
        raise ProofError(
            f"The model has no module {path!r}.",
            do="Module lists in it: " + ", ".join(n for n, m in names.items() if isinstance(m, _LISTS)) + ".",
        )
    if not lists.get(path):
        raise ProofError(
            f"No child of {path!r} that is made of modules takes and gives a (batch, tokens, width) tensor.",
            do=NO_BLOCKS,
        )
    return path, lists[path]


def no_stack(watch: Watch) -> ProofError:
    """The refusal of a model without a stack, with what there is in its place."""
    lists = {n: m for n, m in watch.root.named_modules() if isinstance(m, _LISTS) and any(True for _ in m.parameters())}
    called = {call.name for call in watch.calls}
    why = ["No module list in it runs children that take and give a (batch, tokens, width) tensor."]
    for name, module in lists.items():
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        if isinstance(module, nn.ModuleList) and not any(c in called or c in lists for c in children):
            why.append(f"The children of {name!r} are never called as modules (compiled, traced, or by `.forward`?).")
    shapes = {
        call.name.rpartition(".")[0]: s.shape
        for call in watch.calls
        for s in call.inputs[:1]
        if call.name.rpartition(".")[0] in lists
        and len(s.shape) in (2, 4)
        and s.shape in [o.shape for o in call.outputs]
        if any(True for _ in call.module.children())
    }
    why += [f"The children of {name!r} take and give {tuple(shape)} tensors." for name, shape in shapes.items()]
    return ProofError(
        f"No stack of transformer blocks was found in {type(watch.root).__name__}.", " ".join(why[:4]), NO_BLOCKS
    )


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
