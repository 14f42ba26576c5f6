"""A model is left as it was found: its mode, its attributes, its modules and the generators of random numbers.

A forward pass may change its own model: BigBird switches to full attention for good on a short input, a rotary
embedding grows its tables, a module in training mode counts batches, RWKV divides its weights in evaluation mode and
notes that it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from massact.trace.compilation import is_compiled


@contextmanager
def unchanged(root: nn.Module, values: bool = False) -> Iterator[None]:
    """Run a model in evaluation mode for the length of a `with`, and leave it as it was, whatever happens inside.

    What torch.compile runs is run as it was written (`massact.trace.compilation`). What comes back: the mode of every
    module, its attributes, parameters, buffers, hooks and children, those of the configurations. A model that writes
    its own parameters in a pass keeps what it noted with them: the two belong together, and as long as its note stands
    it does not write them again.

    Args:
        root: the model.
        values: also the generators, and the values of buffers and of other tensors that are no parameters, which a
            pass may write in place; for this they are copied.
    """
    kept = _Kept(root)
    copies = [(x, x.detach().clone()) for x in _own_tensors(root)] if values else []
    devices = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"}) if values else []
    # torch's encoder layers have a fused path for inference, which hooks turn off where they sit and a function mode
    # turns off everywhere: without it every pass rounds alike, whatever is watched.
    fast = torch.backends.mha.get_fastpath_enabled()
    as_written = torch.compiler.set_stance("force_eager") if kept.compiled else nullcontext()
    with torch.random.fork_rng(devices=devices, enabled=values), as_written:
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if kept.training:
                root.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            kept.put_back()
            with torch.inference_mode():
                for tensor, copy in copies:
                    if not torch.equal(tensor, copy):
                        tensor.copy_(copy)


class _Kept:
    """What every dictionary of a model holds in which a module or a configuration keeps something under a name.

    Every pass is run inside one of these: a few milliseconds for some hundred modules. Most of the dictionaries are
    empty (hooks), and are looked at all at once.
    """

    def __init__(self, root: nn.Module) -> None:
        self.full: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.empty: list[dict[Any, Any]] = []
        self.training = False  # of any module; the mode is an attribute like others
        self.modes: list[tuple[nn.Module, bool]] = []
        self.versions = [(p, p._version) for p in root.parameters() if not p.is_inference()]
        self.compiled = False  # any module
        configs: dict[int, dict[Any, Any]] = {}
        for module in _modules(root):
            own = module.__dict__
            self.training = self.training or bool(own.get("training"))
            self.compiled = self.compiled or is_compiled(module)
            self.full.append((own, own.copy()))
            self.modes.append((module, bool(own.get("training"))))
            for held in own.values():  # children, parameters, buffers, hooks, and caches of the module's own
                if isinstance(held, dict):
                    if held:
                        self.full.append((held, held.copy()))
                    else:
                        self.empty.append(held)
            config = own.get("config")
            if config is not None and id(config) not in configs:
                parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
                configs |= {id(part): vars(part) for part in parts if hasattr(part, "__dict__")}
        self.full += [(held, held.copy()) for held in configs.values()]

    def put_back(self) -> None:
        """Give every dictionary what it held, in its order, where it holds something else now."""
        if any(p._version != version for p, version in self.versions):
            for module, mode in self.modes:
                module.training = mode
            return
        if any(self.empty):
            for holder in self.empty:
                holder.clear()
        for holder, before in self.full:
            if (
                len(holder) != len(before)
                or not all(map(is_, holder.values(), before.values()))
                or list(holder) != list(before)
            ):
                holder.clear()
                holder.update(before)


def _modules(root: nn.Module) -> list[nn.Module]:
    """Every module of a model, as `root.modules()` gives them, which makes all their names for it."""
    found, todo = {id(root): root}, [root]
    while todo:
        for child in todo.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                todo.append(child)
    return list(found.values())


def _own_tensors(root: nn.Module) -> list[Tensor]:
    """Tensors that modules hold beside their parameters: buffers, caches."""
    held = {id(b): b for b in root.buffers()}
    for module in root.modules():
        held |= {id(x): x for x in vars(module).values() if type(x) is Tensor}
    # Large integers are packed weights, which nobody writes.
    mine = [x for x in held.values() if type(x) is Tensor and not x.is_meta]
    return [x for x in mine if x.is_floating_point() or x.numel() < 1 << 20]
