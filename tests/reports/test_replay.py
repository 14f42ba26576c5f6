"""The command on a page, given to a shell as it stands there, is the run again: every option, every character."""

from __future__ import annotations

import html
import json
import re
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

import massact as ma
from massact.cli import app
from massact.records.sidecars import Sidecar
from massact.reports.provenance import COMMAND, command_of
from tests.cli.test_cli import run

PROMPTS = [
    "it's \"one\"\nand\ttwo", "  spaces   inside ", "back\\slash \\n $HOME `id` $(id) !x", "--out x; rm -rf *", "é€ 漢",
]  # fmt: skip


def words_of(command: str) -> list[str]:
    """What bash makes of a command line."""
    code = f"f() {{ printf '%s\\0' \"$@\"; }}; f {command}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    return done.stdout.decode().split("\0")[:-1]


def on_the_page(page: Path) -> str:
    """The command as a browser shows it: tags away, white space run together."""
    found = re.search(rf"<dt>{re.escape(COMMAND)}</dt>\s*<dd>(.*?)</dd>", page.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", found[1])).split())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_command_on_a_page_is_the_run_again(
    prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"thresholds": {"magnitude": 40.0, "ratio": 300.5}, "seed": 3, "top_k": 7, "bos": "never"}
    options |= {"n_sequences": 2, "seq_len": 32, "null": False, "bos_contrast": False, "prompt": prompt}
    ma.scan(None, out=tmp_path / "run", **options)
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    words = words_of(on_the_page(ma.report(tmp_path / "run")))
    assert words[:2] == ["massact", "scan"] and words[-2:] == ["--out", "RUN"]
    assert run(monkeypatch, *words[1:-1], str(tmp_path / "again"), "--quiet") == 0
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "again"))
    assert first["config"]["prompt"] == prompt
    for what in ("config", "model", "corpus", "criterion"):
        assert first[what] == second[what]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda s: not any(unicodedata.category(c) in ("Cn", "Co") for c in s)
)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, corpus=TEXT, seed=st.integers(0, 2**32 - 1), null=st.booleans(), dtype=st.sampled_from(
    ["float32", "bfloat16", "float16"]), trust=st.booleans(), ratio=st.floats(0.001, 1e9))  # fmt: skip
def test_any_options_come_back(
    prompt: str, corpus: str, seed: int, null: bool, dtype: str, trust: bool, ratio: float
) -> None:
    config = {"prompt": prompt, "corpus": corpus, "seed": seed, "null": null, "thresholds": {"ratio": ratio}}
    model = {"id": "./a model's folder", "dtype": dtype, "asked": {"trust_remote_code": trust}}
    words = words_of(command_of("scan", Sidecar(config=config, model=model)))
    assert words[:2] == ["massact", "scan"]
    given = get_command(app).commands["scan"].make_context("scan", words[2:]).params  # type: ignore[attr-defined]
    assert (given["prompt"], given["corpus"], given["seed"], given["null"]) == (prompt, corpus, seed, null)
    assert given["model"] == model["id"] and given["dtype"] == dtype and given["trust_remote_code"] is trust
    (threshold,) = given["thresholds"]
    assert float(threshold.removeprefix("ratio=")) == ratio


def test_verbs_on_a_run_load_the_model_as_the_scan_did() -> None:
    scanned = {"asked": {"trust_remote_code": True, "allow_pickle": True}, "dtype": "bfloat16"}
    said = command_of("explain", Sidecar(config={"seed": 1}, model={"id": "x"}), scanned)
    assert said.split() == ["massact", "explain", "RUN", "--trust-remote-code", "--allow-pickle", "--seed", "1"]
