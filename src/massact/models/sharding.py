"""Weights that are cut up among processes are refused: a site, a hash, a twin are of a whole model."""

from __future__ import annotations

from torch import nn

from massact.records.errors import UserError


def refuse_shards(module: nn.Module) -> None:
    """Refuse a model whose weights FSDP or tensor parallelism laid out.

    Raises:
        UserError: says what does it, and how to get the whole model.
    """
    for part in module.modules():
        if "_fsdp_wrapped_module" in part._modules:
            raise _refused(f"{type(part).__name__} holds the weights of the model as flat pieces.")
    for name, weight in module.named_parameters():
        if hasattr(weight, "device_mesh"):
            raise _refused(f"{name!r} is laid out over a mesh of processes (FSDP, tensor parallel).")


def _refused(why: str) -> UserError:
    return UserError(
        "The weights of this model are sharded.",
        why,
        "Save them whole (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, or "
        "save_pretrained), and load() them in one process; with the option device_map='auto' they may lie on several "
        "devices and on the disk.",
    )
