"""What a GGUF file says of itself: architecture, settings, tensors and their types, read without its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import mmap
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massact.records.errors import UserError

GGUF = ".gguf"
VERSIONS = (2, 3)
_MAGIC = b"GGUF"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4  # of a tensor, in ggml
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(spec: str) -> bool:
    """Whether a model is named by a GGUF file: on this machine, or owner/name/file.gguf of the Hub."""
    return spec.endswith(GGUF) and not os.path.isdir(spec)


def in_folder(name: str, file: str | None) -> str:
    """The one name of a model: a GGUF file in a folder or a repository of the Hub is named by both.

    Args:
        name: of a model. file: of a GGUF file in it, or None.

    Raises:
        UserError: the file is named already, or its name is no GGUF's.
    """
    if file is None:
        return name
    if is_gguf(name) or not file.endswith(GGUF):
        raise UserError(f"There is no GGUF file {file!r} in {name!r}.",
                        "" if file.endswith(GGUF) else f"Its name ends in {GGUF}.",
                        "Give a folder or a Hub id, and the name of a file in it.")  # fmt: skip
    return f"{name.rstrip('/')}/{file}"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its shape in the order of torch, its type, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of one GGUF file.

    Args:
        path: of the file.
        architecture: as llama.cpp calls it.
        settings: every scalar, string and array of numbers by its key; of an array of strings its length.
        tensors: all tensors, none of them read.
    """

    path: Path
    architecture: str
    settings: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    def setting(self, key: str) -> Any:
        """A setting of the architecture, or None."""
        return self.settings.get(f"{self.architecture}.{key}")

    def floats(self, name: str) -> np.ndarray | None:
        """The values of a float32 tensor, or None where there is none of that name and type."""
        for tensor in self.tensors:
            if tensor.name == name and tensor.type == "F32":
                values = np.fromfile(self.path, "<f4", tensor.n_bytes // 4, offset=tensor.start)
                return values.reshape(tensor.shape)
        return None

    def record(self) -> dict[str, Any]:
        """What a run keeps of the file: name, SHA-256, architecture, number of tensors of each type."""
        with open(self.path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        types = Counter(t.type for t in self.tensors)
        return {"file": self.path.name, "sha256": sha256, "architecture": self.architecture,
                "types": dict(types.most_common()), "dequantised": True}  # fmt: skip


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file and check that all of its tensors are there.

    Args:
        path: of the file.

    Raises:
        UserError: the package gguf is missing, the file is no GGUF, is damaged, cut off, or one part of several.
    """
    need_package()
    _refuse_part(path, _PART.search(path.name) is not None)
    try:
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise UserError(f"{path} is no GGUF file.", "It does not begin with the letters GGUF.",
                                "Download or convert it again.")  # fmt: skip
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read.", str(error)) from None
    with data:
        try:
            header = _parsed(path, data)
        except (struct.error, ValueError, IndexError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged or was cut off.", f"Its header cannot be read: {error}.",
                            "Copy or download it again.") from None  # fmt: skip
        size = len(data)
    _refuse_part(path, int(header.settings.get("split.count") or 0) > 1)
    end = max((t.start + t.n_bytes for t in header.tensors), default=0)
    if end > size:
        raise UserError(f"{path} was cut off.", f"Its tensors need {end:,} bytes; it has {size:,}.",
                        "Copy or download it again.")  # fmt: skip
    if not header.tensors:
        raise UserError(f"{path} holds no tensors.", "It may be a vocabulary only.", "Give the file of the model.")
    return header


def gguf_notes(gguf: dict[str, Any] | None) -> list[str]:
    """What is said of a model whose weights lay in a GGUF file."""
    if gguf is None:
        return []
    types = ", ".join(f"{n:,} {name}" for name, n in gguf["types"].items())
    said = [f"The weights were unpacked from {gguf['file']} (tensors: {types}): measured is the model as it was "
            "quantised there, computed in floating point."]  # fmt: skip
    if gguf["settled"]:
        named = ", ".join(f"{k} = {v}" for k, v in gguf["settled"].items() if not isinstance(v, list))
        said.append(f"Taken from the file where transformers had another value: {named}.")
    return said + gguf["notes"]


def need_package() -> None:
    """Refuse to go on without the packages that GGUF needs.

    Raises:
        UserError: says how they are installed.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError("Reading GGUF needs the extra `gguf`.", f"Not installed: {', '.join(missing)}.",
                        "pip install 'massact[gguf]'")  # fmt: skip


def _refuse_part(path: Path, is_part: bool) -> None:
    if is_part:
        raise UserError(f"{path} is one part of a GGUF in several files.", "transformers reads whole files only.",
                        f"Put them together: llama-gguf-split --merge {path.name} whole.gguf")  # fmt: skip


def _parsed(path: Path, data: mmap.mmap) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    version, n_tensors, n_settings = struct.unpack_from("<IQQ", data, 4)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise UserError(f"{path} is GGUF of version {version}." if not swapped else f"{path} is a big-endian GGUF.",
                        f"Versions {' and '.join(map(str, VERSIONS))} are read, little-endian.",
                        "Convert the model again.")  # fmt: skip
    settings, at = {}, 24
    for _ in range(_counted(n_settings, 12, data, at)):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        settings[key], at = _value(data, at + 4, kind)
    found = []
    for _ in range(_counted(n_tensors, 24, data, at)):
        name, at = _string(data, at)
        (n_dims,) = struct.unpack_from("<I", data, at)
        if n_dims > _MOST_DIMS:
            raise ValueError(f"tensor {name!r} has {n_dims:,} dimensions")
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
        at += 16 + 8 * n_dims
        found.append((name, tuple(reversed(dims)), GGMLQuantizationType(kind), offset))
    alignment = settings.get("general.alignment", 32)
    architecture = settings.get("general.architecture")
    if not isinstance(architecture, str) or not isinstance(alignment, int) or alignment < 1:
        raise ValueError("it names no architecture")
    start = -(-at // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in found:
        n_values, n_bytes = GGML_QUANT_SIZES[kind]
        tensors.append(StoredTensor(name, shape, kind.name, start + offset, math.prod(shape) // n_values * n_bytes))
    return GgufHeader(path, architecture, settings, tuple(tensors))


def _counted(n: int, least_bytes: int, data: mmap.mmap, at: int) -> int:
    """A number of entries that the rest of the file has room for; a damaged one would be counted for hours."""
    if n * least_bytes > len(data) - at:
        raise ValueError(f"it speaks of {n:,} entries in {len(data) - at:,} bytes")
    return n


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    _counted(length, 1, data, at + 8)
    end = at + 8 + length
    return data[at + 8 : end].decode("utf-8"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A value and where it ends."""
    if kind in _FORMATS:
        form = f"<{_FORMATS[kind]}"
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        raise ValueError(f"a value is of the unknown kind {kind}")
    inner, n = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _FORMATS:
        form = f"<{_counted(n, struct.calcsize('<' + _FORMATS[inner]), data, at)}{_FORMATS[inner]}"
        return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
    if inner != _STRING:
        raise ValueError(f"an array is of the unknown kind {inner}")
    for _ in range(_counted(n, 8, data, at)):
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
    return n, at
