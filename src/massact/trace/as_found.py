"""A model is left as it was found: its mode, its attributes, its modules and the generators of random numbers.

A forward pass may change its own model: BigBird switches to full attention for good on a short input, a rotary
embedding grows its tables, a module in training mode counts batches.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_Kept = list[tuple[MutableMapping[Any, Any], dict[Any, Any]]]


@contextmanager
def unchanged(root: nn.Module, values: bool = False) -> Iterator[None]:
    """Run a model in evaluation mode for the length of a `with`, and leave it as it was, whatever happens inside.

    What comes back: the mode of every module, its attributes, parameters, buffers, hooks and children, those of the
    configurations.

    Args:
        root: the model.
        values: also the generators, and the values of buffers and of other tensors that are no parameters, which a
            pass may write in place; for this they are copied.
    """
    kept = [(holder, dict(holder)) for holder in _holders(root)]
    modes = {module: module.training for module in root.modules()}
    copies = [(x, x.detach().clone()) for x in _own_tensors(root)] if values else []
    devices = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices, enabled=values):
        try:
            if any(modes.values()):
                root.eval()
            yield
        finally:
            _put_back(kept)
            for module, training in modes.items():
                module.training = training
            with torch.inference_mode():
                for tensor, copy in copies:
                    if not torch.equal(tensor, copy):
                        tensor.copy_(copy)


def _holders(root: nn.Module) -> Iterator[MutableMapping[Any, Any]]:
    """Every dictionary in which a module or a configuration keeps something under a name."""
    seen: set[int] = set()
    for module in root.modules():
        own = vars(module)
        yield own
        # Children, parameters, buffers, hooks, and caches of the module's own.
        yield from (held for held in own.values() if isinstance(held, MutableMapping))
        config = own.get("config")
        todo = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
        for one in todo:
            if hasattr(one, "__dict__") and id(one) not in seen:
                seen.add(id(one))
                yield vars(one)


def _put_back(kept: _Kept) -> None:
    """Give every dictionary what it held, in its order, where it holds something else now."""
    for holder, before in kept:
        same = len(holder) == len(before) and all(
            a == b and holder[a] is before[b] for a, b in zip(holder, before, strict=True)
        )
        if not same:
            holder.clear()
            holder.update(before)


def _own_tensors(root: nn.Module) -> list[Tensor]:
    """Tensors that modules hold beside their parameters: buffers, caches."""
    held = {id(b): b for b in root.buffers()}
    for module in root.modules():
        held |= {id(x): x for x in vars(module).values() if type(x) is Tensor}
    # Large integers are packed weights, which nobody writes.
    mine = [x for x in held.values() if type(x) is Tensor and not x.is_meta]
    return [x for x in mine if x.is_floating_point() or x.numel() < 1 << 20]
