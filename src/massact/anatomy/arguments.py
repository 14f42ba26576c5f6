"""Example values for the arguments of a forward pass, by their names: what a model requires beside its main input."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

N_ROWS = 2  # sequences of an example

# What configurations call the width of one frame of sound, or of one vector of any other sequence.
_FRAME = ("num_mel_bins", "feature_projection_input_dim", "input_feat_size", "input_feat_per_channel", "n_mel_bins",
          "mel_bins", "n_mels", "mel_dim", "input_dim", "input_channels", "feature_size")  # fmt: skip
_LENGTH = 13


def holders(config: Any) -> list[Any]:
    """A configuration and its sub-configurations."""
    return [config, *(getattr(config, k, None) for k in getattr(config, "sub_configs", {}))]


def first(config: Any, *names: str) -> Any:
    """The first of some attributes that a configuration or one of its parts has."""
    for holder in holders(config):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                return value
    return None


def required(forward: Any) -> list[str]:
    """Names of the arguments that a forward pass cannot do without."""
    parameters = inspect.signature(forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def packed_pixels(vision: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image as rows of patches: (patches, values of a patch), and its grid of patches (frames, rows, columns)."""
    merge = _side(getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_kernel_size", None) or 1)
    channels = next((c for n in ("in_channels", "in_chans", "num_channels") if (c := getattr(vision, n, None))), 3)
    grid = (1, merge, 7 * merge)
    frames = _side(getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1)
    values = int(channels) * frames * _side(vision.patch_size) ** 2
    return torch.randn(math.prod(grid), values, generator=generator), torch.tensor([grid])


def patches(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Images as patches (rows, patches, values of one), what counts of them, and their grids (rows, columns)."""
    values = int(first(config, "num_channels") or 3) * _side(first(config, "patch_size") or 16) ** 2
    return {
        "pixel_values": torch.randn(N_ROWS, 14, values, generator=generator),
        "pixel_attention_mask": torch.ones(N_ROWS, 14, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, 7]] * N_ROWS),
    }


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def frames(config: Any, generator: torch.Generator, n_frames: int = 104) -> Tensor | None:
    """Sound as vectors (rows, frames, width), where the configuration says how wide: 8 frames for each of 13 tokens."""
    width = first(config, *_FRAME)
    return torch.randn(N_ROWS, n_frames, int(width), generator=generator) if isinstance(width, int) else None


def value_of(name: str, config: Any, given: dict[str, Any], generator: torch.Generator) -> Tensor | None:
    """A value of a required argument; None where its name does not say enough.

    Args:
        name: of the argument.
        config: of the model.
        given: other arguments, whose lengths it has to fit.
    """
    main = next((x for x in given.values() if isinstance(x, Tensor) and x.ndim > 1), None)
    n_rows = N_ROWS if main is None else main.shape[0]
    if name.endswith("mask") and main is not None:
        bins = first(config, *_FRAME)
        length = main.shape[-1] if main.ndim == 3 and main.shape[1] == bins else main.shape[1]
        return torch.ones(n_rows, length, dtype=torch.long)
    if name == "spatial_shapes":  # of a tower that takes patches: see `patches`
        return torch.tensor([[2, 7]] * N_ROWS)
    if name == "inputs" and (first(config, "vocab_size") or 0) > 1:  # bytes, as many as there are places for
        length = int(first(config, "max_position_embeddings") or _LENGTH)
        return torch.randint(int(first(config, "vocab_size")), (N_ROWS, length), generator=generator)
    if name == "pixel_values_videos":
        side, n_frames = first(config, "image_size", "crop_size") or 224, first(config, "num_frames", "frames_per_clip")
        return torch.rand(N_ROWS, int(n_frames or 2), 3, _side(side), _side(side), generator=generator)
    if name == "bbox" and main is not None:
        corners = torch.randint(0, 30, (n_rows, main.shape[1], 2), generator=generator)
        return torch.cat([corners, corners + 5], -1)
    if name in ("inputs_embeds", "query_embeds", "hidden_states", "encoder_hidden_states"):
        width = first(config, "hidden_size", "d_model")
        return None if width is None else torch.randn(n_rows, _LENGTH, int(width), generator=generator)
    if name in ("past_values", "latents"):
        length = first(config, "context_length") or _LENGTH
        width = first(config, "num_input_channels", "latent_dim", "input_size") or 1
        return torch.randn(n_rows, int(length), int(width), generator=generator)
    return None
