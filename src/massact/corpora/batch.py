"""A ready set of model inputs, and the batches it is read in.

Shapes: N sequences of the corpus, B rows of a batch, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import torch

from massact.corpora.image_files import Pictures
from massact.corpora.modalities import Modalities, token_types
from massact.corpora.readiness import Reader, Wish
from massact.corpora.recordings import Prompt, Recordings
from massact.corpora.token_strings import Spelling
from massact.records.errors import UserError
from massact.records.sites import ranges

PositionClass = Literal["start", "delimiter", "padding", "other"]
PADDING: Final = "padding"
PROMPT, GENERATED = "prompt", "generated"  # where a token of a text that a model went on with comes from
Positions: TypeAlias = slice | torch.Tensor | None


PER_IMAGE = ("image_grid_thw", "image_sizes")  # inputs with one row for each image


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass takes, and which of its positions count.

    Args:
        inputs: keyword arguments of the model; `attention_mask` (B, T) only when a position does not count.
        sequences: index in the corpus, one per row.
        rows: the positions that count, one entry per row: None = all, a slice = a contiguous run,
            a LongTensor = any other set.
        past: positions before the first one here, which a cache of keys and values already holds.
        counts: of stacks whose positions are not those of `input_ids` (frames of sound, a decoder), by their number of
            positions, the same as `rows`.
        pieces: rows that a tower has for the one sequence of this batch: of several images one for each.
    """

    inputs: dict[str, torch.Tensor]
    sequences: tuple[int, ...]
    rows: tuple[Positions, ...]
    past: int = 0
    counts: Mapping[int, tuple[Positions, ...]] = field(default_factory=dict)
    pieces: int = 1

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""

        def moved(rows: tuple[Positions, ...]) -> tuple[Positions, ...]:
            return tuple(row.to(device) if isinstance(row, torch.Tensor) else row for row in rows)

        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        counts = {width: moved(rows) for width, rows in self.counts.items()}
        return replace(self, inputs=inputs, rows=moved(self.rows), counts=counts)

    def __repr__(self) -> str:
        """Which sequences, and the shapes of their inputs."""
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.inputs.items())
        return f"Batch(sequences {ranges(self.sequences)}: {shapes})"

    def part(self, start: int, stop: int) -> Batch:
        """Return the rows from `start` to before `stop`, for when the whole does not fit into memory."""
        inputs = {name: tensor[start:stop] for name, tensor in self.inputs.items()}
        counts = {width: rows[start:stop] for width, rows in self.counts.items()}
        return replace(
            self, inputs=inputs, sequences=self.sequences[start:stop], rows=self.rows[start:stop], counts=counts
        )

    def rows_of(self, n_positions: int) -> tuple[Positions, ...]:
        """Which positions count in a stack of so many; all where nothing is said of such a stack."""
        told = self.inputs.get("input_ids", self.inputs.get("attention_mask"))
        about = self.rows if told is not None and told.shape[1] == n_positions else (None,) * len(self.rows)
        return self.counts.get(n_positions, about)


@dataclass(frozen=True)
class Origin:
    """How a corpus was made: what run.json needs in order to make it again.

    Args:
        bos: the resolved policy: 'never', 'always' (BOS in every window), 'tokenizer' (every window gets what
            the tokenizer adds to a sequence), 'stream' (once, around the whole text), 'chat' (each text is a message in
            the chat template) or 'given'.
        bos_requested: the policy that was asked for.
        special_tokens: what was added, as {'prefix': [...], 'suffix': [...]}.
        seed: the seed that was given; it only matters where the source draws documents at random.
        packing: method ('windows' | 'prompts' | 'given') and its numbers.
        source: where the documents came from.
    """

    bos: str = "given"
    bos_requested: str = "auto"
    special_tokens: dict[str, list[str]] = field(default_factory=lambda: {"prefix": [], "suffix": []})
    seed: int = 0
    packing: dict[str, Any] = field(default_factory=lambda: {"method": "given"})
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Corpus:
    """An immutable, ready set of model inputs: token ids, images, or any named tensors.

    Args:
        name: what the user called it.
        kind: 'tokens' where `inputs` has `input_ids`, else 'tensors'.
        inputs: keyword arguments of the model, each with N as its first dimension but for the packed ones; no
            `attention_mask`.
        mask: (N, T) bool, which positions count; None where all do.
        origin: how it was made.
        spelling: turns token ids into strings; None where no tokenizer is known.
        pictures: of images read from files: their names and classes; None for anything else.
        places: name of each position of a model of images ('[CLS]', 'patch (0, 3)') or of sound ('frame 0.00-0.02 s');
            None where none is known.
        own_places: the same of each sequence, where they differ (images of any size); () elsewhere.
        recordings: of sound read from files: names, lengths, transcripts; None for anything else.
        counts: masks (N, P) bool of stacks with P positions of their own (frames of sound, a decoder), told apart by P.
        ends: of each recording, the first position behind its end, in a stack of frames; None elsewhere.
        packed: of an input that holds the rows of all sequences one after another (patches of images of any size,
            several images a sequence), how many rows each sequence has. Such a corpus is read one sequence at a time,
            since the tower that takes these rows sees those of a whole batch as one sequence.
        modalities: what each position is, as far as a model was asked; None before.
        prompts: of a text that a model went on with, the tokens of each sequence that it was given; () elsewhere.
    """

    name: str
    kind: Literal["tokens", "tensors"]
    inputs: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None
    origin: Origin = field(default_factory=Origin)
    spelling: Spelling | None = None
    pictures: Pictures | None = None
    places: tuple[str, ...] | None = None
    packed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    modalities: Modalities | None = None
    recordings: Recordings | None = None
    counts: tuple[torch.Tensor, ...] = ()
    ends: tuple[int, ...] | None = None
    own_places: tuple[tuple[str, ...], ...] = ()
    prompts: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """Its name and the shapes of its inputs."""
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.inputs.items())
        return f"Corpus({self.name!r}, {self.n_sequences:,} sequence{'s' * (self.n_sequences != 1)}: {shapes})"

    @property
    def n_sequences(self) -> int:
        """Number of sequences (or images)."""
        return next(tensor for name, tensor in self.inputs.items() if name not in self.packed).shape[0]

    @property
    def seq_len(self) -> int | None:
        """Tokens per sequence; None where sequences differ in length or are not tokens."""
        if self.kind != "tokens" or self.mask is not None:
            return None
        return self.inputs["input_ids"].shape[1]

    @property
    def n_tokens(self) -> int | None:
        """Number of positions that count, over all sequences; None for tensors without a mask, and for sound."""
        if self.mask is not None and self.recordings is None:
            return int(self.mask.sum())
        return self.inputs["input_ids"].numel() if self.kind == "tokens" else None

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: the same for every batch size, and for the same content under another name."""
        counts = {f"positions {i}": mask for i, mask in enumerate(self.counts)}
        return content_sha256({**self.inputs, **counts}, self.mask)

    def __len__(self) -> int:
        return self.n_sequences

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Read the corpus in order.

        Args:
            batch_size: rows per batch; the last batch may be smaller.
            start: first sequence (a resumed run); at or past the end nothing comes.

        Raises:
            UserError: `batch_size` below 1, `start` below 0.
        """
        if batch_size < 1:
            raise UserError(f"The batch size is {batch_size}.", "A batch has at least one sequence.", "Use 1 or more.")
        if start < 0:
            raise UserError(f"The first sequence is {start}.", "Sequences are numbered from 0.", "Use 0 or more.")
        last = self.n_sequences
        batch_size = 1 if self.packed else batch_size
        return (self._batch(low, min(low + batch_size, last)) for low in range(start, last, batch_size))

    def n_images(self, sequence: int) -> int:
        """How many images a sequence has, of a corpus that has any."""
        counts = [n for name, n in self.packed.items() if name in PER_IMAGE] or [
            n for name, n in self.packed.items() if name == "pixel_values" and "image_grid_thw" not in self.inputs
        ]
        return counts[0][sequence] if counts else 1

    def rows(self, start: int, stop: int | None = None) -> dict[str, torch.Tensor]:
        """The inputs of the sequences from `start` to before `stop`; views, not copies."""
        stop = self.n_sequences if stop is None else stop
        cut = {name: (sum(n[:start]), sum(n[:stop])) for name, n in self.packed.items()}
        return {name: x[slice(*cut.get(name, (start, stop)))] for name, x in self.inputs.items()}

    def _pieces(self, sequence: int) -> int:
        """Rows that a tower has for a sequence of several images; of packed patches it has one."""
        return self.n_images(sequence) if self.packed and "image_grid_thw" not in self.inputs else 1

    def _batch(self, low: int, high: int) -> Batch:
        # Cloned, so that a model or an edit that works in place cannot change the corpus.
        inputs = {name: tensor.clone() for name, tensor in self.rows(low, high).items()}
        sequences, pieces = tuple(range(low, high)), self._pieces(low)
        counts = {m.shape[1]: tuple(counted(row) for row in m[low:high]) for m in self.counts}
        if self.mask is None:
            return Batch(inputs, sequences, (None,) * len(sequences), counts=counts, pieces=pieces)
        mask = self.mask[low:high]
        inputs, mask = trim_padding(inputs, mask)
        if mask.all():
            return Batch(inputs, sequences, (None,) * len(sequences), counts=counts, pieces=pieces)
        rows = tuple(counted(row) for row in mask)
        return Batch(inputs | {"attention_mask": mask.long()}, sequences, rows, counts=counts, pieces=pieces)

    def token_id(self, sequence: int, pos: int) -> int:
        """Return the token id at a position; -1 where the corpus is not tokens."""
        self._inside(sequence, pos)
        return int(self.inputs["input_ids"][sequence, pos]) if self.kind == "tokens" else -1

    def token(self, sequence: int, pos: int) -> str:
        """Return a readable token, for example ' the', '\\n' or '<s>'; 'patch (0, 3)', or 'token 17' where there is
        neither an id nor a name."""
        token_id = self.token_id(sequence, pos)
        if self.kind != "tokens":
            if self._behind(sequence, pos):
                return PADDING
            places = self.own_places[sequence] if self.own_places else self.places
            return places[pos] if places is not None and pos < len(places) else f"token {pos}"
        if self.modalities is not None and token_id in self.modalities.ids:
            return self.modalities.name(self.inputs["input_ids"][sequence], sequence, pos)
        return self.spelling.string(token_id) if self.spelling else f"id {token_id}"

    def modality(self, sequence: int, pos: int) -> str:
        """Return what a position is: text, image, video or audio; empty where it is not known."""
        return "" if self.modalities is None else self.modalities.of(self.token_id(sequence, pos), pos)

    def written_by(self, sequence: int, pos: int) -> str:
        """Return whether a position is of the prompt or was generated; empty of a text that no model went on with."""
        return "" if not self.prompts else PROMPT if pos < self.prompts[sequence] else GENERATED

    def position_class(self, sequence: int, pos: int) -> PositionClass:
        """Say whether a position is the first that counts, a delimiter, padding, or another one (paper.md 2.1).

        Padding is a frame behind the end of a recording that counts all the same, as the model attends to it. A
        delimiter is a punctuation mark, a run of newlines, or a separator token. Without a tokenizer no position is
        known to be one.
        """
        self._inside(sequence, pos)
        first = 0 if self.mask is None else int(self.mask[sequence].to(torch.uint8).argmax())
        if pos == first:
            return "start"
        if self._behind(sequence, pos):
            return PADDING
        spelling = self.spelling if self.kind == "tokens" and self.modality(sequence, pos) in ("", "text") else None
        is_delimiter = spelling is not None and spelling.is_delimiter(self.token_id(sequence, pos))
        return "delimiter" if is_delimiter else "other"

    def _behind(self, sequence: int, pos: int) -> bool:
        return self.ends is not None and pos >= self.ends[sequence]

    def _inside(self, sequence: int, pos: int) -> None:
        # Negative indices would silently wrap around. How many positions an image has, the model decides.
        width = self.inputs["input_ids"].shape[1] if self.kind == "tokens" else pos + 1
        if not (0 <= sequence < self.n_sequences and 0 <= pos < width):
            raise IndexError(f"sequence {sequence}, position {pos} of a corpus of {self.n_sequences} x {width}")

    def head(self, n: int) -> Corpus:
        """Return the first `n` sequences.

        Raises:
            UserError: fewer than one, or more than there are.
        """
        if not 1 <= n <= self.n_sequences:
            raise UserError(
                f"The first {n} sequences of {self.name!r} were asked for.",
                f"The corpus has {self.n_sequences}.",
                f"Ask for 1 to {self.n_sequences}.",
            )
        return self.part(0, n)

    def part(self, start: int, stop: int | None = None, *, trim: bool = True) -> Corpus:
        """Return the sequences from `start` to before `stop`; without padding that no row needs, where `trim`."""
        inputs = self.rows(start, stop)
        parts: dict[str, Any] = {
            "pictures": None if self.pictures is None else self.pictures.part(start, stop),
            "recordings": None if self.recordings is None else self.recordings.part(start, stop),
            "counts": tuple(mask[start:stop] for mask in self.counts),
            "ends": None if self.ends is None else self.ends[start:stop],
            "own_places": self.own_places[start:stop],
            "prompts": self.prompts[start:stop],
            "packed": {name: n[start:stop] for name, n in self.packed.items()},
        }
        if self.mask is None:
            return replace(self, inputs=inputs, **parts)
        if not trim:
            return replace(self, inputs=inputs, mask=self.mask[start:stop], **parts)
        inputs, mask = trim_padding(inputs, self.mask[start:stop])
        return replace(self, inputs=inputs, mask=None if mask.all() else mask, **parts)

    def cut(self, n_tokens: int) -> Corpus | None:
        """Return the first tokens of every sequence; None where there is more than tokens, or a row would be empty."""
        of_tokens = [
            self.kind == "tokens" and t.shape[:2] == self.inputs["input_ids"].shape for t in self.inputs.values()
        ]
        if not all(of_tokens) or self.packed or self.counts:
            return None
        mask = None if self.mask is None else self.mask[:, :n_tokens]
        if mask is not None and not bool(mask.any(1).all()):
            return None
        mask = None if mask is None or bool(mask.all()) else mask
        return replace(self, inputs={name: t[:, :n_tokens] for name, t in self.inputs.items()}, mask=mask)

    def with_tokenizer(self, tokenizer: Any) -> Corpus:
        """Return the same corpus with readable token strings (token ids that came without a tokenizer)."""
        return replace(self, spelling=Spelling(tokenizer))

    def ready(self, model: Reader, wish: Wish) -> Corpus:
        """The same with what only the model knows of it: readable tokens, and what a decoder of sound reads."""
        if self.kind == "tokens" and self.spelling is None and model.tokenizer is not None:
            return self.with_tokenizer(model.tokenizer)
        prompt = model.prompt
        if prompt is None or self.spelling is not None or "decoder_inputs_embeds" in self.inputs:
            return self
        made = self if "decoder_input_ids" in self.inputs else self._with_prompt(prompt)
        return made if model.tokenizer is None else made.with_tokenizer(model.tokenizer)

    def _with_prompt(self, prompt: Prompt) -> Corpus:
        """Features of sound that were given as tensors, with the decoder's start tokens."""
        ids = torch.tensor([prompt.ids]).expand(self.n_sequences, -1).contiguous()
        record = {"prompt_ids": list(prompt.ids), "prompt_from": prompt.said_by, "then": None}
        origin = replace(self.origin, source=self.origin.source | {"decoder": record})
        return replace(self, inputs={**self.inputs, "decoder_input_ids": ids}, origin=origin)

    def with_types(self, model: Reader) -> Corpus:
        """The same with what its tokens are, where an image grid stands beside them: multimodal rotary positions."""
        needed = "mm_token_type_ids" in model.inputs_accepted() and "mm_token_type_ids" not in self.inputs
        if not needed or not self.packed or self.kind != "tokens":
            return self
        types = token_types(self.inputs["input_ids"], model.placeholders)
        return replace(self, inputs={**self.inputs, "mm_token_type_ids": types})

    def require(self, vocabulary: int | None = None, context: int | None = None) -> None:
        """Check the token ids against a model before it runs on them.

        Args:
            vocabulary: rows of the model's embedding.
            context: most positions that the model takes.

        Raises:
            UserError: an id outside the vocabulary, or sequences longer than the context.
        """
        if self.kind != "tokens":
            return
        ids = self.inputs["input_ids"]
        if vocabulary is not None and int(ids.max()) >= vocabulary:
            row, pos = divmod(int(ids.argmax()), ids.shape[1])
            raise UserError(
                f"Token id {int(ids.max())} (sequence {row}, position {pos}) is outside the vocabulary.",
                f"The model knows ids 0 to {vocabulary - 1}.",
                "Tokenise the text with the tokenizer of this model.",
            )
        if context is not None and ids.shape[1] > context:
            raise UserError(
                f"The sequences are {ids.shape[1]} tokens long.",
                f"The model takes at most {context}.",
                f"Use --seq-len {context} or less.",
            )

    def info(self) -> dict[str, Any]:
        """Return what run.json records about the corpus: plain JSON values only."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "seq_len": self.seq_len,
            "n_sequences": self.n_sequences,
            "n_tokens": self.n_tokens,
            "tokenizer": self.spelling.info() if self.spelling else None,
            **asdict(self.origin),
        }


def counted(mask_T: torch.Tensor) -> Positions:
    """Return the positions that count: None = all, a slice = one contiguous run, else a LongTensor."""
    positions = mask_T.nonzero().flatten()
    first, last = int(positions[0]), int(positions[-1])
    if len(positions) == len(mask_T):
        return None
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def content_sha256(inputs: Mapping[str, torch.Tensor], mask: torch.Tensor | None) -> str:
    """Hash named tensors: for each, in name order, 'name dtype shape' and then the bytes (little endian).

    Token ids are int64. An id that does not count (padding) is hashed as 0: which id a tokenizer pads with
    does not change the content.
    """
    digest = hashlib.sha256()
    parts = dict(inputs) if mask is None else {**inputs, "attention_mask": mask}
    for name in sorted(parts):
        tensor = parts[name].cpu().contiguous()
        if name == "input_ids" and mask is not None:
            tensor = tensor * mask
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        # Through uint8: NumPy has no bfloat16. The buffer is read in place, not copied.
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def trim_padding(
    inputs: dict[str, torch.Tensor], mask_BT: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Cut the columns at the end that no row counts, where the ids are the only input."""
    if set(inputs) != {"input_ids"}:
        return inputs, mask_BT
    width = int(mask_BT.any(dim=0).nonzero().max()) + 1
    return {"input_ids": inputs["input_ids"][:, :width]}, mask_BT[:, :width]
