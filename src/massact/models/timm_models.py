"""Read a model of timm by name, and say plainly why one cannot be read."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from massact.records.errors import UserError, causes, first_line, near
from massact.records.user_files import refuse_special_in

TIMM = "timm:"
INSTALL = "Install both: pip install 'massact[vision]'"


def read_timm(spec: str, dtype: torch.dtype | str, revision: str | None, options: dict[str, Any]) -> nn.Module:
    """Make a model of timm with its pretrained weights.

    Args:
        spec: 'timm:' and what `timm.create_model` takes: a name (vit_tiny_patch16_224.augreg_in21k_ft_in1k),
            hf-hub:OWNER/NAME, or local-dir:FOLDER (config.json and weights, as timm saves them).
        dtype: of the weights, or "auto" for float32.
        revision: must be None: timm writes it hf-hub:OWNER/NAME@REVISION.
        options: more arguments of `create_model`; pretrained=False makes random weights, allow_pickle and
            trust_remote_code mean nothing here: files are read with weights_only=True, and timm runs no code of a Hub.

    Raises:
        UserError: timm is not installed, there is no such model, or its weights cannot be read.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{spec!r} needs timm, and timm needs torchvision.", str(error), INSTALL) from None
    except Exception as error:  # torchvision of another build than torch
        why = first_line(error)
        raise UserError(f"{spec!r} needs timm, which cannot be used as it is installed.", why, INSTALL) from None
    name = spec.removeprefix(TIMM)
    if revision is not None:
        raise UserError("Models of timm have no --revision.", do=f"Write {TIMM}hf-hub:OWNER/NAME@REVISION")
    given = {k: v for k, v in options.items() if k not in ("allow_pickle", "trust_remote_code")}
    if ":" not in name and not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), 5)
        do = near(name, close) if close else "See timm.list_models()."
        raise UserError(f"timm {timm.__version__} has no model {name!r}.", do=do)
    refuse_special_in(name.removeprefix("local-dir:"))
    try:
        module = timm.create_model(name, **({"pretrained": True} | given))
    except Exception as error:
        raise _explained(spec, error) from error
    return module if isinstance(dtype, str) else module.to(dtype)


def _explained(spec: str, error: BaseException) -> UserError:
    first, kinds = first_line(error), {type(cause).__name__ for cause in causes(error)}
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        return UserError(
            f"The weights of {spec!r} are not in the cache, and the Hub cannot be reached.",
            first,
            f"Give a folder that timm saved: {TIMM}local-dir:FOLDER",
        )
    return UserError(
        f"{spec!r} cannot be read.",
        f"{type(error).__name__}: {first}",
        f"Give a name of timm with weights, {TIMM}hf-hub:OWNER/NAME or {TIMM}local-dir:FOLDER.",
    )
