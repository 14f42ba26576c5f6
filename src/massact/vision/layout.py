"""Which token of an image model is what: class token, registers, patches and their grid.

Shapes: N images, T tokens, L layers, P tokens that are no patches.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from massact.trace.added_tokens import added_positions
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
        added: positions of tokens that an edit has added (`AddedTokens`), anywhere.
    """

    stack: str
    n_tokens: int
    n_prefix: int
    registers: tuple[int, ...]
    grid: tuple[int, int]
    added: tuple[int, ...] = ()

    @property
    def patches(self) -> range:
        """Positions of the patches, row by row."""
        return range(self.n_prefix, self.n_prefix + self.grid[0] * self.grid[1])

    @property
    def class_tokens(self) -> tuple[int, ...]:
        """Positions in front of the patches that are no registers: the class token (and DeiT's for distillation)."""
        return tuple(p for p in range(self.n_prefix) if p not in self.registers and p not in self.added)

    @property
    def own(self) -> tuple[int, ...]:
        """Positions of the model's own tokens, in order: all but the added ones."""
        return tuple(p for p in range(self.n_tokens) if p not in self.added)

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
    patches; they must be the first ones. Of these P tokens, `num_register_tokens` (timm: `num_reg_tokens`) are
    registers, the last ones. The grid has the image's proportions: rows / columns = height / width. Tokens that an edit
    adds at the moment are told apart, and may stand in front of the patches or behind them.

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
    (first, added), (second, _) = (_embedded(model, corpus, chosen, x) for x in (x_1CHW, x_1CHW + noise))
    if first.shape != second.shape or first.ndim != 3:
        raise UserError("The tokens of an image are no row of one length.", f"Shapes: {tuple(first.shape)}, "
                        f"{tuple(second.shape)}.")  # fmt: skip
    same_T = (first == second).all(-1)[0].tolist()
    own = [p for p in range(len(same_T)) if p not in added]
    patches = [p for p in own if not same_T[p]]
    if not patches or patches != own[-len(patches) :] or patches[-1] - patches[0] >= len(patches):
        raise UserError(
            "The patches of this model are not its last tokens.",
            f"Of {len(own)} tokens {len(own) - len(patches)} do not depend on the image.",
        )
    n_prefix, n_registers = patches[0], _n_registers(model)
    prefix = own[: -len(patches)]
    if n_registers > len(prefix):
        raise UserError(
            f"The configuration has {n_registers} registers, the model {len(prefix)} tokens in front of the patches.",
            do="Give their positions: positions=[...].",
        )
    size = grid or _grid(len(patches), *x_1CHW.shape[-2:])
    if size[0] * size[1] != len(patches):
        raise UserError(f"A grid of {size[0]} x {size[1]} has not the {len(patches)} patches of the model.")
    return Layout(chosen.name, len(same_T), n_prefix, tuple(prefix[len(prefix) - n_registers :]), size, added)


def layout_now(model: Model, corpus: Corpus, layout: Layout) -> Layout:
    """The layout under the edits that are in force, whose tokens but for added ones are those of a known layout.

    Raises:
        UserError: they are not.
    """
    now = read_layout(model, corpus, stack=layout.stack, grid=layout.grid)
    if len(now.own) != len(layout.own):
        raise UserError(f"The layout is of {len(layout.own)} tokens, the model has {len(now.own)}.",
                        do="Read the layout of these images: read_layout(model, corpus).")  # fmt: skip
    return now


def places_now(positions: Sequence[int], layout: Layout, now: Layout) -> list[int]:
    """Where patches of one layout stand in another one of the same grid."""
    return [p - layout.n_prefix + now.n_prefix for p in positions]


def _images(corpus: Corpus) -> Tensor:
    x = corpus.inputs.get(PIXELS)
    if x is None or x.ndim != 4:
        raise UserError("The corpus holds no images.", f"It has {', '.join(corpus.inputs)}.",
                        "Give {'pixel_values': (N, channels, height, width)}.")  # fmt: skip
    return x


def _embedded(model: Model, corpus: Corpus, stack: Stack, x_1CHW: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input of the first block (1, T, D), and which of its tokens an edit has added."""
    seen: list[Tensor] = []
    place = stack.blocks[0].places["resid_pre"]
    inputs: dict[str, Any] = {k: v[:1] for k, v in corpus.inputs.items()} | {PIXELS: x_1CHW}
    taps: Any = [(place, lambda h: seen.append(h.clone()))]
    with torch.inference_mode(), tapped(model.module, taps, stop=True) as state, suppress(AllSeen):
        state.begin()
        model.run(inputs, places=[place])
    return seen[0], added_positions(model.module, stack)


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
