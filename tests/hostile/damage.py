"""Ways to damage files, all drawn from one random source, so that a case can be shrunk and repeated."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd

SHARES = {"command line": 0.18, "command line, run": 0.01, "runs": 0.24, "pages": 0.03, "configurations": 0.08,
          "tokenizers": 0.02, "weights": 0.14, "corpora": 0.30}  # fmt: skip
WRONG: list[Any] = [
    None, -1, 0, 10**30, 10**400, 2**31, 2**63, 1e308, 1.5, float("nan"), float("inf"), "nan", "x", "", True, [], {},
    [1, 2], {"a": 1}, [[["x"]]], "\x1b[31m", "\ud800", "<script>", ["x", 1, None],
]  # fmt: skip


def cases(room: str) -> int:
    """Cases of a room: its share of MASSACT_FUZZ in all, 400 if that is not set."""
    return max(4, round(int(os.environ.get("MASSACT_FUZZ", "400")) * SHARES[room]))


class StillAtWork(BaseException):
    """A case hangs; no `except Exception` is to take it for a refusal."""


@contextmanager
def limits(seconds: int = 60, memory: int = 3 << 30) -> Iterator[None]:
    """End a case that hangs, and refuse it memory, where the system can."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    import resource

    def late(*_: object) -> None:
        raise StillAtWork(f"after {seconds} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if os.path.exists("/proc/self/statm") else None
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        if used is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def of_bytes(rng: Random, data: bytes) -> bytes:
    """Flipped, cut, emptied, doubled, or other bytes altogether."""
    kind = rng.randrange(6)
    at = rng.randrange(len(data) + 1)
    if kind == 0 and data:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 9))) + data[at:]
    if kind == 3:
        return data + data
    return b"" if kind == 4 else bytes(rng.randrange(256) for _ in range(rng.randint(1, 40)))


def of_json(rng: Random, value: Any) -> Any:
    """One value replaced, removed, doubled or added, at any depth."""
    root = copy.deepcopy(value)
    node = root
    while isinstance(node, dict | list) and node:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if isinstance(node[key], dict | list) and node[key] and rng.randrange(5):
            node = node[key]
            continue
        kind = rng.randrange(8)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["x", "", "schema_version", "__class__", "self", "a" * 300])] = rng.choice(WRONG)
        elif kind == 2 and isinstance(node, list):
            node.append(rng.choice([*WRONG, node[0]]))
        else:
            node[key] = rng.choice(WRONG)
        return root
    return rng.choice(WRONG)


def json_text(rng: Random, text: str) -> str:
    """A JSON file that is damaged as a value, or as a text."""
    kind = rng.randrange(12)
    if kind == 0:
        return "[" * 100_000
    if kind == 1:
        return text.replace("1", "9" * 5000, 1)
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        value = of_json(rng, value)
    return json.dumps(value)


def of_table(rng: Random, data: pd.DataFrame) -> pd.DataFrame:
    """Columns dropped, renamed or of another type; rows lost, doubled or turned round; values out of range."""
    kind, column = rng.randrange(9), rng.choice(list(data.columns))
    if kind == 0:
        return data.drop(columns=column)
    if kind == 1:
        return data.rename(columns={column: rng.choice(["x", "", column.upper()])})
    if kind == 2:
        return data.iloc[:0]
    if kind == 3:
        return pd.concat([data, data])
    if kind == 4 and len(data):
        return data.iloc[[rng.randrange(len(data))]]
    if kind == 5:
        return data.iloc[::-1]
    data = data.copy()
    if kind == 6 and len(data):
        values = list(data[column])
        values[rng.randrange(len(values))] = rng.choice(
            [None, "x", "<b>\x00", "[" * 3000, ""] if data[column].dtype.kind not in "ifb"
            else [float("nan"), float("inf"), -1.0, 1e300, 2.0**62, 0.0])  # fmt: skip
        data[column] = values
        return data
    value = rng.choice([0, -1, 2**62, 1e300, "x", None, float("nan"), True, b"x", [1], pd.Timestamp(0), ""])
    data[column] = [value] * len(data)
    return data


def of_arrays(rng: Random, data: bytes) -> bytes:
    """Arrays lost, emptied, of another shape or type, or no numbers at all."""
    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    name, kind = rng.choice(sorted(arrays)), rng.randrange(8)
    one = arrays[name]
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays["x"] = np.zeros(3)
    else:
        made = {
            2: lambda: one[:0] if one.ndim else np.zeros(0), 3: lambda: one.reshape(-1),
            4: lambda: one[None], 5: lambda: np.array(["x"] * max(1, len(np.atleast_1d(one)))),
            6: lambda: np.full(one.shape, np.nan), 7: lambda: np.array(rng.choice([-1, 2**62, 0.5, ""])),
        }  # fmt: skip
        arrays[name] = made[kind]()
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def instead(rng: Random, path: Path) -> None:
    """A directory, a link to itself, to nothing or to another file, or nothing, where a file was."""
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to(path.parent / "nowhere")
    elif kind == 3 and len(others := sorted(p for p in path.parent.iterdir() if p.is_file())):
        path.symlink_to(rng.choice(others))


def of_file(rng: Random, path: Path) -> None:
    """Damage a file as its kind suggests."""
    kind = rng.randrange(8)
    if kind == 0 and hasattr(os, "symlink"):
        instead(rng, path)
    elif kind == 1:
        path.write_bytes(of_bytes(rng, path.read_bytes()))
    elif path.suffix == ".json":
        path.write_text(json_text(rng, path.read_text(encoding="utf-8")), encoding="utf-8")
    elif path.suffix == ".parquet":
        try:
            of_table(rng, pd.read_parquet(path)).to_parquet(path)
        except (TypeError, ValueError, OverflowError):  # such a table cannot be written at all (pyarrow's are of these)
            path.write_bytes(of_bytes(rng, path.read_bytes()))
    elif path.suffix == ".npz":
        path.write_bytes(of_arrays(rng, path.read_bytes()))
    else:
        path.write_bytes(of_bytes(rng, path.read_bytes()))


@contextmanager
def damaged(rng: Random, directory: Path, files: list[Path], most: int = 2) -> Iterator[list[Path]]:
    """Some of the files damaged for the length of a `with`."""
    hit = list(dict.fromkeys(rng.choice(files) for _ in range(rng.randint(1, most))))
    kept = {path: path.read_bytes() for path in hit}
    try:
        for path in hit:
            of_file(rng, path)
        yield hit
    finally:
        for path, data in kept.items():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(data)
