"""Which token of an image model is what: class token, registers, patches and their grid.

Shapes: N images, T tokens, L layers, P tokens that are no patches.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.models import Model
from massact.records.anatomy import Stack
from massact.records.errors import UserError
from massact.trace import tapped
from massact.trace.hooks import AllSeen

PIXELS = "pixel_values"


@dataclass(frozen=True)
class Layout:
    """The tokens of one image.

    Args:
        stack: name of the stack.
        n_tokens: T.
        n_prefix: tokens in front of the patches; the first of them is the class token.
        registers: positions of the registers; () where the model has none.
        grid: rows and columns of patches.
    """

    stack: str
    n_tokens: int
    n_prefix: int
    registers: tuple[int, ...]
    grid: tuple[int, int]

    @property
    def patches(self) -> range:
        """Positions of the patches, row by row."""
        return range(self.n_prefix, self.n_prefix + self.grid[0] * self.grid[1])

    @property
    def class_tokens(self) -> tuple[int, ...]:
        """Positions in front of the patches that are no registers: the class token (and DeiT's for distillation)."""
        return tuple(p for p in range(self.n_prefix) if p not in self.registers)

    def place(self, position: int) -> tuple[int, int]:
        """Row and column of a patch."""
        return divmod(position - self.n_prefix, self.grid[1])


def image_stack(model: Model, stack: str | None = None) -> Stack:
    """The stack that sees images: the named one, the only one, or the one that is called after vision.

    Raises:
        UserError: there are several, and none or more than one of them is.
    """
    stacks = model.anatomy.stacks
    if stack is not None:
        return model.anatomy.stack(stack)
    seeing = [s for s in stacks if len(stacks) == 1 or "vision" in s.name or "visual" in s.name]
    if len(seeing) != 1:
        raise UserError("It is not known which part of the model sees images.", do="Name one of the stacks: "
                        + ", ".join(s.name for s in stacks) + ".")  # fmt: skip
    return seeing[0]


def read_layout(
    model: Model, corpus: Corpus, *, stack: str | None = None, grid: tuple[int, int] | None = None
) -> Layout:
    """Find the patches by experiment, and the registers in the model's configuration.

    Tokens that are the same for an image and for that image with noise, at the input of the first block, are no
    patches; they must be the first ones. The grid has the image's proportions: rows / columns = height / width.
    Of the P tokens in front, `num_register_tokens` (timm: `num_reg_tokens`) are registers, the last ones.

    Args:
        corpus: images (`pixel_values`), whose first one is looked at.
        stack: of several, which.
        grid: rows and columns of patches; None to work them out.

    Raises:
        UserError: the corpus holds no images, or the tokens do not form such a layout.
    """
    chosen = image_stack(model, stack)
    x_1CHW = _images(corpus)[:1]
    noise = torch.randn(x_1CHW.shape, generator=torch.Generator().manual_seed(0)).to(x_1CHW)
    first, second = (_embedded(model, corpus, chosen, x) for x in (x_1CHW, x_1CHW + noise))
    if first.shape != second.shape or first.ndim != 3:
        raise UserError("The tokens of an image are no row of one length.", f"Shapes: {tuple(first.shape)}, "
                        f"{tuple(second.shape)}.")  # fmt: skip
    same_T = (first == second).all(-1)[0].tolist()
    n_prefix = same_T.index(False) if False in same_T else len(same_T)
    if any(same_T[n_prefix:]) or n_prefix == len(same_T):
        raise UserError(
            "The patches of this model are not the last tokens.",
            f"Of {len(same_T)} tokens {sum(same_T)} do not depend on the image.",
        )
    n_registers = _n_registers(model)
    if n_registers > n_prefix:
        raise UserError(
            f"The configuration has {n_registers} registers, the model {n_prefix} tokens in front of the patches.",
            do="Give their positions: positions=[...].",
        )
    size = grid or _grid(len(same_T) - n_prefix, *x_1CHW.shape[-2:])
    if size[0] * size[1] != len(same_T) - n_prefix:
        raise UserError(f"A grid of {size[0]} x {size[1]} has not the {len(same_T) - n_prefix} patches of the model.")
    return Layout(chosen.name, len(same_T), n_prefix, tuple(range(n_prefix - n_registers, n_prefix)), size)


def _images(corpus: Corpus) -> Tensor:
    x = corpus.inputs.get(PIXELS)
    if x is None or x.ndim != 4:
        raise UserError("The corpus holds no images.", f"It has {', '.join(corpus.inputs)}.",
                        "Give {'pixel_values': (N, channels, height, width)}.")  # fmt: skip
    return x


def _embedded(model: Model, corpus: Corpus, stack: Stack, x_1CHW: Tensor) -> Tensor:
    """The input of the first block (1, T, D)."""
    seen: list[Tensor] = []
    place = stack.blocks[0].places["resid_pre"]
    inputs: dict[str, Any] = {k: v[:1] for k, v in corpus.inputs.items()} | {PIXELS: x_1CHW}
    taps: Any = [(place, lambda h: seen.append(h.clone()))]
    with torch.inference_mode(), tapped(model.module, taps, stop=True) as state, suppress(AllSeen):
        state.begin()
        model.run(inputs, places=[place])
    return seen[0]


def _n_registers(model: Model) -> int:
    config = getattr(model.module, "config", None)
    for holder in (config, getattr(config, "vision_config", None), model.module):
        for name in ("num_register_tokens", "num_reg_tokens"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 0


def _grid(n: int, height: int, width: int) -> tuple[int, int]:
    rows = round(float(np.sqrt(n * height / width)))
    if rows and n % rows == 0 and abs(rows / (n // rows) * width / height - 1) < 0.2:
        return rows, n // rows
    raise UserError(f"{n} patches form no grid of {height} x {width} pixels.", do="Give grid=(rows, columns).")
