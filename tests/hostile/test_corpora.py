"""Corpora, damaged: text, JSONL, CSV, images and recordings."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import massact as ma
from massact.corpora import AudioSource, Corpus, ImageSource, PairSource
from massact.records.errors import MassactError
from tests import sounds
from tests.hostile.damage import WRONG, cases, instead, limits, of_bytes

STEPS = {"resize": 20, "crop": 16, "mean": 0.5, "std": 0.25}
ODD = ["", "\x00", "\ufeff", "\u2028", "a" * 5000, "x" * 200_000, '"', "1,2,3", "../..", "/", "~nobody/x", "a\nb",
       "1e400", "\x1b[2J", "9" * 5000, "\U0001f469\u200d\U0001f680", "0.png", "0.wav", "<s>", "path"]  # fmt: skip
KINDS = ("text", "jsonl", "csv", "pairs", "images", "wav", "flac", "sheet")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ma.load().tokenizer


def written(rng: Random, kind: str, place: Path) -> Path:
    """A whole corpus of a kind; gives what names it."""
    if kind in ("wav", "flac", "sheet"):
        sounds.folder(place, "flac" if kind == "flac" else "wav", texts=bool(rng.randrange(2)))
        (place / "list.csv").write_text("path,text\n0.wav,low\n1.wav,high low\n")
        return place / "list.csv" if kind == "sheet" else place
    if kind in ("images", "csv", "pairs"):
        pixels = np.random.default_rng(0).integers(0, 256, (30, 24, 3), dtype=np.uint8)
        for i, ending in enumerate(("png", "jpg", "gif")):
            Image.fromarray(pixels).save(place / f"{i}.{ending}")
    name = {"text": "a.txt", "jsonl": "a.jsonl", "csv": "a.csv", "pairs": "a.jsonl"}.get(kind)
    text = {
        "text": "A kettle sings. Nobody hears it.\n" * 9, "csv": "path,label\n0.png,cat\n1.jpg,dog\n2.gif,cat\n",
        "jsonl": "\n".join(json.dumps({"text": f"A kettle sings {i} times.", "n": i}) for i in range(9)),
        "pairs": "\n".join(json.dumps({"image": f"{i}.{e}", "text": "a kettle"}) for i, e in enumerate(("png", "jpg"))),
    }.get(kind)  # fmt: skip
    if name is None or text is None:
        return place
    (place / name).write_text(text, encoding="utf-8")
    return place / name


def row_of(rng: Random, line: str) -> str:
    """A line with one value that is odd."""
    if not line.startswith("{"):
        cells = line.split(",")
        cells[rng.randrange(len(cells))] = rng.choice(ODD)
        return ",".join(cells)
    row = json.loads(line)
    key = rng.choice(sorted(row))
    kind = rng.randrange(4)
    if kind == 0:
        del row[key]
    else:
        row[key] = rng.choice(ODD if kind == 1 else WRONG)
    return json.dumps(rng.choice([row, row, row, [row], key, None]))


def spoiled(rng: Random, file: Path) -> None:
    """Damage one file of a corpus."""
    kind = rng.randrange(4)
    if kind == 0:
        instead(rng, file)
    elif kind == 1 or file.suffix in (".png", ".jpg", ".gif", ".wav", ".flac"):
        file.write_bytes(of_bytes(rng, file.read_bytes()))
    else:
        lines = file.read_text(encoding="utf-8").split("\n")
        at = rng.randrange(len(lines))
        lines[at] = row_of(rng, lines[at])
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")


def made(rng: Random, spec: Path, tokenizer: Any) -> None:
    """Name it as a corpus, and make the model's inputs of it."""
    n = rng.choice([None, "all", 1, 3])
    source = ma.corpus(spec, n_sequences=n)
    if isinstance(source, ImageSource):
        source = source.encode(None, preprocess=STEPS)
    elif isinstance(source, AudioSource):
        extractor = sounds.whisper_extractor()
        source = source.encode(extractor, input_name="input_features", tokenizer=sounds.tokenizer())
    elif not isinstance(source, Corpus | PairSource):
        source = source.encode(tokenizer, seq_len=rng.choice([None, 8, 1]), context=64)
    if isinstance(source, Corpus):
        assert source.n_sequences > 0 and source.sha256
        json.dumps(source.info())


@settings(max_examples=cases("corpora"))
@given(st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_damaged_corpora_are_read_or_refused(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, kind: str, rng: Random
) -> None:
    place = tmp_path_factory.mktemp("corpus")
    spec = written(rng, kind, place)
    files = sorted(p for p in place.iterdir() if p.is_file())
    for file in dict.fromkeys(spec if spec.is_file() and rng.randrange(3) else rng.choice(files) for _ in range(2)):
        spoiled(rng, file)
    try:
        with limits():
            made(rng, spec, tokenizer)
    except MassactError as error:
        assert error.what
