"""What is installed: the wheel holds everything that `massact scan` needs with no network."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import pytest
import yaml

from recipes.distribution import build, check, versions

ROOT = Path(__file__).parents[1]
# Package -> what is imported of it, where the names differ.
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
# Functions that are given a module by its name.
BY_NAME = "import_module|find_spec|_need|_data|quant_module"
# What others import by themselves: transformers asks for it where GGUF is read, lm-eval where a model is run.
FOR_OTHERS = {("gguf", "accelerate"), ("tasks", "accelerate"), ("train", "tensorboard")}


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
                 "massact/reports/render/page.js", "massact/reports/render/page.html", "massact/py.typed"):  # fmt: skip
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "recipes/")) for name in names)


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def module_of(requirement: str) -> str:
    name = re.split(r"[><=\[;]", requirement)[0]
    return MODULES.get(name, name.replace("-", "_"))


def imported() -> set[str]:
    """Packages that the source imports, or looks for by name."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Call) and re.search(BY_NAME, ast.unparse(node.func)):
                parts = [
                    part for a in node.args[:1] for part in (a.values[:1] if isinstance(a, ast.JoinedStr) else [a])
                ]
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                found |= {text.split(".")[0] for text in texts if isinstance(text, str)}
    return found


def test_every_dependency_and_extra_is_imported_and_every_import_declared() -> None:
    known, used = project(), imported()
    extras = {(extra, module_of(r)) for extra, needed in known["optional-dependencies"].items()
              for r in needed if extra not in ("dev", "docs")}  # fmt: skip
    needed = {module_of(r) for r in known["dependencies"]}
    assert needed - used == set()
    assert {pair for pair in extras if pair[1] not in used} <= FOR_OTHERS
    ours = set(sys.stdlib_module_names) | {"massact"} | needed | {module for _, module in extras}
    of_others = {"bitsandbytes", "tokenizers", "mpl_toolkits"}  # with a quantised model, transformers, matplotlib
    assert {m for m in used if m.isidentifier()} - ours <= of_others


def test_dev_has_what_extras_bring_and_the_pins_have_it() -> None:
    extras = project()["optional-dependencies"]
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    dev = {module_of(r) for r in extras["dev"]}
    assert {"tensorboard", "build"} <= dev & pins
    apart = {"datasets", "timm", "torchvision"}  # of the network; in an environment of their own (make test-vision)
    for extra in set(extras) - {"dev", "docs"}:
        assert {module_of(r) for r in extras[extra]} <= dev | apart, extra


def test_one_version_and_a_citation_that_can_be_read() -> None:
    assert len(set(versions().values())) == 1, versions()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited) and cited["license"] == project()["license"]
    assert cited["references"][0]["url"] == project()["urls"]["Paper"]


def test_a_release_does_what_make_does() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    steps = " ".join(str(step.get("run")) for step in jobs["dist"]["steps"])
    for verb in ("version", "build", "check"):
        assert f"recipes/distribution.py {verb}" in steps
    assert jobs["publish"]["needs"] == "dist"
    makefile = (ROOT / "Makefile").read_text()
    assert "distribution.py build dist" in makefile and "distribution.py check dist" in makefile


@pytest.mark.long
def test_wheel_and_source_archive_scan_in_an_empty_environment(tmp_path: Path) -> None:
    for file in build(tmp_path / "dist"):
        (tmp_path / file.suffix).mkdir()
        check(file, tmp_path / file.suffix, offline=True)


def test_what_was_not_built_is_told(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "recipes/distribution.py")]
    for arguments, said in ((("version", "v99.0"), "99.0"), (("check", str(tmp_path)), "nothing")):
        done = subprocess.run([*script, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr
