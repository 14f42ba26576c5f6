"""Rooms and arrows, budgets and promises about the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import massact as ma
from massact.verbs import verbs

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "massact"

# What each room may import: the architecture. `python docs/generate.py` writes it into docs/architecture.md.
_FLOOR = "records corpora stats trace"
ARROWS: dict[str, set[str]] = {
    room: set(others.split())
    for room, others in {
        "records": "",
        "verbs": "records",
        "corpora": "records",
        "stats": "records",
        "trace": "records corpora stats",
        "anatomy": "records corpora trace",
        "variants": "records stats trace anatomy",
        "models": f"{_FLOOR} anatomy variants",
        "positions": f"{_FLOOR} verbs anatomy models",
        "scans": f"{_FLOOR} verbs anatomy models positions",
        "explanations": f"{_FLOOR} verbs anatomy models positions scans",
        "interventions": f"{_FLOOR} verbs anatomy models positions scans",
        "prefixes": f"{_FLOOR} verbs anatomy models variants positions scans explanations interventions",
        "quantisation": f"{_FLOOR} verbs anatomy models positions scans interventions prefixes",
        "classics": f"{_FLOOR} verbs anatomy models positions scans explanations interventions",
        "training": f"{_FLOOR} anatomy variants models",
        "labs": f"{_FLOOR} anatomy variants models training",
        "reproductions": f"{_FLOOR} verbs anatomy models positions scans explanations interventions classics",
        "reports": "records verbs",
    }.items()
}
# The ways up, inside a function alone: (file, room) -> why.
UPWARDS = {("records/display.py", "reports"): "a prompt or a notebook shows a result by the words of its report"}
NO_TORCH = {"records", "verbs", "reports"}
DOORS = {"cli", "__init__", "__main__"}  # may import anything, lazily


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at the top level of the file)."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", id(node) in top


def room_of(path: Path) -> str:
    parts = path.relative_to(SRC).parts
    return parts[0] if len(parts) > 1 else path.stem


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SRC)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    for name, at_the_top in imports(path):
        if name.startswith("massact."):
            other = name.split(".")[1]
            if not at_the_top and (str(path.relative_to(SRC)), other) in UPWARDS:
                continue
            assert other == room or other in ARROWS[room], f"{room}/ may not import {other}/"
        if room in NO_TORCH:
            assert name.split(".")[0] not in ("torch", "transformers"), f"{room}/ may not import {name}"


def test_every_room_is_in_the_table_and_says_what_it_is() -> None:
    rooms = {p.parent.name for p in SRC.glob("*/__init__.py")} - DOORS
    assert rooms == set(ARROWS)
    for room in rooms:
        text = ast.get_docstring(ast.parse((SRC / room / "__init__.py").read_text())) or ""
        for word in ("take", "give", "know", "must not know"):
            assert word in " ".join(text.lower().split()), f"{room}/__init__.py does not say what it {word}s"


def test_hooks_are_installed_in_trace_only() -> None:
    for path in modules():
        if re.search(
            r"register_(full_)?(forward|backward|module)\w*_hook|TorchDispatchMode|TorchFunctionMode", path.read_text()
        ):
            assert room_of(path) == "trace", path


def test_file_and_function_budgets() -> None:
    for path in [*modules(), *sorted((ROOT / "tests").rglob("*.py"))]:
        n = len(path.read_text().splitlines())
        assert n <= 500, f"{path} has {n} lines: split it"
    long, functions = [], 0
    for path in modules():
        if room_of(path) in DOORS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions += 1
                n_args = len(node.args.args) + len(node.args.kwonlyargs)
                assert n_args <= 9, f"{path}: {node.name} takes {n_args} arguments"
                annotated = node.returns is not None or node.name.startswith("__torch")
                assert annotated, f"{path}: {node.name} is not annotated"
                if (node.end_lineno or 0) - node.lineno > 60:
                    long.append(f"{path.name}:{node.name}")
    assert len(long) <= functions * 0.03, long


def test_no_rooms_of_odds_and_ends() -> None:
    for path in modules():
        assert not re.search(r"utils|helpers|common|manager|misc", path.stem), path


# Words of module names that are no nouns: "ed" at the end, and these; and where one stands nevertheless.
NO_NOUNS = {
    "given", "held", "shown", "found", "seen", "kept", "known", "drawn", "made", "told", "written", "beside",
    "between", "build", "attend", "preprocess", "select", "small",
}  # fmt: skip
NAMED_SO = {
    "trace/added_tokens": "tokens that an edit adds, as the class is called",
}


def test_modules_are_nouns() -> None:
    for path in modules():
        name = str(path.relative_to(SRC).with_suffix(""))
        words = path.stem.strip("_").split("_")
        wrong = [w for w in words if w in NO_NOUNS or (w.endswith("ed") and len(w) > 3)]
        assert not wrong or name in NAMED_SO, f"{name}: {', '.join(wrong)} is no noun"


# Stems that several rooms have on purpose; kinds of results have the same name wherever they are treated.
IN_TWO_ROOMS = {
    "job": "what a verb does, in the room of each",
    "verb": "a verb that is more than a job on a scan; in verbs/, what a verb is",
}


def test_no_stem_is_in_two_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for path in modules():
        parts = path.relative_to(SRC).parts
        if path.stem != "__init__" and "kinds" not in parts and parts[0] not in DOORS:
            rooms.setdefault(path.stem, set()).add(parts[0])
    twice = {stem: sorted(of) for stem, of in rooms.items() if len(of) > 1}
    assert set(twice) == set(IN_TWO_ROOMS), twice


def test_no_module_hides_behind_a_function_of_its_name() -> None:
    for room in ARROWS:
        exported = set(__import__(f"massact.{room}", fromlist=["x"]).__dict__.get("__all__", ()))
        assert not exported & {p.stem for p in (SRC / room).glob("*.py")}, room


def test_public_names_are_few_and_all_there() -> None:
    assert len(ma.__all__) <= 15
    for name in ma.__all__:
        assert getattr(ma, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'scna'"):
        ma.scna  # noqa: B018


def test_public_functions_have_docstrings() -> None:
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name in ("Rule",), f"{path}: {node.name} has no docstring"


VERBS = (*verbs(), "compare", "show", "report")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([verb, "--help"] for verb in VERBS),
        *(["show", "nowhere"], ["report", "nowhere"], ["compare", "nowhere", "there"]),
    ],
)
def test_help_and_show_import_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from massact.cli import main\nsys.argv = ['massact', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert '--help' not in sys.argv or 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_text_names_no_machine_and_no_host() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files or [str(p.relative_to(ROOT)) for p in modules()]:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yml") and path != Path(__file__) and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"pypi\.org|pythonhosted|registry\.npmjs|/root/|/tmp/bash", text), name


# ---- tests hold facts: numbers, names, rows of tables, single words of a verdict; how it is worded is free
_WORD = re.compile(r"""["'`(]*[A-Za-z]{2,}["'`).,:;?!]*""")
_READS_TEXT = {"startswith", "endswith", "count", "search", "match", "fullmatch", "findall", "split", "tells", "each"}


def pinned(node: ast.AST) -> Iterator[str]:
    """The strings that a condition holds a text to. Names of rows and columns (keys, arguments of calls) are none."""
    if isinstance(node, ast.Constant):
        yield node.value if isinstance(node.value, str) else ""
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.Subscript) and child is node.slice:
            continue
        if isinstance(node, (ast.Call, ast.keyword)) and isinstance(child, (ast.Constant, ast.JoinedStr)):
            if getattr(node, "arg", "") != "match" and _called(node) not in _READS_TEXT:
                continue
        yield from pinned(child)


def _called(node: ast.AST) -> str:
    function = getattr(node, "func", None)
    return getattr(function, "attr", "") or getattr(function, "id", "")


def phrases(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every phrase of four or more words that an assertion or an expected error of a test holds."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and _called(node) == "raises"):
            for text in pinned(node.test if isinstance(node, ast.Assert) else node):
                if sum(bool(_WORD.fullmatch(word)) for word in text.split()) >= 4:
                    yield node.lineno, text


def test_no_test_pins_a_phrase(tmp_path: Path) -> None:
    """A sentence may be written better without a test breaking: see `tells` and `each` in tests/facts.py."""
    example = tmp_path / "example.py"
    example.write_text(
        'assert "is harmful in every group" in text\nassert any(f"is {x} the very last of them" in s for s in text)\n'
        'with pytest.raises(UserError, match="was not found in this folder"): f()\n'
        'assert tells(text, "harmful", 0.3) and rows["share of all the tokens"] == 1, "no more than a message"\n'
    )
    assert [line for line, _ in phrases(example)] == [1, 2, 3]
    found = [
        f"{p.relative_to(ROOT)}:{line}: {text!r}" for p in (ROOT / "tests").rglob("*.py") for line, text in phrases(p)
    ]
    assert not found, "\n".join(found)
