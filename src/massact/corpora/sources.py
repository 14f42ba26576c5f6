"""What the user names -> documents or ready inputs: `corpus()`, the door of this room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from massact.corpora.audio_source import AudioSource
from massact.corpora.batch import Corpus
from massact.corpora.files import at_home, has_columns, looks_like_path, named, read_path
from massact.corpora.hub import read_dataset, read_preset
from massact.corpora.image_files import is_image, pictures_of
from massact.corpora.image_source import ImageSource
from massact.corpora.packing import DEFAULT_SEQUENCES, Request, pack_prompts, pack_windows
from massact.corpora.pairs import PairSource, pairs_of
from massact.corpora.preprocessing import checked
from massact.corpora.readiness import Reader, Wish
from massact.corpora.recordings import is_sound, recordings_of
from massact.corpora.tensors import from_ids, from_tensors
from massact.corpora.text_tables import is_table
from massact.records.errors import UserError
from massact.records.presets import PRESETS

EMBEDDED_BREAK = "\n* * *\n"


@dataclass(frozen=True, eq=False)
class Source:
    """Named documents, not yet tokenised; the model brings the tokenizer.

    Args:
        name: what the user called it.
        read: the documents, given the seed (only a random draw depends on it).
        join: what stands between two documents when they are packed.
        prompts: True where each document is one sequence unless a length is asked for.
        protocol: what bos='auto' means for this source: 'never', 'stream', or None (what the tokenizer does).
        request: what `corpus()` was asked for; `encode` falls back on it.
        origin: where the documents come from, for run.json.
        rows: True where each document stands alone, as rows of a table do: each is a message in a chat template.
    """

    name: str
    read: Callable[[int], Sequence[str]]
    join: str = "\n\n"
    prompts: bool = False
    protocol: str | None = None
    request: Request = field(default_factory=Request)
    origin: dict[str, Any] = field(default_factory=dict)
    rows: bool = False

    def documents(self) -> list[str]:
        """Return the texts, in order."""
        return list(self.read(self.request.seed))

    def ready(self, model: Reader, wish: Wish) -> Corpus:
        """Read and tokenised for a model, see `massact.corpora.readiness.ready`."""
        name = model.name or "The model"
        if "input_ids" not in model.inputs_accepted():
            raise UserError(
                f"{name} takes {model.main_input}, not text.",
                do="Give images or recordings (a folder, a CSV, a list), or tensors: corpus({'pixel_values': tensor}).",
            )
        if model.tokenizer is None:
            raise UserError(
                f"{name} comes without a tokenizer, so it cannot read text.",
                do="Put its tokenizer's files into its folder; in Python give token ids (a (sequences, tokens) tensor) "
                "or load(..., tokenizer=...).",
            )
        return self.encode(
            model.tokenizer,
            seq_len=wish.seq_len,
            n_sequences=wish.n_sequences,
            bos=wish.bos,
            seed=wish.seed,
            context=model.context,
            chat_template=wish.chat_template or None,
        )

    def encode(
        self,
        tokenizer: Any,
        *,
        seq_len: int | None = None,
        n_sequences: int | Literal["all"] | None = None,
        bos: str | None = None,
        seed: int | None = None,
        context: int | None = None,
        chat_template: bool | None = None,
    ) -> Corpus:
        """Tokenise: windows of `seq_len`, or one sequence per prompt.

        Args:
            tokenizer: a transformers tokenizer.
            seq_len: tokens per sequence; None: as given to `corpus()`, else min(1024, context, the text).
            n_sequences: how many; None: as given to `corpus()`, else up to 32 windows, or all prompts.
            bos: 'auto', 'always' or 'never'; None: what `corpus()` was given.
            seed: for a source that draws documents at random; None: what `corpus()` was given.
            context: most positions that the model takes.
            chat_template: whether each text is the message of a user in the tokenizer's chat template: each prompt,
                each row of JSONL, a table or a data set (the first 32, unless `n_sequences` says more), or with a
                length each window, whose `seq_len` tokens hold the template too.

        Raises:
            UserError: no tokenizer, no chat template, or text and request do not fit together, see `packing`.
        """
        if tokenizer is None:
            raise UserError(
                f"The corpus {self.name!r} is text.",
                "The model has no tokenizer.",
                "Give a (B, T) tensor of token ids, or a dict of tensors such as {'pixel_values': ...}.",
            )
        given: dict[str, Any] = {
            "seq_len": seq_len,
            "n_sequences": n_sequences,
            "bos": bos,
            "seed": seed,
            "context": context,
            "chat_template": chat_template,
        }
        request = replace(self.request, **{key: value for key, value in given.items() if value is not None})
        documents = self.read(request.seed)
        messages = self.rows and request.chat_template
        if messages and request.n_sequences is None:
            request = replace(request, n_sequences=min(DEFAULT_SEQUENCES, len(documents)))
        if (self.prompts or messages) and request.seq_len is None:
            return pack_prompts(self.name, documents, tokenizer, request, self.origin)
        return pack_windows(self.name, documents, tokenizer, request, self.join, self.protocol, self.origin)


AnySource = Source | ImageSource | PairSource | AudioSource  # what still waits for a model


def corpus(
    spec: Any = None,
    /,
    *,
    tokenizer: Any = None,
    seq_len: int | None = None,
    n_sequences: int | Literal["all"] | None = None,
    bos: str = "auto",
    seed: int = 0,
    split: str | None = None,
    text_column: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    chat_template: bool = False,
) -> AnySource | Corpus:
    """Name or give the inputs to measure on.

    Args:
        spec: None or 'embedded' (the text in the package); a preset of the paper ('wikitext-2', 'c4', 'pg19',
            'redpajama'); a text, Markdown or JSONL file, a CSV, TSV or parquet table, or a folder of such; a data set
            of the Hub, as 'name' or 'name:configuration'; a list of prompts; (B, T) token ids; a dict of tensors;
            images: a folder of them (folders of classes inside it are labels), a CSV with a column 'path' (and
            'label'), a list of paths or images of Pillow; images with text: a JSONL file whose rows have 'image' (a
            path, relative to the file) and 'text'; sound: a folder of wav and flac files (with transcripts: a.txt
            beside a.wav), one file, a CSV with a column 'path' (and 'text'), a list of paths or of (samples, rate in
            Hz).
        tokenizer: a transformers tokenizer; text without one stays a `Source` until the model brings it.
        seq_len: tokens per sequence, special tokens included. If it is given, a list of prompts is packed.
        n_sequences: how many sequences, 'all' for all; None: up to 32 windows of text, all of anything else.
        bos: 'auto', 'always' (BOS in front of every sequence) or 'never'; see `resolve_specials`.
        seed: for a source that draws documents at random (added to the paper's own seed).
        split: split of a data set.
        text_column: key or column that holds the text, for JSONL, tables and data sets; None: 'text'.
        preprocess: of images, what is to be other than the model's processor says: {'resize': short side or (H, W),
            'crop': side or (H, W), 'resample': 'bicubic', 'mean': 0.5 or three, 'std': 0.5 or three}.
        chat_template: of text, whether each prompt, each row of a table, or each window is a user's message in the
            tokenizer's chat template, see `Source.encode`.

    Returns:
        A `Corpus` where the inputs are ready or a tokenizer is given, a `Source` of text, an `ImageSource`, a
        `PairSource` of images with text, or an `AudioSource`.

    Raises:
        UserError: what is wrong with the input, why, and what to do.
    """
    request = Request(seq_len, n_sequences, bos, seed, chat_template=chat_template)
    written = text_column is not None and isinstance(spec, str | Path) and is_table(Path(spec))  # it says so itself
    sounds = None if written else _sounds(spec, request)
    images = _images(spec, request, preprocess) if sounds is None and not written else None
    if sounds is not None or images is not None:
        _no_text_options("images" if sounds is None else "recordings", split, text_column, tokenizer)
    if images is not None:
        return images
    pairs = _pairs(spec, request, text_column)
    if pairs is not None:
        _no_text_options("images with text", split, None, tokenizer)
    if preprocess:
        raise UserError("preprocess was given.", "It means something for images only.", "Leave it out.")
    if pairs is not None:
        return pairs
    if sounds is not None:
        return sounds
    if isinstance(spec, torch.Tensor | np.ndarray | Mapping):
        _no_text_options("given tensors", split, text_column)
        if chat_template:
            raise UserError("chat_template was given.", "Token ids are in no template.", "Give the text.")
        if isinstance(spec, Mapping):
            return from_tensors(spec, tokenizer, request)
        return from_ids(spec, tokenizer, request)
    source = replace(_source(spec, split, text_column), request=request)
    if tokenizer is not None:
        return source.encode(tokenizer)
    source.documents()  # what cannot be read fails here, before a model is loaded
    return source


def corpus_again(record: Mapping[str, Any], given: str | None = None) -> AnySource | Corpus:
    """The source of a corpus from what run.json keeps of it.

    Args:
        record: `Corpus.info()`.
        given: how the user named it: the path of a file or folder.

    Raises:
        UserError: its source was not kept (ids, tensors, prompts), or cannot be read any more.
    """
    source, name = record.get("source") or {}, record.get("name")
    kind = source.get("kind")
    if kind == "embedded":
        return corpus()
    if kind in ("file", "folder") and given is not None:
        return corpus(Path(given), text_column=source.get("text_column"))
    if kind in ("images", "pairs", "recordings") and given is not None:
        return corpus(
            Path(given),
            n_sequences=record.get("n_sequences"),
            text_column=source.get("text_column"),
            preprocess=source.get("asked"),
        )
    if kind in ("preset", "dataset"):
        return corpus(name, split=source.get("split"), text_column=source.get("column"))
    raise UserError(
        f"The corpus {name!r} of this run cannot be made again from its record.",
        f"It was given as {kind or 'ids or tensors'}, which a run does not keep.",
        "Give it: --corpus FILE, or explain(model, corpus, result) in Python.",
    )


def _sounds(spec: Any, request: Request) -> AudioSource | None:
    """Recordings that a spec means; None where it means something else."""
    given = spec
    if isinstance(spec, Path | str):
        given = _file_meant(spec)
        if given is None:
            return None
    found = recordings_of(given)
    if found is None:
        return None
    _nothing_of_text("It means nothing for recordings.", request)
    name = named(given) if isinstance(given, Path) else "recording" if is_sound(given) else "recordings"
    return AudioSource(name, found, request.n_sequences)


def _file_meant(spec: Path | str) -> Path | None:
    """The file or folder that a name means; None where it means something else, or is not there."""
    if isinstance(spec, str) and (spec in PRESETS or spec.strip() in ("", "embedded")):
        return None
    path = at_home(spec)
    return path if _exists(path) else None


def _nothing_of_text(why: str, request: Request) -> None:
    bos, chat = None if request.bos == "auto" else request.bos, request.chat_template or None
    for option, value in (("seq_len", request.seq_len), ("bos", bos), ("chat_template", chat)):
        if value is not None:
            raise UserError(f"{option}={value!r} was given.", why, "Leave it out.")


def _images(spec: Any, request: Request, preprocess: Mapping[str, Any] | None) -> ImageSource | None:
    """Images that a spec means; None where it means something else."""
    if is_image(spec) or isinstance(spec, Path | str):
        path = spec if is_image(spec) else _file_meant(spec)
        if path is None:
            return None
        pictures = pictures_of([path] if is_image(spec) else path)
        name = "image" if is_image(spec) else named(path)
    else:
        pictures, name = pictures_of(spec), "images"
    if pictures is None:
        return None
    _nothing_of_text("It means nothing for images.", request)
    return ImageSource(name, pictures, request.n_sequences, checked(preprocess))


def _pairs(spec: Any, request: Request, text_column: str | None) -> PairSource | None:
    """Images with text that a path means; None where it means something else."""
    if not isinstance(spec, Path | str) or (isinstance(spec, str) and spec in PRESETS) or not _exists(Path(spec)):
        return None
    pairs = pairs_of(at_home(spec), request.n_sequences, text_column)
    if pairs is not None:
        _nothing_of_text("The model's processor says it.", request)
    return pairs


def _source(spec: Any, split: str | None, text_column: str | None) -> Source:
    if spec is None or spec == "embedded":
        _no_text_options("the embedded text", split, text_column)
        return Source("embedded", _once(_embedded), origin={"kind": "embedded"})
    if isinstance(spec, Path):
        return _path_source(spec, split, text_column)
    if isinstance(spec, str):
        return _named_source(spec, split, text_column)
    if isinstance(spec, Sequence) and spec and all(isinstance(text, str) for text in spec):
        _no_text_options("a list of prompts", split, text_column)
        prompts = tuple(spec)
        return Source("prompts", lambda seed: prompts, prompts=True, origin={"kind": "prompts"})
    if isinstance(spec, Sequence) and not spec:
        raise UserError("The corpus is empty.", "The list has no prompts.", "Give at least one text.")
    raise UserError(
        f"A {type(spec).__name__} is no corpus.",
        "A list must hold only strings." if isinstance(spec, Sequence) else "It is nothing that can be read.",
        "Give a name, a path, a list of strings, a (B, T) tensor of ids, or a dict of tensors.",
    )


def _named_source(spec: str, split: str | None, text_column: str | None) -> Source:
    preset = PRESETS.get(spec)
    if preset is not None:
        origin = {
            "kind": "preset",
            "dataset": preset.dataset,
            "config": preset.config,
            "split": split or preset.split,
            "column": text_column or preset.column,
            "first": preset.first,
            "random": preset.random,
            "random_seed": preset.random_seed if preset.random else None,
        }
        read = _once(lambda seed: read_preset(preset, split, text_column, seed))
        return Source(spec, read, preset.join, protocol=preset.special_tokens, origin=origin)
    if not spec.strip():
        raise UserError("The name of the corpus is empty.", f"It is {spec!r}.", "Name a file, a folder or a data set.")
    path = Path(spec)
    if looks_like_path(spec) or _exists(path):
        return _path_source(path, split, text_column)
    if any(char.isspace() for char in spec):
        raise UserError(
            f"There is no file, folder or data set {spec[:60]!r}.",
            "A name of a data set has no white space in it.",
            "If it is a prompt, put it in a list: corpus(['...']).",
        )
    documents, where = read_dataset(spec, split, text_column)
    return Source(spec, lambda seed: documents, origin={"kind": "dataset"} | where, rows=True)


def _path_source(path: Path, split: str | None, text_column: str | None) -> Source:
    _no_text_options("a file or folder", split, None)
    path = at_home(path)
    # The name alone: a full path says more about the user's machine than about the text, which has its hash.
    origin = {"kind": "folder" if path.is_dir() else "file", "text_column": text_column}
    read = _once(lambda seed: read_path(path, text_column))
    return Source(named(path), read, origin=origin, rows=not path.is_dir() and has_columns(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a prompt given as a name is too long for a path
        return False


def _no_text_options(kind: str, split: str | None, text_column: str | None, tokenizer: Any = None) -> None:
    for option, value in (("split", split), ("text_column", text_column), ("tokenizer", tokenizer)):
        if value is not None:
            shown = type(value).__name__ if option == "tokenizer" else repr(value)
            raise UserError(f"{option}={shown} was given.", f"It means nothing for {kind}.", "Leave it out.")


def _embedded(seed: int) -> list[str]:
    text = (resources.files("massact.corpora") / "embedded.txt").read_text(encoding="utf-8")
    return [piece.strip() for piece in text.split(EMBEDDED_BREAK) if piece.strip()]


def _once(read: Callable[[int], Sequence[str]]) -> Callable[[int], Sequence[str]]:
    """Remember what was read, per seed: a data set is read once, however often the source is encoded."""
    seen: dict[int, Sequence[str]] = {}

    def remembered(seed: int) -> Sequence[str]:
        if seed not in seen:
            seen[seed] = read(seed)
        return seen[seed]

    return remembered
