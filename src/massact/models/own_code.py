"""Code that comes with a model: it runs where the user says so, and nobody is asked for it on stdin.

transformers asks "run the custom code? [y/N]" where `trust_remote_code` is not stated, and takes a line of stdin for
the answer. Whatever is read by it is read through `read_with`, which always states it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from massact.records.errors import UserError
from massact.records.user_files import refuse_special_in

TRUST = "trust_remote_code"
FLAG = "--trust-remote-code"
TOKENIZER_FILES = ("tokenizer_config.json",)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def read_with(cls: Any, spec: Any, options: Mapping[str, Any], **more: Any) -> Any:
    """`cls.from_pretrained(spec, ...)`, with `trust_remote_code` stated: False unless the options say True.

    Args:
        cls: a class of transformers.
        spec: path of a folder, or a Hub id.
        options, more: for `from_pretrained`.

    Raises:
        UserError: it needs code of its own, and this was not allowed, or the folder holds a pipe or device.
    """
    trusted = bool(options.get(TRUST, False))
    refuse_special_in(spec)
    try:
        return cls.from_pretrained(spec, **(dict(options) | more | {TRUST: trusted}))
    except ValueError as error:
        if not trusted and TRUST in str(error):
            raise needs_code(str(spec), named_code(spec, options)) from error
        raise


def needs_code(spec: str, code: str) -> UserError:
    """The message of a model that was not allowed to run its code.

    Args:
        spec: what it was asked for by.
        code: which class of which file; "" where that is not known.
    """
    return UserError(
        f"Model {spec!r} needs code of its own to run{f': {code}' if code else '; its files do not say which'}.",
        "Code of a model can do anything on this machine, so it runs only where that is asked for.",
        f"Read that code; if you trust it, pass {FLAG}.",
    )


def check_code(spec: str, config: Any, options: Mapping[str, Any]) -> None:
    """Refuse a model whose own code is another class than any of transformers: read without it, it is another model.

    Args:
        spec: path of a folder, or a Hub id.
        config: its configuration.
        options: those it is read with; with trust_remote_code nothing is refused.

    Raises:
        UserError: names the class and the flag.
    """
    if options.get(TRUST):
        return
    saved_by_known = any(_known(name) for name in architectures(config))
    needed = ("AutoConfig", *(() if saved_by_known else ("AutoModel",)))
    if code := _unknown({auto: named for auto, named in entries(config).items() if auto.startswith(needed)}):
        raise needs_code(spec, code)


def check_parts(spec: str, options: Mapping[str, Any], *files: str) -> None:
    """As `check_code`, of the tokenizer or processor: a file of theirs may name a class of its own.

    Args:
        spec, options: see `check_code`.
        files: `TOKENIZER_FILES` or `PROCESSOR_FILES`.

    Raises:
        UserError: names the class and the flag.
    """
    if not options.get(TRUST) and (code := named_code(spec, options, *files)):
        raise needs_code(spec, code)


def named_code(spec: str, options: Mapping[str, Any], *files: str) -> str:
    """The first class in auto_map of the files of a model that transformers does not have, and its file; "" for none.

    Args:
        spec, options: see `check_code`.
        files: which; nothing: every one that may name code.
    """
    hub = {k: v for k, v in options.items() if k in ("revision", "token", "cache_dir")}
    for file in files or ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES):
        try:
            fields = json.loads(Path(str(cached_file(spec, file, **hub))).read_text(encoding="utf-8"))
        except Exception:  # no such file, no network, no JSON: reading the part itself says it
            continue
        if code := _unknown(entries(fields)):
            return code
    return ""


def entries(config: Any) -> dict[str, Any]:
    """What auto_map of a configuration names: Auto class -> 'file.Class'; {} where there is none."""
    found = config.get("auto_map") if isinstance(config, Mapping) else getattr(config, "auto_map", None)
    if isinstance(found, list | tuple):  # of a tokenizer, as files were once written
        return {"AutoTokenizer": list(found)}
    return dict(found) if isinstance(found, Mapping) else {}


def architectures(config: Any) -> list[str]:
    """Names of classes that a checkpoint was saved from."""
    names = getattr(config, "architectures", None)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def own_class(config: Any) -> Any:
    """The Auto class by which the model's own code is reached, of those that its auto_map names; None for none.

    It is the one whose class the checkpoint was saved from; where that is no class of transformers either, the one with
    a language-model head, else any.
    """
    named = {k: str(v) for k, v in entries(config).items() if k.startswith("AutoModel") and hasattr(transformers, k)}
    saved = architectures(config)
    order = [auto for auto, one in named.items() if one.rpartition(".")[2] in saved]
    if not any(hasattr(transformers, name) for name in saved):
        order += ["AutoModelForCausalLM", "AutoModel", *named]
    return next((getattr(transformers, auto) for auto in order if auto in named), None)


def _unknown(auto_map: Mapping[str, Any]) -> str:
    """The first class that transformers does not have, and its file; of a tokenizer two are named, slow and fast."""
    named = ((auto, one) for auto, x in auto_map.items() for one in (x if isinstance(x, list) else [x]))
    for auto, one in named:
        repository, _, place = str(one or "").rpartition("--")
        file, _, name = place.rpartition(".")
        if name and not _known(name):
            where = f" of the repository {repository}" if repository else ""
            return f"its {auto} is {name} in {file.replace('.', '/')}.py{where}"
    return ""


def _known(name: str) -> bool:
    """Whether transformers has a class of this name; some models write theirs with other capitals (MPT)."""
    return name.lower() in _names()


@cache
def _names() -> frozenset[str]:
    # `dir` gives the same, and looks every name up among all others: most of a second.
    return frozenset(name.lower() for name in transformers.__all__)
