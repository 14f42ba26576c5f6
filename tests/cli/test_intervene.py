"""`massact intervene` and `massact show` as a user meets them: files, answers, and one clear message for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import massact as ma
from massact.interventions import QUARTET
from massact.models.loading import EMBEDDED, location_of
from massact.records.kinds.intervention import Intervention
from massact.records.tables import columns_of
from massact.reports import effects_in_words
from tests.cli.runs import copied_run, scanned_run
from tests.cli.test_cli import run
from tests.cli.test_explain import files, refused
from tests.facts import tells

FAST = ["--n-sequences", "8", "--seq-len", "32", "--no-null", "--no-bos-contrast"]
LOW = ["--threshold", "ratio=200", "--threshold", "magnitude=10"]


def strict(text: str) -> dict:
    """JSON as the standard has it."""

    def no(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=no)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a scan of the embedded model, with findings."""
    return scanned_run(tmp_path_factory, *FAST, *LOW)


@pytest.fixture
def copied(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be intervened on, without the figure: `done` has it."""
    return copied_run(scanned, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def done(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its intervention."""
    folder = Path(shutil.copytree(scanned, tmp_path_factory.mktemp("cli") / "done"))
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "intervene", "--quiet", str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file: twelve texts of two kinds."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"text": f"The boat of number {i} is old. The sea is cold, and the wind is up!" if i % 2 else
             f"She was {i} years of age, and her house was small but very warm.", "kind": "sea" if i % 2 else "home"}
            for i in range(12)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


# ------------------------------------------------------------------------------------------------- the answer
def test_intervene_adds_its_files_and_leaves_those_of_the_scan(scanned: Path, done: Path) -> None:
    before, after = files(scanned), files(done)
    assert all(after[name] == data for name, data in before.items())
    assert set(after) - set(before) == {
        "effects.parquet", "intervene.json", "figures/effects.png"}  # fmt: skip
    with Image.open(done / "figures" / "effects.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10, "blank"
    record, run_json = (json.loads((done / f"{n}.json").read_text()) for n in ("intervene", "run"))
    assert record["model"]["weights_sha256"] == run_json["model"]["weights_sha256"]
    assert record["corpus"]["sha256"] == run_json["corpus"]["sha256"]
    assert (record["estimated_on"], record["evaluated_on"]) == ("sequences 0 to 3", "sequences 4 to 7")
    effects = pd.read_parquet(done / "effects.parquet")
    assert list(effects) == list(columns_of("effects")) and list(dict.fromkeys(effects["edit"])) == list(QUARTET)
    assert (effects.n_elements > 0).all() and set(effects.group) == {"all"} and set(effects.n_sequences) == {4}


def test_intervene_and_show_print_the_same(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "intervene", str(copied), "--set", "zero", "--set", "mean") == 0
    printed = capsys.readouterr().out
    assert run(monkeypatch, "show", str(copied)) == 0
    shown = capsys.readouterr().out
    e = Intervention.open(copied)
    assert e is not None and list(dict.fromkeys(e.effects["edit"])) == ["zero", "mean"]
    flat_printed, flat_shown = (" ".join(text.replace("│", " ").split()) for text in (printed, shown))
    for sentence in effects_in_words(e):
        assert sentence in flat_printed and sentence in flat_shown
    assert f"massact show {copied}" in printed


def test_json_is_one_document_with_all_that_was_done(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "intervene", str(copied), "--json", "--set", "zero") == 0
    out, err = capsys.readouterr()
    record = strict(out)
    assert err == "" and len(record["effects"]) > 0 and set(record["effects"][0]) == set(columns_of("effects"))
    assert run(monkeypatch, "show", str(copied), "--json") == 0
    shown = strict(capsys.readouterr().out)
    assert shown["intervention"] == record and "explanation" not in shown
    assert {k for k in shown if k != "intervention"} == set(ma.open_run(copied).as_dict())
    assert run(monkeypatch, "explain", str(copied), "--quiet", "--n-sequences", "1") == 0
    capsys.readouterr()
    assert run(monkeypatch, "show", str(copied), "--json") == 0
    both = strict(capsys.readouterr().out)
    assert both["intervention"] == record and len(both["explanation"]["heads"]) > 0 and both["verb"] == "scan"


def test_options_are_recorded(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "scale=0.5", "--set", "clip=3", "--set", "value=-1", "--layer", "3", "--no-hold-out",
               "--batch-size", "4", "--seed", "5"]  # fmt: skip
    assert run(monkeypatch, "intervene", str(copied), "--json", *options) == 0
    record = strict(capsys.readouterr().out)
    wanted = {"sets": ["scale=0.5", "clip=3", "value=-1"], "layer": 3, "hold_out": False, "batch_size": 4, "seed": 5}
    assert wanted.items() <= record["config"].items() and record["target"]["site"] == "3.resid_post"
    assert [*dict.fromkeys(r["edit"] for r in record["effects"])] == ["scale 0.5", "clip 3", "value -1"]
    assert {r["layer"] for r in record["effects"]} == {3} and {r["n_sequences"] for r in record["effects"]} == {8}
    assert record["evaluated_on"] == "sequences 0 to 7"
    same, more = record["notes"]
    assert tells([same], "Means", "sequences")
    n_findings = len(pd.read_parquet(copied / "findings.parquet").query("layer == 3"))
    assert tells([more], 48, f"{n_findings} of the {n_findings} findings")


def test_quiet_prints_nothing_and_intervening_again_replaces(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("zero", "mean"):
        assert run(monkeypatch, "intervene", str(copied), "--quiet", "--set", name) == 0
        assert capsys.readouterr().out == ""
        e = Intervention.open(copied)
        assert e is not None and set(e.effects["edit"]) == {name} and not list(copied.rglob(".*.tmp"))


def test_two_runs_give_the_same_table(copied: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = shutil.copytree(location_of(EMBEDDED), copied.parent / "moved")
    assert run(monkeypatch, "intervene", "--quiet", str(copied), str(moved)) == 0
    pd.testing.assert_frame_equal(*(pd.read_parquet(f / "effects.parquet") for f in (copied, done)))


def test_effects_by_a_column_of_a_jsonl_file(
    copied: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--corpus", str(labelled), "--group", "kind", "--set", "zero"]
    assert run(monkeypatch, "intervene", str(copied), *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    e = Intervention.open(copied)
    assert e is not None and e.info.evaluated_on == "sequences 6 to 11"
    counts = e.effects[e.effects.metric == "perplexity"].set_index("group").n_sequences.to_dict()
    assert counts == {"all": 6, "kind=home": 3, "kind=sea": 3}
    model, alone = ma.load(), []  # each row stands alone, whatever windows the scan had
    for row in map(json.loads, labelled.read_text().splitlines()[6:]):
        ids = ma.corpus([row["text"]], tokenizer=model.tokenizer).inputs["input_ids"]
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(model.module(input_ids=ids).logits[0, :-1], ids[0, 1:])
        alone.append({"kind": row["kind"], "nll": float(nll)})
    wanted = pd.DataFrame(alone).groupby("kind").nll.mean()
    told = e.effects[e.effects.metric == "nll"].set_index("group").baseline
    for kind in ("sea", "home"):
        assert told[f"kind={kind}"] == pytest.approx(wanted[kind], rel=1e-5)
    assert "kind=sea" in printed and "hurts kind=" not in printed, "three sequences of each settle nothing"
    assert e.effects.gap.isna().all()
    assert any("scanned anew" in note for note in e.info.notes)


def test_show_of_an_intervention_imports_no_torch(done: Path) -> None:
    code = (
        "import sys; from massact.cli import main\nsys.argv = ['massact', 'show', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(done)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "95% interval" in ended.stdout
    edits = [name.split()[0] for name in Intervention.open(done).effects["edit"].unique()]
    assert len(edits) > 1 and any(all(e in line.split() for e in edits) for line in ended.stdout.splitlines())


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("arguments", "says"), [
    (["--set", "zeroo"], ["zeroo", "zero"]), (["--set", "scale"], ["scale", "number"]),
    (["--set", "clip=x"], ["clip=x", "number"]), (["--set", "zero=1"], ["zero=1"]),
    (["--set", "replace-first"], ["replace-first", "TOKEN"]), (["--set", "weight=a.weight"], ["weight=a.weight"]),
    (["--set", "cut=first"], ["cut=first", "whole"]), (["--set", "replace-first=no-such-token"], ["no-such-token"]),
    (["--set", "weight=no.such[1,2]"], ["no.such"]), (["--layer", "2,99"], ["Layer 99"]), (["--layer", "2,x"], ["2,x"]),
    (["--evaluate-on", "./no-such.txt"], ["no-such.txt"]),
    (["--layer", "0"], ["Layer 0", "2"]), (["--layer", "99"], ["Layer 99"]), (["--layer", "last"], ["last"]),
    (["--group", "kind"], ["--group", "--evaluate-on"]), (["--group", "kinds", "--corpus", "ROWS"], ["kinds", "kind"]),
    (["--group", "kind", "--corpus", "./no-such.jsonl"], ["no-such.jsonl"]),
    (["--corpus", "./no-such.txt"], ["no-such.txt"]), (["./no/such/model"], ["no/such/model"]),
    (["--device", "gpu9"], ["gpu9"]), (["--set", "zero", "--set", "zero"], ["zero", "twice"]),
])  # fmt: skip
def test_bad_arguments_write_nothing(
    arguments: list[str], says: list[str], copied: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = files(copied)
    given = [str(labelled) if a == "ROWS" else a for a in arguments]
    message = refused(monkeypatch, capsys, "intervene", str(copied), *given)
    assert all(word in message for word in says), message
    assert files(copied) == before


@pytest.mark.parametrize(("rows", "says"), [
    ('{"text": "a", "kind": 1}\n{"text": "b"}\n', ["Row 2", "'kind'"]), ('{"kind": 1}\n', ["Row 1", "no text"]),
    ("", ["is empty"]), ("{not json\n", ["cannot be read"]), ("[1, 2]\n", ["Row 1"]),
])  # fmt: skip
def test_rows_that_are_none(
    rows: str, says: list[str], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, before = tmp_path / "bad.jsonl", files(copied)
    file.write_text(rows)
    message = refused(monkeypatch, capsys, "intervene", str(copied), "--group", "kind", "--corpus", str(file))
    assert all(word in message for word in [*says, "bad.jsonl"]) and files(copied) == before


def test_bad_usage_is_status_2(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(copied)
    for arguments in ([], [path, "--batch-size", "0"], [path, "--sets", "zero"], [path, "--limit", "0"]):
        assert run(monkeypatch, "intervene", *arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_other_weights_are_refused(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(location_of(EMBEDDED), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights[next(n for n in weights if "mlp" in n)].view(-1)[3] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = files(copied)
    message = refused(monkeypatch, capsys, "intervene", str(copied), str(folder))
    scanned_hash = json.loads((copied / "run.json").read_text())["model"]["weights_sha256"]
    assert tells([message], "scanned", scanned_hash[:12])
    assert files(copied) == before


def test_a_run_without_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    out = tmp_path / "quiet"
    high = ["--threshold", "ratio=1e9", "--threshold", "magnitude=1e9"]
    assert run(monkeypatch, "scan", "--quiet", "--out", str(out), *FAST, *high) == 0
    capsys.readouterr()
    before = files(out)
    assert "no massive activations" in refused(monkeypatch, capsys, "intervene", str(out))
    assert files(out) == before


def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    assert "nowhere" in refused(monkeypatch, capsys, "intervene", str(tmp_path / "nowhere"))
    assert "thesis" in refused(monkeypatch, capsys, "intervene", str(tmp_path / "thesis"))
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis"]


def test_a_damaged_intervention_is_one_message(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("intervene.json", b"{"), ("intervene.json", b'{"schema_version": 99}'),
                          ("intervene.json", b'{"schema_version": 1, "notes": 7}'), ("effects.parquet", b"PAR1"),
                          ("effects.parquet", None)):  # fmt: skip
        bad = Path(shutil.copytree(done, tmp_path / "bad"))
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        assert name in refused(monkeypatch, capsys, "show", str(bad))
        assert name in refused(monkeypatch, capsys, "show", str(bad), "--json")
        shutil.rmtree(bad)


def test_an_interrupt_leaves_the_run_as_it_was(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = files(copied)
    monkeypatch.setattr("massact.interventions.job.evaluate", interrupt)
    assert run(monkeypatch, "intervene", str(copied)) == 130
    assert files(copied) == before and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["intervene", "quantise"])
def test_one_of_several_stacks_is_named_on_the_command_line(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """The notes of a run say to: a stack that is not there is refused by its name, not as an option."""
    message = refused(monkeypatch, capsys, verb, str(copied), "--stack", "stream_9")
    assert "stream_9" in message and "option" not in message
