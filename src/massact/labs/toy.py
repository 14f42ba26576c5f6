"""What a training of the toy lab is: its record, the named presets, its model and its optimiser.

Shapes: D width, V tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from massact.labs.backcopy import CHAINS, STARTS, Backcopy, random_backcopy, text_backcopy
from massact.records.errors import UserError, near
from massact.training.configs import with_fields
from massact.variants.registry import variant

OPTIMISERS = {"adamw": 1e-3, "sgd": 0.05}  # with their learning rates
FROM_QUERY = 8  # queries before it see too few keys: attention that is merely spread would look like a sink
ORDINARY = 9  # the position that the first one is compared with
FAR = 4  # from so many positions behind it on, targets are far: neighbours need it for what it says, not for a bias
NEXT = 7  # targets right behind an edited position


@dataclass(frozen=True)
class LabConfig:
    """One training of the toy lab. The defaults show the story of the paper within minutes.

    Args:
        preset: the name it came from.
        attention: name of an attention variant; options: of that variant.
        chain: "random": bigrams of a random Markov chain; "text": of the text that comes with massact, as published.
        concentration: of the random chain's rows: the smaller, the more certain is what follows.
        starts: "bos": every sequence begins with BOS; "none": none; "mixed": some.
        share: of sequences that begin with BOS, where they are mixed.
        optimiser: "adamw" or "sgd" (momentum 0.9).
        learning_rate: after 50 steps of warm-up; 0: 1e-3 for AdamW, 0.05 for SGD.
        weight_decay: of matrices, under AdamW.
        steps, batch, length: of training; sequences of a step; tokens of a sequence.
        layers, heads, width, mlp: shape of the model, a GPT-2 with ReLU.
        sharpness: standard deviation of the initial weights of queries and keys; all others have 1 / sqrt(width).
        position_scale: initial position embeddings are so many times as large as token embeddings.
        every: steps between two measurements.
        seed: of weights, chain and data.
    """

    preset: str = "story"
    attention: str = "softmax"
    options: dict[str, Any] = field(default_factory=dict)
    chain: str = "random"
    concentration: float = 0.25
    starts: str = "mixed"
    share: float = 0.8
    optimiser: str = "adamw"
    learning_rate: float = 0.0
    weight_decay: float = 0.05
    steps: int = 1500
    batch: int = 32
    length: int = 32
    layers: int = 3
    heads: int = 8
    width: int = 64
    mlp: int = 256
    sharpness: float = 0.25
    position_scale: float = 3.0
    every: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or OPTIMISERS[self.optimiser]

    @property
    def shifted(self) -> int:
        """How many positions the variant puts before the sequence."""
        return int(self.attention == "sink-token")

    @classmethod
    def of(cls, preset: str = "story", **options: Any) -> LabConfig:
        """A preset with some fields replaced.

        Args:
            preset: of `PRESETS`.
            options: fields; a text is read as the field's type, `options.std` sets one option of the variant.

        Raises:
            UserError: no such preset, field or value (says which are near).
        """
        if preset not in PRESETS:
            raise UserError(f"The toy lab has no preset {preset!r}.", do=near(preset, PRESETS))
        made: LabConfig = with_fields(PRESETS[preset], "The toy lab", options)
        return made

    def for_variant(self, name: str) -> LabConfig:
        """The same with another attention variant, of whose options those that it has."""
        known = variant(name).options
        return replace(self, attention=name, options={k: v for k, v in self.options.items() if k in known})

    def as_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def _check(c: LabConfig) -> None:
    """Refuse values that no training can have, before anything is built."""
    for name, known in (("starts", STARTS), ("optimiser", tuple(OPTIMISERS)), ("chain", CHAINS)):
        if getattr(c, name) not in known:
            raise UserError(f"{name}={getattr(c, name)!r} is unknown.", do=near(str(getattr(c, name)), known))
    for name in ("steps", "batch", "layers", "heads", "width", "mlp", "every"):
        if getattr(c, name) < 1:
            raise UserError(f"{name}={getattr(c, name)} is too small.", do=f"Set {name} to 1 or more.")
    least = ORDINARY + 2 * FAR
    if c.length < least:
        raise UserError(f"length={c.length} is too short.", f"Position {ORDINARY} and some behind it are looked at.",
                        f"Set length to {least} or more.")  # fmt: skip
    if not 0 < c.share < 1:
        raise UserError(f"share={c.share} leaves one kind of sequence.", do="Set it between 0 and 1, or starts=bos.")
    if not (c.concentration > 0 and c.learning_rate >= 0 and c.weight_decay >= 0 and c.sharpness > 0):
        raise UserError("concentration and sharpness must be above 0, rate and weight decay not below.")
    if not c.position_scale >= 0:
        raise UserError(f"position_scale={c.position_scale} is negative.")
    if c.width % c.heads:
        raise UserError(f"width={c.width} cannot be shared by {c.heads} heads.")
    variant(c.attention)


PRESETS: dict[str, LabConfig] = {
    "story": LabConfig(),
    # Sizes, rate and optimiser as published; how weights are drawn is ours. 100,000 steps at most are published.
    "guo": LabConfig(
        preset="guo", chain="text", starts="bos", steps=10_000, batch=512, length=256, layers=3, heads=1, width=256,
        mlp=1024, learning_rate=3e-4, weight_decay=1e-4, sharpness=0.0625, position_scale=1.0, every=500,
    ),
}  # fmt: skip


def task_of(config: LabConfig) -> Backcopy:
    """The task of a configuration."""
    if config.chain == "text":
        return text_backcopy()
    return random_backcopy(seed=config.seed, concentration=config.concentration)


def toy_model(config: LabConfig, n_tokens: int) -> nn.Module:
    """A small GPT-2 with sharp, noisy heads, so that looking everywhere is no way of looking nowhere.

    Weights are drawn from torch's global generator.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=n_tokens, n_positions=config.length + 1, n_embd=config.width, n_layer=config.layers,
            n_head=config.heads, n_inner=config.mlp, activation_function="relu", resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, tie_word_embeddings=False, bos_token_id=n_tokens - 1, eos_token_id=n_tokens - 1,
            use_cache=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 2:
                p.normal_(0, config.width**-0.5)
            if name == "transformer.wpe.weight":
                p.mul_(config.position_scale)
            if name.endswith("c_attn.weight"):
                p[:, : 2 * config.width].normal_(0, config.sharpness)
    return module


def optimiser_of(module: nn.Module, config: LabConfig) -> tuple[torch.optim.Optimizer, Any]:
    """The optimiser of a configuration, and its schedule: constant after 50 steps of warm-up."""
    if config.optimiser == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=config.rate, momentum=0.9)
    else:
        decayed = [p for p in module.parameters() if p.ndim >= 2]
        rest = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        made = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.99))
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, (step + 1) / 50))
