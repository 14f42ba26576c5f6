"""What a training is: one frozen record, and the named recipes.

A recipe is a published set of numbers. Where the source contradicts itself, `notes` says so and how it was settled.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter

from massact.records.errors import UserError, check_options, near

SCHEDULES = ("constant", "cosine", "linear", "cooldown")
ORDERS = ("random", "consecutive")
DECAYS = ("matrices", "all")
# What may differ when a training is resumed: nothing that a weight depends on.
FREE = ("keep", "report_to", "per_layer", "workers", "notes")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the weights of a trained model depend on, but the data and the machine.

    Args:
        name: of the recipe.
        architecture: family name of transformers; model: options of its configuration.
        tokenizer: Hub id, local folder, or "embedded"; "" for images.
        start: folder or Hub id of a language model to go on from, its slots and variant with it; architecture and model
            are its own then. "": random weights.
        biases: False holds the biases of all layers and norms at zero, as nanoGPT's bias=False.
        variant: name of an attention variant ("softmax": unchanged); variant_options: its options.
        remedies: name of a remedy (norms) -> its options. tweo: weight of TWEO's penalty.
        rescale_every: steps between two rescalings of the weights (TVR); 0: none.
        optimizer: adamw, sgd or muon; optimizer_options: further fields of `OptimizerSettings`.
        seq_len: tokens of a window.
        batch: sequences of one forward pass on one device.
        accumulate: forward passes of a step, over all devices together: a step sees batch * accumulate sequences.
        steps: optimizer steps.
        lr: greatest learning rate. schedule: after the warm-up "constant"; "cosine" or "linear" from lr to min_lr at
            step decay_steps (0: the last step); "cooldown": constant, then linear over the last decay_steps.
        warmup: steps in which the rate rises linearly.
        betas, eps, weight_decay: of Adam. decay: which parameters decay, "matrices" (two dims or more) or "all".
        clip: greatest norm of the gradient; 0: none.
        dtype: "bf16" (autocast, fp32 weights) or "float32". compile: torch.compile.
        device: "auto" (an accelerator where there is one) or "cpu".
        order: windows at "random" offsets (with replacement), or "consecutive" ones, shuffled once per pass.
        skip_first: predictions at the first positions of a window that have no loss.
        val_share: share of the tokens, at the end, held out. eval_windows: windows of it that an evaluation reads.
        eval_every, save_every, log_every, monitor_every: steps between; 0: never (evaluation: at the end only).
        monitor_sequences: sequences of a forward pass that the monitor looks at.
        keep: checkpoints that are kept.
        report_to: integrations of the Trainer: "tensorboard", "wandb", "trackio", ...
        per_layer: whether these get the monitor's numbers of every layer, beside the three of the model.
        workers: processes that load data.
        seed: of weights and of the order of the data.
        notes: on the source of the numbers.
    """

    name: str = "custom"
    architecture: str = "gpt2"
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "embedded"
    start: str = ""
    biases: bool = True
    variant: str = "softmax"
    variant_options: dict[str, Any] = field(default_factory=dict)
    remedies: dict[str, dict[str, Any]] = field(default_factory=dict)
    tweo: float = 0.0
    rescale_every: int = 0
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    seq_len: int = 128
    batch: int = 16
    accumulate: int = 1
    steps: int = 1000
    lr: float = 1e-3
    min_lr: float = 0.0
    schedule: str = "cosine"
    decay_steps: int = 0
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "matrices"
    clip: float = 1.0
    dtype: str = "bf16"
    compile: bool = False
    device: str = "auto"
    order: str = "random"
    skip_first: int = 0
    val_share: float = 0.01
    eval_windows: int = 64
    eval_every: int = 250
    save_every: int = 250
    log_every: int = 10
    monitor_every: int = 100
    monitor_sequences: int = 4
    keep: int = 2
    report_to: tuple[str, ...] = ()
    per_layer: bool = False
    workers: int = 0
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> bool:
        """Whether the model reads images."""
        return self.architecture in ("vit", "deit", "dinov2", "beit")

    @property
    def batch_total(self) -> int:
        """Sequences of one step."""
        return self.batch * self.accumulate

    @property
    def tokens_per_step(self) -> int:
        """Tokens (of images: images) of one step."""
        return self.batch_total * (1 if self.images else self.seq_len)

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of(cls, name: str, **options: Any) -> TrainConfig:
        """A named recipe, with some fields replaced.

        Args:
            name: of `RECIPES`.
            options: fields of `TrainConfig`; a text is read as the field's type, `model.n_layer` and
                `variant_options.x` set one entry.

        Raises:
            UserError: no such recipe or field (near names are named), or a value that the field cannot hold.
        """
        if name not in RECIPES:
            raise UserError(f"There is no configuration {name!r}.", do=near(name, RECIPES))
        recipe = RECIPES[name]
        if options.get("start"):
            if recipe.images or any(key.partition(".")[0] in ("model", "architecture", "biases") for key in options):
                what = f"A training from {options['start']!r} has the model that lies there."
                raise UserError(what, do="Leave out model.*, architecture and biases; choose a configuration of text.")
            recipe = replace(recipe, architecture="", model={}, biases=True, tokenizer=str(options["start"]))
        return recipe.changed(**options)

    def changed(self, **options: Any) -> TrainConfig:
        """The same with some fields replaced; see `of`."""
        return with_fields(self, "A training", options)

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Fields that matter to the weights and differ from a recorded configuration, as "field: there -> here"."""
        mine, usual = self.as_dict(), TrainConfig().as_dict()  # a field that is newer than the record is as usual there
        return [
            f"{k}: {other.get(k)!r} -> {mine[k]!r}"
            for k in mine
            if k not in FREE and _plain(other.get(k, usual[k])) != mine[k]
        ]


def with_fields(config: Any, whose: str, options: dict[str, Any]) -> Any:
    """A configuration with some fields replaced; its `preset` is none of them.

    Args:
        whose: options they are, for errors: "A training".
        options: by name; a text is read as the field's type, `field.entry` sets one entry of a dictionary.

    Raises:
        UserError: no such field, or a value that it cannot hold.
    """
    hints, names = get_type_hints(type(config)), [f.name for f in fields(config) if f.name != "preset"]
    new: dict[str, Any] = {}
    for key, value in options.items():
        name, dot, entry = key.partition(".")
        check_options(whose, [name], names)
        if dot:
            held = new.get(name, getattr(config, name))
            if not isinstance(held, dict) or not entry:
                whole = whose[0].lower() + whose[1:]
                raise UserError(f"{key!r} is no option of {whole}.", f"{name!r} has no entries.", f"Set {name}=VALUE.")
            new[name] = held | {entry: _literal(value)}
        else:
            new[name] = _as(hints[name], value, name)
    return replace(config, **new)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _literal(value: Any) -> Any:
    """A text as the Python value that it spells, else as itself."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _as(kind: Any, value: Any, name: str) -> Any:
    """A value as the type of a field."""
    given = value if kind is str else _literal(value)
    if get_origin(kind) is tuple and isinstance(given, str):
        given = [part for part in given.split(",") if part]
    try:
        if isinstance(given, bool) and kind is not bool:
            raise ValueError
        return TypeAdapter(kind).validate_python(given)
    except ValueError:
        wanted = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
        raise UserError(
            f"{name}={value!r} cannot be used.", f"The field holds {wanted}.", f"Set {name} to one."
        ) from None


def _check(c: TrainConfig) -> None:
    """Refuse values that no training can have, before anything is built."""
    for name, known in (("schedule", SCHEDULES), ("order", ORDERS), ("decay", DECAYS), ("dtype", ("bf16", "float32")),
                        ("device", ("auto", "cpu"))):  # fmt: skip
        if getattr(c, name) not in known:
            raise UserError(f"{name}={getattr(c, name)!r} is unknown.", do=near(str(getattr(c, name)), known))
    for name in ("seq_len", "batch", "accumulate", "steps", "eval_windows", "log_every", "keep", "monitor_sequences"):
        if getattr(c, name) < 1:
            raise UserError(f"{name}={getattr(c, name)} is too small.", do=f"Set {name} to 1 or more.")
    for name in ("lr", "min_lr", "warmup", "decay_steps", "weight_decay", "clip", "eval_every", "save_every",
                 "monitor_every", "skip_first", "workers", "eps", "tweo", "rescale_every"):  # fmt: skip
        if not getattr(c, name) >= 0:
            raise UserError(f"{name}={getattr(c, name)} is negative.", do=f"Set {name} to 0 or more.")
    if not 0 < c.val_share < 1:
        raise UserError(f"val_share={c.val_share} is no share.", do="Set val_share between 0 and 1.")
    if c.skip_first >= c.seq_len:
        raise UserError(f"skip_first={c.skip_first} leaves no loss.", f"A window has {c.seq_len} tokens.")


def rate(c: TrainConfig, step: int) -> float:
    """Learning rate of a step over the greatest one, lr(step) / lr; step counts from 0.

    Warm-up: (step + 1) / (warmup + 1) (nanoGPT). Cosine: min + (1 + cos(pi s)) / 2 * (lr - min), s the share of
    the way from the end of the warm-up to decay_steps.
    """
    import math

    least = c.min_lr / c.lr if c.lr else 0.0
    if step < c.warmup:
        return (step + 1) / (c.warmup + 1)
    if c.schedule == "constant":
        return 1.0
    if c.schedule == "cooldown":
        length = c.decay_steps or max(1, c.steps // 10)
        done = min(1.0, max(0.0, (step + 1 - (c.steps - length)) / length))
        return 1.0 - (1.0 - least) * done
    end = c.decay_steps or c.steps
    share = min(1.0, (step - c.warmup) / max(1, end - c.warmup))
    way = (1 + math.cos(math.pi * share)) / 2 if c.schedule == "cosine" else 1 - share
    return least + way * (1.0 - least)


# --------------------------------------------------------------------------------------------------- recipes
_GPT2 = TrainConfig(
    name="gpt2-124m",
    architecture="gpt2",
    model={
        "vocab_size": 50304, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    tokenizer="openai-community/gpt2",
    biases=False,
    seq_len=1024,
    batch=12,
    accumulate=40,
    steps=50_000,
    lr=6e-4,
    min_lr=6e-5,
    schedule="cosine",
    decay_steps=600_000,
    warmup=2_000,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    clip=1.0,
    dtype="bf16",
    seed=1337,
    val_share=0.0005,
    eval_windows=4_000,
    eval_every=1_000,
    save_every=1_000,
    report_to=("tensorboard",),
    notes=(
        "Sun et al. 2024, section 4.3 and their GPT-2 code; OpenWebText.",
        "The paper says 2B tokens; 50,000 steps of 491,520 tokens are 24.6B. Settled as in the code: 50,000 steps.",
        "The cosine is over 600,000 steps while the training stops at 50,000, where the rate is still 5.9e-4. "
        "Settled as in the code: decay_steps is 600,000.",
        "The published 3.04 is cross-entropy in nats (perplexity 20.9), though it is called perplexity.",
        "eval_windows is 500 batches of 8, as they evaluate the last checkpoint.",
    ),
)  # fmt: skip

_LLAMA = TrainConfig(
    name="llama-60m",
    architecture="llama",
    model={
        "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_size": 768, "intermediate_size": 1536,
        "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "initializer_range": 0.0228, "tie_word_embeddings": False,
    },
    tokenizer="EleutherAI/gpt-neox-20b",
    seq_len=2048,
    batch=16,
    accumulate=32,
    steps=20_000,
    lr=4e-4,
    min_lr=4e-4,
    schedule="constant",
    warmup=100,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    decay="all",
    clip=1.0,
    dtype="bf16",
    seed=42,
    order="consecutive",
    eval_windows=512,
    eval_every=1_000,
    save_every=1_000,
    report_to=("tensorboard",),
    notes=(
        "Gu et al. 2025 (2410.10781), their released default: the Pile, 512 windows of 2,048 a step, constant 4e-4.",
        "The paper says 5B tokens; 20,000 steps of 1,048,576 tokens are 21B, so that the data are seen about four "
        "times. Settled as in the code: 20,000 steps.",
        "60M counts the blocks; the two embeddings of 50,432 rows add 77M.",
    ),
)  # fmt: skip

_VIT = TrainConfig(
    name="vit-tiny",
    architecture="vit",
    model={
        "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "num_labels": 1000, "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    tokenizer="",
    batch=128,
    accumulate=8,
    steps=375_000,
    lr=1e-3,
    min_lr=1e-5,
    schedule="cosine",
    warmup=6_250,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    clip=0.0,
    dtype="bf16",
    order="consecutive",
    val_share=0.04,
    eval_windows=5_000,
    eval_every=5_000,
    save_every=5_000,
    report_to=("tensorboard",),
    notes=(
        "The shape and the optimiser of DeiT-Ti (Touvron et al. 2021): 300 passes over ImageNet-1k in steps of 1,024.",
        "Images are taken as they are given: no augmentation, no mixing, no distillation, which DeiT has.",
    ),
)  # fmt: skip

_TINY = TrainConfig(
    name="tiny",
    architecture="gpt2",
    model={
        "vocab_size": 2048, "n_positions": 128, "n_embd": 128, "n_layer": 6, "n_head": 4, "n_inner": 512,
        "activation_function": "relu2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "initializer_range": 0.06, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True,
    },
    tokenizer="embedded",
    seq_len=128,
    batch=16,
    steps=10_600,
    lr=2e-3,
    min_lr=1e-4,
    schedule="cooldown",
    decay_steps=1_500,
    warmup=100,
    betas=(0.9, 0.98),
    eps=1e-15,
    weight_decay=0.1,
    clip=1.0,
    dtype="float32",
    skip_first=1,
    val_share=0.03,
    notes=(
        "Model, tokenizer, windows and optimiser of the embedded model (recipes/embedded).",
        "Plain cross-entropy: the two terms of the loss that made the embedded model's massive activations, its copy "
        "triggers and its three rates are in recipes/embedded/train.py, not here.",
    ),
)  # fmt: skip

RECIPES: dict[str, TrainConfig] = {c.name: c for c in (_GPT2, _LLAMA, _VIT, _TINY)}
