"""What docs/extending.md adds is added: its files are written, installed, and seen at every door."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)

# Each line is a command; what it prints, and its status, come back as one JSON list.
RUN = """
import json, sys
sys.path.insert(0, sys.argv[2])
import pytest
from tests.cli.runs import render_nothing
render_nothing(pytest.MonkeyPatch(), but="counts")
from typer.testing import CliRunner
from massact.cli import app
told = []
for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, line.split(), catch_exceptions=True)
    told.append([done.exit_code, done.output + str(done.exception or "")])
import generate
from massact.training import apply_variant
from tests.families import build
model = apply_variant(build("llama"), "half")
told.append([0, "\\n".join(sorted(n for n, _ in model.named_parameters() if "half" in n))])
print("TOLD" + json.dumps([*told, [0, "\\n".join(make() for make in generate.PAGES.values())]]))
"""
LINES = (
    "--help",
    "count --help",
    "scan --criterion loud --n-sequences 4 --no-null --no-bos-contrast --out run -q",
    "count run --least 10 --figures svg,png -q",
    "show run",
    "show run --json",
    "report run --format md",
    "intervene run --set halve=3 --no-all-keys --no-hold-out --json",
    "intervene run --set halve=x",
    "count run --least -1",
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The package of the page, installed as any other; and what every door says with it."""
    place = tmp_path_factory.mktemp("lamps")
    files = {name: text for name, text in BLOCKS if name != "pyproject.toml"}
    for name, text in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    groups = tomllib.loads(dict(BLOCKS)["pyproject.toml"])["project"]["entry-points"]
    points = "\n".join(f"[{group}]\n" + "\n".join(f"{n} = {v}" for n, v in of.items()) for group, of in groups.items())
    (place / "lamps-1.dist-info").mkdir()
    (place / "lamps-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lamps\nVersion: 1\n")
    (place / "lamps-1.dist-info" / "entry_points.txt").write_text(points)
    path = os.pathsep.join([str(place), str(ROOT / "src"), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(LINES), str(ROOT / "docs")], capture_output=True,
                          text=True, cwd=place, env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100"})  # fmt: skip
    assert "TOLD" in done.stdout, done.stdout + done.stderr
    said = [(status, text) for status, text in json.loads(done.stdout.partition("TOLD")[2])]
    return place / "run", dict(zip((*LINES, "variant", "reference"), said, strict=True))


def test_a_verb_stands_on_the_command_line(told: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    _, said = told
    assert "How many findings" in said["--help"][1]
    assert "--least" in said["count --help"][1] and "at least this" in said["count --help"][1]
    assert said["count run --least 10 --figures svg,png -q"] == (0, "")
    status, refused = said["count run --least -1"]
    assert status == 2 and "--least" in refused


def test_its_result_is_kept_shown_reported_and_drawn(told: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    run, said = told
    record = json.loads(said["show run --json"][1])
    findings = [row for row in record["findings"] if row["magnitude"] >= 10]
    counts = {row["layer"]: row["count"] for row in record["count"]["counts"]}
    assert findings and counts == {n: sum(f["layer"] == n for f in findings) for n in counts}
    assert record["count"]["config"] == {"least": 10.0}
    most = max(counts, key=lambda n: counts[n])
    page = (run / "report.md").read_text()
    assert f"has most: {counts[most]}." in said["show run"][1]
    assert f"has most: {counts[most]}." in page and "Findings by layer" in page
    assert all((run / "figures" / f"counts.{kind}").stat().st_size for kind in ("png",))


def test_a_statistic_and_a_criterion_are_in_the_scan(told: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    record = json.loads(told[1]["show run --json"][1])
    assert record["criterion"]["name"] == "loud" and {f["criterion"] for f in record["findings"]} == {"loud"}
    assert all(0 < row["positive"] < 1 for row in record["layers"])


def test_an_edit_is_made_and_its_value_read(told: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    status, text = told[1]["intervene run --set halve=3 --no-all-keys --no-hold-out --json"]
    effects = json.loads(text)["effects"]
    assert status == 0 and {row["edit"] for row in effects} == {"halve=3"}
    assert any(row["metric"] == "kl" and row["edited"] > 0 for row in effects)
    assert "needs a layer" in told[1]["intervene run --set halve=x"][1]


def test_a_variant_is_applied(told: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    names = told[1]["variant"][1].splitlines()
    assert names == [f"model.layers.{n}.self_attn.massact_half" for n in range(3)]


def test_all_stand_in_the_reference(told: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    page = told[1]["reference"][1]
    for said in ("| `loud` |", "| `halve=LAYER` |", "| `half` |", "# counts.parquet", "massact count [OPTIONS]"):
        assert said in page, said
