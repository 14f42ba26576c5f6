"""`massact quantise` as a user meets it: on a run, on a model, shown, reported, its files, bad input, no extra."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from massact.quantisation import number_formats
from massact.records.kinds.quantisation import Quantisation
from tests.cli.runs import copied_run, scanned_run
from tests.cli.test_cli import run
from tests.cli.test_explain import files, refused
from tests.facts import tells
from tests.quantisation.linear_twin import save_linear_twin

SMALL = ["--n-sequences", "8", "--seq-len", "48"]
FEW = ["--schemes", "int8-tensor,int8-tensor+exempt,W8A8"]
OUTPUT = {"quantise.json", "quantised.parquet", "remedies.parquet", "quantised_sites.parquet", "guilty_sites.parquet"}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scanned_run(tmp_path_factory, *SMALL, "--no-null", "--no-bos-contrast")


@pytest.fixture
def copied(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_run(scanned, tmp_path, monkeypatch)


def test_a_run_gets_its_losses_beside_its_tables(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(copied)
    assert run(monkeypatch, "quantise", str(copied), *FEW, "--batch-size", "3") == 0
    assert tells([capsys.readouterr().out], "int8-tensor", "cost", "mlp_act")
    after = files(copied)
    assert all(after[name] == content for name, content in before.items())
    assert OUTPUT <= set(after)
    assert run(monkeypatch, "show", str(copied)) == 0
    assert tells([capsys.readouterr().out], "int8-tensor+exempt")
    assert run(monkeypatch, "show", str(copied), "--json") == 0
    told = json.loads(capsys.readouterr().out)["quantisation"]
    rows = {row["scheme"]: row for row in told["quantised"] if row["metric"] == "nll"}
    assert list(rows) == ["int8-tensor", "int8-tensor+exempt", "W8A8"] and rows["int8-tensor"]["n_sequences"] == 4
    assert rows["int8-tensor"]["delta_nats"] > 0.1 > rows["int8-tensor+exempt"]["delta_nats"]
    assert run(monkeypatch, "report", str(copied)) == 0
    page = next(copied.glob("*.html")).read_text(encoding="utf-8")
    assert 'id="quantisation"' in page and "int8-tensor+exempt" in page
    other = tmp_path / "again"
    os.rename(copied, other)
    assert run(monkeypatch, "show", str(other)) == 0


@pytest.mark.rendered
def test_a_model_is_scanned_first_and_its_recipes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_linear_twin(tmp_path / "twin"), tmp_path / "run"
    chosen = ["--schemes", "int8-tensor", "--schemes", "weights:int4-group32/int8-token", "--guilty", "none"]
    assert run(monkeypatch, "quantise", str(model), "--out", str(out), *SMALL, *chosen, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    done = Quantisation.open(out)
    assert done is not None and set(told["exports"]) == {"llmcompressor.yaml", "torchao.py"} == set(done.info.exports)
    for name, text in done.info.exports.items():
        assert (out / "export" / name).read_text(encoding="utf-8") == text
    assert (out / "run.json").is_file() and (out / "figures" / "quantisation.png").stat().st_size > 10_000
    assert not len(done.guilty_sites)


@pytest.mark.parametrize(
    "options",
    [["--schemes", "int9-tensor"], ["--schemes", "int8-tensor,int8-tensor"], ["--schemes", "int8-group0"],
     ["--schemes", "weights:int8-channel+exempt"], ["--schemes", "int8-tensor-static+smooth+hadamard"],
     ["--schemes", "kv:int4-group7"], ["--schemes", "int4-group25"], ["--schemes", "MXFP8"], ["--sites", "attn_out"],
     ["--sites", "mlp_act", "--schemes", "attn_in:int8-tensor"], ["--guilty", "int8-tenser"],
     ["--guilty", "weights:int8-channel"], ["--guilty", "int8-tensor+slots"], ["--export", "W9A9"],
     ["--n-sequences", "9"], ["--out", "elsewhere"]],
)  # fmt: skip
def test_bad_input_is_one_message(
    copied: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(monkeypatch, capsys, "quantise", str(copied), *options)
    assert not OUTPUT & set(files(copied)) and not (copied / "export").exists()


@pytest.mark.parametrize(("package", "scheme"), [("compressed_tensors", "int8-tensor"), ("torchao", "mxfp4"),
                                                 ("compressed_tensors", None)])  # fmt: skip
def test_a_missing_extra_is_told_before_anything_is_loaded(
    copied: Path, package: str, scheme: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_module = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return import_module(name, *rest)

    number_formats.quant_module.cache_clear()
    monkeypatch.setattr(number_formats.importlib, "import_module", missing)
    monkeypatch.setattr("massact.scans.earlier_scan.load", lambda *_, **__: pytest.fail("the model was loaded"))
    said = refused(monkeypatch, capsys, "quantise", str(copied), *(["--schemes", scheme] if scheme else []))
    assert "massact[quant]" in said
    number_formats.quant_module.cache_clear()
