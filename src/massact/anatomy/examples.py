"""A short example input for any model: what to run while a model is watched and proved."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.arguments import N_ROWS, first, frames, holders, packed_pixels, patches, required, value_of
from massact.corpora.modalities import token_types
from massact.records.errors import UserError

N_TOKENS = 13  # a prime that is no usual width, so that a product over tokens is told from one over features


def _ids(config: Any, n_tokens: int, generator: torch.Generator) -> Tensor:
    size = int(first(config, "vocab_size") or 0)
    if size < 2:
        raise UserError("The model's vocabulary size is unknown.", do="Give inputs={...} to load().")
    # Padding would be masked, and a placeholder for an image asks for that image.
    special = {
        value
        for holder in holders(config)
        for name, value in getattr(holder, "__dict__", {}).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    allowed = torch.tensor([i for i in range(min(size, 512)) if i not in special] or [0])
    return allowed[torch.randint(len(allowed), (2, n_tokens), generator=generator)]


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    size = first(config, "image_size") or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return torch.rand(2, int(first(config, "num_channels") or 3), height, width, generator=generator)


def _rand(cfg: dict[str, Any], seed: int) -> Tensor:
    """Two images of the size that a model of timm takes."""
    return torch.rand(2, *cfg["input_size"], generator=torch.Generator().manual_seed(seed))


def timm_cfg(module: nn.Module) -> dict[str, Any] | None:
    """How a model of timm says that its images are prepared; its size is that of the patches it was built for.

    Args:
        module: of timm, or a wrapper whose configuration holds a `pretrained_cfg`.
    """
    inner = getattr(module, "timm_model", module)
    for holder in (module, getattr(module, "config", None)):
        cfg = getattr(holder, "pretrained_cfg", None)
        if isinstance(cfg, Mapping) and "input_size" in cfg:
            size = getattr(getattr(inner, "patch_embed", None), "img_size", None)
            built = {} if size is None else {"input_size": (cfg["input_size"][0], *size)}
            return dict(cfg) | built
    return None


def example_inputs(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one short forward pass of a model, from its configuration.

    Args:
        model: a transformers model of any modality, or a model of timm.
        seed: of the random tokens, pixels or features.

    Raises:
        UserError: the model is from neither of them, so its inputs must be given.
    """
    config, cfg = getattr(model, "config", None), timm_cfg(model)
    if cfg is not None and not hasattr(model, "main_input_name"):
        return {next(iter(inspect.signature(model.forward).parameters)): _rand(cfg, seed)}
    if config is None or not hasattr(model, "main_input_name"):
        raise UserError(
            f"massact does not know what {type(model).__name__} takes.",
            "It is not a model of transformers or timm.",
            "Give one short example: load(model, inputs={'name': tensor, ...}).",
        )
    if "unimplemented" in getattr(model.forward, "__name__", ""):
        raise UserError(
            f"{type(model).__name__} has no forward pass of its own.",
            "It holds models that run one after another when it generates.",
            "Load one of its parts: load(model.NAME).",
        )
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if not isinstance(main, str):  # several, the first of which it is about
        main = main[0]
    needed = required(model.forward)
    grid = next((n for n in needed if n.endswith("grid_thw")), None)
    given: dict[str, Any] = {}
    if grid is not None and hasattr(config, "patch_size"):  # a tower that takes patches of any number of images
        given[needed[0]], given[grid] = packed_pixels(config, generator)
    elif "pixel_values" in accepted and (
        "pixel_values" in needed or main == "pixel_values" or "vision_config" in getattr(config, "sub_configs", {})
    ):
        given["pixel_values"] = _pixels(config, generator) if cfg is None else _rand(cfg, seed)
    if main == "input_features":
        frames = 2 * int(first(config, "max_source_positions") or 1500)
        given["input_features"] = torch.randn(2, int(first(config, "num_mel_bins") or 80), frames, generator=generator)
    if main == "input_values":
        given["input_values"] = _sound(config, generator)
    wrapped = any(p.kind is p.VAR_POSITIONAL for p in accepted.values())  # forward(*args, **kwargs) around a model
    if main == "input_ids" and (main in accepted or wrapped):
        given["input_ids"] = _ids(config, _room(config, N_TOKENS), generator)
    if "decoder_input_ids" in accepted:
        given["decoder_input_ids"] = _ids(config, _room(config, N_TOKENS - 2), generator)
    for name in [*needed, *([main] if not given and main in accepted else [])]:
        if name not in given:
            value = (
                _ids(config, N_TOKENS, generator)
                if name.endswith("input_ids")
                else value_of(name, config, given, generator)
            )
            given |= {} if value is None else {name: value}
    if not given or not set(needed) <= set(given):
        needed = [n for n in needed if n not in given]
        raise UserError(
            f"massact does not know how to make {' and '.join(needed or [main])} for {type(model).__name__}.",
            "Its configuration does not say what it takes.",
            "Give one short example: load(model, inputs={'name': tensor, ...}).",
        )
    return given | fixed_arguments(model) | _places(model, given)


def placeholders_of(config: Any) -> dict[int, str]:
    """Token ids that stand for something else than text, by the names of a configuration: id -> image, video, audio."""
    found: dict[int, str] = {}
    for holder in holders(config):
        for kind in ("image", "video", "audio"):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    found.setdefault(value, kind)
    return found


def mixed_example(model: nn.Module, seed: int = 0) -> dict[str, Any] | None:
    """One image and its placeholders among random tokens, for a model that puts what its tower gives in their place.

    How many placeholders an image takes is asked of the model itself (`get_image_features`).

    Returns:
        The example; None where the model has no placeholders for images, or its tower needs more than pixels.
    """
    config, accepted = model.config, inspect.signature(model.forward).parameters
    ids = [i for i, kind in placeholders_of(config).items() if kind == "image"]
    if not ids or not {"input_ids", "pixel_values"} <= set(accepted) or not hasattr(model, "get_image_features"):
        return None
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {"pixel_values": _pixels(config, generator)}
    if "image_grid_thw" in accepted:
        pixels, grid = packed_pixels(config.vision_config, generator)
        given = {"pixel_values": pixels, "image_grid_thw": grid}
    device = device_of(model)
    try:
        with torch.inference_mode():
            features = model.get_image_features(**to_device(given, device, float_dtype(model)), return_dict=True)
    except Exception:  # it needs more than pixels (the sizes of the images before they were cut into tiles)
        return None
    features = features.pooler_output
    rows = list(features) if isinstance(features, list | tuple) else [features.reshape(-1, *features.shape[-2:])[0]]
    n_image = rows[0].reshape(-1, rows[0].shape[-1]).shape[0]
    n_images = 1 if "image_grid_thw" in given else 2
    text = _ids(config, _prime_from(n_image + 6) - n_image, generator)[:n_images]
    image = torch.full((n_images, n_image), ids[0])
    given["input_ids"] = torch.cat([text[:, :3], image, text[:, 3:]], 1)
    if "mm_token_type_ids" in accepted:
        given["mm_token_type_ids"] = token_types(given["input_ids"], placeholders_of(config))
    return given | fixed_arguments(model)


def _prime_from(n: int) -> int:
    """The least prime from n on: a number of tokens that is no usual width."""
    return next(k for k in range(max(n, 2), 2 * n + 3) if all(k % d for d in range(2, math.isqrt(k) + 1)))


def _room(config: Any, n_tokens: int) -> int:
    """Tokens of the example: fewer in a context too short for them; some tables keep two places for padding.

    More where attention is sparse by blocks: on a text of few blocks such a model attends to everything.
    """
    block, drawn = (first(config, name) for name in ("block_size", "num_random_blocks"))
    if isinstance(block, int) and isinstance(drawn, int):
        n_tokens = _prime_from((5 + 2 * drawn) * block + 8)  # a proof also runs a few tokens less
    places = first(config, "max_position_embeddings", "n_positions", "n_ctx")
    short = isinstance(places, int) and 0 < places < n_tokens + 2  # some say -1 for any length
    return max(2, places - 2) if short else n_tokens


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    """A spectrogram where the configuration gives its size, else a wave long enough for a few tokens."""
    frames, bins = first(config, "max_length"), first(config, "num_mel_bins")
    if frames and bins and first(config, "conv_stride") is None:
        return torch.randn(2, int(frames), int(bins), generator=generator)
    return torch.randn(2, N_TOKENS * math.prod(first(config, "conv_stride") or (320,)) + 400, generator=generator)


def example_variants(model: nn.Module, seed: int = 0) -> list[dict[str, Any]]:
    """What to try, in this order, where a configuration does not say which of several layouts the model takes.

    An image and its placeholders in the text, where the model has such; the usual example; text alone (an image may
    need what only its processor knows); a video in place of an image; sound with its frames first.
    """
    usual = example_inputs(model, seed)
    variants = [usual]
    if "pixel_values" in usual and "input_ids" in usual:
        mixed = mixed_example(model, seed)
        variants = [mixed, usual] if mixed is not None else variants
        variants.append({k: v for k, v in usual.items() if k != "pixel_values"})
    elif "pixel_values" in usual and usual["pixel_values"].ndim == 4:
        frames = int(first(model.config, "num_frames") or 2)
        pixels = usual["pixel_values"]
        variants.append(usual | {"pixel_values": pixels[:, None].expand(-1, frames, -1, -1, -1).contiguous()})
    if "input_features" in usual:
        variants.append(usual | {"input_features": usual["input_features"].transpose(1, 2)[:, :128].contiguous()})
    return [*variants, *_less_usual(model, usual, seed)]


def _less_usual(model: nn.Module, usual: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """More to try: tokens beside pixels, frames of another width with a mask, sound beside text, tokens of several
    codebooks, boxes of words on a page.
    """
    config, accepted = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    if "input_ids" in accepted and "input_ids" not in usual and first(config, "vocab_size"):
        ids = _ids(config, _room(config, N_TOKENS), generator)
        found.append({k: v for k, v in usual.items() if k != "decoder_input_ids"} | {"input_ids": ids})
        found.append(usual | {"input_ids": ids})
    if "input_values" in accepted and not {"input_ids", "input_values", "input_features", "pixel_values"} & set(usual):
        found.append(usual | {"input_values": _sound(config, generator)})
    sound = frames(config, generator)
    if sound is not None:
        found += _sounds(accepted, usual, sound)
        # Frames may be stacked before they are given: as wide as what the first projection reads.
        wide = next((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), sound.shape[-1])
        if wide != sound.shape[-1] and "input_features" in usual:
            found.append(usual | {"input_features": torch.randn(*sound.shape[:2], wide, generator=generator)})
    if "input_values" in usual and usual["input_values"].ndim == 2:
        found.append(usual | {"input_values": usual["input_values"][:, None]})
    decoder = getattr(config, "decoder_config", None)
    n_books = int(first(config, "num_codebooks", "n_codebooks") or getattr(decoder, "num_channels", 0))
    for name in [n for n in ("decoder_input_ids", "input_ids") if n_books and n in usual]:
        ids = usual[name].repeat_interleave(n_books, 0)
        found += [usual | {name: ids}, usual | {name: ids.reshape(N_ROWS, n_books, -1).transpose(1, 2).contiguous()}]
    if {"pixel_values", "pixel_attention_mask", "spatial_shapes"} <= set(accepted):  # patches of images of any shape
        found.append({k: v for k, v in usual.items() if k != "pixel_values"} | patches(config, generator))
    if "bbox" in accepted and "input_ids" in usual:
        found.append(usual | {"bbox": value_of("bbox", config, {"input_ids": usual["input_ids"]}, generator)})
    return found


def _sounds(accepted: Iterable[str], usual: dict[str, Any], sound: Tensor) -> list[dict[str, Any]]:
    """Layouts of frames of sound (rows, frames, width), alone and with a mask that hides none of them."""
    found = []
    masks = [n for n in accepted if n in ("input_features_mask", "attention_mask", "padding_mask")]
    if "input_features" in usual:
        features = usual["input_features"]
        found += [usual | {m: torch.ones(N_ROWS, features.shape[-1], dtype=torch.long)} for m in masks[:1]]
    for name in [n for n in ("input_features", "input_values") if n in accepted]:
        found.append(usual | {name: sound})
        found += [usual | {name: sound, m: torch.ones(sound.shape[:2], dtype=torch.long)} for m in masks[:1]]
        if name == "input_features" and "input_ids" in usual:
            found.append(usual | {name: sound[:, None]})
            found.append(usual | {name: sound.transpose(1, 2).contiguous()})
    return found


def fixed_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments that never change a hidden state but cost time and memory: no key-value cache."""
    parameters = inspect.signature(model.forward).parameters
    by_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    cached = (
        hasattr(getattr(model, "config", None), "use_cache") and getattr(model, "main_input_name", "") != "pixel_values"
    )
    return {"use_cache": False} if "use_cache" in parameters or (by_keyword and cached) else {}


def _places(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Masked autoencoders shuffle their patches by random noise: fix it, so that two runs can be compared."""
    if "noise" not in inspect.signature(model.forward).parameters:
        return {}
    patch = first(model.config, "patch_size") or 16
    if not isinstance(patch, int):
        return {}
    batch, _, height, width = given["pixel_values"].shape
    n = (height // patch) * (width // patch)
    return {"noise": torch.rand(batch, n, generator=torch.Generator().manual_seed(0))}


def whole_images(part: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """For masked autoencoders that mask nothing (mask_ratio 0): what keeps the patches in order."""
    if getattr(getattr(part, "config", None), "mask_ratio", None) != 0 or "noise" in given:
        return {}
    shuffled = _places(part, given) if "pixel_values" in given else {}
    return {name: x.sort(dim=1).values for name, x in shuffled.items()}


def float_dtype(module: nn.Module) -> torch.dtype:
    """What a model computes in: the dtype of its first parameter that is not packed into 8 bits or fewer."""
    dtypes = (p.dtype for p in module.parameters())
    return next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter that is not brought in when it is needed."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def to_device(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs on the model's device, floating ones in its dtype."""
    return {
        k: (v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v)
        for k, v in inputs.items()
    }
