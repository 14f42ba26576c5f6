"""stdout closed, full, or a pipe that nobody reads; a full disk; Ctrl-C: one message, the right status, whole files."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import massact as ma
from massact.cli import output
from massact.cli.interrupts import how_to_go_on
from massact.records.disk import all_or_nothing, write_atomic
from massact.records.errors import WorkError
from massact.records.tables import save_arrays
from massact.verbs import verbs
from tests.cli.test_cli import FAST, run
from tests.facts import tells

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("output") / "run"
    ma.scan(None, n_sequences=2, seq_len=32, null=False, bos_contrast=False, out=out)
    return out


def shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which M is massact and $1, ... are the arguments."""
    code = f'M() {{ "{sys.executable}" -m massact "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(["bash", "-c", code, "bash", *arguments], capture_output=True, text=True, env=ENVIRONMENT,
                          timeout=300)  # fmt: skip


NOT_PRINTED = "What was to be printed could not be"


@pytest.mark.parametrize(("line", "status", "says"), [
    ('M show "$1" >&-', 1, "closed"), ('M show --json "$1" >&-', 1, "closed"),
    ('M show "$1" >/dev/full', 1, "No space left"), ('M show --json "$1" >/dev/full', 1, "No space left"),
    ('M --help >/dev/full', 1, "No space left"), ('M scan --help >&-', 1, "closed"),
    ('PYTHONUNBUFFERED=1 M show --json "$1" >/dev/full', 1, "No space left"),
    ('M show --json "$1" | true', 141, ""), ('M show "$1" | true', 141, ""), ('M --help | true', 141, ""),
    ('M report "$1" >&-', 1, "closed"), ('M show "$1/nothing" >&-', 2, "No such run directory"),
    ('M show "$1/nothing" >/dev/full', 2, "No such run directory"),
    ('M show "$1/nothing" 2>&-', 2, ""), ('M show "$1/nothing" 2>/dev/full', 2, ""), ('M nothing 2>/dev/full', 2, ""),
    ('M show "$1" <&- >/dev/null 2>&-', 0, ""),
])  # fmt: skip
def test_what_cannot_be_printed_is_told_once(line: str, status: int, says: str, scanned: Path) -> None:
    done = shell(line, str(scanned))
    assert done.returncode == status, done
    assert says in done.stderr and done.stdout == ""
    assert done.stderr.count("error: ") == bool(says) and bool(done.stderr) == bool(says)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if status == 1 and "UNBUFFERED" not in line:
        assert NOT_PRINTED in done.stderr


def test_files_stay_whole_when_stdout_is_closed(tmp_path: Path) -> None:
    """The first file that is opened gets number 1 where stdout was closed: what is printed must not go into it."""
    few = "--n-sequences 2 --seq-len 32 --no-null --no-bos-contrast"
    done = shell(f'M scan --out "$1" {few} >&-', str(tmp_path / "run"))
    assert done.returncode == 1 and NOT_PRINTED in done.stderr and done.stderr.count("\n") == 3
    result = ma.open_run(tmp_path / "run")
    assert result.info.status == "ok" and (tmp_path / "run" / "figures").is_dir()
    quiet = shell(f"M scan --quiet {few} >&-")
    assert (quiet.returncode, quiet.stderr) == (0, ""), "nothing was to be printed"


class Full(io.StringIO):
    """A stdout without room."""

    number = errno.ENOSPC

    def write(self, text: str) -> int:
        super().write(text)
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(self.number, os.strerror(self.number))


class Gone(Full):
    number = errno.EPIPE


@pytest.mark.parametrize("stream", [Full, Gone])
@pytest.mark.parametrize("verb", [
    ["scan", *FAST], ["explain", "RUN", "--n-sequences", "2"], ["classics", "--list"], ["reproduce", "--list"],
    ["train", "--list"], ["compare", "RUN", "OTHER"], ["report", "RUN"], ["show", "RUN"],
    ["intervene", "RUN", "--set", "zero"],
], ids=lambda v: v[0] if isinstance(v, list) else v.__name__)  # fmt: skip
def test_every_verb_tells_it(
    verb: list[str], stream: type[Full], scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = shutil.copytree(scanned, tmp_path / "run")
    if verb[0] == "explain":
        monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    monkeypatch.setattr(sys, "stdout", stream())
    places = {"RUN": str(run_dir), "OTHER": str(scanned)}
    status = run(monkeypatch, *(places.get(w, w) for w in verb))
    err = capsys.readouterr().err
    if stream is Gone:
        assert status == output.GONE and err == ""
    else:
        assert status == 1 and err.startswith(f"error: {NOT_PRINTED}") and "No space left" in err
    written = {"explain": "explain.json", "intervene": "intervene.json", "report": "report.html"}
    assert (run_dir / written.get(verb[0], "run.json")).is_file()


# -------------------------------------------------------------------------------------------------------- full disk
def full_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk has no room for one file, of which half is written."""
    ordinary = write_atomic

    def no_room(path: Path, write: Any) -> None:
        def half(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

        ordinary(path, half if path.name == name else write)

    for module in ("tables", "run", "sidecars"):
        monkeypatch.setattr(f"massact.records.{module}.write_atomic", no_room)


@pytest.mark.parametrize("name", ["run.json", "layers.parquet", "portrait.npz"])
def test_a_scan_on_a_full_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_on(monkeypatch, name)
    out = tmp_path / "run"
    assert run(monkeypatch, "scan", "--quiet", "--out", str(out), *FAST) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and tells([err], "disk", "full", name) and err.count("\n") == 3
    assert not list(out.glob(".*")), "nothing half-written"
    if name != "run.json":
        assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert "--resume" in err
    monkeypatch.undo()
    if name != "run.json":  # every message of such a run names what works
        for verb in (("show", str(out)), ("scan", "--quiet", "--out", str(out), *FAST)):
            assert run(monkeypatch, *verb) == 2 and "--resume" in capsys.readouterr().err
    assert run(monkeypatch, "scan", "--quiet", "--out", str(out), "--resume", *FAST) == 0


@pytest.mark.parametrize("name", ["explain.json", "a table"])
def test_a_verb_on_a_full_disk_leaves_the_run_as_it_was(
    name: str, scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(scanned, tmp_path / "run")
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    assert run(monkeypatch, "explain", str(out), "--quiet", "--n-sequences", "2") == 0
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    tables = sorted(n for n in before if n.endswith(".parquet") and not (scanned / n).exists())
    name = tables[-1] if name == "a table" else name
    full_on(monkeypatch, name)
    assert run(monkeypatch, "explain", str(out), "--quiet", "--n-sequences", "1") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and tells([err], "disk", "full", name)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    """A real process with `ulimit -f`: a file is cut at 4 kB by the system."""
    code = "from massact.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "scan", "--quiet", "--out", str(tmp_path / "run"), *FAST], capture_output=True,
        text=True, env=ENVIRONMENT, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert tells([done.stderr], "disk", "full")
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").glob(".*"))


def test_all_or_nothing(tmp_path: Path) -> None:
    record = tmp_path / "record.json"

    def text(name: str, said: str) -> None:
        write_atomic(tmp_path / name, lambda p: p.write_text(said))

    for said in ("one", "two"):
        with all_or_nothing(record):
            text("record.json", said)
            text("table", said)
            save_arrays(tmp_path / "a.npz", {"x": np.arange(2)})
    assert record.read_text() == (tmp_path / "table").read_text() == "two"
    with pytest.raises(WorkError, match="full"), all_or_nothing(record):
        text("table", "three")
        pd.DataFrame()
        write_atomic(record, lambda p: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
    assert record.read_text() == (tmp_path / "table").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "record.json", "table"]


# ----------------------------------------------------------------------------------------------------------- Ctrl-C
@pytest.mark.parametrize(("verb", "stage"), [
    (["scan", "--out", "NEW", *FAST], "massact.scans.verb.load"), (["scan", *FAST], "massact.scans.verb.load"),
    (["scan", "--out", "NEW", *FAST], "massact.scans.job._Job.run"),
    (["explain", "RUN"], "massact.explanations.explain"),
    (["intervene", "RUN"], "massact.interventions.verb.intervene"),
    (["classics", "RUN"], "massact.classics.classics"),
    (["classics", "--out", "NEW"], "massact.scans.scan_first"),
    (["reproduce", "--out", "NEW"], "massact.cli.reproduce.reproduce"),
    (["reproduce", "RUN"], "massact.cli.reproduce.reproduce"), (["reproduce"], "massact.cli.reproduce.reproduce"),
    (["train", "--out", "NEW"], "massact.training.train"), (["report", "RUN"], "massact.reports.report"),
    (["show", "RUN"], "massact.records.kinds.results_in"), (["compare", "RUN", "OTHER"], "massact.reports.compare"),
], ids=lambda v: " ".join(v[:2]) if isinstance(v, list) else v)  # fmt: skip
def test_ctrl_c_tells_what_can_be_done(
    verb: list[str], stage: str, scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`--resume` is said where there is something to go on with, and the same command with it is then taken."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run_dir = shutil.copytree(scanned, tmp_path / "run")
    places = {"RUN": str(run_dir), "NEW": str(tmp_path / "new"), "OTHER": str(scanned)}
    words = [places.get(w, w) for w in verb]
    with monkeypatch.context() as patch:
        patch.setattr(stage, interrupted)
        assert run(patch, *words) == 130
    err = capsys.readouterr().err
    assert err.startswith("error: Interrupted. ") and err.count("\n") == 1 and "Traceback" not in err
    began = stage.endswith("_Job.run")
    assert ("--resume" in err) == began and (("again" in err) or began or "--out DIR" in err)
    if began:
        assert json.loads((tmp_path / "new" / "run.json").read_text())["status"] == "interrupted"
        assert run(monkeypatch, *words, "--quiet", "--resume") == 0


def test_a_training_that_began_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    assert "--resume" in how_to_go_on(verbs()["train"], {"out": tmp_path})
    assert "--resume" not in how_to_go_on(verbs()["train"], {"out": tmp_path / "other"})
    assert "--resume" not in how_to_go_on(verbs()["train"], {"out": None})
