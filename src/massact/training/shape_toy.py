"""What a training of the vision toy lab is: its record, its model and the images it sees.

Shapes: D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from massact.records.errors import UserError, near
from massact.training.shapes import BACKGROUNDS, CLASSES, RADIUS, Shapes, draw_shapes
from massact.training.toy import OPTIMISERS, with_options
from massact.training.variants import variant

WITH_REGISTERS = "+registers"
N_HELD_OUT = 512  # images
DRAWN_AT_ONCE = 640  # images: one draw for many steps costs less than one for each


@dataclass(frozen=True)
class ShapeConfig:
    """One training of the vision toy lab. The defaults take about a minute.

    Args:
        attention: name of an attention variant; options: of that variant.
        registers: learned tokens without a place, between class token and patches.
        background: "plain": one grey; "textured": with waves over it; "mixed": half of each.
        size, patch: of an image and of its patches, in pixels; both are square.
        layers, heads, width, mlp_ratio: shape of the model, a DINOv2 whose head reads the class token.
        position_scale: standard deviation of the initial position embeddings, class token and registers.
        optimiser: "adamw" or "sgd" (momentum 0.9).
        learning_rate: after 50 steps of warm-up; 0: 1e-3 for AdamW, 0.05 for SGD.
        weight_decay: of matrices, under AdamW.
        steps, batch: of training; images of a step.
        every: steps between two measurements.
        seed: of weights and images.
    """

    attention: str = "softmax"
    options: dict[str, Any] = field(default_factory=dict)
    registers: int = 0
    background: str = "mixed"
    size: int = 30
    patch: int = 5
    layers: int = 4
    heads: int = 4
    width: int = 64
    mlp_ratio: int = 4
    position_scale: float = 0.3
    optimiser: str = "adamw"
    learning_rate: float = 0.0
    weight_decay: float = 0.05
    steps: int = 500
    batch: int = 32
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or OPTIMISERS[self.optimiser]

    @property
    def arm(self) -> str:
        """What this training is called beside others."""
        return self.attention + (WITH_REGISTERS if self.registers else "")

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return 1 + self.registers

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2

    @property
    def uniform_attention(self) -> float:
        """Attention on one token of a head that looks everywhere alike."""
        return 1 / (self.prefix + self.patches)

    @classmethod
    def of(cls, **options: Any) -> ShapeConfig:
        """The defaults with some fields replaced; a text is read as the field's type.

        Raises:
            UserError: no such field or value (says which are near).
        """
        return with_options(cls(), "The vision toy lab", options)

    def as_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def _check(c: ShapeConfig) -> None:
    """Refuse values that no training can have, before anything is built."""
    for name, known in (("background", BACKGROUNDS), ("optimiser", tuple(OPTIMISERS))):
        if getattr(c, name) not in known:
            raise UserError(f"{name}={getattr(c, name)!r} is unknown.", do=near(str(getattr(c, name)), known))
    for name in ("patch", "layers", "heads", "width", "mlp_ratio", "steps", "batch", "every"):
        if getattr(c, name) < 1:
            raise UserError(f"{name}={getattr(c, name)} is too small.", do=f"Set {name} to 1 or more.")
    if c.size % c.patch or c.size * RADIUS[0] < 2:
        raise UserError(f"size={c.size} cannot be used with patch={c.patch}.",
                        "Patches fill an image, and a shape has a radius of two pixels at least.")  # fmt: skip
    if not 0 <= c.registers <= c.patches - 2:
        raise UserError(f"registers={c.registers} is out of range.", "As many patches are edited, to compare, and an "
                        f"image has {c.patches}.", f"Set it from 0 to {c.patches - 2}.")  # fmt: skip
    if not (c.learning_rate >= 0 and c.weight_decay >= 0 and c.position_scale >= 0):
        raise UserError("Rate, weight decay and position_scale must not be negative.")
    if c.width % c.heads:
        raise UserError(f"width={c.width} cannot be shared by {c.heads} heads.")
    if variant(c.attention).name == "sink-token":
        raise UserError("The vision toy lab does not train sink-token.", "In an image a register is such a token.",
                        "Set registers=1.")  # fmt: skip


def arms_of(variants: Sequence[str], options: dict[str, Any]) -> list[ShapeConfig]:
    """One configuration for each training: every variant without registers, the first one also with them.

    Args:
        variants: names of attention variants.
        options: fields of `ShapeConfig`; `registers` is how many the first variant has in its second training (4 if
            nothing is said; 0: no such training).

    Raises:
        UserError: a variant twice or unknown, or an option that no variant has.
    """
    if not variants or len(set(variants)) < len(variants):
        raise UserError(f"The toy lab wants every variant once, not {', '.join(variants) or 'none'}.")
    base = ShapeConfig.of(**{"registers": 4} | options)
    configs = []
    for name in variants:
        known = variant(name).options
        own = {k: v for k, v in base.options.items() if k in known}
        variant(name).resolved(own)
        configs.append(replace(base, attention=name, options=own, registers=0))
    unknown = [k for k in base.options if not any(k in c.options for c in configs)]
    if unknown:
        raise UserError(f"None of {', '.join(variants)} has the option {unknown[0]!r}.")
    if base.registers:
        configs.insert(1, replace(configs[0], registers=base.registers))
    return configs


def shape_model(config: ShapeConfig) -> nn.Module:
    """A small DINOv2 with as many registers as are wanted; its head has no use for the mean of the patches.

    So patches are of use to the class token alone, and those that say nothing are free for something else. All weights
    come from the seed, those of registers last: the others are the same with and without them.
    """
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    names = dict(enumerate(CLASSES))
    module = Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            mlp_ratio=config.mlp_ratio, image_size=config.size, patch_size=config.patch,
            num_register_tokens=config.registers, id2label=names, label2id={name: i for i, name in names.items()},
        )
    )  # fmt: skip
    embeddings, random = module.dinov2_with_registers.embeddings, torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for block in module.dinov2_with_registers.encoder.layer:
            for p in block.parameters():
                if p.ndim == 2:
                    p.normal_(0, p.shape[1] ** -0.5, generator=random)
        module.classifier.weight.normal_(0, config.width**-0.5, generator=random)
        module.classifier.weight[:, config.width :] = 0
        patches = embeddings.patch_embeddings.projection
        patches.weight.normal_(0, patches.weight[0].numel() ** -0.5, generator=random)
        for p in (embeddings.position_embeddings, embeddings.cls_token, embeddings.register_tokens):
            p.normal_(0, config.position_scale, generator=random)
    return module


def held_out_shapes(config: ShapeConfig) -> Shapes:
    """Held-out images."""
    return draw_shapes(N_HELD_OUT, config.size, config.background, np.random.default_rng([config.seed, 2]))
