"""`--help`, `-h`, `--version` and completion: what a shell is asked for most."""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import massact as ma
from massact.verbs import verbs
from tests.cli.test_cli import run

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "TERM": "xterm"}
NAMES = [*verbs(), "compare", "show", "report"]


def command(*arguments: str) -> list[str]:
    code = f"import sys; sys.argv = ['massact', *{arguments!r}]; from massact.cli import main; main()"
    return [sys.executable, "-c", code]


def said(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        command(*arguments), env=ENVIRONMENT | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("verb", ["", *NAMES])
def test_short_and_long_flags_give_the_same_page(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = []
    for flag in ("-h", "--help"):
        assert run(monkeypatch, *[verb] * bool(verb), flag) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] and "--help" in pages[0] and "\x1b" not in pages[0]


def test_options_stand_in_groups() -> None:
    page = said("scan", "--help")
    own, more = page.split("More options:")
    assert all(flag in own for flag in ("--criterion", "--corpus", "--seq-len"))
    assert all(flag in more and flag not in own for flag in ("--device ", "--json", "--quiet"))


def test_every_verb_has_its_whole_question_on_the_first_page() -> None:
    page = " ".join(said("--help").split())
    assert all(" ".join(verb.asks.split()) in page for verb in verbs().values())


@pytest.mark.parametrize("plain", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_has_colours_unless_it_is_told_not_to(plain: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "NO_COLOR"} | plain
    done = subprocess.run(command("scan", "-h"), env=environment, stdout=theirs, check=True)
    shown = os.read(ours, 1 << 16)
    os.close(ours), os.close(theirs)
    assert done.returncode == 0 and b"Usage" in shown and (b"\x1b[" in shown) == (not plain)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_names_what_lies_under_it(flag: str) -> None:
    told = said(flag)
    assert told.startswith(f"massact {ma.__version__} ") and told.count("\n") == 1
    assert f"torch {version('torch')}" in told and f"transformers {version('transformers')}" in told


@pytest.mark.parametrize(
    "words, place, found",
    [("massact sc", 1, "scan"), ("massact qu", 1, "quantise"), ("massact scan --thr", 2, "--threshold")],
)
def test_a_shell_completes_verbs_and_options(words: str, place: int, found: str) -> None:
    told = said(_MASSACT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(place))
    assert told.split() == [found]
    # named, since what shell this runs under is a matter of who started it
    assert "complete" in said("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    costs = []
    for _ in range(3):
        said("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        costs.append(after - before)
        before = after
    assert min(costs) < 0.6  # 0.27 s on a quiet core: twice of it are left for a busy one
