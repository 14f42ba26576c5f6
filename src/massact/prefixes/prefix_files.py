"""A folded model as files: an ordinary folder, the keys and values of the prefix for serving engines, and its ids."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from massact.corpora import Corpus
from massact.models import Model, with_attention
from massact.models.transformers_models import without_bars
from massact.prefixes.construction import Folded, keys_and_values
from massact.records.errors import UserError

MODEL, CACHE, RECORD = "model", "prefix_kv.safetensors", "prefix.json"


def save_folded(model: Model, folded: Folded, corpus: Corpus, folder: str | Path) -> list[str]:
    """Write FOLDER/model, FOLDER/prefix_kv.safetensors and FOLDER/prefix.json.

    Args:
        model: that was folded; corpus: whose tokens are spelled.

    Returns:
        What a user of the files must know.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        module: Any = folded.model.module
        with without_bars():
            module.save_pretrained(path / MODEL)
        notes = _save_tokenizer(model, folded, path / MODEL)
        _save_cache(model, folded, path / CACHE)
        record = json.dumps(record_of(model, folded, corpus), indent=2, ensure_ascii=False)
        (path / RECORD).write_text(record + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written.", error.strerror or str(error)) from None
    return notes


def record_of(model: Model, folded: Folded, corpus: Corpus) -> dict[str, Any]:
    """What prefix.json says: which prefix, of which model, at which positions, and how each file is used."""
    info, n = model.info(), folded.n
    tokens = [corpus.spelling.string(i) if corpus.spelling else f"id {i}" for i in folded.ids]
    return {
        "ids": list(folded.ids), "tokens": tokens, "n": n,
        "model": {"id": info.id, "weights_sha256": info.weights_sha256, "dtype": info.dtype},
        "positions": {"prefix": list(range(n)), "text_from": n},
        "use": {
            MODEL: "from massact.variants.storage import load_variant; model = load_variant(AutoModelForCausalLM."
                   f"from_pretrained('{MODEL}')). Text is given without the prefix, and without BOS in front.",
            CACHE: "layers.{i}.key and layers.{i}.value, (key-value heads, n, width), keys after rotary at positions "
                   f"0..{n - 1}: the start of the cache of every prompt, whose text counts from position {n}. Of the "
                   "original model.",
            "ids": "Where neither is taken: these ids in front of every prompt of the original model.",
        },
    }  # fmt: skip


def _save_cache(model: Model, folded: Folded, file: Path) -> None:
    """Keys and values of the prefix at positions 0..n-1, as the original model keeps them."""
    seen = with_attention(model)
    pairs = keys_and_values(seen, folded.ids)
    tensors = {}
    for site, place in sorted(seen.anatomy.attentions.items()):
        for name, x in zip(("key", "value"), pairs[place.module], strict=True):
            tensors[f"layers.{site.layer - 1}.{name}"] = x.detach().cpu().contiguous()
    save_file(tensors, str(file), metadata={"ids": json.dumps(list(folded.ids)), "format": "pt"})


def _save_tokenizer(model: Model, folded: Folded, folder: Path) -> list[str]:
    """The tokenizer beside the weights, without a BOS of its own where that is a slot now."""
    if model.tokenizer is None:
        return ["The model came without a tokenizer: none is saved with it."]
    tokenizer: Any = copy.deepcopy(model.tokenizer)
    first = _first(tokenizer)
    if first in folded.ids and hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = False  # whatever it says: what it does is looked at below
    tokenizer.save_pretrained(folder)
    if first in folded.ids and _first(tokenizer) == first:
        return ["Its tokenizer goes on putting a token in front that is a slot now: give text without special tokens "
                "(add_special_tokens=False; --bos never)."]  # fmt: skip
    return []


def _first(tokenizer: Any) -> int | None:
    """The special token that a tokenizer puts in front of a text by itself."""
    ids = tokenizer("a").get("input_ids") or [None]
    return ids[0] if ids[0] in set(getattr(tokenizer, "all_special_ids", ())) else None
