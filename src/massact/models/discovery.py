"""Find the anatomy of a model nobody has seen before, by watching one short forward pass.

`stacks` says which lists hold blocks, `blocks` reads each of them, `roles` checks by experiment which
writes carry something from token to token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from massact.models.blocks import read_block
from massact.models.stacks import NO_BLOCKS, find_stacks, layer_counts, stack_names
from massact.records.anatomy import Anatomy, Block, Place, Stack
from massact.records.errors import ProofError
from massact.trace.watch import Call, Watch


def discover(model: nn.Module, inputs: dict[str, Any], blocks: Iterable[str] | None = None) -> Anatomy:
    """Find the stacks, blocks and sites of a model by watching it run once.

    Args:
        model: the module, in evaluation mode.
        inputs: keyword arguments for one short forward pass.
        blocks: dotted paths of the lists of blocks; None to search.

    Raises:
        ProofError: no stack of blocks is found, or a block cannot be read.
    """
    watch = Watch(model)
    with watch.watching():
        model(**inputs)
    counts = layer_counts(getattr(model, "config", None))
    candidates = find_stacks(watch, blocks, counts)
    params = {id(p): name for name, p in model.named_parameters()}
    stacks: list[tuple[str, list[Block], int]] = []
    refused: list[ProofError] = []
    for path, calls in candidates:
        try:
            read = [read_block(watch, call, i + 1, params) for i, call in enumerate(calls)]
        except ProofError as error:
            # A list of the length that the configuration names is a stack: not reading it is a refusal.
            if blocks is not None or len(calls) in counts:
                raise
            refused.append(error)
            continue
        stacks.append((path, read, _width(watch, calls[0])))
    if not stacks:
        if refused:
            raise refused[0]
        raise ProofError(
            f"No stack of transformer blocks was found in {type(model).__name__}.",
            "No module list in it runs children that take and give a (batch, tokens, width) tensor.",
            NO_BLOCKS,
        )
    names = stack_names([path for path, _, _ in stacks])
    return Anatomy(
        tuple(Stack(n, path, tuple(read), width) for n, (path, read, width) in zip(names, stacks, strict=True)),
        _logits_place(watch),
    )


def _width(watch: Watch, call: Call) -> int:
    return next(s.shape[-1] for s in call.inputs if len(s.shape) == 3)


def _logits_place(watch: Watch) -> Place | None:
    head = getattr(watch.root, "get_output_embeddings", lambda: None)()
    top = watch.calls[0]
    if head is None:
        return None
    return next((Place("", "out", s.path) for s in top.outputs if s.path and s.path[-1] == "logits"), None)
