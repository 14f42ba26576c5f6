"""What was changed in a model after it was built: in its configuration, and done again on a twin or on loading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from massact.records.errors import UserError

PREFIX = "massact_"  # of every parameter and module that a change adds


def changes_of(model: nn.Module) -> list[str]:
    """Names of the changes that were made to a live model, in their order."""
    return [change.keywords["name"] for change in getattr(model, "massact_changes", ())]


def note_change(model: nn.Module, change: Callable[..., nn.Module], name: str, options: dict[str, Any]) -> None:
    """Write a change down: in `config.massact` (saved in config.json), and as a call that makes it again.

    Args:
        model: the changed model.
        change: `change(model, name=name, **options)` makes it again.
        name, options: as in that call; plain values only.
    """
    # A tuple of partials of functions with a name: copies and pickles of the model keep it.
    model.massact_changes = (*getattr(model, "massact_changes", ()), partial(change, name=name, **options))
    kinds = [{"change": c.func.__name__, **c.keywords} for c in model.massact_changes]
    model.config.massact = {"changes": kinds}


def changeable(model: nn.Module) -> Any:
    """The configuration of a model that changes can be written into.

    Raises:
        UserError: it is not a transformers model.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "to_dict"):
        raise UserError(
            f"{type(model).__name__} is not a transformers model.",
            "Changes are written into its configuration and go through transformers' attention interface.",
            "Give a model of transformers (AutoModel..., or a class of it).",
        )
    return config
