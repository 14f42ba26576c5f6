"""`massact scan --corpus photos/` and `massact intervene --labels`: Table 4 from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import massact as ma
from massact.cli import main
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from tests.facts import tells
from tests.families import build

HALF = ["--preprocess", "mean=0.5", "--preprocess", "std=0.5"]


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["massact", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "photos" / ("LABEL_1" if i % 2 else "LABEL_0") / f"a 'b'\n$({i}) é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build("vit").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.rendered
def test_scan_explain_intervene_on_images(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, thresholds = tmp_path / "run", ["--threshold", "magnitude=0", "--threshold", "ratio=2.5"]
    assert run("scan", model, "--corpus", photos, monkeypatch=monkeypatch) == 2
    assert "--preprocess resize=256" in capsys.readouterr().err
    steps = [*HALF, "--preprocess", "resize=20", "--preprocess", "crop=20"]
    asked = ["scan", model, "--corpus", photos, "--out", out, *thresholds, *steps, "--no-null", "-q"]
    assert run(*asked, monkeypatch=monkeypatch) == 0
    info = json.loads((out / "run.json").read_text(encoding="utf-8"))
    kept = info["corpus"]["source"]
    assert (kept["kind"], kept["form"], kept["labelled"]) == ("images", "classes", True)
    assert kept["preprocess"]["resize"] == 20 and kept["preprocess"]["std"] == [0.5] * 3
    assert info["config"]["preprocess"]["crop"] == 20
    assert run("explain", out, "-q", monkeypatch=monkeypatch) == 0
    drawn = {p.stem for p in (out / "figures").glob("*.png")}
    assert {"attention_patches", *(f"patches_{x}" for x in ("norms", "histograms", "neighbours"))} <= drawn
    pictures = ma.open_run(out).images["pictures"]
    assert pictures.shape == (8, 20, 20, 3)
    first = Image.open(min(photos.rglob("*.png"), key=lambda p: p.relative_to(photos).as_posix()))
    resized = np.asarray(first.resize((26, 20), Image.Resampling.BICUBIC))[:, 3:23]
    np.testing.assert_array_equal(pictures[0], resized)
    assert run("intervene", out, "--labels", "auto", "-q", monkeypatch=monkeypatch) == 0
    first = Intervention.open(out)
    assert first is not None and "accuracy" in set(first.effects.metric) and first.info.config["labels"] == "auto"
    rows = [f'"{p.name}",{p.parent.name[-1]}' for p in photos.rglob("*.png")]
    (tmp_path / "l.csv").write_text("\n".join(["file,label", *rows[1:]]), encoding="utf-8")
    capsys.readouterr()
    assert run("intervene", out, "--labels", tmp_path / "l.csv", "-q", monkeypatch=monkeypatch) == 2
    assert tells(capsys.readouterr().err, "no label", rows[0].split('"')[1].splitlines()[-1])
    assert run("show", out, monkeypatch=monkeypatch) == 0
    assert "patch (" in capsys.readouterr().out


def test_classics_of_images(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    steps = [*HALF, "--preprocess", "resize=20", "--preprocess", "crop=20"]
    asked = ["classics", model, "--corpus", photos, "--which", "norm-growth", "--out", tmp_path / "run", "-q"]
    assert run(*asked, monkeypatch=monkeypatch) == 2 and "--preprocess" in capsys.readouterr().err
    assert run(*asked, *steps, monkeypatch=monkeypatch) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["corpus"]["source"]["preprocess"]["crop"] == [20, 20] and info["config"]["preprocess"]["resize"] == 20
    assert run("classics", tmp_path / "run", *steps, monkeypatch=monkeypatch) == 2
    assert tells(capsys.readouterr().err, "--preprocess", "not", "run")


def test_labels_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    model = ma.load(build("vit"))
    steps = {"resize": [20, 20], "mean": 0.5, "std": 0.5}
    corpus = ma.corpus(photos, preprocess=steps)
    result = ma.scan(model, corpus, thresholds={"magnitude": 0.0, "ratio": 2.5}, null=False)

    def intervene(labels: object) -> object:
        from massact.interventions import intervene

        return intervene(model, corpus, result, labels=labels, sets=("zero",), sinks=False)  # type: ignore[arg-type]

    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))

    def table(labels: list[object], heading: str = "path,label") -> str:
        quoted = [f'"{name}",{label}' for name, label in zip(names, labels, strict=False)]
        file = tmp_path / f"{len(list(tmp_path.glob('*.csv')))}.csv"
        file.write_text("\n".join([heading, *quoted]), encoding="utf-8")
        return str(file)

    right = [0 if "LABEL_0" in name else 1 for name in names]
    a, b, c = (intervene(x) for x in ("auto", right, table(right[::1])))
    for other in (b, c):
        assert other.effects.equals(a.effects)  # type: ignore[attr-defined]
    told = [any("are not among the images that cuts and means are of" in note for note in found.info.notes)
            for found in (intervene([0] * 5 + [1] * 5), intervene([0, 1] * 5))]  # type: ignore[attr-defined]  # fmt: skip
    assert told == [True, False]
    for labels, says in (
        (table([2] * 10), "label of .* is 2"), (table(right[:4]), "has no label for the image"),
        (table(["ant", "bee", "cat", "dog", "elk"] * 2), "5 class names, and the model has 2"),
        (right[:3], "3 entries"),
        (table(right, "path,note"), "has no labels"), ("nowhere.csv", "no file"), ([-1] * 10, "is -1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            intervene(labels)


@pytest.mark.long
def test_real_vit_by_the_command_line_alone(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 4 on real photographs: zero costs more than ten points of top-1 at the onset, the controls nothing."""
    vit, out = real_data / "models" / "vit-tiny-imagenet", tmp_path / "run"
    steps = [*HALF, "--preprocess", "resize=249", "--preprocess", "crop=224"]
    photos = real_data / "images" / "labels.csv"
    rest = ["--corpus", photos, "--out", out, "--threshold", "ratio=500", "--no-null", "-q"]
    assert run("scan", vit, *rest, *steps, "--n-sequences", 100, monkeypatch=monkeypatch) == 0
    result = ma.open_run(out)
    assert result.info.answer["stacks"][0]["onset"] == 8
    corners = result.findings.token.value_counts().index[:4]
    assert set(corners) == {f"patch ({r}, {c})" for r in (0, 13) for c in (0, 13)}
    sets = [x for name in ("zero", "mean", "random") for x in ("--set", name)]
    done = ["intervene", out, "--labels", "auto", "--no-all-keys", "--batch-size", 10, *sets, "-q"]
    assert run(*done, monkeypatch=monkeypatch) == 0
    saved = Intervention.open(out)
    assert saved is not None
    top1 = saved.effects[saved.effects.metric == "accuracy"].set_index("edit")
    assert (top1.baseline > 0.8).all() and top1.delta["zero"] < -0.1 and top1.ci_high["zero"] < 0
    assert abs(top1.delta["mean"]) <= 0.02 and abs(top1.delta["random"]) <= 0.02
