"""What is wrong with the inputs is told before weights are loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import massact as ma
from massact.cli import app
from massact.models import loading
from massact.records.errors import MassactError, UserError

RUN = str(Path(__file__).parents[1] / "golden" / "schema_3")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is a failure of the test."""
    monkeypatch.setattr(loading, "_read", lambda *args: pytest.fail("weights were read"))


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, MassactError), done.output
    return str(done.exception)


@pytest.mark.parametrize(("arguments", "says"), [
    (("scan", "--corpus", "no-such-file.txt"), "no-such-file.txt"),
    (("scan", "--preprocess", "resize=224"), "preprocess"),
    (("scan", "--preprocess", "blur=3"), "blur"),
    (("scan", "--figures", "bmp"), "bmp"),
    (("scan", "--dtype", "int3"), "int3"),
    (("scan", "--device", "abacus"), "abacus"),
    (("scan", "--criterion", "sun2025"), "sun2025"),
    (("scan", "org/name"), "org/name"),
    (("explain", RUN, "--corpus", "no-such-file.txt"), "no-such-file.txt"),
    (("explain", RUN, "org/name"), "org/name"),
    (("intervene", RUN, "--set", "nought"), "nought"),
    (("classics", "--preprocess", "resize=224"), "preprocess"),
    (("quantise", "--schemes", "int99"), "int99"),
])  # fmt: skip
def test_before_weights(
    arguments: tuple[str, ...], says: str, unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("massact.records.reachability.unreachable", lambda address: "no route")
    monkeypatch.chdir(tmp_path)
    assert says in refused(*arguments)


@pytest.mark.parametrize("verb", [("intervene", RUN), ("quantise",)])
def test_extras_before_weights(verb: tuple[str, ...], unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "lm_eval" else plain(n, *a))
    assert "massact[tasks]" in refused(*verb, "--tasks", "piqa")


def test_in_python_a_corpus_before_weights(unloaded: None) -> None:
    given: dict[str, Any] = {"preprocess": {"resize": 224}}
    for corpus, options in (("no-such-file.txt", {}), (None, given)):
        with pytest.raises(UserError):
            ma.scan("embedded", corpus, **options)
