"""Models from GGUF files: the same as the model that was written, or one clear message before anything is read."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import massact as ma
from massact.models import random_twin
from massact.models.gguf_header import read_header
from massact.records.errors import UserError
from tests.facts import each
from tests.families import FAMILIES as FAMILY_CONFIGS
from tests.families import build
from tests.gguf_files import logits, permuted, stored_tensors, write_gguf

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "stablelm", "starcoder2",
            "falcon", "bloom", "lfm2", "qwen3_moe"]  # fmt: skip


# The sixth layer of Gemma 3 sees everything, and alone has scaled positions; Qwen's experts share a weight of one.
CHANGED: dict[str, dict[str, Any]] = {"gemma3": {"num_hidden_layers": 6}, "qwen3_moe": {"norm_topk_prob": True}}


def _plain(family: str) -> Any:
    torch.manual_seed(0)
    config, arguments, model = FAMILY_CONFIGS[family]
    return getattr(transformers, model)(getattr(transformers, config)(**arguments | CHANGED.get(family, {}))).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


# ---------------------------------------------------------------------------- the same model
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    module = _plain(family)
    write_gguf(tmp_path / "model.gguf", module)
    model = ma.load(tmp_path / "model.gguf")
    assert torch.equal(logits(model.module), logits(module))
    assert model.dtype == torch.float32 and model.gguf is not None and model.gguf["dequantised"]


def test_quantised_weights_are_those_that_the_file_holds(tmp_path: Path, llama: Any) -> None:
    """Q8_0 and F16 are unpacked as the package gguf unpacks them; queries and keys come back in their own order."""
    path = tmp_path / "model.gguf"
    types = {"attn_q.weight": "Q8_0", "attn_k.weight": "Q8_0", "ffn_gate.weight": "Q8_0", "ffn_up.weight": "F16"}
    stored = write_gguf(path, llama, types=types)
    model = ma.load(path)
    read = stored_tensors(model.module)
    assert read.keys() == stored.keys()
    for name, values in stored.items():
        assert np.array_equal(read[name], values), name
    assert not np.array_equal(stored["blk.0.attn_q.weight"], stored_tensors(llama)["blk.0.attn_q.weight"])
    info = model.info()
    n_others = len(stored) - 12
    assert info.gguf is not None and info.gguf["types"] == {"Q8_0": 9, "F16": 3, "F32": n_others}
    assert info.gguf["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (info.name, info.id) == ("model.gguf", str(path))


def test_rows_of_a_head_are_interleaved() -> None:
    """The order of llama.cpp, for one head of four rows: first of the first half, first of the second, ..."""
    assert permuted(np.arange(8.0)[:, None], 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_as_asked(dtype: str, whole: Path, llama: Any) -> None:
    model = ma.load(whole, dtype=dtype)
    kind = getattr(torch, dtype)
    assert {p.dtype for p in model.module.parameters()} == {kind}
    read, written = (m.model.layers[1].mlp.up_proj.weight for m in (model.module, llama))
    assert torch.equal(read, written.to(kind))


def test_the_tokenizer_comes_with_it(whole: Path) -> None:
    tokenizer = ma.load(whole).tokenizer
    assert tokenizer("a a!", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids(t) for t in ("a", "\u0120a", "!")
    ]
    assert tokenizer.decode(tokenizer("a a!").input_ids, skip_special_tokens=True) == "a a!"


def test_it_is_a_plain_model_afterwards(whole: Path, tmp_path: Path, llama: Any) -> None:
    """It can be saved, has a random twin, and the folder is the same model."""
    model = ma.load(whole)
    model.module.save_pretrained(tmp_path / "folder")
    assert torch.equal(logits(ma.load(tmp_path / "folder").module), logits(llama))
    twin = random_twin(model)
    assert not isinstance(twin, str) and twin.gguf is None


# ------------------------------------------------- what the file says and transformers takes from its defaults
def _rotary(module: Any, **parameters: Any) -> Any:
    """The same weights with other rotary positions."""
    config = copy.deepcopy(module.config)
    where = config.rope_parameters.get("full_attention", config.rope_parameters)
    where.update(parameters)
    other = type(module)(config).eval()
    other.load_state_dict(module.state_dict())
    return other


SCALED = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}


@pytest.mark.parametrize(("family", "settings", "parameters"), [
    ("llama", {"rope.freq_base": 77.0}, {"rope_theta": 77.0}),
    ("starcoder2", {"rope.freq_base": 77.0}, {"rope_theta": 77.0}),
    ("stablelm", {"rope.dimension_count": 4}, {"partial_rotary_factor": 0.5}),
    ("llama", {"rope.scaling.type": "linear"} | SCALED, {"rope_type": "linear", "factor": 4.0}),
    ("gemma3", {"rope.scaling.type": "linear"} | SCALED, {"rope_type": "linear", "factor": 4.0}),
    ("qwen2", {"rope.scaling.type": "yarn"} | SCALED,
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
])  # fmt: skip
def test_rotary_positions_are_those_of_the_file(
    family: str, settings: dict[str, Any], parameters: dict[str, Any], tmp_path: Path
) -> None:
    module = _rotary(_plain(family), **parameters)
    write_gguf(tmp_path / "model.gguf", module, settings=settings)
    model = ma.load(tmp_path / "model.gguf")
    assert torch.equal(logits(model.module), logits(module))
    assert not torch.equal(logits(model.module), logits(_plain(family)))


def test_llama_31_divides_its_frequencies(tmp_path: Path, llama: Any) -> None:
    """`rope_freqs` is one divisor for each frequency (llama.cpp): written out here on the buffer itself."""
    factors = np.linspace(1, 8, 4, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", llama, more={"rope_freqs.weight": factors})
    model = ma.load(tmp_path / "model.gguf")
    wanted = copy.deepcopy(llama)
    wanted.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    torch.testing.assert_close(logits(model.module), logits(wanted), rtol=0, atol=1e-6)  # a division, in another order
    assert (logits(llama) - logits(wanted)).abs().max() > 1e-4


@pytest.mark.parametrize(("family", "changes"), [
    ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.25}),
    ("gemma2", {"rms_norm_eps": 0.25}), ("gpt2", {"layer_norm_epsilon": 0.25}),
    ("falcon", {"layer_norm_epsilon": 0.25}), ("phi3", {"sliding_window": 5}), ("stablelm", {"layer_norm_eps": 0.25}),
])  # fmt: skip
def test_other_settings_are_those_of_the_file(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    plain = build(family)
    config = copy.deepcopy(plain.config)
    for name, value in changes.items():
        setattr(config, name, value)
    module = type(plain)(config).eval()
    module.load_state_dict(plain.state_dict())
    write_gguf(tmp_path / "model.gguf", module)
    assert torch.equal(logits(ma.load(tmp_path / "model.gguf").module), logits(module))
    assert not torch.equal(logits(module), logits(plain))


# ---------------------------------------------------------------------------- refused, before anything is read
@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)


@pytest.mark.usefixtures("nothing_read")
def test_a_file_cut_off_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    data, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    start = read_header(whole).tensors[0].start
    for n in [*range(0, start, 61), start - 1, start + 5, len(data) - 1]:
        cut.write_bytes(data[:n])
        with pytest.raises(UserError) as caught:
            ma.load(cut)
        assert "cut.gguf" in caught.value.what and caught.value.do, n


@pytest.mark.usefixtures("nothing_read")
def test_damaged_headers_end_in_one_message_or_another_header(whole: Path, tmp_path: Path) -> None:
    """Any byte of the header may be wrong: it is read, or refused, and takes no longer for it."""
    data, bad = whole.read_bytes(), tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    n_refused = 0
    for at in rng.integers(0, read_header(whole).tensors[0].start, 400):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        bad.write_bytes(damaged)
        try:
            read_header(bad)
        except UserError:
            n_refused += 1
    assert n_refused > 20


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize(("content", "says"), [
    (b"", "cannot be read|no GGUF"), (b"PK\x03\x04" + bytes(100), "no GGUF file"),
    (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "version 9"),
    (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "big"),
    (b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "names no architecture"),
    (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "entries"),
])  # fmt: skip
def test_what_is_no_gguf_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=says):
        ma.load(tmp_path / "x.gguf")


@pytest.mark.usefixtures("nothing_read")
def test_a_part_is_refused_by_its_name_and_by_what_it_says(tmp_path: Path, llama: Any) -> None:
    write_gguf(tmp_path / "big-00001-of-00003.gguf", llama)
    write_gguf(tmp_path / "big.gguf", llama, settings={".split.count": 3, ".split.no": 0})
    for name in ("big-00001-of-00003.gguf", "big.gguf"):
        with pytest.raises(UserError, match="--merge"):
            ma.load(tmp_path / name)


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_prints_the_install_line(package: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(UserError, match=r"pip install 'massact\[gguf\]'") as caught:
        ma.load(whole)
    assert package in caught.value.why


@pytest.mark.usefixtures("nothing_read")
def test_files_that_are_not_there(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no 'tinny\.gguf' in '.*'") as caught:
        ma.load(whole.parent, options={"gguf_file": "tinny.gguf"})
    assert "'tiny.gguf'" in caught.value.do
    with pytest.raises(UserError, match=each("GGUF", "model.gguf")):
        ma.load(tmp_path / "nowhere" / "model.gguf")
    with pytest.raises(UserError, match="--gguf-file tiny.gguf"):
        ma.load(whole.parent)
    with pytest.raises(UserError, match="has no revisions"):
        ma.load(whole, revision="main")
    with pytest.raises(UserError, match=each("GGUF", "'tiny.bin'")):
        ma.load(whole.parent, options={"gguf_file": "tiny.bin"})
    with pytest.raises(UserError, match=each("neither", "folder", "cache")):
        ma.load("some-one/some-model", options={"gguf_file": "some.gguf"})


@pytest.mark.parametrize(("change", "says"), [
    ({"architecture": "clip"}, "architecture 'clip'"),
    ({"more": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "leaves weights of"),
    ({"settings": {"attention.head_count_kv": None}}, "how many key heads"),
    ({"settings": {"rope.scaling.type": "sideways"}}, "'sideways'"),
    ({"settings": {"block_count": 4}}, "random numbers"),
    ({"settings": {"embedding_length": 64}}, "cannot read|random numbers"),
])  # fmt: skip
def test_what_transformers_would_read_wrongly_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path, llama: Any
) -> None:
    write_gguf(tmp_path / "model.gguf", llama, **change)
    with pytest.raises(UserError, match=says) as caught:
        ma.load(tmp_path / "model.gguf")
    assert "model.gguf" in caught.value.what and caught.value.do


def test_a_file_of_the_hub_is_named_by_its_repository(whole: Path, tmp_path: Path, llama: Any) -> None:
    """From the cache of the Hub, laid out here; its name and revision are what a run needs to find it again."""
    place, commit = tmp_path / "models--owner--name", "0" * 40
    (place / "snapshots" / commit / "parts").mkdir(parents=True)
    (place / "snapshots" / commit / "parts" / "tiny.gguf").write_bytes(whole.read_bytes())
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    given = {"gguf_file": "parts/tiny.gguf", "cache_dir": str(tmp_path)}
    model = ma.load("owner/name", revision="main", options=given)
    assert torch.equal(logits(model.module), logits(llama))
    info = model.info()
    assert (info.id, info.name, info.revision) == ("owner/name/parts/tiny.gguf", "tiny.gguf", "main")
    assert torch.equal(logits(ma.load(info.id, options={"cache_dir": str(tmp_path)}).module), logits(llama))
