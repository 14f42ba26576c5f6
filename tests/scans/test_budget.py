"""How many sequences a scan reads where nobody says, on a slow machine and on a fast one."""

from __future__ import annotations

from typing import Any

import pytest

import massact as ma
from massact.corpora import corpus
from massact.models import Model
from massact.positions import ready_corpus
from massact.records.runinfo import duration
from massact.scans import budget
from massact.scans.budget import within_a_minute
from massact.scans.job import Text
from massact.verbs.scan import ScanConfig


@pytest.fixture(scope="module")
def model() -> Model:
    return ma.load()


def text(model: Model, config: ScanConfig) -> Text:
    source = corpus(None)
    return Text(source, ready_corpus(model, source, config), None)


class Clock:
    """A clock on which every sequence takes so many seconds."""

    def __init__(self, each: float) -> None:
        self.each, self.reads = each, 0

    def perf_counter(self) -> float:
        self.reads += 1
        return self.reads * self.each


@pytest.mark.parametrize(
    ("each", "fits"),
    [(0.1, 16), (5.0, 9), (1000.0, 4)],  # of 60 seconds, at 1.3 passes a sequence; never fewer than four
)
def test_a_slow_machine_reads_fewer_sequences_and_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch, each: float, fits: int
) -> None:
    config, said = ScanConfig.of({"seq_len": 128}), list[str]()
    whole = text(model, config)
    whole = Text(whole.source, whole.ready.head(16), None)
    monkeypatch.setattr(budget, "time", Clock(each))
    part, chosen = within_a_minute(model, whole, config, said.append)
    assert part.ready.n_sequences == fits and chosen.n_sequences == (None if fits == 16 else fits)
    assert len(said) == (fits < 16)
    if said:
        assert f"{fits} of 16" in said[0] and "--n-sequences 16" in said[0]


def test_what_was_asked_for_is_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "time", Clock(1000.0))
    config = ScanConfig.of({"seq_len": 64, "n_sequences": 12})
    part, chosen = within_a_minute(model, text(model, config), config, pytest.fail)
    assert part.ready.n_sequences == 12 and chosen is config


def test_the_command_scans_what_fits_and_goes_on_with_as_much(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.test_cli import run

    monkeypatch.setattr(budget, "time", Clock(1000.0))
    out = tmp_path / "run"
    assert run(monkeypatch, "scan", "--seq-len", "64", "--out", str(out), "--figures", "none") == 0
    scan = ma.open_run(out)
    assert scan.info.config["n_sequences"] == 4 and set(scan.findings["sequence"]) <= {0, 1, 2, 3}
    assert "4 of 32" in capsys.readouterr().err
    assert run(monkeypatch, "scan", "--seq-len", "64", "--out", str(out), "--resume", "--quiet") == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (100, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (9000, "2.5 h")],
)
def test_how_long_a_run_takes_is_told_in_one_unit(seconds: float, said: str) -> None:
    assert duration(seconds) == said
