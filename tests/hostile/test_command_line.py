"""The command line with options and values of any kind: an answer, or one message and a status."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import massact as ma
from massact import cli
from massact.records.errors import WorkError
from tests.families import build
from tests.hostile.damage import cases, limits

GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = [
    "", " ", "-1", "0", "1", "2", "3", "1e9", "99999999999999999999", "1.5", "nan", "inf", "x", "auto", "none", "all",
    "\u00b2", "\udcff", "\x1b[31m", "[bold]", "a" * 300, "nowhere/x", ".", "~nobody/x", "--", "-", "=", "a=b", "%s%n",
    "magnitude=1", "magnitude=nan", "=3", "ratio=", "resize=-1", "crop=0x0", "mean=x", "lr=nan", "steps=-3", "onset",
    "model.n_layer=0", "scale=nan", "clip=", "value=1e400", "weight=x[1,2]", "dims", "zero", "mean", "random",
    "kv-bias", "softmax", "tiny", "gpt2-124m", "vit-tiny", "guo", "story", "shapes", "bigram-backcopy", "html", "md",
    "png,svg", "png,x", "cpu", "cuda:99", "meta", "float32", "int8", "always", "never", "sun2024", "step1:step9:0",
    "step1,step2", "step9:step1:1", "1,2,3", "1,,2", "streaming", "norm-growth", "timm:x", "timm:", "card", "latex",
    "\u202e",
]  # fmt: skip
HEAVY = ("massact.scans.verb.load", "massact.scans.scan_first", "massact.training.train",
         "massact.labs.job.run_lab", "massact.scans.reopen", "massact.interventions.verb.reopen",
         "massact.scans.verb.scan_checkpoints", "massact.cli.reproduce.reproduce")  # fmt: skip
DRAWN = ("massact.reports.draw", "massact.reports.documents.draw")
SMALL = ["--n-sequences", "1", "--seq-len", "8", "--no-null", "--no-bos-contrast", "--device", "cpu"]


def options_of(verb: Any) -> dict[str, bool]:
    """Every spelling of the options of a verb, and whether it takes a value."""
    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    found = {}
    for parameter in command.params:
        for spelling in [*parameter.opts, *parameter.secondary_opts]:
            if spelling.startswith("-") and spelling != "--help":
                found[spelling] = not getattr(parameter, "is_flag", False)
    return found


VERBS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
OPTIONS = {verb: options_of(verb) for verb in VERBS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, a model and a text, by relative names."""
    path = tmp_path_factory.mktemp("line")
    shutil.copytree(GOLDEN, path / "golden")
    build("llama").save_pretrained(path / "model")
    (path / "text.txt").write_text("A kettle sings. " * 30)
    return path


def words(rng: Random, verb: str, out: str) -> list[str]:
    """A command of random options."""
    names = ["golden/schema_2", "golden/explained_2", "golden/trained_1", "golden/lab_1", "golden", "model", "text.txt"]

    def value() -> str:
        return rng.choice(VALUES if rng.randrange(4) else [*names, out])

    line = [verb]
    for _ in range(rng.randrange(6)):
        option = rng.choice(sorted(OPTIONS[verb]))
        line += [option, value()] if OPTIONS[verb][option] and rng.randrange(12) else [option]
    if verb not in ("scan", "train", "classics") or rng.randrange(2):
        line[1:1] = [rng.choice(names) if rng.randrange(5) else value() for _ in range(rng.choice([0, 1, 1, 1, 2, 2]))]
    return [*line, "--out", out] if rng.randrange(3) == 0 else line


def status_of(line: list[str]) -> tuple[int, str, str]:
    """Run a command in this process: its status, and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", ["massact", *line]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped):  # fmt: skip
        cli.main()
    return int(stopped.value.code or 0), out.getvalue(), err.getvalue()


def behaved(line: list[str], out: Path) -> None:
    """No traceback, a known status, one message, and nothing half-written."""
    with limits():
        status, _, err = status_of(line)
    assert status in (0, 1, 2, 130), line
    assert "Traceback" not in err and "massact failed" not in err, (line, err)
    messages = [text for text in err.splitlines() if text.lower().startswith("error: ")]
    assert len(messages) == (status != 0) or "Usage:" in err, (line, err)
    left = [p.name for p in out.rglob("*") if p.name.startswith(".") or p.name.endswith(".tmp")] if out.is_dir() else []
    assert not left, (line, left)


def begins(*_: Any, **__: Any) -> Any:
    raise WorkError("Here the work begins.")


@contextlib.contextmanager
def instead_of(targets: tuple[str, ...], by: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(mock.patch(target, by))
        yield


@pytest.fixture
def fresh(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@settings(max_examples=cases("command line"), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(VERBS), st.randoms(use_true_random=False))
def test_any_command_is_answered_before_the_work_begins(fresh: Path, verb: str, rng: Random) -> None:
    shutil.rmtree(fresh / "out", ignore_errors=True)
    with instead_of(HEAVY, begins), instead_of(DRAWN, lambda *_, **__: []):
        behaved(words(rng, verb, "out"), fresh / "out")


@settings(max_examples=cases("command line, run"), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_any_small_scan_is_answered(fresh: Path, embedded: ma.Model, rng: Random) -> None:
    shutil.rmtree(fresh / "out", ignore_errors=True)
    line = [*words(rng, "scan", "out"), *SMALL]
    with instead_of(("massact.models.load",), lambda *_, **__: embedded), instead_of(DRAWN, lambda *_, **__: []):
        behaved(line, fresh / "out")


@pytest.fixture(scope="module")
def embedded() -> ma.Model:
    return ma.load()
