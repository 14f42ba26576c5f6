"""Named recordings that still wait for a model: its feature extractor says how they become numbers.

Shapes: N recordings, S samples, F frames of the model's input, T ids that the decoder reads.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from massact.corpora.batch import Corpus, Origin
from massact.corpora.masks import zero_one
from massact.corpora.readiness import Reader, Wish, how_many, refuse_text_options
from massact.corpora.recordings import Prompt, Recordings, at_rate, opened
from massact.corpora.token_strings import Spelling
from massact.records.errors import UserError, class_and_line

MOST_BYTES = 4 << 30  # all inputs of a corpus are held as float32
MOST_NAMES = 1000  # file names kept in run.json
AT_ONCE = 8  # recordings that an extractor of fixed length gets in one call
_LARGE = ("mel_filters", "mel_filters_slaney", "window")  # follow from the other fields


@dataclass(frozen=True, eq=False)
class AudioSource:
    """Recordings, not yet read; the model brings the feature extractor.

    Args:
        name: what the user called them.
        recordings: where they are, and their transcripts.
        n_sequences: how many, from the start; None or 'all' for all.
    """

    name: str
    recordings: Recordings
    n_sequences: int | Literal["all"] | None = None

    def ready(self, model: Reader, wish: Wish) -> Corpus:
        """Read and prepared for a model, see `massact.corpora.readiness.ready`."""
        refuse_text_options("sound", wish)
        if model.sound_input is None:
            raise UserError(
                f"{model.name or 'The model'} takes {model.main_input}, not sound.", do="Give what it takes."
            )
        return self.encode(
            model.processor,
            input_name=model.sound_input,
            tokenizer=model.tokenizer,
            prompt=model.prompt,
            n_sequences=wish.n_sequences,
        )

    def encode(
        self,
        extractor: Any,
        *,
        input_name: str,
        tokenizer: Any = None,
        prompt: Prompt | None = None,
        n_sequences: int | Literal["all"] | None = None,
    ) -> Corpus:
        """Read the recordings and make the model's inputs of them, all in memory.

        The mean of the channels, at the extractor's sampling rate, goes through the extractor. A decoder reads the
        prompt and then the transcript, as text alone, without an end token.

        Args:
            extractor: a feature extractor of transformers.
            input_name: the model's name for sound, 'input_features' or 'input_values'.
            tokenizer: of the decoder; needed only for transcripts.
            prompt: None for a model without a decoder, which reads no transcripts.
            n_sequences: None: as given to `corpus()`.

        Raises:
            UserError: there is no extractor, a recording cannot be read, they are too many, or a transcript is longer
                than the decoder's context.
        """
        rate = getattr(extractor, "sampling_rate", None)
        if rate is None:
            raise UserError(
                "The model does not say how sound is prepared for it.",
                "Beside its weights there is no preprocessor_config.json of a feature extractor.",
                f"Save its feature extractor there, or give tensors: corpus({{{input_name!r}: tensor}}).",
            )
        n = how_many(n_sequences, self.n_sequences, len(self.recordings), "recordings", self.name)
        recordings = self.recordings.part(0, n)
        sounds, heard = _read(recordings, int(rate))
        inputs, mask = _extracted(self.name, extractor, sounds, input_name)
        time_axis = _time_axis(inputs, extractor)
        hop = 1 if inputs.ndim == 2 else getattr(extractor, "hop_length", None)
        step_s = None if hop is None else hop / rate
        seconds = [len(sound) / rate for sound in sounds]
        read = seconds if step_s is None else [min(s, inputs.shape[time_axis] * step_s) for s in seconds]
        parts, decoder = {input_name: inputs}, None
        counts: tuple[torch.Tensor, ...] = ()
        if prompt is not None:
            ids, positions, decoder = _decoder_ids(recordings, tokenizer, prompt)
            parts["decoder_input_ids"] = ids
            counts = () if positions.all() else (positions,)
        prepared = {"extractor": type(extractor).__name__, **_fields(extractor), **heard,
                    "input_shape": list(inputs.shape[1:]), "masked": mask is not None}  # fmt: skip
        source = {
            "kind": "recordings", "form": recordings.form, "files": list(recordings.names[:MOST_NAMES]),
            "seconds": [round(s, 4) for s in seconds[:MOST_NAMES]], "preprocess": prepared, "decoder": decoder,
            "transcripts": recordings.texts is not None, "notes": _notes(recordings, seconds, read, prompt),
        }  # fmt: skip
        origin = Origin(bos_requested="auto", packing={"method": "given"}, source=source)
        kept = replace(recordings, sounds=(), seconds=tuple(read), step_s=step_s, time_axis=time_axis,
                       prompt=() if prompt is None else prompt.ids)  # fmt: skip
        spelling = Spelling(tokenizer) if tokenizer is not None and prompt is not None else None
        return Corpus(self.name, "tensors", parts, mask, origin, spelling, recordings=kept, counts=counts)


def _read(recordings: Recordings, rate: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Samples of every recording, one channel at one rate, and what was done for that."""
    sounds, rates, channels = [], Counter[int](), Counter[int]()
    total = 0
    for name, sound in zip(recordings.names, recordings.sounds, strict=True):
        samples_SC, own = opened(sound, name)
        rates[own] += 1
        channels[samples_SC.shape[1]] += 1
        sounds.append(at_rate(samples_SC.mean(1, dtype=np.float32), own, rate))
        total += sounds[-1].nbytes
        if total > MOST_BYTES:
            raise _too_many(len(recordings), total, f"Use --n-sequences {max(1, len(sounds) - 1)} or less.")
    return sounds, {
        "sampling_rate": rate, "recorded_at": {str(k): n for k, n in sorted(rates.items())},
        "resampled_by": "scipy.signal.resample_poly" if set(rates) - {rate} else None,
        "channels": {str(k): n for k, n in sorted(channels.items())},
        "channels_joined_by": "mean" if set(channels) - {1} else None,
    }  # fmt: skip


def _too_many(n: int, total: float, do: str) -> UserError:
    return UserError(
        f"{n:,} recordings do not fit.", f"They would take {total / 2**30:.1f} GiB; {MOST_BYTES >> 30} are allowed.", do
    )


def _extracted(
    name: str, extractor: Any, sounds: Sequence[np.ndarray], input_name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the model takes (N, ...), and its mask (N, F) where the extractor makes one and something is padding."""
    takes = inspect.signature(extractor.__call__).parameters
    options: dict[str, Any] = {"sampling_rate": extractor.sampling_rate, "return_tensors": "np"}
    fixed = "padding" not in takes or takes["padding"].default == "max_length"
    if not fixed:
        options["padding"] = True
    values, masks = [], []
    try:
        for low in range(0, len(sounds), AT_ONCE if fixed else len(sounds)):
            made = extractor(list(sounds[low : low + AT_ONCE] if fixed else sounds), **options)
            values.append(np.asarray(made[input_name], np.float32))
            masks.append(made.get("attention_mask"))
            if len(sounds) * values[0][0].nbytes > MOST_BYTES:
                fit = max(1, MOST_BYTES // values[0][0].nbytes)
                raise _too_many(len(sounds), len(sounds) * values[0][0].nbytes, f"Use --n-sequences {fit} or less.")
    except UserError:
        raise
    except Exception as error:  # extractors raise what their arithmetic raises: too short for one window, ...
        raise UserError(
            f"{type(extractor).__name__} cannot prepare the recordings of {name!r}.",
            class_and_line(error), "Look for one that is very short.",
        ) from error  # fmt: skip
    inputs = torch.from_numpy(np.concatenate(values))
    if not bool(torch.isfinite(inputs).all()):
        raise UserError(f"{type(extractor).__name__} makes NaN or Inf of the recordings of {name!r}.")
    if any(m is None for m in masks):
        return inputs, None
    mask = zero_one("attention_mask", torch.from_numpy(np.concatenate(masks)))
    return inputs, None if bool(mask.all()) else mask


def _time_axis(inputs: torch.Tensor, extractor: Any) -> int:
    """Of features (N, bins, F) or (N, F, bins) the axis of F: the other one is as long as the extractor says."""
    bins = getattr(extractor, "feature_size", None)
    return 1 if inputs.ndim == 3 and inputs.shape[2] == bins and inputs.shape[1] != bins else inputs.ndim - 1


def _fields(extractor: Any) -> dict[str, Any]:
    """The numbers of an extractor, without arrays that follow from them."""
    fields = {k: v for k, v in extractor.to_dict().items() if k not in _LARGE}
    return {k: v for k, v in fields.items() if v is None or isinstance(v, str | bool | int | float)}


def _decoder_ids(
    recordings: Recordings, tokenizer: Any, prompt: Prompt
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What the decoder reads (N, T), which of it counts (N, T) bool, and the record of it."""
    rows = [list(prompt.ids) for _ in recordings.names]
    if recordings.texts is not None:
        if tokenizer is None:
            raise UserError(
                "The recordings have transcripts, and the model comes without a tokenizer.",
                do="Take the transcripts away, or give the model its tokenizer.",
            )
        for row, name, text in zip(rows, recordings.names, recordings.texts, strict=True):
            row += _transcript_ids(tokenizer, text)
            if prompt.context is not None and len(row) > prompt.context:
                raise UserError(
                    f"The transcript of {name!r} is {len(row):,} tokens long, the prompt included.",
                    f"The decoder takes at most {prompt.context:,}.", "Cut the recording and its transcript.",
                )  # fmt: skip
    width = max(map(len, rows))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    counts = torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]
    record = {"prompt_ids": list(prompt.ids), "prompt_from": prompt.said_by,
              "then": "transcript" if recordings.texts is not None else None}  # fmt: skip
    return ids, counts, record


def _transcript_ids(tokenizer: Any, text: str) -> list[int]:
    """A transcript as decoders of sound were trained on it: its first word with a space in front, as every other.

    Byte-level tokenizers that add none by themselves (Whisper's) get one; SentencePiece marks words on its own.
    """
    text = text.lstrip()
    plain, spaced = (list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (text, f" {text}"))
    marked = bool(plain) and str(tokenizer.convert_ids_to_tokens(plain[:1])[0]).startswith(("\u2581", "\u0120"))
    return spaced if not marked and tokenizer.decode(spaced).startswith(" ") else plain


def _notes(recordings: Recordings, seconds: Sequence[float], read: Sequence[float], prompt: Prompt | None) -> list[str]:
    """What a reader must know of how recordings were read."""
    notes = []
    cut = [name for name, s, r in zip(recordings.names, seconds, read, strict=True) if s - r > 1e-6]
    if cut:
        also = "; their transcripts may go on behind it" if recordings.texts is not None else ""
        notes.append(f"{len(cut):,} recording(s) are longer than the model takes: of each the first {max(read):.4g} s "
                     f"were read{also} (the first is {cut[0]!r}).")  # fmt: skip
    if recordings.texts is not None and prompt is None:
        notes.append("The model has no decoder, so the transcripts were not read.")
    return notes
