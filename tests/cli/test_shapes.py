"""`massact train --task shapes` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from massact import cli
from massact.records.kinds.scan import open_run
from massact.records.kinds.shapes import ShapeLab
from massact.training import shape_toy

SMALL = [f"--set={x}" for x in ("width=16", "size=16", "patch=4", "layers=2", "batch=8", "every=3")]
TASK = ["train", "--task", "shapes", *SMALL]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["massact", *arguments])
    monkeypatch.setattr("massact.training.lab.cores", lambda: 1)
    monkeypatch.setattr(shape_toy, "N_HELD_OUT", 24)
    monkeypatch.setenv("COLUMNS", "300")  # so that no sentence is broken
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_a_lab_is_shown_saved_and_its_models_are_scanned_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scan of the images that were written, by the processor that lies beside the model, finds what the lab found."""
    out = tmp_path / "lab"
    assert run(monkeypatch, *TASK, "--attention", "softmax", "--attention", "kv-bias", "--steps", "6", "--seed", "2",
               "--set", "registers=3", "--out", str(out)) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "6 steps of adamw, seed 2; background mixed" in printed and "does not show" in printed
    assert (out / "figures" / "shapes.png").is_file() and (out / "figures" / "shapes.svg").is_file()
    lab = ShapeLab.open(out)
    assert lab is not None and lab.arms == ["softmax", "softmax+registers", "kv-bias"]
    assert run(monkeypatch, "show", str(out)) == 0
    assert capsys.readouterr().out.strip() in printed
    assert run(monkeypatch, "show", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["shapes"][0]["step"] == 0
    for arm in ("softmax+registers", "kv-bias"):
        place = tmp_path / arm
        assert run(monkeypatch, "scan", str(out / f"model-{arm}"), "--corpus", str(out / "held_out"), "--no-null",
                   "--out", str(place), "--quiet") == 0  # fmt: skip
        scanned, own = open_run(place).layers, lab.shapes_layers[lab.shapes_layers["arm"] == arm]
        np.testing.assert_allclose(scanned.sort_values("layer")["ratio"], own["ratio"], rtol=1e-4)


def test_json_quiet_and_unsaved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*TASK, "--attention", "softmax", "--steps", "2"]
    assert run(monkeypatch, *few, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["arms"]) == ["softmax", "softmax+registers"]
    assert run(monkeypatch, *few, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert run(monkeypatch, *few) == 0
    assert "Not saved." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attention", "softmaxx"], "softmax"),
        (["--config", "guo"], "--config is not for"),
        (["--set", "sizes=16"], "size"),
        (["--set", "registers=many"], "registers='many'"),
        (["--data", "images.npz"], "--data is not for"),
        (["--resume"], "--resume is not for"),
        (["--attention", "sink-token"], "registers=1"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *TASK, *arguments) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
