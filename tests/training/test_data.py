"""Token files: what is in them, that they are whole or not there; and windows in an order of the seed alone."""

from __future__ import annotations

import errno
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from massact.records.errors import UserError, WorkError
from massact.training import data as data_module
from massact.training.components import tokenizer_of
from massact.training.configs import RECIPES
from massact.training.data import Pictures, Windows, open_tokens, prepare, read_pictures, split


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return tokenizer_of(RECIPES["tiny"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.txt").write_text("The second document.\n" * 30)
    (folder / "a.md").write_text("The first document.\n" * 30)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))
    return folder


def ids_of(tokenizer: object, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]


def test_ids_are_those_of_the_documents(tokenizer: object, text: Path, tmp_path: Path) -> None:
    found = prepare(text, tokenizer, tmp_path / "data")
    end = ids_of(tokenizer, "\n\n")
    documents = [(text / "a.md").read_text(), (text / "b.txt").read_text(), *(f"line {i}" for i in range(5))]
    expected = [i for d in documents for i in [*ids_of(tokenizer, d), *end]]
    assert found.ids.tolist() == expected and found.ids.dtype == np.uint16
    h = found.header
    assert (h.n_documents, h.n_tokens, h.separator) == (7, len(expected), end)
    assert h.n_characters == sum(map(len, documents)) and h.tokenizer["vocab_size"] == 2048
    found.check()


def test_a_file_a_list_and_the_embedded_text(tokenizer: object, text: Path, tmp_path: Path) -> None:
    file = prepare(text / "b.txt", tokenizer, tmp_path)
    listed = prepare([(text / "b.txt").read_text()], tokenizer, tmp_path)
    assert file.ids.tolist() == listed.ids.tolist() and file.header.text_sha256 == listed.header.text_sha256
    assert prepare(None, tokenizer, tmp_path).header.n_documents > 10
    assert prepare(file, None, tmp_path) is file
    assert prepare(None, tokenizer, tmp_path, max_tokens=100).header.n_tokens == 100


def test_an_end_of_text_token_stands_between_documents(tokenizer: object, tmp_path: Path) -> None:
    class WithEnd:
        eos_token_id = 7

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def __call__(self, *a: object, **k: object) -> object:
            return tokenizer(*a, **k)  # type: ignore[operator]

        def __len__(self) -> int:
            return 70_000

    found = prepare(["one", "two"], WithEnd(), tmp_path)
    assert found.ids.tolist() == [*ids_of(tokenizer, "one"), 7, *ids_of(tokenizer, "two"), 7]
    assert found.ids.dtype == np.uint32  # for more than 65,536 tokens


def test_found_again_unless_text_or_tokenizer_changed(
    tokenizer: object, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    first = prepare(text, tokenizer, out)
    monkeypatch.setattr(data_module, "_write", lambda *a: pytest.fail("tokenised twice"))
    assert prepare(text, tokenizer, out).path == first.path
    monkeypatch.undo()
    (text / "b.txt").write_text("Another one.")
    assert prepare(text, tokenizer, out).path != first.path and len(list(out.glob("*.bin"))) == 2


def test_what_is_not_whole_is_made_again(tokenizer: object, text: Path, tmp_path: Path) -> None:
    first = prepare(text, tokenizer, tmp_path / "data")
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:-2])  # as a copy that broke off
    assert open_tokens(first.path) is None
    assert prepare(text, tokenizer, tmp_path / "data").path.read_bytes() == whole
    first.path.with_suffix(".json").unlink()  # as a kill between the two renames
    assert open_tokens(first.path) is None
    assert prepare(text, tokenizer, tmp_path / "data").path.read_bytes() == whole
    first.path.write_bytes(whole[::-1])
    with pytest.raises(UserError, match="damaged"):
        first.check()


@pytest.mark.parametrize("where", ["write", "rename"])
def test_an_interrupted_write_leaves_nothing(
    where: str, tokenizer: object, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_module.os, "fsync" if where == "write" else "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(text, tokenizer, out)
    assert list(out.iterdir()) == []


def test_a_full_disk_is_said(tokenizer: object, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data_module.os, "fsync", full)
    with pytest.raises(WorkError, match="No space left"):
        prepare(text, tokenizer, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_abandoned_files_are_removed_and_those_of_others_are_not(tokenizer: object, text: Path, tmp_path: Path) -> None:
    old, young = tmp_path / ".tokens-x.bin.1.tmp", tmp_path / ".tokens-y.bin.2.tmp"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    prepare(text, tokenizer, tmp_path)
    assert not old.exists() and young.exists()


def test_long_documents_are_cut_at_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "PIECE", 50)
    for document in ("one line of words\n" * 20, "words " * 60, "x" * 333, ""):
        pieces = list(data_module._pieces(document))
        assert "".join(pieces) == document and all(len(p) <= 50 for p in pieces)


@pytest.mark.usefixtures("hub_there")
def test_a_data_set_is_streamed(tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def rows() -> object:
        for i in range(1000):
            read.append(i)
            yield {"text": f"Document number {i} of a stream."}

    def load_dataset(dataset: str, **options: object) -> object:
        assert dataset == "some/stream" and options == {"name": "en", "split": "train", "streaming": True}
        return rows()

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = prepare("some/stream:en", tokenizer, tmp_path, max_tokens=50)
    assert found.header.n_tokens == 50 and len(read) < 20  # no more is read than is needed
    assert found.header.source["dataset"] == "some/stream:en"


def test_nothing_to_read(tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.txt"):
        prepare(tmp_path / "missing.txt", tokenizer, tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text"):
        prepare(tmp_path / "empty.txt", tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------------- windows
TOKENS = np.arange(1000, dtype=np.uint16)


@pytest.mark.parametrize("order", ["random", "consecutive", "even"])
def test_windows_say_the_next_token(order: str) -> None:
    w = Windows(TOKENS, 16, 50, seed=3, order=order, skip_first=2)
    for i in (0, 7, 49):
        item = w[i]
        assert item["input_ids"].tolist() == list(range(w.offset(i), w.offset(i) + 16))
        assert item["labels"].tolist() == [-100, -100, *(item["input_ids"] + 1).tolist()[2:]]
    with pytest.raises(IndexError):
        w[50]


def test_an_item_depends_on_seed_and_index_only() -> None:
    for order in ("random", "consecutive"):
        a, b = Windows(TOKENS, 16, 500, 3, order), Windows(TOKENS, 16, 500, 3, order)
        backwards = {i: b.offset(i) for i in reversed(range(500))}
        assert [a.offset(i) for i in range(500)] == [backwards[i] for i in range(500)]
        other = Windows(TOKENS, 16, 500, 4, order)
        assert [a.offset(i) for i in range(500)] != [other.offset(i) for i in range(500)]


def test_random_windows_are_spread_and_consecutive_ones_partition() -> None:
    offsets = [Windows(TOKENS, 16, 5000, 0).offset(i) for i in range(5000)]
    assert 0 <= min(offsets) < 5 and 978 < max(offsets) <= 983 and abs(np.mean(offsets) - 491.5) < 15
    side = Windows(TOKENS, 16, 124, 0, "consecutive")
    for number in range(2):
        assert sorted(side.offset(number * 62 + i) for i in range(62)) == list(range(0, 992, 16))
    even = Windows(TOKENS, 16, 5, order="even")
    assert [even.offset(i) for i in range(5)] == [0, 245, 491, 737, 983]


def test_too_short_a_text_and_the_split(tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a window takes 17"):
        Windows(TOKENS[:16], 16, 5)
    tokens = prepare(None, tokenizer, tmp_path)
    ids, held = split(tokens, 0.1)
    assert len(held) == round(0.1 * tokens.header.n_tokens)
    assert np.array_equal(np.concatenate([ids, held]), tokens.ids)


def test_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.arange(10))
    read = Pictures(*read_pictures(tmp_path / "p.npz"), n=20, seed=1)
    item = read[3]
    i = int(item["labels"])
    assert item["pixel_values"].shape == (3, 8, 6)
    torch.testing.assert_close(item["pixel_values"], torch.from_numpy(images[i]).permute(2, 0, 1) / 127.5 - 1)
    assert sorted(int(read[k]["labels"]) for k in range(10)) == list(range(10))
    with pytest.raises(UserError, match="holds no images"):
        read_pictures(tmp_path / "q.npz")
    with pytest.raises(UserError, match="trained on"):
        Pictures(images[0], np.arange(10), 5)
