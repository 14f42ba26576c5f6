"""Build the wheel and the source archive, and try each in an environment that has nothing else of this checkout.

    python recipes/distribution.py version v0.1.0        # is this tag the version, in every file that names it?
    python recipes/distribution.py build dist            # dist/*.whl and dist/*.tar.gz; needs build and hatchling
    python recipes/distribution.py check dist            # each installed into an empty environment, which scans
    python recipes/distribution.py check dist --offline  # with the dependencies of this Python: nothing is downloaded

`make dist` does the second and the last; a release the first three (.github/workflows/release.yml).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCAN = ("scan", "--seq-len", "32", "--n-sequences", "2", "--figures", "none", "--out", "run")


def versions(root: Path = ROOT) -> dict[str, str]:
    """File -> the version that it names."""
    known = {"pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]}
    for name, pattern in {"src/massact/__init__.py": r'^__version__ = "(.+)"$', "CITATION.cff": r"^version: (.+)$",
                          "CHANGELOG.md": r"^## \[(\d.*?)\]"}.items():  # fmt: skip
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M)
        known[name] = found[1] if found else "none"
    return known


def build(place: Path) -> list[Path]:
    """Wheel and source archive, in a folder; the wheel is made of the source archive, so both hold what it needs."""
    # With what is installed here: an environment of its own would be downloaded, and pins would not hold in it.
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(ROOT)], check=True)
    return built(place)


def built(place: Path) -> list[Path]:
    """The one wheel and the one source archive of a folder."""
    found = [*place.glob("*.whl"), *place.glob("*.tar.gz")]
    if [f.suffix for f in found] != [".whl", ".gz"]:
        sys.exit(f"{place} holds {[f.name for f in found] or 'nothing'}, not one wheel and one source archive.")
    return found


def check(file: Path, place: Path, offline: bool = False) -> None:
    """Install one of them into an empty environment, ask it for help and let it scan what comes with it.

    Args:
        file: wheel or source archive.
        place: an empty folder, for the environment and the run.
        offline: take the dependencies of this Python, without what is installed editable in it.
    """
    venv.create(place / "env", with_pip=True)
    python = place / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if offline:
        site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                              capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
        # A path file of a folder that a path file names is not read, so an editable massact stays out.
        (Path(site) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip += ["--no-deps", "--no-build-isolation", "--no-index"]
    else:
        pip += ["--constraint", str(ROOT / "constraints.txt")]
    apart = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=place, env=apart, stdout=subprocess.PIPE, text=True, check=True).stdout

    run(*pip, str(file.resolve()))
    home = Path(run(str(python), "-c", "import massact; print(massact.__file__)").strip())
    if place.resolve() not in home.resolve().parents:
        sys.exit(f"massact was imported from {home}, not from what was installed.")
    if not (home.parent / "py.typed").is_file():
        sys.exit(f"{file.name} holds no py.typed.")
    massact = str(python.parent / "massact")
    if "scan" not in run(massact, "--help"):
        sys.exit("massact --help does not tell of scan.")
    said = json.loads(run(massact, *SCAN, "--json"))
    if not said["findings"] or not (place / "run" / "layers.parquet").is_file():
        sys.exit("The scan of the embedded model found nothing.")
    print(f"{file.name}: installed, and its scan has {len(said['findings'])} findings.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["version", "build", "check"])
    parser.add_argument("of", help="a tag, or the folder of wheel and source archive")
    parser.add_argument("--offline", action="store_true")
    given = parser.parse_args()
    if given.what == "version":
        wrong = {file: v for file, v in versions().items() if v != given.of.removeprefix("v")}
        if wrong:
            sys.exit(f"The tag is {given.of}, but {wrong}.")
    elif given.what == "build":
        build(Path(given.of))
    else:
        for file in built(Path(given.of)):
            with tempfile.TemporaryDirectory() as place:
                check(file, Path(place), given.offline)


if __name__ == "__main__":
    main()
