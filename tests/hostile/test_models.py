"""Model folders, damaged: configurations, tokenizers and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import massact as ma
from massact.records.errors import MassactError
from massact.training import apply_variant
from tests.families import build
from tests.hostile.damage import cases, json_text, limits, of_bytes, of_json

FAMILIES = ("llama", "gpt2", "vit", "kv-bias")
EMBEDDED = Path(ma.__file__).parent / "models" / "embedded"
SIZES = [0, -1, 1, 3, 7, 10**9, 2**31, 2**40, 10**30]
TEXT = "A kettle sings. Nobody hears it, but the cat does."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved model of each family."""
    place = tmp_path_factory.mktemp("models")
    for name in FAMILIES[:-1]:
        build(name).save_pretrained(place / name)
    apply_variant(build("llama"), "kv-bias").save_pretrained(place / "kv-bias")
    (place / "text").mkdir()
    for file in EMBEDDED.iterdir():
        shutil.copy(file, place / "text")
    return place


def loaded(folder: Path, text: str | None = None) -> None:
    """Load a model, and scan a little of it: either works or is refused."""
    torch.manual_seed(0)
    try:
        with limits():
            model = ma.load(folder)
            if text is not None:
                ma.scan(model, text, n_sequences=1, seq_len=8, null=False, bos_contrast=False)
    except MassactError as error:
        assert error.what


def sized(rng: Random, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with an impossible size."""
    names = sorted(k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool))
    return config | {rng.choice(names): rng.choice(SIZES)}


@settings(max_examples=cases("configurations"))
@given(st.sampled_from(FAMILIES), st.randoms(use_true_random=False))
def test_damaged_configurations_are_read_or_refused(folders: Path, family: str, rng: Random) -> None:
    file = folders / family / "config.json"
    text = file.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
        changed = json.dumps(sized(rng, config)) if rng.randrange(2) else json_text(rng, text)
        file.write_text(changed, encoding="utf-8")
        loaded(folders / family)
    finally:
        file.write_text(text, encoding="utf-8")


def words_of(rng: Random, text: str) -> str:
    """A tokenizer with other words or ids, or parts that are not what they should be."""
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    kind, word = rng.randrange(6), rng.choice(sorted(vocabulary))
    if kind == 0:
        vocabulary[word] = rng.choice([-1, 2048, 10**6, 2**31, 2**40, 0, 1.5, "x", None])
    elif kind == 1:
        tokenizer["model"]["vocab"] = {w: i + rng.choice([1, 2000, 10**6]) for w, i in vocabulary.items()}
    elif kind == 2:
        for gone in sorted(vocabulary)[: rng.randint(1, len(vocabulary))]:
            del vocabulary[gone]
    elif kind == 3:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"] = [{"id": rng.choice([2048, 10**6, -1]), "content": "kettle"} | flags]
    elif kind == 4:
        tokenizer["model"]["merges"] = rng.choice([[], [["A", "zz"]], "x", None, [1]])
    else:
        part = rng.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor", "model", "version"])
        tokenizer[part] = of_json(rng, tokenizer.get(part))
    return json.dumps(tokenizer)


@settings(max_examples=cases("tokenizers"))
@given(st.randoms(use_true_random=False))
def test_damaged_tokenizers_are_read_or_refused(folders: Path, rng: Random) -> None:
    file = folders / "text" / rng.choice(["tokenizer.json"] * 5 + ["tokenizer_config.json"])
    text = file.read_text(encoding="utf-8")
    try:
        if rng.randrange(5) == 0:
            file.write_bytes(of_bytes(rng, text.encode()))
        elif file.name == "tokenizer.json":
            file.write_text(words_of(rng, text), encoding="utf-8")
        else:
            file.write_text(json_text(rng, text), encoding="utf-8")
        loaded(folders / "text", TEXT)
    finally:
        file.write_text(text, encoding="utf-8")


def header_of(rng: Random, data: bytes) -> bytes:
    """A safetensors file with another length, offsets, types, shapes or names in its header."""
    n = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + n]), data[8 + n :]
    name, kind = rng.choice(sorted(set(header) - {"__metadata__"})), rng.randrange(9)
    one = header[name]
    if kind == 0:
        length = rng.choice([0, n - 1, n + 1, len(data), 2**63, 2**64 - 1, rng.randrange(2 * n)])
        return length.to_bytes(8, "little") + data[8:]
    if kind == 1:
        others = [header[other]["data_offsets"] for other in sorted(header) if other != "__metadata__"]
        one["data_offsets"] = rng.choice([[0, 0], [5, 1], [-1, 3], [0, 2**62], [0], "x", None, *others])
    elif kind == 2:
        one["dtype"] = rng.choice(["F16", "F64", "I64", "BOOL", "U8", "X", "", None, 3, "F8_E4M3", "BF16"])
    elif kind == 3:
        one["shape"] = rng.choice([[], [0], [-1], one["shape"][::-1], [2**40, 2**40], [1, *one["shape"]], "x", None])
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header[rng.choice(["x", "", name.upper()])] = header.pop(name)
    elif kind == 6:
        header["__metadata__"] = rng.choice([{}, None, {"format": "x"}, {"a": 1}, "x"])
    elif kind == 7:
        rest = rest[: rng.randrange(len(rest))]
    else:
        begin, end = one["data_offsets"]
        filling = np.float32(rng.choice([float("nan"), float("inf"), 3e38, 0.0])).tobytes()
        rest = rest[:begin] + filling * ((end - begin) // 4) + rest[begin + (end - begin) // 4 * 4 :]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


@settings(max_examples=cases("weights"))
@given(st.sampled_from(FAMILIES), st.randoms(use_true_random=False))
def test_damaged_weights_are_read_or_refused(folders: Path, family: str, rng: Random) -> None:
    file = folders / family / "model.safetensors"
    data = file.read_bytes()
    try:
        file.unlink()  # another process may have it mapped
        file.write_bytes(header_of(rng, data) if rng.randrange(4) else of_bytes(rng, data))
        loaded(folders / family)
    finally:
        file.write_bytes(data)
