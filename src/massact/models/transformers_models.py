"""Read a transformers model and its tokenizer, and say plainly why one cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import nn

from massact.models.checkpoint_formats import need_library, silent, unpack
from massact.models.own_code import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    TRUST,
    architectures,
    check_code,
    check_parts,
    needs_code,
    own_class,
    read_with,
)
from massact.records.errors import UserError, causes, first_line
from massact.records.reachability import check_on_hub
from massact.records.user_files import read_given, refuse_special_in
from massact.variants.application import apply_variant
from massact.variants.storage import load_variant, told_changes

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf")

FEW_LAYERS = 1000  # so many are made in seconds, whatever the weights hold

# Files of which a tokenizer needs at least one.
_VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "vocab.*", "*.vocab", "spiece.model", "*.bpe*", "*.tiktoken", "*.spm",
)  # fmt: skip


def read_pretrained(
    spec: str, dtype: torch.dtype | str, revision: str | None, options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Read a model and its tokenizer from a local folder or the Hub, from safetensors.

    Args:
        spec: path of a folder, or a Hub id.
        dtype: of the weights, or "auto" for the stored one.
        revision: branch, tag or commit of a Hub model.
        options: for `from_pretrained`; `allow_pickle` (ours) reads `.bin` files with weights_only=True.

    Raises:
        UserError: no such model, no network, gated, corrupt, or pickle-only weights.
    """
    allow_pickle = bool(options.pop("allow_pickle", False))
    path = Path(spec)
    if looks_local(spec):
        _check_folder(path, allow_pickle)
    common = {"revision": revision, **options} if revision else dict(options)
    config = read_config(spec, common)
    check_parts(spec, common, *TOKENIZER_FILES)  # before the weights are read
    _check_layers(path, config.to_dict())
    read = read_changed if getattr(config, "massact", None) else read_module
    return read(spec, config, dtype, common | {"use_safetensors": not allow_pickle}), _tokenizer(spec, config, common)


def read_config(spec: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """The configuration of a model.

    Args:
        spec: path of a folder, or a Hub id.
        options: for `from_pretrained`.

    Raises:
        UserError: there is none, it cannot be read, or the model needs code of its own, which was not allowed.
    """
    name = os.fspath(spec)
    if not looks_local(name):
        check_on_hub(name, cache=options.get("cache_dir"))
    try:
        config = read_with(transformers.AutoConfig, name, options)
    except UserError:
        raise
    except Exception as error:
        raise plain_error(name, error, looks_local(name)) from error
    check_code(name, config, options)
    return config


def looks_local(spec: str) -> bool:
    """Whether a name can only be meant as a folder."""
    return Path(spec).exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1


def read_tokenizer(spec: str, revision: str | None, options: dict[str, Any]) -> Any:
    """The tokenizer beside the weights of a model, without reading these; None where there is none.

    Args:
        spec, revision, options: see `read_pretrained`.
    """
    common = {k: v for k, v in options.items() if k != "allow_pickle"} | ({"revision": revision} if revision else {})
    try:
        config = read_config(spec, common)
    except Exception:  # whoever reads the model itself says why it cannot be read
        return None
    return _tokenizer(spec, config, common)


def read_module(spec: str, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> nn.Module:
    """Read a model of the class that it was saved from.

    Args:
        spec: path of a folder, or a Hub id.
        config: its configuration.
        dtype: of the weights, or "auto" for the stored one.
        options: for `from_pretrained`.

    Raises:
        UserError: it cannot be read, or weights are missing.
    """
    cls = model_class(config, bool(options.get(TRUST)))
    # A changed model has weights that the plain architecture does not know: no warning about what is filled in later.
    quiet = _without_warnings() if getattr(config, "massact", None) else nullcontext()
    need_library(spec, config, dtype)
    try:
        with without_bars(), quiet, silent(config):
            loading = {"config": config, "dtype": dtype, "output_loading_info": True}
            module, report = read_with(cls, spec, options, **loading)
            unpack(module)
    except UserError:
        raise
    except Exception as error:
        raise plain_error(spec, error, Path(spec).exists()) from error
    _check_report(spec, report)
    return module


def from_pretrained(path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """Read a transformers model with every change that its config.json tells of.

    Args:
        path: a folder or a Hub id.
        dtype: of the weights, or "auto" for the stored one.
        options: for transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: no such model, or its files do not hold what its configuration tells of.
    """
    known = {k: v for k, v in options.items() if k in ("revision", "token", "cache_dir", TRUST)}
    config = read_config(path, known)
    read = read_changed if getattr(config, "massact", None) else read_module
    return read(os.fspath(path), config, dtype, options)


def read_changed(spec: str, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> nn.Module:
    """As `read_module`, for a configuration that tells of changes."""
    if all(change.get("change") == apply_variant.__name__ for change in told_changes(config)):
        return load_variant(read_module(spec, config, dtype, options), spec)
    # Other norms have other names in the files, which the plain architecture would not find.
    trusted = bool(options.get(TRUST))
    cls = model_class(config, trusted)
    wanted = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    plain = isinstance(cls, type) and issubclass(cls, nn.Module)
    model = cls(config) if plain else cls.from_config(config, trust_remote_code=trusted)
    return load_variant(model.to(wanted).eval(), spec)


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Reading a local folder takes a moment; the library's own progress bar would fill the terminal."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _check_folder(path: Path, allow_pickle: bool) -> None:
    if not path.exists():
        raise UserError(
            f"No such model folder: {path}", do="Give a Hub id, a local folder, or nothing (embedded model)."
        )
    refuse_special_in(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is a file, not a model folder.", do="Give the folder that holds config.json, or a .gguf file."
        )
    config = path / "config.json"
    packed = sorted(f.name for f in path.glob("*.gguf"))
    if packed and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(
            f"{path} holds GGUF files: {', '.join(packed[:6])}{', ...' if len(packed) > 6 else ''}.",
            do=f"Name one: --gguf-file {packed[0]}",
        )
    if not config.is_file():
        raise UserError(
            f"{path} is no model folder: it has no config.json.", do="Save the model there with save_pretrained()."
        )
    try:
        parsed = json.loads(read_given(config).decode("utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{config} is not valid JSON.", str(error), "Copy or download it again.") from None
    if isinstance(parsed, dict) and "architecture" in parsed and "model_type" not in parsed:
        raise UserError(f"{path} was saved by timm.", do=f"Say so: timm:local-dir:{path}")
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise UserError(f"{config} names no model_type.", do="Save the model with save_pretrained().")
    if any(path.glob("*.safetensors")):
        return
    others = sorted(f.name for pattern in _WEIGHTS for f in path.glob(pattern))
    if not others:
        raise UserError(f"{path} holds no weights.", do="It needs *.safetensors files.")
    if not allow_pickle:
        raise UserError(
            f"{path} holds only pickle weights ({', '.join(others[:3])}).",
            "Pickle files can run code when they are read.",
            "Convert them with save_pretrained() (safetensors), or pass --allow-pickle to read them with "
            "weights_only=True.",
        )


def _check_layers(folder: Path, config: dict[str, Any]) -> None:
    """Refuse layers that no weights are there for: making millions of them takes hours before anything else does."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    try:
        n_tensors = sum(len(safe_open(file, "pt").keys()) for file in files)
    except (OSError, SafetensorError) as error:
        raise plain_error(str(folder), error, True) from error
    most = max([0, *_layers(config)])
    if files and most > max(FEW_LAYERS, n_tensors):
        raise UserError(f"{folder / 'config.json'} says {most:,} layers, its weights hold {n_tensors:,} tensors.",
                        do="Copy or download the model again.")  # fmt: skip


def _layers(config: Any) -> Iterator[int]:
    """Numbers of layers that a configuration and its parts name."""
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, int) and (name == "n_layer" or name.endswith("layers")):
            yield value
        yield from _layers(value)


def model_class(config: Any, trusted: bool = False) -> Any:
    """The class that a checkpoint was saved from, its own code where that may run, else the bare model of its type."""
    if trusted and (own := own_class(config)) is not None:
        return own
    for name in architectures(config):
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel


def plain_error(spec: str, error: Exception, looks_local: bool) -> UserError:
    """One clear message for whatever transformers, the Hub or safetensors raised."""
    chain = causes(error)
    text = first_line(error)
    kinds = tuple(type(e).__name__ for e in chain)
    everything = " ".join(str(e) for e in chain)
    if any(isinstance(e, hub_errors.GatedRepoError) for e in chain) or "gated repo" in everything:
        return UserError(
            f"Model {spec!r} is gated: you are not allowed to read it yet.",
            text,
            "Accept its terms on its page, then log in with `hf auth login`.",
        )
    if any(isinstance(e, hub_errors.RepositoryNotFoundError) for e in chain):
        return UserError(
            f"There is no model {spec!r} on the Hub, or it is private.",
            text,
            "Check the spelling, or log in with `hf auth login`.",
        )
    if any(isinstance(e, hub_errors.RevisionNotFoundError) for e in chain):
        return UserError(f"Model {spec!r} has no such revision.", text, "Check --revision.")
    if "SafetensorError" in kinds:
        return UserError(f"The weights of {spec!r} are corrupt.", text, "Copy or download them again.")
    if "model type" in everything and "not recognize" in everything.lower():
        return UserError(
            f"Transformers {transformers.__version__} does not know the model type of {spec!r}.",
            text,
            "Install a newer transformers; for a model with its own code pass --trust-remote-code.",
        )
    if "trust_remote_code" in everything:
        return needs_code(spec, "")
    no_safetensors = "safetensors" in everything and (
        "does not appear to have" in everything or "use_safetensors" in everything
    )
    if (
        not looks_local
        and not no_safetensors
        and any(
            isinstance(e, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, OSError)) for e in chain
        )
    ):
        offline = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return UserError(
            f"Model {spec!r} is neither a local folder nor in the cache, and the Hub cannot be reached{offline}.",
            text,
            "Check the name and the network, or give a local folder.",
        )
    if no_safetensors:
        return UserError(
            f"Model {spec!r} offers only pickle weights.",
            "Pickle files can run code when they are read.",
            "Convert them with save_pretrained(), or pass --allow-pickle (weights_only=True).",
        )
    return UserError(
        f"Model {spec!r} cannot be read.",
        f"{type(error).__name__}: {text}",
        "Check that the folder or id holds a complete transformers model.",
    )


def _check_report(spec: str, report: dict[str, Any]) -> None:
    """Weights that were not in the files would be random: refuse, nothing measured on them is true."""
    missing = sorted(report.get("missing_keys", ()))
    mismatched = sorted(str(k) for k in report.get("mismatched_keys", ()))
    # Pooler and classification heads are not on the residual stream; checkpoints often come without them.
    missing = [k for k in missing if not any(w in k for w in ("pooler", "classifier", "score", "head", "predictions"))]
    if missing or mismatched:
        first = (missing or mismatched)[0]
        raise UserError(
            f"The weights of {spec!r} do not fit its config.json: {len(missing)} missing, "
            f"{len(mismatched)} of another shape (first: {first}).",
            "Missing weights would be filled with random numbers.",
            "Copy or download the model again.",
        )


def read_processor(spec: str, revision: str | None, options: dict[str, Any]) -> Any:
    """What prepares images for a model: its processor, or the fields of its file, or None where there is none.

    Of a mixed model the processor of images and text, where it can be made.

    Processors that are written for torchvision alone cannot be made without it; their preprocessor_config.json says
    all the same what they do.

    Args:
        spec, revision, options: as for `read_pretrained`.
    """
    common = {"revision": revision} if revision else {}
    asked = common | {TRUST: options.get(TRUST, False)}
    check_parts(spec, asked, *PROCESSOR_FILES)
    try:
        both = read_with(transformers.AutoProcessor, spec, asked, backend="pil")
        if hasattr(both, "image_processor") and hasattr(both, "tokenizer"):
            return both
    except UserError:
        raise
    except Exception:  # only images, or parts that need torchvision
        pass
    try:
        return read_with(transformers.AutoImageProcessor, spec, asked, backend="pil")
    except UserError:
        raise
    except Exception:  # no file, no network, no such class: what its file says is tried next
        pass
    try:
        found = transformers.utils.cached_file(spec, "preprocessor_config.json", **common)
        fields = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    except Exception:
        return None
    return fields if isinstance(fields, dict) else None


def read_extractor(spec: str, revision: str | None, options: dict[str, Any]) -> Any:
    """The feature extractor of a model of sound, or None where there is none.

    Args:
        spec, revision, options: as for `read_pretrained`.
    """
    asked = ({"revision": revision} if revision else {}) | {TRUST: options.get(TRUST, False)}
    check_parts(spec, asked, *PROCESSOR_FILES)
    try:
        return read_with(transformers.AutoFeatureExtractor, spec, asked)
    except UserError:
        raise
    except Exception:  # no file, no network, no such class: a corpus of recordings says what is missing
        return None


def _tokenizer(spec: str, config: Any, common: dict[str, Any]) -> Any:
    """The tokenizer beside the weights; None for models without text, and where there is none.

    From a folder without tokenizer files transformers makes an empty tokenizer of the model's family, which turns
    any text into unknown tokens: that one is not taken. A text corpus then says that there is no tokenizer.
    """
    try:
        tokenizer = read_with(transformers.AutoTokenizer, spec, common)
    except UserError:
        raise
    except Exception:
        return None
    text_config = getattr(config, "text_config", None)
    words = getattr(config, "vocab_size", None) or getattr(text_config, "vocab_size", None) or 0
    folder = Path(spec)
    empty = 10 * len(tokenizer) < words or (folder.is_dir() and not any(f for p in _VOCABULARY for f in folder.glob(p)))
    return None if empty else tokenizer
