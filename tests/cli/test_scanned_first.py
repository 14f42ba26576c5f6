"""A verb on a scan that is given a model: it is scanned first, by what was asked of the scan."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

import massact as ma
from massact.cli.early_checks import is_model
from massact.models.loading import EMBEDDED, location_of
from massact.records.kinds.reproduction import Reproduction
from tests.cli.runs import render_nothing
from tests.cli.test_cli import run
from tests.corpora.test_chat_templates import PROMPTS, TEMPLATE

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("--text-column", "body", "--chat-template")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template, and prompts in a table beside it."""
    folder = tmp_path_factory.mktemp("chat") / "chatty"
    ma.load().module.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(location_of(EMBEDDED))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    pd.DataFrame({"body": PROMPTS * 2}).to_csv(folder.parent / "prompts.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def wanted(chat: Path) -> ma.ScanResult:
    return ma.scan(str(chat), PROMPTS * 2, chat_template=True, null=False, bos_contrast=False)


@pytest.mark.parametrize("verb", [("explain",), ("intervene", "--set", "zero", "--no-repetition", "--no-hold-out")],
                         ids=lambda v: v[0])  # fmt: skip
def test_explain_and_intervene_scan_a_model_first(
    verb: tuple[str, ...], chat: Path, wanted: ma.ScanResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render_nothing(monkeypatch)
    table, out = str(chat.parent / "prompts.csv"), tmp_path / "run"
    assert run(monkeypatch, verb[0], str(chat), *verb[1:], "--corpus", table, *KINDS, "--out", str(out), "-q") == 0
    made = ma.open_run(out)
    assert made.info.corpus["sha256"] == wanted.info.corpus["sha256"] and made.info.corpus["bos"] == "chat"
    assert made.findings.equals(wanted.findings)
    told = json.loads((out / f"{verb[0]}.json").read_text())
    assert told["corpus"]["sha256"] == made.info.corpus["sha256"]
    assert run(monkeypatch, verb[0], str(out), *verb[1:], "--corpus", table, "-q") == 0  # the run itself, read again


def test_reproduce_reads_the_column(
    chat: Path, wanted: ma.ScanResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render_nothing(monkeypatch)
    table, out = str(chat.parent / "prompts.csv"), tmp_path / "run"
    assert (
        run(monkeypatch, "reproduce", str(chat), "--corpus", table, *KINDS, "--only", "E4", "--out", str(out), "-q")
        == 0
    )
    assert ma.open_run(out).info.corpus["sha256"] == wanted.info.corpus["sha256"]
    assert run(monkeypatch, "reproduce", str(chat), "--corpus", table, *KINDS[:2], "--only", "E4", "--out",
               str(tmp_path / "plain"), "--n-sequences", "2", "--seq-len", "8", "-q") == 0  # fmt: skip
    assert ma.open_run(tmp_path / "plain").info.corpus["bos"] == "never"  # as the paper
    assert Reproduction.open(out) is not None


@pytest.mark.parametrize("option", [("--chat-template",), ("--text-column", "body"), ("--seq-len", "8"),
                                    ("--out", "x")], ids=lambda o: o[0])  # fmt: skip
@pytest.mark.parametrize("verb", ["explain", "intervene", "classics", "reproduce"])
def test_a_run_has_its_scan(
    verb: str, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, verb, str(GOLDEN / "schema_3"), *option) == 2
    assert option[0] in capsys.readouterr().err or verb == "reproduce"


def test_two_models_are_one_too_many(
    chat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", str(chat), "embedded") == 2
    assert "chatty" in capsys.readouterr().err


def test_what_is_a_model_and_what_a_run(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "a.gguf").touch()
    models = [str(chat), "embedded", "org/name", "gpt2", "timm:vit_tiny_patch16_224", "a.gguf", "."]
    runs = [str(GOLDEN / "schema_3"), "runs", "runs/typo", "./runs/x", "thesis.tex", "/no/where"]
    assert [is_model(spec) for spec in models + runs] == [True] * len(models) + [False] * len(runs)
