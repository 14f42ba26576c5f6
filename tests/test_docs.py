"""The documents say what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from massact.reports import READINGS
from tests.test_structure import ARROWS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_pages_made_of_the_code_are_fresh() -> None:
    import generate

    stale = [name for name, make in generate.PAGES.items() if (ROOT / "docs" / name).read_text("utf-8") != make()]
    assert not stale, "run: python docs/generate.py"


def test_every_error_is_on_its_page() -> None:
    import generate

    assert generate.errors_page().count("| `UserError` |") > 200  # a raise that is written in another way is missing


def test_every_figure_is_in_the_gallery() -> None:
    import generate

    shown = {(verb, name) for verb, name in generate.gallery()}
    assert all((ROOT / "docs" / "figures" / "gallery" / generate.picture(*key)).is_file() for key in shown)
    known = {name for reading in READINGS.values() for name in reading.figures}
    # by_input needs sequences told apart by a number, origins a text that the model wrote, attention_patches a scan of
    # images that was explained
    assert known - {name for _, name in shown} <= {"by_input", "origins", "attention_patches", "compare_losses"}


def test_architecture_table_is_the_one_that_is_enforced() -> None:
    import generate

    said = generate.architecture_page()
    assert {f"| `{room}/` |" for room in ARROWS} <= {line[: line.find("|", 1) + 1] for line in said.splitlines()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_documents_exist(page: Path) -> None:
    """Every option of every `massact` command that a page shows is one that the command has."""
    from typer.main import get_command

    from massact.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^\s*(?:\$ )?massact (.+)$", page.read_text(), flags=re.M):
        words = line.split("#")[0].split()
        if words[0].startswith("-") or (page.name, words[0]) == ("extending.md", "count"):  # tests/test_extending.py
            continue
        assert words[0] in commands, f"{page.name}: massact {line}"
        known = {o for p in commands[words[0]].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in words[1:]:
            assert not word.startswith("--") or word.split("=")[0] in known, f"{page.name}: {word}"


SKIPPING = r"pytest\.skip\(|mark\.skip|\b(real_data|real_text|smollm2|gemma3): Path"


def test_skips_are_in_the_ledger() -> None:
    ledger = (ROOT / "tests" / "SKIPS.md").read_text()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path != Path(__file__) and re.search(SKIPPING, path.read_text()):
            assert path.name in ledger, f"{path.name} skips without an entry in tests/SKIPS.md"
