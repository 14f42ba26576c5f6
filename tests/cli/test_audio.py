"""`massact scan --corpus speech/`, explain and intervene on a tiny whisper in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import massact as ma
from massact.records.kinds.intervention import Intervention
from tests.cli.test_images import run
from tests.facts import tells
from tests.sounds import folder, saved_whisper

LOW = ["--threshold", "magnitude=0", "--threshold", "ratio=1.5"]


@pytest.mark.rendered
def test_scan_explain_intervene_on_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, speech, out = saved_whisper(tmp_path / "model"), folder(tmp_path / "speech", texts=True), tmp_path / "run"
    assert run("scan", model, "--corpus", speech, "--out", out, *LOW, "--no-null", "-q", monkeypatch=monkeypatch) == 0
    source = json.loads((out / "run.json").read_text(encoding="utf-8"))["corpus"]["source"]
    assert source["kind"] == "recordings" and source["seconds"] == [0.36, 1.0, 0.66] and source["transcripts"]
    assert source["preprocess"]["extractor"] == "WhisperFeatureExtractor"
    assert source["decoder"] == {"prompt_ids": [1], "prompt_from": "decoder_start_token_id", "then": "transcript"}
    found = ma.open_run(out).findings
    assert {"start", "padding", "other"} <= set(found[found["stack"] == "encoder"].position_class)
    assert (out / "figures" / "census.png").is_file()
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    assert run("explain", out, "-q", monkeypatch=monkeypatch) == 0
    sinks = pd.read_parquet(out / "sinks.parquet")
    assert "padding" in set(sinks[sinks["stack"] == "encoder"].position_class)
    assert run("intervene", out, "-q", monkeypatch=monkeypatch) == 0
    saved = Intervention.open(out)
    assert saved is not None and {"nll", "kl", "perplexity"} <= set(saved.effects.metric)
    capsys.readouterr()
    assert run("show", out, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert tells(said, "padding", "frames") and "frame 0." in said
    assert run("scan", model, "--corpus", speech, "--preprocess", "crop=3", monkeypatch=monkeypatch) == 2
    assert tells(capsys.readouterr().err, "not", "images")


def test_one_flac_file_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, speech = saved_whisper(tmp_path / "model", words=False), folder(tmp_path / "s", "flac")
    out = tmp_path / "run"
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    asked = ["scan", model, "--corpus", speech / "0.flac", "--out", out, *LOW, "--no-null", "-q"]
    assert run(*asked, monkeypatch=monkeypatch) == 0
    assert run("explain", out, "-q", monkeypatch=monkeypatch) == 0
    assert run("intervene", out, "--set", "zero", "-q", monkeypatch=monkeypatch) == 0
    saved = Intervention.open(out)
    assert saved is not None and "kl" in set(saved.effects.metric) and "nll" not in set(saved.effects.metric)
    (model / "preprocessor_config.json").unlink()
    assert run("scan", model, "--corpus", speech, monkeypatch=monkeypatch) == 2
    assert tells(capsys.readouterr().err, "no preprocessor_config.json")
