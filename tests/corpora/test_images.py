"""Images as a corpus: where they are, how they become numbers, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from massact.corpora import Corpus, ImageSource, Source, corpus
from massact.corpora.preprocessing import Recipe, recipe_of
from massact.models.transformers_models import read_processor
from massact.records.errors import UserError
from tests.facts import each

STEPS = {"resize": 20, "crop": 16, "mean": 0.5, "std": 0.25}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, seed: int = 0, size: tuple[int, int] = (30, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(*size, seed).save(path)
    return path


def images(spec: object, **options: object) -> ImageSource:
    made = corpus(spec, **options)  # type: ignore[arg-type]
    assert isinstance(made, ImageSource)
    return made


def pixels(made: Corpus) -> np.ndarray:
    return made.inputs["pixel_values"].numpy()


# ------------------------------------------------------------------------------------------------- preprocessing
@pytest.mark.parametrize("size", [(61, 45), (45, 61), (33, 33), (200, 40)])
def test_steps_equal_a_naive_computation(size: tuple[int, int]) -> None:
    image = noise(*size)
    given = {"resize": "32", "crop": "24x28", "resample": "bilinear", "mean": "0.1,0.2,0.3", "std": 0.5}
    got = recipe_of(None, given).apply(image)
    width, height = size
    short = min(size)
    scaled = image.resize(
        (32 if width == short else int(32 * width / short), 32 if height == short else int(32 * height / short)),
        Image.Resampling.BILINEAR,
    )
    left, top = (scaled.width - 28) // 2, (scaled.height - 24) // 2
    x = np.asarray(scaled.crop((left, top, left + 28, top + 24)), np.float64) / 255
    naive = ((x - [0.1, 0.2, 0.3]) / 0.5).transpose(2, 0, 1)
    assert got.shape == (3, 24, 28) and got.dtype == np.float32
    np.testing.assert_allclose(got, naive, atol=1e-6)


PROCESSORS = {
    "ViTImageProcessor": {}, "DeiTImageProcessor": {}, "CLIPImageProcessor": {}, "SiglipImageProcessor": {},
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 48, "width": 33}, "resample": 1},
    "CLIPFeatureExtractor": {"size": 50, "crop_size": 40},
}  # fmt: skip


def folder_of(tmp_path: Path, name: str, fields: dict[str, object]) -> Path:
    key = "feature_extractor_type" if name.endswith("Extractor") else "image_processor_type"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: name, **fields}))
    return tmp_path


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_same_numbers_as_the_processor_of_transformers(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, name, PROCESSORS[name])
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    recipe = recipe_of(read_processor(str(folder), None, {}))
    assert recipe.processor.startswith(name.split("Feature")[0].split("Image")[0])
    for size in ((61, 45), (300, 280), (41, 97)):
        want = theirs(images=noise(*size), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(recipe.apply(noise(*size)), want, atol=1e-6)


def test_a_processor_that_needs_torchvision_is_read_from_its_fields(tmp_path: Path) -> None:
    fields = {"size": {"height": 32, "width": 32}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, "resample": 2,
              "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}  # fmt: skip
    folder = folder_of(tmp_path, "DINOv3ViTImageProcessor", fields)
    assert recipe_of(read_processor(str(folder), None, {})).std == (0.2,) * 3
    recipe = recipe_of(fields | {"image_processor_type": "NoSuchProcessor"})
    assert recipe == Recipe((32, 32), None, "bilinear", 1 / 255, (0.4,) * 3, (0.2,) * 3, "NoSuchProcessor")


def test_timm() -> None:
    half = (0.5,) * 3
    cfg = {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic", "mean": half, "std": half}
    recipe = recipe_of(cfg)
    wanted = Recipe(248, (224, 224), "bicubic", 1 / 255, half, half, "timm pretrained_cfg", even=True)
    assert recipe == wanted and recipe_of(cfg | {"interpolation": None}) == wanted  # bicubic is timm's own default
    for margin, first in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)):  # half of it, rounded to even: torchvision
        column = np.zeros((224, 224 + margin, 3), np.uint8)
        column[:, first] = 255
        left = Recipe(None, (224, 224), even=True).apply(Image.fromarray(column))[0, 0]
        assert left[0] == 1 and not left[1:].any()
    assert recipe_of(cfg | {"crop_mode": "squash"}).resize == (248, 248)
    with pytest.raises(UserError, match="border"):
        recipe_of(cfg | {"crop_mode": "border"})


@pytest.mark.parametrize(("name", "fields"), [
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.9}),  # resizes to 224 / 0.9 and crops
    ("ViTImageProcessor", {"size": {"longest_edge": 30}}),
    ("ViTImageProcessor", {"image_mean": [0.5], "image_std": [0.5]}),
])  # fmt: skip
def test_a_processor_that_does_something_else_is_refused(name: str, fields: dict, tmp_path: Path) -> None:
    with pytest.raises((UserError, ValueError), match="cannot be prepared"):
        recipe_of(read_processor(str(folder_of(tmp_path, name, fields)), None, {}))


def test_nothing_says_how_to_prepare(tmp_path: Path) -> None:
    assert read_processor(str(tmp_path), None, {}) is None
    with pytest.raises(UserError, match=r"resize \(and crop\), mean, std unknown.*\n.*\n.*--preprocess resize=256"):
        images([noise(9, 9)]).encode(None)
    with pytest.raises(UserError, match="std unknown"):
        images([noise(9, 9)], preprocess={"resize": 4, "mean": 0}).encode(None)


@pytest.mark.parametrize("bad", [{"rezise": 3}, {"resize": "0"}, {"crop": "2x3x4"}, {"mean": "a"}, {"std": 0},
                                 {"mean": [1, 2]}, {"resample": "magic"}, {"crop": object()}])  # fmt: skip
def test_bad_steps(bad: dict) -> None:
    with pytest.raises(UserError):
        images([noise(9, 9)], preprocess=bad)


# ------------------------------------------------------------------------------------------------------- sources
def test_folder_csv_list_and_images_are_the_same_content(tmp_path: Path) -> None:
    names = ["b.PNG", "a.jpeg.png", "sub dir/ä '\"\n;$(x).png", "c,d.BMP"]
    for i, name in enumerate(names):
        save(tmp_path / name, i)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.json").write_text("{}")
    folder = images(tmp_path, preprocess=STEPS)
    assert list(folder.pictures.names) == sorted(names) and folder.pictures.labels is None
    assert folder.name == tmp_path.name and folder.pictures.form == "folder"
    made = folder.encode(None)
    paths = [tmp_path / name for name in sorted(names)]
    listed = images([str(p) for p in paths]).encode(None, preprocess=STEPS)
    opened = images([Image.open(p) for p in paths]).encode(None, preprocess=STEPS)
    assert made.sha256 == listed.sha256 == opened.sha256 and made.kind == "tensors" and len(made) == 4
    assert pixels(made).shape == (4, 3, 16, 16)
    assert images(str(tmp_path), n_sequences=2, preprocess=STEPS).encode(None).sha256 == made.head(2).sha256
    assert made.info()["source"]["preprocess"]["crop"] == [16, 16] and made.info()["source"]["files"] == sorted(names)
    json.dumps(made.info())


def test_one_image(tmp_path: Path) -> None:
    path = save(tmp_path / "x.Jpg")
    for spec in (path, str(path), noise(8, 8)):
        assert len(images(spec)) if hasattr(spec, "__len__") and not isinstance(spec, str) else images(spec).pictures


def test_class_folders(tmp_path: Path) -> None:
    for i, name in enumerate(["dog/1.png", "cat/deep/2.png", "cat/1.png"]):
        save(tmp_path / name, i)
    made = images(tmp_path, preprocess=STEPS).encode(None)
    assert made.pictures is not None
    assert made.pictures.names == ("cat/1.png", "cat/deep/2.png", "dog/1.png")
    assert made.pictures.labels == (0, 0, 1) and made.pictures.classes == ("cat", "dog")
    assert made.part(1).pictures.labels == (0, 1) and made.head(1).pictures.names == ("cat/1.png",)


@pytest.mark.parametrize(("text", "labels", "classes"), [
    ("path,label\na.png,3\nb c.png,0\n", (3, 0), None),
    ("\ufefflabel;x,IMAGE,imagenet_class\r\n0,a.png,7\r\n\r\n0,\"b c.png\",8\r\n", (7, 8), None),
    ("file,class\na.png,zebra\nb c.png,ant\n", (1, 0), ("ant", "zebra")),
    ("file,note\na.png,x\nb c.png,y\n", None, None),
])  # fmt: skip
def test_csv(text: str, labels: object, classes: object, tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    save(tmp_path / "b c.png", 2)
    (tmp_path / "list.CSV").write_text(text, encoding="utf-8", newline="")
    found = images(tmp_path / "list.CSV").pictures
    assert (found.names, found.labels, found.classes) == (("a.png", "b c.png"), labels, classes)


@pytest.mark.parametrize(("text", "says"), [
    ("", "is empty"), ("path,label\n", "names no image"), ("picture,label\na.png,1\n", "has no column .text."),
    ("path,label\nno.png,1\n", "row 2"), ("path,label\na.png,\n", "no label"), ("path,label\na.png\n", "1 cells"),
])  # fmt: skip
def test_csv_refused(text: str, says: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        corpus(tmp_path / "list.csv")


def test_text_and_images_are_not_mixed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("text")
    for spec, says in ((tmp_path, "both images"), ([str(path), "a prompt"], "Entry 1"), ([noise(3, 3), 5], "Entry 1"),
                       (["no.png", "nor.jpg"], "no image 'no.png'")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            corpus(spec)
    assert isinstance(corpus(["Describe cat.jpg", "a prompt"]), Source)  # prompts may end as images do
    with pytest.raises(UserError, match=each("no text files", "no images")):
        (tmp_path / "empty").mkdir()
        corpus(tmp_path / "empty")
    for options in ({"seq_len": 4}, {"bos": "never"}, {"split": "test"}, {"tokenizer": object()}):
        with pytest.raises(UserError, match="nothing for images"):
            corpus(path, **options)
    with pytest.raises(UserError, match="images only"):
        corpus(["a prompt"], preprocess=STEPS)


# -------------------------------------------------------------------------------------------------- single images
def test_modes_of_images(tmp_path: Path) -> None:
    base = noise(24, 20)
    grey = base.convert("L")
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.new("L", base.size, 0))
    keep = {"resize": None, "crop": None, "mean": None, "std": None}

    def read(image: object) -> np.ndarray:
        return pixels(images([image], preprocess=keep | {"resize": "20x24"}).encode(None))[0]

    want = np.asarray(base, np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(read(base), want, atol=1e-7)
    np.testing.assert_allclose(read(alpha), want, atol=1e-7)  # transparency is dropped: the colours below it count
    assert all(np.array_equal(c, read(grey)[0]) for c in read(grey))
    np.testing.assert_allclose(read(base.convert("CMYK")), want, atol=1e-7)
    read(base.convert("P")), read(grey.convert("1")), read(base.convert("RGBA").convert("LA"))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    base.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "t.png", exif=turned)
    np.testing.assert_allclose(read(tmp_path / "t.png"), want, atol=1e-7)
    with pytest.raises(UserError, match="more than 8 bits"):
        read(Image.new("I;16", (9, 9)))


def test_broken_images(tmp_path: Path) -> None:
    whole = save(tmp_path / "w.png", size=(80, 80)).read_bytes()
    for name, data in {"cut.png": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"'{name}' cannot be read"):
            images(tmp_path / name, preprocess=STEPS).encode(None)
    with pytest.raises(UserError, match="differ in size"):
        images([noise(8, 9), noise(9, 8)], preprocess={"resize": 8, "mean": 0, "std": 1}).encode(None)
    with pytest.raises(UserError, match=each("3 images")):
        images([noise(8, 9)], n_sequences=3, preprocess=STEPS).encode(None)
    with pytest.raises(UserError, match="too narrow"):
        images([noise(30000, 1)], preprocess=STEPS | {"resize": 400}).encode(None)


def test_too_many_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("massact.corpora.image_source.MOST_BYTES", 2 * 3 * 16 * 16 * 4)
    with pytest.raises(UserError, match="--n-sequences 2"):
        images([noise(20, 20)] * 3, preprocess=STEPS).encode(None)
    assert len(images([noise(20, 20)] * 3, preprocess=STEPS, n_sequences=2).encode(None)) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has names of Unicode only")
def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    try:
        os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system has names of Unicode only")
    made = images(tmp_path, preprocess=STEPS).encode(None)
    assert torch.isfinite(made.inputs["pixel_values"]).all() and json.dumps(made.info())
