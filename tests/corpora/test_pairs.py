"""Images with text from a JSONL file, prepared by the model's processor, from the command line on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import massact as ma
from massact.corpora import PairSource
from massact.records.errors import UserError
from massact.scans import reopen
from tests.cli.test_cli import run
from tests.facts import each
from tests.mixed import IMAGE, save_llava

OFF = {"null": False, "bos_contrast": False}
TEXTS = ["w10 w11", "w12 w13 w14 w15", "w16 <image> w17"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    save_llava(path / "model")
    (path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(path / "images" / f"{i}.png")
    rows = [{"image": f"images/{i}.png", "text": t} for i, t in enumerate(TEXTS)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_a_scan_of_pairs_is_that_of_the_processors_tensors(folder: Path, tmp_path: Path) -> None:
    model = ma.load(folder / "model")
    source = ma.corpus(folder / "pairs.jsonl")
    assert isinstance(source, PairSource)
    options = {"thresholds": {"magnitude": 0.0, "ratio": 3.5}, **OFF}
    result = ma.scan(model, folder / "pairs.jsonl", out=tmp_path / "run", **options)
    processor = transformers.AutoProcessor.from_pretrained(folder / "model", backend="pil")
    images = [Image.open(folder / "images" / f"{i}.png") for i in range(3)]
    made = processor(images=images, text=[f"<image>\n{t}" for t in TEXTS[:2]] + TEXTS[2:], padding=True,
                     padding_side="right", return_tensors="pt")  # fmt: skip
    by_hand = ma.scan(model, ma.corpus(dict(made)), **options)
    columns = ["stack", "layer", "sequence", "pos", "dim", "value", "token", "modality"]
    assert result.findings[columns].equals(by_hand.findings[columns]) and len(result.findings) > 10
    words = result.findings[result.findings.modality == "text"].token
    assert set(words) <= {*(f"w{i}" for i in range(10, 18)), "<s>"} and len(words)
    said = result.info.corpus["source"]
    assert said["files"] == [f"images/{i}.png" for i in range(3)] and said["first_text"] == "<image>\nw10 w11"
    assert said["processor"] == "LlavaProcessor" and said["template"].startswith("placeholder")
    assert reopen(result).corpus.sha256 == result.info.corpus["sha256"]


def test_a_chat_template_is_used(folder: Path) -> None:
    model = ma.load(folder / "model")
    model.processor.chat_template = (
        "{% for m in messages %}w20 {% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }} "
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}w21{% endif %}"
    )
    corpus = ma.corpus(folder / "pairs.jsonl").encode(model.processor, {"input_ids", "pixel_values"})
    assert corpus.origin.source["template"] == "chat template"
    ids = [int(i) for i in corpus.inputs["input_ids"][0][corpus.mask[0]]]
    assert ids == [20, *[IMAGE] * 16, 10, 11, 21]


def test_from_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    out = tmp_path / "run"
    few = ["--n-sequences", "2", "--threshold", "magnitude=0", "--threshold", "ratio=3.5", "--no-null"]
    corpus = ["--corpus", str(folder / "pairs.jsonl")]
    scanned = run(monkeypatch, "scan", str(folder / "model"), *corpus, *few, "--out", str(out))
    assert scanned == 0 and run(monkeypatch, "explain", str(out)) == 0
    assert set(ma.open_run(out).findings.modality) == {"text", "image"}


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"image": "none.png", "text": "w1"}))
    with pytest.raises(UserError, match=each("no image", "none.png")):
        ma.corpus(bad)
    good = json.dumps({"image": str(folder / "images" / "0.png"), "text": "w10"})
    bad.write_text(good + "\n" + json.dumps({"text": "w1"}))
    with pytest.raises(UserError, match=each("Line 2", "no image")):
        ma.corpus(bad)
    bad.write_text(good)
    with pytest.raises(UserError, match=each("processor", "images", "text")):
        ma.scan(ma.load(save_llava(tmp_path / "model")), bad, **OFF)
    with pytest.raises(UserError, match=each("images", "text")):
        ma.scan(None, bad, **OFF)
    with pytest.raises(UserError, match="bos="):
        ma.corpus(bad, bos="always")
    assert torch.is_tensor(ma.load(folder / "model").example["pixel_values"])
