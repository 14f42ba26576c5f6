"""What is installed: the wheel holds everything that `massact scan` needs with no network."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_embedded_model_and_text_are_data_of_the_package() -> None:
    model = resources.files("massact.models") / "embedded"
    names = {f.name for f in model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(len(f.read_bytes()) for f in model.iterdir()) <= 24 * 2**20
    text = (resources.files("massact.corpora") / "embedded.txt").read_text(encoding="utf-8")
    assert len(text.encode()) >= 40_000


def test_embedded_text_is_enough_for_32_sequences_of_256_tokens() -> None:
    import massact as ma

    corpus = ma.corpus(None, tokenizer=ma.load().tokenizer, seq_len=min(256, ma.load().context or 256), n_sequences=32)
    assert corpus.n_sequences == 32


def test_pins_name_no_host_and_fit_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0"
    for requirement in project["dependencies"]:
        assert requirement.split(">=")[0] in pins, requirement
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_wheel_holds_model_text_and_licence(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("massact/models/embedded/model.safetensors", "massact/models/embedded/tokenizer.json",
                 "massact/corpora/embedded.txt", "massact/verbs/scan.py", "massact/reports/render/page.css",
                 "massact/reports/render/page.js", "massact/reports/render/page.html"):  # fmt: skip
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "recipes/")) for name in names)
