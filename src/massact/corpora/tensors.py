"""Inputs that the user already has: token ids, images, any named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from massact.corpora.batch import PER_IMAGE, Corpus, Origin, trim_padding
from massact.corpora.masks import decoder_counts, is_mask, kept_of, zero_one
from massact.corpora.packing import Request
from massact.corpora.token_strings import Spelling
from massact.records.errors import UserError


def from_ids(ids: torch.Tensor | np.ndarray, tokenizer: Any, request: Request) -> Corpus:
    """Make a corpus of token ids, one sequence per row.

    Args:
        ids: (N, T), any integer type.
        tokenizer: for readable tokens and for the size of the vocabulary; may be None.
        request: may only repeat the shape, or ask for the first rows.

    Raises:
        UserError: not two-dimensional, not integers, empty, ids outside the vocabulary, or a request that the
            ids cannot meet.
    """
    return from_tensors({"input_ids": ids}, tokenizer, request, name="ids")


def from_tensors(tensors: Mapping[str, Any], tokenizer: Any, request: Request, name: str | None = None) -> Corpus:
    """Make a corpus of named tensors, for example {'pixel_values': (N, C, H, W)}.

    Args:
        tensors: keyword arguments of the model, each with N first; an `attention_mask` (N, T) says which
            positions count: 1 or True those that do, 0 or False the others, nothing else; a `decoder_attention_mask`
            says the same of what a decoder reads. Tensors are held, not copied; token ids are copied. Beside an
            `image_grid_thw` (N, 3) of frames, rows and columns of patches, `pixel_values` holds the patches of all
            images one after another. Of several images a sequence, what is given of images (`pixel_values`,
            `image_grid_thw`, `image_sizes`) has one row for each image, those of the first sequence first: as many
            for each sequence, or as many as `n_images` (N,) says.
        tokenizer: for readable tokens where there are `input_ids`; may be None.
        request: as for `from_ids`.
        name: name of the corpus; 'ids' or 'tensors' if None.

    Raises:
        UserError: not tensors, different numbers of rows, no rows, a mask that does not fit; as `from_ids`.
    """
    parts = {key: _tensor(key, value) for key, value in tensors.items()}
    if not parts or set(parts) == {"attention_mask"}:
        raise UserError("The corpus is empty.", "The dict has no input tensor.", "Give {'pixel_values': ...} or so.")
    packed = _packed(parts, parts.pop("n_images", None))
    lengths = {tensor.shape[0] for key, tensor in parts.items() if key not in packed}
    if len(lengths) > 1 or any(tensor.numel() == 0 for tensor in parts.values()):
        raise UserError(
            "The tensors do not form a corpus.",
            "Shapes: " + ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in parts.items()) + ".",
            "Each needs one row per sequence, and at least one row.",
        )
    kind: Literal["tokens", "tensors"] = "tokens" if "input_ids" in parts else "tensors"
    if kind == "tokens":
        parts["input_ids"] = _ids(parts["input_ids"], tokenizer)
    mask = parts.pop("attention_mask", None)
    mask = None if mask is None else kept_of(mask, parts.get("input_ids"))
    for key in filter(is_mask, parts):
        zero_one(key, parts[key])
    counts = decoder_counts(parts, mask, parts.get("input_ids"))
    if request.bos == "always":
        raise UserError(
            "bos='always' was asked for.",
            "The inputs are given as they are.",
            "Put the BOS id in, or leave it out.",
        )
    spelling = Spelling(tokenizer) if tokenizer is not None and kind == "tokens" else None
    origin = Origin(bos_requested=request.bos, seed=int(request.seed))
    if mask is not None:
        parts, mask = trim_padding(parts, mask)
    name = name or {"tokens": "ids"}.get(kind, kind)
    corpus = Corpus(name, kind, parts, mask, origin, spelling, packed=packed, counts=counts)
    _meets(corpus, request)
    n = request.n_sequences
    return corpus if n is None or n == "all" or n == corpus.n_sequences else corpus.head(n)


# Patches of images of any size, and the tensor that says how many each image has.
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def _packed(parts: Mapping[str, torch.Tensor], n_images: torch.Tensor | None) -> dict[str, tuple[int, ...]]:
    """Rows of each sequence of the inputs that hold those of all sequences one after another.

    Args:
        n_images: (N,) images of each sequence; None: as many of each.

    Raises:
        UserError: images or patches are not as many as they should be.
    """
    images = _images_of(parts, n_images)
    several = any(n != 1 for n in images)
    found = {name: images for name in (*PER_IMAGE, "pixel_values") if several and name in parts}
    for pixels, grid in _GRIDS.items():
        if pixels not in parts or grid not in parts:
            continue
        sizes, rows = parts[grid], parts[pixels].shape[0]
        if sizes.ndim != 2 or sizes.shape[1] != 3 or int(sizes.prod(1).sum()) != rows:
            said = f"{grid} {tuple(sizes.shape)}" + (f", in all {int(sizes.prod(1).sum())}" if sizes.ndim == 2 else "")
            raise UserError(
                f"{pixels} does not fit {grid}.",
                f"{pixels} has {rows} patches; {said}.",
                f"Give {grid} as (images, 3): frames, rows and columns of patches of each image.",
            )
        mine = sizes.prod(1).split(found.get(grid, (1,) * len(sizes)))
        found[pixels] = tuple(int(n.sum()) for n in mine)
    return found


def _images_of(parts: Mapping[str, torch.Tensor], n_images: torch.Tensor | None) -> tuple[int, ...]:
    """How many images each sequence has; one where there is no text beside them.

    Raises:
        UserError: they cannot be shared out.
    """
    counted = next((parts[name] for name in (*PER_IMAGE, "pixel_values") if name in parts), None)
    if counted is None:
        if n_images is not None:
            raise UserError("n_images is given, and no images are.", do="Leave it out.")
        return ()
    total = counted.shape[0]
    n = next((x.shape[0] for name, x in parts.items() if name.endswith("input_ids")), total)
    if n_images is None:
        return (total // n,) * n if n and total % n == 0 else ()  # what does not fit is refused with all shapes
    given = tuple(int(k) for k in n_images.flatten())
    if len(given) != n or sum(given) != total or min(given, default=1) < 1:
        raise UserError(
            f"n_images does not fit: {total} images for {n} sequences.",
            f"It says {given[:8]}, {sum(given)} in all.",
            "Give one number for each sequence, from 1 on; text without an image is a corpus of its own.",
        )
    return given


def is_cache(name: str, value: Any) -> bool:
    """Whether an input is a cache of keys and values."""
    return name.startswith("past_key_value") or hasattr(value, "get_seq_length")


def no_cache(name: str) -> UserError:
    """The refusal of a cache as an input: every pass would write into it, and what is in it would not be measured."""
    return UserError(
        f"{name!r} is a cache of keys and values.",
        "Every pass writes into it, and the tokens behind it are not in the input, so that no position could be told.",
        "Give the whole text as input_ids. To look at passes that go on from a cache: `with "
        "massact.trace.observing(model, probes):` around a loop of your own.",
    )


def _tensor(name: str, value: Any) -> torch.Tensor:
    if is_cache(name, value):
        raise no_cache(name)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        value = torch.from_numpy(np.ascontiguousarray(native))
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.layout is not torch.strided:
        raise UserError(
            f"{name!r} is no tensor.",
            f"It is a {_described(value)}.",
            "Give a tensor or array with one row per sequence.",
        )
    return value.detach()


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ + (f" of {dtype}, shape {tuple(shape)}" if shape is not None else "")


def _ids(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    if ids.ndim != 2:
        raise UserError(
            "The token ids are not two-dimensional.",
            f"Their shape is {tuple(ids.shape)}.",
            "Give (sequences, tokens); one sequence is ids[None, :].",
        )
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise UserError("The token ids are not integers.", f"They are {ids.dtype}.", "Convert them with .long().")
    ids = ids.to("cpu", torch.long, copy=True)
    if int(ids.min()) < 0:
        raise UserError(
            f"Token id {int(ids.min())} is negative.",
            "Ids start at 0; -100 marks ignored labels, not inputs.",
            "Pass input ids, and an attention_mask for padding.",
        )
    if tokenizer is not None:
        # Not len(tokenizer): ids need not be contiguous, and added tokens may lie past the end.
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
        if int(ids.max()) >= size:
            row, pos = divmod(int(ids.argmax()), ids.shape[1])
            raise UserError(
                f"Token id {int(ids.max())} (sequence {row}, position {pos}) is outside the vocabulary.",
                f"{type(tokenizer).__name__} knows ids 0 to {size - 1}.",
                "Tokenise the text with the tokenizer of this model.",
            )
    return ids


def _meets(corpus: Corpus, request: Request) -> None:
    """Refuse a request that given inputs cannot meet; they are never cut or filled silently."""
    width = corpus.inputs["input_ids"].shape[1] if corpus.kind == "tokens" else None
    if request.seq_len not in (None, width):
        raise UserError(
            f"--seq-len {request.seq_len} was asked for.",
            f"The ids are {width} tokens long." if width else "The corpus is tensors, which have no tokens.",
            "Leave it out" + (f", or pass ids[:, :{request.seq_len}]." if width and request.seq_len < width else "."),
        )
    n = request.n_sequences
    if n is not None and n != "all" and n > corpus.n_sequences:
        raise UserError(
            f"{n} sequences were asked for.",
            f"There are {corpus.n_sequences}.",
            f"Use --n-sequences {corpus.n_sequences} or less.",
        )
    corpus.require(context=request.context)
