"""Files of a kind that nobody expects under their name: programs as pictures, pipes and devices as files."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import massact as ma
from massact.corpora import corpus
from massact.corpora.image_files import FORMATS, opened
from massact.corpora.plain_files import read_text
from massact.corpora.recordings import opened as heard
from massact.records.errors import UserError
from massact.records.user_files import read_given, refuse_special
from massact.training import TrainConfig
from massact.training.components import tokenizer_of
from massact.training.data import prepare, read_pictures

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(marker) (w) file closefile showpage\n%%EOF\n"


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*given: object, **_: object) -> None:
        raise AssertionError(f"a program was started: {given}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)


def damaged_by_a_preview(eps: bytes) -> bytes:
    """The form with a binary header, which holds a preview."""
    return struct.pack("<4sIIIIIIH", b"\xc5\xd0\xd3\xc6", 30, len(eps), 0, 0, 0, 0, 0xFFFF) + eps


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps"])
@pytest.mark.parametrize("data", [EPS, damaged_by_a_preview(EPS)])
def test_eps_is_refused_whatever_it_is_called(name: str, data: bytes, tmp_path: Path, no_program: None) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"EPS") as refused:
        opened(file, name)
    assert name in refused.value.what and "PNG" in refused.value.do
    with Image.open(file) as picture, pytest.raises(UserError, match="EPS"):  # not decoded yet
        opened(picture, name)


def test_eps_is_refused_at_every_door_of_images(tmp_path: Path, no_program: None) -> None:
    (tmp_path / "a.png").write_bytes(EPS)
    (tmp_path / "list.csv").write_text("path\na.png\n")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "text": "a dog"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(EPS)

    class Processor:
        class image_processor:  # noqa: N801
            pass

        class tokenizer:  # noqa: N801
            pass

    for source in (tmp_path / "folder", tmp_path / "list.csv", tmp_path / "a.png", [tmp_path / "a.png"]):
        with pytest.raises(UserError, match="EPS"):
            made = corpus(source)
            ma.scan(_vit(), made)
    with pytest.raises(UserError, match="EPS"):
        corpus(tmp_path / "pairs.jsonl")._encoded(Processor(), 0)


def _vit() -> ma.Model:
    from transformers import ViTImageProcessor

    from tests.families import build

    module = build("vit")
    size = module.config.image_size
    return ma.load(module, processor=ViTImageProcessor(size={"height": size, "width": size}))


@pytest.mark.parametrize("form", [f for f in FORMATS if f not in ("AVIF",)])
def test_ordinary_formats_are_read_whatever_they_are_called(form: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    file = tmp_path / "picture.png"
    Image.fromarray(values).save(file, format=form)
    picture = opened(file, "picture.png")
    assert picture.size == (9, 8) and picture.mode == "RGB"
    if form in ("BMP", "PNG", "PPM", "TIFF"):
        assert np.array_equal(np.asarray(picture), values)


@pytest.mark.parametrize("form", ["TGA", "PCX", "ICO", "SGI"])
def test_other_formats_are_refused_with_those_that_are_read(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png", format=form)
    with pytest.raises(UserError, match="JPEG"):
        opened(tmp_path / "picture.png", "picture.png")


def test_a_bomb_is_an_error(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(body)
    with pytest.raises(UserError, match="3600000000 pixels"):
        opened(tmp_path / "bomb.png", "bomb.png")


# ------------------------------------------------------------------------------------------------------------ sound
def test_sound_is_known_by_what_it_is_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    samples = np.zeros(1000, np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, format="OGG", subtype="VORBIS")
    with pytest.raises(UserError, match="OGG"):
        heard(tmp_path / "a.wav", "a.wav")
    soundfile.write(tmp_path / "b.flac", samples, 16000)
    assert heard(tmp_path / "b.flac", "b.flac")[0].shape == (1000, 1)
    monkeypatch.setattr("massact.corpora.recordings.MOST_BYTES", 3999)
    with pytest.raises(UserError, match="1,000 samples"):
        heard(tmp_path / "b.flac", "b.flac")


# ------------------------------------------------------------------------------------------------ pipes and devices
def pipe(place: Path) -> Path:
    os.mkfifo(place)
    return place


@pytest.fixture(params=["a named pipe", "a device", "a socket", "a link to a device"])
def special(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    place = tmp_path / "special"
    if request.param == "a named pipe":
        os.mkfifo(place)
    elif request.param == "a device":
        place = Path("/dev/zero")
    elif request.param == "a socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("special")
    else:
        place.symlink_to("/dev/zero")
    return place, request.param.removeprefix("a link to ")


DOORS: dict[str, Callable[[Path], object]] = {
    "corpus": corpus, "corpus by name": lambda p: corpus(str(p)), "a list of images": lambda p: corpus([p]),
    "model": ma.load, "run": ma.open_run, "training text": lambda p: prepare(p, None, p.parent / "x"),
    "training images": read_pictures, "tokenizer": lambda p: tokenizer_of(TrainConfig.of("tiny", tokenizer=str(p))),
    "report": lambda p: ma.report(p), "list of classes": lambda p: __import__("massact.interventions", fromlist=["x"])
    .ZeroShot.read(p), "text": read_text,
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_pipes_and_devices_are_refused_at_once(door: str, special: tuple[Path, str]) -> None:
    place, said = special
    with pytest.raises(UserError, match=said if door not in ("run", "report") else "director"):
        DOORS[door](place)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model_folder_is_refused(name: str, tmp_path: Path) -> None:
    from tests.families import build

    build("llama").save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    pipe(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}' is a named pipe"):
        ma.load(tmp_path)


def test_a_pipe_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a named pipe"):
        ma.load(pipe(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["run.json", "layers.parquet", "portrait.npz", "explain.json"])
def test_a_pipe_in_a_run_directory_is_refused(name: str, tmp_path: Path) -> None:
    ma.scan(None, n_sequences=2, seq_len=32, null=False, bos_contrast=False, out=tmp_path / "run")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    pipe(tmp_path / "run" / name)
    with pytest.raises(UserError, match=f"{name}' is a named pipe"):
        ma.report(tmp_path / "run")


def test_a_report_does_not_take_the_place_of_a_device(tmp_path: Path) -> None:
    ma.scan(None, n_sequences=2, seq_len=32, null=False, bos_contrast=False, out=tmp_path / "run")
    place = pipe(tmp_path / "page.html")
    with pytest.raises(UserError, match="named pipe"):
        ma.report(tmp_path / "run", out=place)
    assert place.is_fifo()


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(b"x" * 100)
    assert read_given(file, 100) == b"x" * 100
    with pytest.raises(UserError, match="larger"):
        read_given(file, 99)
    with open(file, "wb") as sparse:
        sparse.truncate(5 << 30)
    with pytest.raises(UserError, match=r"5\.0 GiB"):
        read_text(file)
    refuse_special(file)
    refuse_special(tmp_path / "nothing")
