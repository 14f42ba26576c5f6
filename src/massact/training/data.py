"""Text tokenised once into a memory-mapped file, and windows of it in an order that only the seed decides.

A token file is two files: NAME.bin, the ids, and NAME.json, its header. Both are written under temporary names and
renamed, the header last, so that a header speaks for a whole file. NAME holds a hash of the text and of the tokenizer:
another text is another file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from massact.corpora import Source, corpus
from massact.corpora.files import at_home, has_columns, looks_like_path, named, read_path, text_files
from massact.corpora.hub import read_rows
from massact.corpora.packing import token_ids
from massact.records.errors import UserError, WorkError
from massact.records.user_files import refuse_special

FORMAT = 1
PIECE = 1 << 20  # characters that are tokenised at once
ABANDONED_S = 3600  # a temporary file this old has no writer any more
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Header:
    """What a token file holds.

    Args:
        dtype: uint16 or uint32.
        n_tokens, n_documents, n_characters: counts.
        text_sha256: over the documents, each closed by a zero byte.
        tokens_sha256: over the bytes of the ids.
        tokenizer: class, sha256, vocab_size.
        separator: ids between two documents.
        source: where the text came from.
    """

    dtype: str
    n_tokens: int
    n_documents: int
    n_characters: int
    text_sha256: str
    tokens_sha256: str
    tokenizer: dict[str, Any]
    separator: list[int]
    source: dict[str, Any]
    format: int = FORMAT


@dataclass(frozen=True)
class Tokens:
    """A token file: (N,) ids, memory-mapped."""

    path: Path
    header: Header

    @property
    def ids(self) -> np.ndarray:
        """The ids, read from the disk as they are asked for."""
        return np.memmap(self.path, dtype=self.header.dtype, mode="r")

    def check(self) -> None:
        """Read all of it.

        Raises:
            UserError: its bytes are not those that were written.
        """
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != self.header.tokens_sha256:
            raise UserError(f"{self.path} is damaged.", "Its ids have another hash.", "Delete it: it is made again.")


def open_tokens(path: str | Path) -> Tokens | None:
    """Open NAME.bin beside its header; None where either is missing or not whole.

    Raises:
        UserError: the header was written by a newer massact.
    """
    path = Path(path)
    try:
        data = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if data["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer massact.", do="Update massact, or delete the file.")
        header = Header(**data)
        if path.stat().st_size != header.n_tokens * np.dtype(header.dtype).itemsize:
            return None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Tokens(path, header)


def prepare(
    source: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    text_column: str | None = None,
    split: str | None = None,
    max_tokens: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Tokens:
    """Tokenise a text into a file below `folder`, or find it there.

    Documents are read one after the other; between two stands the tokenizer's end-of-text token, or an empty line where
    it has none. No other special token is added.

    Args:
        source: a text, Markdown or JSONL file, a table, a folder of them, a list of texts, None (the embedded text), or
            a data set of the Hub as "name" or "name:configuration", which is streamed.
        tokenizer: a transformers tokenizer.
        folder: where token files lie.
        text_column: of JSONL, tables and data sets. split: of data sets ("train" if None).
        max_tokens: stop after so many.
        progress: called with ("tokenise", characters done, characters in all or 0).

    Returns:
        The token file, complete.

    Raises:
        UserError: nothing to read, or no token in it.
        WorkError: the disk is full.
    """
    if isinstance(source, Tokens):
        return source
    folder = Path(folder)
    text = _text_of(source, text_column, split)
    about = {"class": type(tokenizer).__name__, "sha256": tokenizer_hash(tokenizer), "vocab_size": len(tokenizer)}
    key = json.dumps([FORMAT, text.key, about["sha256"], max_tokens], sort_keys=True)
    path = folder / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
    if (found := open_tokens(path)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".tokens-*.tmp"):
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            left.unlink(missing_ok=True)
    temporary = [folder / f".{path.with_suffix(end).name}.{os.getpid()}.tmp" for end in (".bin", ".json")]
    try:
        header = _write(temporary[0], text, tokenizer, about, max_tokens, progress)
        temporary[1].write_text(json.dumps(asdict(header), indent=2) + "\n", "utf-8")
        os.replace(temporary[0], path)
        os.replace(temporary[1], path.with_suffix(".json"))
    except OSError as error:
        raise WorkError(f"The tokens could not be written to {folder}.", error.strerror or str(error),
                        "Make room, or name another folder.") from error  # fmt: skip
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
    return Tokens(path, header)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that a tokenizer does: its serialised form, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__} {said}".encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class _Text:
    """Documents to be read once, what tells them from others before they are read, and their origin."""

    read: Callable[[], Iterable[str]]
    key: Any
    origin: dict[str, Any]
    n_characters: int = 0


def _text_of(source: Any, text_column: str | None, split: str | None) -> _Text:
    if isinstance(source, (list, tuple)) or source is None or source == "embedded":
        embedded = None if isinstance(source, (list, tuple)) else corpus()
        documents = embedded.documents() if isinstance(embedded, Source) else list(source)
        kind = {"kind": "texts" if embedded is None else "embedded"}
        return _Text(lambda: documents, _hash(documents), kind, sum(map(len, documents)))
    path = at_home(source)
    if isinstance(source, Path) or looks_like_path(str(source)) or path.exists():
        if not path.exists():
            read_path(path)  # says what is missing
        refuse_special(path)
        files = text_files(path) if path.is_dir() else [path]
        column = text_column if any(map(has_columns, files)) else None

        def read() -> Iterator[str]:
            for file in files:
                if file.stat().st_size or len(files) == 1:
                    mine = column if has_columns(file) else None
                    yield from read_path(file, mine)

        digest = hashlib.sha256()
        for file in files:  # the bytes: cheaper than the documents, and as good a key
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{name}\0".encode("utf-8", "backslashreplace"))
            with open(file, "rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
        origin = {"kind": "folder" if path.is_dir() else "file", "name": named(path), "n_files": len(files)}
        return _Text(read, [digest.hexdigest(), column], origin, sum(f.stat().st_size for f in files))
    name = str(source)
    chosen = {"dataset": name, "split": split or "train", "column": text_column}
    return _Text(lambda: read_rows(name, split or "train", text_column), chosen, {"kind": "dataset"} | chosen)


def _hash(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces of about `PIECE` characters that end at a line, else at a space."""
    start = 0
    while len(document) - start > PIECE:
        end = start + PIECE
        at = max(document.rfind("\n", start, end), start)
        at = at if at > start else max(document.rfind(" ", start, end), start)
        at = at if at > start else end
        yield document[start:at]
        start = at
    yield document[start:]


def _write(
    path: Path, text: _Text, tokenizer: Any, about: dict[str, Any], max_tokens: int | None, progress: Progress
) -> Header:
    dtype = np.dtype("uint16" if len(tokenizer) <= 1 << 16 else "uint32")
    end = tokenizer.eos_token_id
    separator = [end] if isinstance(end, int) else token_ids(tokenizer, "\n\n")
    n_tokens = n_documents = n_characters = 0
    words, tokens = hashlib.sha256(), hashlib.sha256()
    with open(path, "wb") as file:

        def put(ids: list[int]) -> None:
            nonlocal n_tokens
            ids = ids if max_tokens is None else ids[: max_tokens - n_tokens]
            data = np.asarray(ids, dtype).tobytes()
            tokens.update(data)
            file.write(data)
            n_tokens += len(ids)

        for document in text.read():
            if max_tokens is not None and n_tokens >= max_tokens:
                break
            words.update(document.encode("utf-8", "surrogatepass") + b"\0")
            for piece in _pieces(document):
                put(token_ids(tokenizer, piece))
                n_characters += len(piece)
                progress("tokenise", n_characters, max(text.n_characters, n_characters))
            put(separator)
            n_documents += 1
        file.flush()
        os.fsync(file.fileno())
    if n_documents == 0 or n_tokens <= len(separator):
        raise UserError("There is no text to train on.", "No token was found in it.", "Give a file with some text.")
    return Header(str(dtype), n_tokens, n_documents, n_characters, words.hexdigest(), tokens.hexdigest(), about,
                  separator, text.origin)  # fmt: skip


# ------------------------------------------------------------------------------------------------- windows
class Windows(Dataset):
    """Windows of a token file: item i is {"input_ids": (T,), "labels": (T,)}, labels the token after each.

    Item i depends on (seed, i) only, so a training that goes on at item i sees what it would have seen.

    Args:
        tokens: (N,) ids.
        seq_len: T.
        n: items.
        seed: of the order.
        order: "random": an offset drawn anew for every item; "consecutive": windows side by side, shuffled once per
            pass; "even": n windows spread evenly, for evaluation.
        skip_first: labels at the first positions that are -100 (no loss).

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, n: int, seed: int = 0, order: str = "random", skip_first: int = 0
    ) -> None:
        self.tokens, self.seq_len, self.n, self.seed, self.order = tokens, seq_len, n, seed, order
        self.skip_first = skip_first
        self.room = len(tokens) - seq_len  # offsets 0..room-1 leave a token to predict
        if self.room < 1:
            raise UserError(
                f"The text has {len(tokens)} tokens in one of its parts; a window takes {seq_len + 1}.",
                "A part of the text is held out for evaluation, so it may be the shorter part.",
                "Give a longer text, a shorter seq_len, or another val_share.",
            )
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.n

    def offset(self, i: int) -> int:
        """Where item i begins."""
        if self.order == "random":
            # A counter-based generator gives item i at once, without the i draws before it.
            bits = np.random.Philox(key=self.seed % (1 << 64), counter=[i, 0, 0, 0])
            return int(np.random.Generator(bits).integers(self.room))
        if self.order == "even":
            return i * (self.room - 1) // max(1, self.n - 1)
        side = (self.room - 1) // self.seq_len + 1
        number, at = divmod(i, side)
        if self._pass is None or self._pass[0] != number:
            self._pass = number, np.random.default_rng([self.seed, number]).permutation(side)
        return int(self._pass[1][at]) * self.seq_len

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        start = self.offset(i)
        ids = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        labels = ids[1:].clone()
        labels[: self.skip_first] = -100
        return {"input_ids": ids[:-1], "labels": labels}


def split(tokens: Tokens, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The ids for training, and the last `share` of them, which are held out."""
    ids = tokens.ids
    cut = len(ids) - max(1, round(share * len(ids)))
    return ids[:cut], ids[cut:]


class Pictures(Dataset):
    """Images with their labels: item i is {"pixel_values": (C, H, W) float32, "labels": ()}.

    Args:
        images: (M, C, H, W), or (M, H, W, C) where the last axis has 1, 3 or 4 entries; uint8 is scaled to -1..1.
        labels: (M,) classes.
        n: items; more than M is several passes.
        seed: of the order, shuffled once per pass; None: as given.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, n: int, seed: int | None = None) -> None:
        if images.ndim != 4 or len(images) != len(labels) or not len(images):
            raise UserError(f"Images of shape {images.shape} with {len(labels)} labels cannot be trained on.",
                            do="Give images (M, C, H, W) and labels (M,).")  # fmt: skip
        self.images, self.labels, self.n, self.seed = images, labels, n, seed
        self.last = images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4)
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        number, at = divmod(i, len(self.images))
        if self.seed is not None:
            if self._pass is None or self._pass[0] != number:
                order = np.random.default_rng([self.seed, number]).permutation(len(self.images))
                self._pass = number, order
            at = int(self._pass[1][at])
        image = torch.from_numpy(np.ascontiguousarray(self.images[at]))
        image = image.permute(2, 0, 1) if self.last else image
        image = image.float().div(127.5).sub(1) if image.dtype == torch.uint8 else image.float()
        return {"pixel_values": image, "labels": torch.tensor(int(self.labels[at]))}


def read_pictures(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an .npz file with the arrays `images` and `labels`.

    Raises:
        UserError: it cannot be read, or lacks one of them.
    """
    refuse_special(path)
    try:
        with np.load(Path(path), allow_pickle=False) as data:
            return data["images"], data["labels"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} holds no images.", f"{type(error).__name__}: {error}",
                        "Give an .npz file with the arrays images (M, C, H, W) and labels (M,).") from None  # fmt: skip
