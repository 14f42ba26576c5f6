"""Models in GGUF files, as llama.cpp runs them: found, refused or read by transformers, with their weights unpacked."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from torch import nn

from massact.models.gguf_config import settle
from massact.models.gguf_header import GGUF, GgufHeader, need_package, read_header
from massact.models.transformers_models import model_class, plain_error
from massact.records.errors import UserError, first_line, near
from massact.records.reachability import check_on_hub
from massact.records.user_files import refuse_special

# The first pre-tokenizers of llama.cpp that split a text as GPT-2 does, which is what transformers does by default.
_AS_GPT2 = {None, "default", "gpt-2"}


def read_gguf(
    spec: str, dtype: torch.dtype | str, revision: str | None, options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Read a model and its tokenizer from a GGUF file.

    The weights are unpacked into `dtype`; "auto" is float32, which holds every value of every type exactly.

    Args:
        spec: path of the file, or owner/name/file.gguf on the Hub.
        dtype: of the weights, or "auto".
        revision: branch, tag or commit of a Hub model.
        options: for `from_pretrained`.

    Returns:
        The module and its tokenizer or None; the module's `massact_gguf` is what a run keeps of the file.

    Raises:
        UserError: no such file, a part, damaged, or of an architecture that is not read (wholly).
    """
    need_package()
    path = _located(spec, revision, options)
    header = read_header(path)
    with _once():
        try:
            module, report, settled = _filled(header, dtype, options)
        except UserError:
            raise
        except Exception as error:
            raise _unread(header, error) from error
    _check_whole(header, module, report)
    # It is a plain model now; what says otherwise keeps it from being saved.
    module.is_quantized = False
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    tokenizer, notes = _tokenizer(header)
    module.massact_gguf = header.record() | {"settled": settled, "notes": notes}
    return module, tokenizer


def _filled(header: GgufHeader, dtype: torch.dtype | str, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """The model, what transformers reports of reading it, and what was put right in its configuration."""
    where: dict[str, Any] = {"gguf_file": header.path.name}
    config = transformers.AutoConfig.from_pretrained(header.path.parent, trust_remote_code=False, **where)
    settled = settle(config, header)
    ours = {k: v for k, v in options.items() if k not in ("trust_remote_code", "allow_pickle")}
    # Architectures that transformers could run packed are unpacked like the others, with no kernel from the Hub.
    packed = getattr(transformers, "GgufConfig", None)
    unpack = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    asked: dict[str, Any] = {"dtype": torch.float32 if dtype == "auto" else dtype, "output_loading_info": True}
    module, report = model_class(config).from_pretrained(
        header.path.parent, config=config, trust_remote_code=False, **(asked | unpack | where | ours)
    )
    return module, report, settled


@contextlib.contextmanager
def _once() -> Iterator[None]:
    """Without bars over every tensor, and with the header and the table of names read once.

    The package takes seconds for a vocabulary, and transformers makes the table anew for every module of a model.
    """
    import gguf

    plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in plain.items():
        setattr(gguf, name, functools.cache(function))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)


def _located(spec: str, revision: str | None, options: dict[str, Any]) -> Path:
    """The file on this machine, downloaded where it is on the Hub.

    Raises:
        UserError: there is none; says which others lie there.
    """
    path = Path(spec).expanduser()
    refuse_special(path)
    if path.is_file():
        if revision is not None:
            raise UserError(f"The file {spec!r} has no revisions.", f"--revision {revision!r} would change nothing.",
                            "Leave it out.")  # fmt: skip
        return path
    owner, *rest = spec.split("/")
    on_hub = len(rest) > 1 and owner not in ("", ".", "..", "~") and not path.parent.is_dir()
    if not on_hub:
        raise _absent(path)
    repository, name = f"{owner}/{rest[0]}", "/".join(rest[1:])
    known = {k: options[k] for k in ("token", "cache_dir", "local_files_only") if k in options}
    check_on_hub(repository, cache=options.get("cache_dir"))
    try:
        found = transformers.utils.cached_file(repository, name, revision=revision, **known)
    except Exception as error:
        chain = [error, error.__cause__, error.__context__]
        away = hub_errors.LocalEntryNotFoundError  # also an EntryNotFoundError: no network, and not in the cache
        if any(isinstance(e, hub_errors.EntryNotFoundError) and not isinstance(e, away) for e in chain):
            raise UserError(f"{repository} on the Hub has no file {name!r}.", do="Look at its list.") from error
        raise plain_error(repository, error, False) from error
    return Path(str(found))


def _absent(path: Path) -> UserError:
    if not path.parent.is_dir():
        return UserError(f"No such GGUF file: {path}", do="Give a path, or owner/name/file.gguf of the Hub.")
    here = sorted(f.name for f in path.parent.glob(f"*{GGUF}"))
    return UserError(f"There is no {path.name!r} in {str(path.parent)!r}.",
                     do=near(path.name, here) if here else "It holds no GGUF files.")  # fmt: skip


def _unread(header: GgufHeader, error: Exception) -> UserError:
    text = first_line(error, "")
    if "not supported yet" in text and "architecture" in text:
        return UserError(
            f"{header.path} is of the architecture {header.architecture!r}.",
            f"Transformers {transformers.__version__} does not read it from GGUF.",
            "Give the model as a folder of safetensors or by its Hub id.",
        )
    return UserError(
        f"Transformers {transformers.__version__} cannot read {header.path} (architecture {header.architecture!r}).",
        f"{type(error).__name__}: {text}",
        "Give the model as a folder of safetensors or by its Hub id.",
    )


def _check_whole(header: GgufHeader, module: nn.Module, report: dict[str, Any]) -> None:
    """Refuse a model that is not the one in the file: weights made up, or left in the file.

    Transformers passes over tensors that its architecture has no place for (biases, experts), without a word: the
    number of values tells.
    """
    do = "Give the model as a folder of safetensors or by its Hub id."
    lacking = sorted(map(str, [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]))
    if lacking:
        raise UserError(f"{header.path} does not fill the {type(module).__name__} that transformers makes of it.",
                        f"{len(lacking):,} weights would be random numbers (first: {lacking[0]}).", do)  # fmt: skip
    state = {t.data_ptr(): t.numel() for t in module.state_dict().values() if t.numel()}
    n_layers = getattr(module.config.get_text_config(), "num_hidden_layers", math.inf)
    tied = module.get_output_embeddings() is not None and (
        module.get_output_embeddings().weight is module.get_input_embeddings().weight
    )
    n_stored = 0
    for tensor in header.tensors:
        place = tensor.name.split(".")
        further = place[0] == "blk" and int(place[1]) >= n_layers  # a block that predicts tokens after the next
        twice = tied and tensor.name == "output.weight"
        if not further and not twice and not tensor.name.startswith("rope_f"):  # see `settle`
            n_stored += math.prod(tensor.shape)
    n_read = sum(state.values())
    if n_stored > n_read:
        raise UserError(f"Transformers {transformers.__version__} leaves weights of {header.path} unread.",
                        f"It holds {n_stored:,} values, {type(module).__name__} {n_read:,}.", do)  # fmt: skip


def _tokenizer(header: GgufHeader) -> tuple[Any, list[str]]:
    """The tokenizer in a file and what must be said of it; None where there is none that transformers can make."""
    if "tokenizer.ggml.tokens" not in header.settings:
        return None, ["The file holds no tokenizer."]
    try:
        with _once():
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
                header.path.parent, gguf_file=header.path.name, trust_remote_code=False
            )
    except Exception as error:
        return None, [f"Transformers cannot make the tokenizer of the file ({type(error).__name__}: {error})."]
    notes, split = [], header.settings.get("tokenizer.ggml.pre")
    if header.settings.get("tokenizer.ggml.model") == "gpt2" and split not in _AS_GPT2 | _known_splits():
        notes.append(f"The file names the pre-tokenizer {split!r}, which transformers does not know: text is split as "
                     "GPT-2's, so that a few tokens may be others than in llama.cpp.")  # fmt: skip
    return tokenizer, notes


def _known_splits() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # transformers before 5.20 keeps no such table
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)
