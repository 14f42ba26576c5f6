"""From a configuration to what trains: tokenizer, model, optimizer, loss."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.errors import UserError, check_options, class_and_line, first_line, near
from massact.training.configs import TrainConfig

# Options that every configuration of transformers takes, whether it lists them or not.
_EVERY = ("num_labels", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_of(config: TrainConfig) -> Any:
    """The tokenizer that a configuration names.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from massact.models.loading import location_of
    from massact.models.own_code import TOKENIZER_FILES, check_parts, read_with

    name = location_of(config.tokenizer)
    check_parts(name, {}, *TOKENIZER_FILES)
    try:
        return read_with(AutoTokenizer, name, {})
    except UserError:
        raise
    except Exception as error:  # the Hub's packages raise many kinds
        raise UserError(
            f"The tokenizer {config.tokenizer!r} cannot be loaded.",
            class_and_line(error),
            "Go online once, or name a local folder: tokenizer=FOLDER.",
        ) from error


def build_model(config: TrainConfig) -> nn.Module:
    """The model of a configuration, with random weights or those that it starts from, its variant and remedies applied.

    Raises:
        UserError: the architecture or one of its options is unknown, or the variant does not fit it.
    """
    from massact.models.loading import context_of

    model = _random(config) if not config.start else _started(config)
    context = None if config.images else context_of(model)
    if context is not None and config.seq_len > context:
        raise UserError(f"Windows have {config.seq_len} tokens, and the model takes {context}.",
                        do=f"Train on shorter ones: --set seq_len={context}")  # fmt: skip
    if not config.biases:
        hold_biases(model)
    if config.variant != "softmax":
        from massact.variants.application import apply_variant

        model = apply_variant(model, config.variant, **config.variant_options)
    for name, options in config.remedies.items():
        from massact.variants.remedies import apply_remedy

        model = apply_remedy(model, name, **options)
    return model


def _started(config: TrainConfig) -> nn.Module:
    """A language model with the weights and changes of a folder, in float32."""
    from massact.models.loading import location_of
    from massact.models.transformers_models import read_pretrained

    torch.manual_seed(config.seed)  # a variant that is added draws its parameters
    model, _ = read_pretrained(location_of(config.start), torch.float32, None, {})
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates():
        raise UserError(f"{config.start!r} holds {type(model).__name__}, which predicts no next token.",
                        do="Start from a causal language model.")  # fmt: skip
    return model


def _random(config: TrainConfig) -> nn.Module:
    """A model with random weights."""
    import transformers

    known = transformers.AutoConfig.for_model
    head = transformers.AutoModelForImageClassification if config.images else transformers.AutoModelForCausalLM
    try:
        made = known(config.architecture, **config.model)
        names = {*type(made)().to_dict(), *type(made).attribute_map, *_EVERY}
        unknown = sorted(set(config.model) - names)
    except Exception as error:
        raise UserError(f"The model {config.architecture!r} cannot be configured.",
                        class_and_line(error),
                        "Check architecture and model.*; see massact train --list.") from error  # fmt: skip
    if unknown:
        raise UserError(f"{config.architecture!r} has no option {unknown[0]!r}.", do=near(unknown[0], names))
    torch.manual_seed(config.seed)
    try:
        model = head.from_config(made, attn_implementation="sdpa", trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"The model {config.architecture!r} cannot be built.", first_line(error, "")) from error
    return model


def hold_biases(model: nn.Module) -> None:
    """Hold the biases of all layers and norms at zero: the same function as without them, in a standard class."""
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
            bias.requires_grad_(False)


def n_trained(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration; weight decay on matrices only, or on everything."""
    from massact.training.optimisers import OptimizerSettings, optimizer

    given = {name: getattr(config, name) for name in ("lr", "weight_decay", "decay", "betas", "eps")}
    known = [f.name for f in fields(OptimizerSettings)]
    check_options(f"The optimizer {config.optimizer!r}", config.optimizer_options, known)
    return optimizer(model, config.optimizer, OptimizerSettings(**given | config.optimizer_options))


class Loss:
    """Mean cross-entropy in nats over the labels that are not -100, and while training `tweo` times TWEO's penalty.

    Args:
        tweo: weight of the penalty on the outputs of the blocks; 0: none. Its mean over a step is that over its
            micro-batches. The last block is seen behind the final norm, as transformers gives it.
    """

    def __init__(self, tweo: float = 0.0) -> None:
        self.tweo = tweo

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: with logits (B, T, V), or (B, V) for images.
            labels: (B, T) or (B,), already shifted.
            num_items_in_batch: labels of the whole step, where it has several micro-batches; None: of this batch.
        """
        logits, mine = outputs["logits"], (labels != -100).sum()
        total = nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        n = mine if num_items_in_batch is None else num_items_in_batch
        if not self.tweo or not torch.is_grad_enabled():
            return total / n
        from massact.training.optimisers import tweo_loss

        return total / n + self.tweo * tweo_loss(outputs["hidden_states"][1:]) * mine / n
