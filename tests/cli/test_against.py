"""`massact scan BASE --against CHAT`: both runs as they are alone, and what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import massact as ma
from massact.models.loading import EMBEDDED, location_of
from tests.cli.runs import render_nothing
from tests.cli.test_cli import FAST, run
from tests.corpora.test_chat_templates import TEMPLATE


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """The embedded model with a chat template."""
    folder = tmp_path / "chatty"
    ma.load().module.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(location_of(EMBEDDED))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_two_models_are_scanned_and_put_side_by_side(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    render_nothing(monkeypatch)
    out = tmp_path / "pair"
    assert run(monkeypatch, "scan", "--against", str(chat), "--chat-template", "--out", str(out), *FAST) == 0
    printed = capsys.readouterr().out
    assert "embedded" in printed and "chatty chat" in printed and str(out / "chatty-chat") in printed
    alone = ma.scan(None, n_sequences=2, seq_len=32, null=False, bos_contrast=False)
    one, other = ma.open_run(out / "embedded"), ma.open_run(out / "chatty-chat")
    assert one.findings.equals(alone.findings) and one.info.corpus["bos"] == "never"
    assert other.info.corpus["bos"] == "chat" and (out / "compare.parquet").is_file()


def test_without_a_directory_it_is_told_alone(
    chat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    render_nothing(monkeypatch)
    assert run(monkeypatch, "scan", str(chat), "--against", str(chat), "--json", *FAST) == 0
    told = json.loads(capsys.readouterr().out)["compare"]
    assert [row["label"] for row in told] == ["chatty 1", "chatty 2"] and told[0]["max"] == told[1]["max"]


@pytest.mark.parametrize("more", [["--revisions", "a,b"], ["--checkpoints"], ["--revision", "main"]], ids=str)
def test_two_models_and_many_checkpoints_exclude_each_other(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "scan", "--against", "embedded", *more) == 2
    assert "--against" in capsys.readouterr().err


def test_a_run_of_one_model_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert run(monkeypatch, "scan", "--against", "embedded", "--out", str(tmp_path)) == 2
    assert "another --out" in capsys.readouterr().err
