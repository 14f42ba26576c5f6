"""Images with text: rows {"image": path, "text": ...} of a JSONL file, made into tensors by the model's processor."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from massact.corpora.batch import Corpus
from massact.corpora.files import JSONL_SUFFIXES, at_home, named
from massact.corpora.image_files import opened
from massact.corpora.image_source import MOST_NAMES
from massact.corpora.packing import Request
from massact.corpora.plain_files import read_text
from massact.corpora.readiness import Reader, Wish, how_many, refuse_text_options
from massact.corpora.tensors import from_tensors
from massact.records.errors import UserError, class_and_line

# What a processor gives for each token; a shorter row is filled up with zeros, which are masked.
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, eq=False)
class PairSource:
    """Images with text, not yet read; the model brings its processor.

    Args:
        name: what the user called them.
        rows: path of the image and text of each.
        names: of the images, as the file has them.
        n_sequences: how many, from the start; None or 'all' for all.
    """

    name: str
    rows: tuple[tuple[Path, str], ...]
    names: tuple[str, ...]
    n_sequences: int | Literal["all"] | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    def ready(self, model: Reader, wish: Wish) -> Corpus:
        """Read and prepared for a model, see `massact.corpora.readiness.ready`."""
        name = model.name or "The model"
        if not {"input_ids", "pixel_values"} <= model.inputs_accepted():
            raise UserError(f"{name} does not take images and text together.", do="Give text, or images.")
        if not all(hasattr(model.processor, part) for part in ("image_processor", "tokenizer")):
            missing = importlib.util.find_spec("torchvision") is None
            raise UserError(
                f"{name} comes without a processor of images and text.",
                "Its processor may need torchvision, which is not installed." if missing else "",
                "Save it beside the weights (processor.save_pretrained), or give tensors by name.",
            )
        refuse_text_options("images with text", wish)
        return self.encode(model.processor, model.inputs_accepted(), n_sequences=wish.n_sequences)

    def encode(
        self, processor: Any, accepted: Collection[str], *, n_sequences: int | Literal["all"] | None = None
    ) -> Corpus:
        """Read the images and let the processor put each into its text.

        Its chat template does so where it has one (one turn of a user: the image, then the text, then the start of
        the answer); else its placeholder stands in a line of its own before the text. A text that holds the
        placeholder is left as it is.

        Args:
            processor: of images and text, of transformers.
            accepted: names of the inputs that the model takes; others are dropped, and the record says so.
            n_sequences: None: as given to `corpus()`.

        Raises:
            UserError: an image cannot be read, there are too few rows, or the processor objects to one of them.
        """
        n = how_many(n_sequences, self.n_sequences, len(self.rows), "sequences", self.name)
        made = [self._encoded(processor, i) for i in range(n)]
        texts, parts = [t for t, _ in made], [p for _, p in made]
        given = set(parts[0]) & (set(accepted) | {"attention_mask"})
        joined = {name: _joined(name, [part[name] for part in parts]) for name in sorted(given)}
        corpus = from_tensors(joined, processor.tokenizer, Request(), name=self.name)
        source = self.origin | {
            "kind": "pairs", "processor": type(processor).__name__, "files": list(self.names[:n][:MOST_NAMES]),
            "image_processor": type(processor.image_processor).__name__, "first_text": texts[0],
            "template": "chat template" if getattr(processor, "chat_template", None) else "placeholder, then the text",
            "dropped": sorted(set(parts[0]) - given),
        }  # fmt: skip
        return replace(corpus, origin=replace(corpus.origin, source=source))

    def _encoded(self, processor: Any, i: int) -> tuple[str, dict[str, torch.Tensor]]:
        """The text of one row with its placeholder, and what the processor makes of it and its image."""
        path, text = self.rows[i]
        image = opened(path, self.names[i])
        try:
            text = _with_placeholder(processor, text)
            # A chat template writes the BOS token itself.
            bos = getattr(processor.tokenizer, "bos_token", None)
            special = not (bos and text.startswith(bos))
            made = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=special)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{type(processor).__name__} cannot prepare row {i} ({self.names[i]!r}).",
                class_and_line(error),
                "Prepare it yourself, and give tensors: corpus({'input_ids': ..., 'pixel_values': ..., ...}).",
            ) from error
        return text, {name: x for name, x in made.items() if isinstance(x, torch.Tensor)}


def _with_placeholder(processor: Any, text: str) -> str:
    token = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None)
    if token is not None and str(token) in text:
        return text
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return str(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    if token is None:
        raise UserError(
            f"{type(processor).__name__} says neither a placeholder for an image nor a chat template.",
            do="Give tensors: corpus({'input_ids': ..., 'pixel_values': ...}).",
        )
    return f"{token}\n{text}"


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name in _PER_TOKEN:
        width = max(x.shape[1] for x in parts)
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in parts])
    if len({x.shape[1:] for x in parts}) > 1:
        raise UserError(
            f"The images differ in {name}: {', '.join(str(tuple(x.shape)) for x in parts[:4])}.",
            "They were cut into different numbers of tiles, which do not form one tensor.",
            "Use images of one size.",
        )
    return torch.cat(parts)


def pairs_of(path: Path, n_sequences: int | Literal["all"] | None, text_column: str | None) -> PairSource | None:
    """Rows of images and text of a JSONL file; None where it is another file, or its first row has no image.

    Raises:
        UserError: a row is no such row, or its image is not there.
    """
    if path.suffix.lower() not in JSONL_SUFFIXES or not path.is_file():
        return None
    column = text_column or "text"
    rows: list[tuple[Path, str]] = []
    names: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            if not rows:
                return None  # text, or a broken line of it: whoever reads text says so
            raise UserError(f"Line {number} of {str(path)!r} has no image, others have.",
                            do='Each line looks like {"image": "a.png", "text": "What is it?"}.')  # fmt: skip
        if not isinstance(record.get(column), str):
            raise UserError(f"Line {number} of {str(path)!r} has no text in column {column!r}.",
                            f"Its columns: {', '.join(map(repr, record))}.",
                            "Name it (text_column), or add it.")  # fmt: skip
        image = path.parent / at_home(record["image"])
        if not os.path.isfile(image):
            raise UserError(f"There is no image {str(image)!r}.", f"It is on line {number} of {str(path)!r}.",
                            "Paths are relative to that file.")  # fmt: skip
        rows.append((image, record[column]))
        names.append(record["image"])
    if not rows:
        return None
    return PairSource(named(path), tuple(rows), tuple(names), n_sequences, {"text_column": text_column})
