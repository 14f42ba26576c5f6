"""Where recordings are: a folder, one file, a CSV, a list; and how one is opened (wav and flac)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from massact.corpora.files import (
    AUDIO_SUFFIXES,
    JSONL_SUFFIXES,
    TEXT_SUFFIXES,
    files_in,
    named_file,
    read_text,
)
from massact.corpora.image_files import is_image_name
from massact.corpora.text_tables import csv_rows
from massact.records.errors import UserError, class_and_line

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC")  # as libsndfile calls what these endings mean; it starts no programs
MOST_BYTES = 4 << 30  # of one recording as float32: a few bytes of flac can say that they are hours
PATH_COLUMNS = ("path", "file", "filename", "file_name", "audio")
TEXT_COLUMNS = ("text", "transcript", "sentence")
INSTALL = "Install what reads audio: pip install 'massact[audio]'"


@dataclass(frozen=True)
class Prompt:
    """What the decoder of a model of sound reads ahead of any transcript.

    Args:
        ids: token ids.
        said_by: where they are from, for run.json.
        context: most positions of the decoder; None where that is not known.
    """

    ids: tuple[int, ...]
    said_by: str
    context: int | None = None


@dataclass(frozen=True)
class Recordings:
    """Recordings of a corpus, in order, and what is said in them.

    Args:
        names: of each recording, relative to where they were looked for.
        texts: transcript of each, or None.
        sounds: path of each, or (samples, rate in Hz); empty once they are read.
        form: 'folder', 'csv', 'file' or 'list'.
        seconds: of each, the length that the model got; empty until they are read.
        step_s: seconds from one input frame of the model to the next; None until they are read, or where it is unknown.
        time_axis: axis of the model's input along which time runs.
        prompt: ids that the decoder reads first, ahead of a transcript; empty where there is no decoder.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...] | None = None
    sounds: tuple[Any, ...] = field(default=(), repr=False)
    form: str = "list"
    seconds: tuple[float, ...] = ()
    step_s: float | None = None
    time_axis: int = -1
    prompt: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def part(self, start: int, stop: int | None = None) -> Recordings:
        """Those from `start` to before `stop`."""
        texts = None if self.texts is None else self.texts[start:stop]
        return replace(self, names=self.names[start:stop], texts=texts, sounds=self.sounds[start:stop],
                       seconds=self.seconds[start:stop])  # fmt: skip


def is_audio_name(name: Any) -> bool:
    """Whether a path or string ends as recordings do."""
    return isinstance(name, str | os.PathLike) and os.fspath(name).lower().endswith(AUDIO_SUFFIXES)


def is_sound(thing: Any) -> bool:
    """Whether something is (samples, rate in Hz), as libraries that read audio give it."""
    return (
        isinstance(thing, tuple) and len(thing) == 2
        and isinstance(thing[0], np.ndarray | torch.Tensor) and isinstance(thing[1], int | float | np.integer)
    )  # fmt: skip


def recordings_of(spec: Any) -> Recordings | None:
    """The recordings that a path or list means; None where it means something else.

    Raises:
        UserError: recordings mixed with images or with text that is no transcript, a missing file, a CSV without the
            column.
    """
    if isinstance(spec, Path):
        if spec.is_dir():
            return _folder(spec)
        if spec.suffix.lower() == ".csv" and spec.is_file():
            return _csv(spec)
        if is_audio_name(spec) and spec.is_file():
            return _with_texts(Recordings((spec.name,), sounds=(spec,), form="file"))
        return None
    if is_sound(spec):
        return Recordings(("recording 0",), sounds=(spec,))
    if not isinstance(spec, Sequence) or isinstance(spec, str) or not spec:
        return None
    meant = [is_sound(x) or is_audio_name(x) for x in spec]
    words = all(isinstance(x, str) for x in spec)  # a prompt may end as a file does
    if not any(meant) or (words and not all(meant) and not any(is_audio_name(x) and os.path.isfile(x) for x in spec)):
        return None
    if not all(meant):
        odd = meant.index(False)
        raise UserError(
            f"Entry {odd} of the list is no recording: {str(spec[odd])[:60]!r}.",
            f"Other entries are. Recordings end in {' '.join(AUDIO_SUFFIXES)}, or are (samples, rate).",
            "Give two lists.",
        )
    sounds = tuple(
        x if is_sound(x) else named_file("recording", Path(x), f"entry {i} of the list") for i, x in enumerate(spec)
    )
    names = tuple(f"recording {i}" if is_sound(x) else Path(x).name for i, x in enumerate(spec))
    found = Recordings(names, sounds=sounds)
    return found if any(is_sound(x) for x in spec) else _with_texts(found)


def _folder(folder: Path) -> Recordings | None:
    shown = files_in(folder)
    sounds = sorted((f for f in shown if is_audio_name(f)), key=lambda f: f.relative_to(folder).as_posix())
    if not sounds:
        return None
    stems = {f.with_suffix("") for f in sounds}
    other = [f for f in shown if is_image_name(f)]
    other += [
        f for f in shown if f.suffix.lower() in (*TEXT_SUFFIXES, *JSONL_SUFFIXES)
        and not (f.suffix.lower() == ".txt" and f.with_suffix("") in stems)
    ]  # fmt: skip
    if other:
        raise UserError(
            f"The folder {str(folder)!r} holds recordings ({len(sounds):,}) and other inputs ({len(other):,}).",
            f"For example {sounds[0].name!r} and {other[0].name!r}; a transcript is called as its recording, with "
            "the ending .txt.",
            "Name a folder of recordings alone, a CSV with a column 'path', or give a list in Python.",
        )
    names = tuple(f.relative_to(folder).as_posix() for f in sounds)
    return _with_texts(Recordings(names, sounds=tuple(sounds), form="folder"))


def _with_texts(found: Recordings) -> Recordings:
    """Recordings with the transcripts that stand beside them: `a.txt` beside `a.wav`.

    Raises:
        UserError: some have one and others have none, or one is empty.
    """
    files = [Path(sound).with_suffix(".txt") for sound in found.sounds]
    there = [file.is_file() for file in files]
    if not any(there):
        return found
    if not all(there):
        odd = there.index(False)
        raise UserError(
            f"The recording {found.names[odd]!r} has no transcript, and others have one.",
            f"There is no {files[odd].name!r} beside it.",
            "Give every recording one, or none.",
        )
    texts = tuple(" ".join(read_text(file).split()) for file in files)
    if not all(texts):
        raise UserError(f"The transcript {files[texts.index('')].name!r} is empty.", do="Fill it, or leave it out.")
    return replace(found, texts=texts)


def _csv(file: Path) -> Recordings | None:
    """Recordings and transcripts of a CSV with a header; None if its first row names no recording."""
    rows = [row for row in csv_rows(file) if any(cell.strip() for cell in row)]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    at = next((head.index(name) for name in PATH_COLUMNS if name in head), None)
    if at is None or len(rows) < 2 or len(rows[1]) <= at or not is_audio_name(rows[1][at].strip()):
        return None
    text_at = next((head.index(name) for name in TEXT_COLUMNS if name in head), None)
    names, texts, sounds = [], [], []
    for number, row in enumerate(rows[1:], start=1):
        where = f"recording {number} of {file.name!r}"
        if len(row) != len(head) or not is_audio_name(row[at].strip()):
            raise UserError(f"In {where} {len(row)} cells stand under {len(head)} columns, or no recording is named.")
        names.append(row[at].strip())
        sounds.append(named_file("recording", file.parent / names[-1], where))
        if text_at is not None:
            texts.append(" ".join(row[text_at].split()))
            if not texts[-1]:
                raise UserError(f"In {where} there is no transcript.", do="Give every one, or leave the column out.")
    return Recordings(tuple(names), tuple(texts) if text_at is not None else None, tuple(sounds), "csv")


# --------------------------------------------------------------------------------------------------------- opening
def opened(sound: Any, name: str) -> tuple[np.ndarray, int]:
    """Samples (S, C), float32, of S samples and C channels, and their rate in Hz.

    Raises:
        UserError: the extra is missing, or the recording cannot be read, is empty, or holds NaN or Inf.
    """
    if is_sound(sound):
        samples, rate = np.asarray(sound[0]), float(sound[1])
        if samples.ndim == 1:
            samples = samples[:, None]
        if samples.dtype.kind != "f" or samples.ndim != 2:
            raise UserError(
                f"The samples of {name!r} are {samples.dtype} of shape {samples.shape}.",
                "They must be floats from -1 to 1, (samples,) or (samples, channels).",
                "Divide integers by their greatest value: x / 32768.",
            )
        if not (math.isfinite(rate) and rate > 0 and rate == int(rate)):
            raise UserError(f"The sampling rate of {name!r} is {sound[1]}.", do="Give a whole number of Hz.")
    else:
        samples, rate = _read(Path(sound), name)
    if not samples.size:
        raise UserError(f"The recording {name!r} is empty.", "It holds no sample.", "Leave it out.")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise UserError(f"The recording {name!r} is NaN or Inf in {bad:,} of its samples.", do="Leave it out.")
    return samples.astype(np.float32), int(rate)


def _read(path: Path, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: it is there, but not the C library below it
        raise UserError(f"The recording {name!r} cannot be read.", "soundfile is not installed.", INSTALL) from error
    try:
        with open(path, "rb") as file:  # libsndfile itself opens only paths that are Unicode
            with soundfile.SoundFile(file) as sound:
                if sound.format not in FORMATS:
                    raise UserError(
                        f"The recording {name!r} is {sound.format}, whatever it is called.",
                        f"Formats that are read: {', '.join(FORMATS)}.", "Save it as wav or flac.",
                    )  # fmt: skip
                if (size := sound.frames * sound.channels * 4) > MOST_BYTES:
                    raise UserError(
                        f"The recording {name!r} is {sound.frames:,} samples of {sound.channels} channels long.",
                        f"They would take {size / 2**30:,.1f} GiB; {MOST_BYTES >> 30} are allowed.", "Cut it.",
                    )  # fmt: skip
                samples, rate = sound.read(dtype="float32", always_2d=True), sound.samplerate
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise UserError(
            f"The recording {name!r} cannot be read.", class_and_line(error),
            "Copy it again, or leave it out.",
        ) from error  # fmt: skip
    return samples, rate


def at_rate(samples_S: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples at another rate: polyphase filtering with scipy's own window, ceil(S wanted / rate) of them."""
    if rate == wanted:
        return samples_S
    from scipy.signal import resample_poly  # half a second, which most corpora need not wait

    shared = math.gcd(rate, wanted)
    return resample_poly(samples_S, wanted // shared, rate // shared).astype(np.float32)
