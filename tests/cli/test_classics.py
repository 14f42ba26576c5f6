"""`massact classics` as a user meets it: on a run, on a model, unavailable entries, bad input, printed again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import massact as ma
from massact.classics import CLASSICS, classics
from massact.records.kinds.classics import Classics
from massact.records.tables import columns_of
from massact.reports import classics_in_words
from massact.reports.kinds.classics import SENTENCES, draw_classics
from massact.reports.render.sheets import figure_of
from tests.cli.test_cli import run
from tests.cli.test_explain import files, refused
from tests.cli.test_intervene import copied, scanned  # noqa: F401  (fixtures)
from tests.facts import each, tells
from tests.families import build

FEW = ["--which", "norm-growth", "--which", "attention-biases"]


@pytest.fixture(scope="module")
def whole() -> ma.ScanResult:
    """All entries on the embedded model; as (scan, classics)."""
    model = ma.load(None)
    scan = ma.scan(model, None, null=False, bos_contrast=False, n_sequences=4, seq_len=64)
    return scan, classics(model, None, scan)  # type: ignore[return-value]


def test_every_entry_has_an_outcome_and_a_sentence(whole: tuple) -> None:
    """A declared entry without words, or words without an entry, would go unnoticed."""
    _, done = whole
    assert set(done.info.outcomes) == set(CLASSICS) == set(SENTENCES)
    words = classics_in_words(done)
    for name, entry in CLASSICS.items():
        assert any(w.startswith(f"{name} ({entry.source}): ") for w in words), name
    assert set(done.classics["classic"]) == set(CLASSICS)
    sheet = draw_classics(done)
    assert sheet is not None
    figure = figure_of(sheet)
    assert all(axes.has_data() or not axes.axison for axes in figure.axes)


def test_a_model_that_is_scanned_first_keeps_where_its_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later verb finds the text again by the record of the scan."""
    text = tmp_path / "text.txt"
    text.write_text("A kettle sings. The lamp is low. " * 60)
    out = tmp_path / "run"
    few = ["--which", "norm-growth", "--seq-len", "32", "--n-sequences", "2", "-q"]
    assert run(monkeypatch, "classics", "--corpus", str(text), "--out", str(out), *few) == 0
    assert json.loads((out / "run.json").read_text())["config"]["corpus"] == str(text)
    assert run(monkeypatch, "classics", str(out), "--which", "norm-growth", "-q") == 0


def test_saved_and_read_again_it_is_the_same(whole: tuple, tmp_path: Path) -> None:
    scan, done = whole
    done.save(scan.save(tmp_path / "run"))
    again = Classics.open(tmp_path / "run")
    assert again is not None and classics_in_words(again) == classics_in_words(done)
    for table in Classics.TABLES:
        pd.testing.assert_frame_equal(getattr(again, table), getattr(done, table))
        assert list(getattr(again, table).columns) == list(columns_of(table))


def test_a_run_gets_its_files_and_keeps_those_of_the_scan(
    copied: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(copied)
    assert run(monkeypatch, "classics", str(copied), *FEW, "--n-sequences", "2") == 0
    said = capsys.readouterr().out
    assert "norm-growth" in said and "Added to" in said
    after = files(copied)
    assert all(after[name] == data for name, data in before.items())
    assert set(after) - set(before) == {"classics.parquet", "classic_effects.parquet", "classics.json"}
    assert set(json.loads((copied / "classics.json").read_text())["outcomes"]) == {"norm-growth", "attention-biases"}
    code = (
        "import sys; from massact.cli import main\nsys.argv = ['massact', 'show', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(copied)], capture_output=True, text=True)
    assert shown.returncode == 0 and "norm-growth" in shown.stdout, shown.stderr


@pytest.mark.rendered
def test_a_model_is_scanned_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    assert run(monkeypatch, "classics", "--out", str(out), "--which", "norm-growth", "--n-sequences", "2", "--seq-len",
               "32", "--json") == 0  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert printed["outcomes"]["norm-growth"][""]["layers"] == 6
    assert ma.open_run(out).info.status == "ok" and Classics.open(out) is not None
    assert (out / "figures" / "classics.png").is_file() and (out / "figures" / "layers.png").is_file()
    image = Image.open(out / "figures" / "classics.png").convert("L")
    assert image.size[0] > 300 and len(image.getcolors(1 << 20)) > 20


def test_list_names_every_entry_and_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "classics", "--list") == 0
    said = capsys.readouterr().out
    assert all(f"{c.name} " in said and c.source in said for c in CLASSICS.values())


def test_what_a_model_cannot_have_is_told_with_the_reason() -> None:
    """A Llama has no biases; an encoder of images has no text to stream."""
    ids = torch.randint(1, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    model = ma.load(build("llama"))
    scan = ma.scan(model, ids, null=False, bos_contrast=False)
    done = classics(model, ids, scan, which=("attention-biases", "norm-growth"))
    reason = done.info.outcomes["attention-biases"]["unavailable"]
    assert reason and "norm-growth" in done.info.outcomes and done.info.outcomes["norm-growth"][""]["layers"] > 0
    assert any("unavailable: " in w and reason in w for w in classics_in_words(done))
    images = {"pixel_values": torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))}
    vit = ma.load(build("vit"))
    seen = classics(vit, images, ma.scan(vit, images, null=False), which=("streaming",))
    assert seen.info.outcomes["streaming"]["unavailable"] and not len(seen.classics)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--which", "rogue-dim"], ["rogue-dim", "rogue-dims"]), (["./no/such/model"], ["no/such/model"]),
    (["RUN", "--out", "x"], ["--out"]), (["RUN", "--seq-len", "9"], ["--seq-len"]),
    (["RUN", "--model", "./no-such"], ["no-such"]), (["--corpus", "./no-such.txt"], ["no-such.txt"]),
])  # fmt: skip
def test_bad_arguments_write_nothing(
    arguments: list[str], says: list[str], copied: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = files(copied)
    given = [str(copied) if a == "RUN" else a for a in arguments]
    message = refused(monkeypatch, capsys, "classics", *given)
    assert all(word in message for word in says), message
    assert files(copied) == before


def test_other_weights_and_other_texts_are_refused(whole: tuple) -> None:
    scan, _ = whole
    other = ma.load(build("gpt2"))
    with pytest.raises(ma.MassactError, match=each(other.info().weights_sha256[:12])):
        classics(other, None, scan)
    with pytest.raises(ma.MassactError, match="no option"):
        classics(ma.load(None), None, scan, wich=())


def test_nothing_is_told_of_biases_that_are_zero_and_of_too_few_layers() -> None:
    (none,) = SENTENCES["attention-biases"]({"effects": {}})
    assert tells([none], "no bias", "effect", "notes")
    few = {"factor": float("nan"), "r2": float("nan"), "layers": 2, "first_over_rest": 0.9}
    (said,) = SENTENCES["norm-growth"](few)
    assert "unavailable (2 layers)" in said and "NaN" not in said
