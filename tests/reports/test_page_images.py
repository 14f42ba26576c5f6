"""Sections of images on the page: pictures, maps and curves are those of the run; labs compared."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import compared
import hostile_run
import numpy as np
import pictured_run
import pytest
import read_page
import synthetic
from PIL import Image
from test_page import page_of

from massact.records.errors import UserError
from massact.records.kinds.comparison import open_compared
from massact.records.kinds.scan import ScanResult
from massact.records.sidecars import Sidecar
from massact.records.tables import frame
from massact.reports import report
from massact.reports.provenance import command_of
from massact.reports.spelling import percent
from tests.facts import each, tells

GOLDEN = Path(__file__).parents[1] / "golden"


def section(page: read_page.Page, name: str) -> read_page.Element:
    (found,) = [s for s in page.root.all("section") if s.attributes["id"] == name]
    return found


def figure(page: read_page.Page, title: str) -> dict:
    (found,) = [f for t, f in page.figures().items() if title in t]
    return found


def explained(stack: str = "") -> object:
    e = hostile_run.explanation(["a"], 3, 2)
    e.patch_attention = frame("patch_attention", pictured_run.attention(stack))
    return e


def test_pictures_are_those_of_the_run_and_frames_lie_on_massive_patches(tmp_path: Path) -> None:
    scan = pictured_run.scan()
    drawings = page_of(scan, tmp_path).root.all("svg")
    assert len(drawings) == 3
    for drawing, pixels, mask in zip(drawings, scan.images["pictures"], scan.images["massive"], strict=True):
        (image,) = drawing.all("image")
        source = str(image.attributes["href"])
        kept = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))))
        assert kept.shape == pixels.shape and np.abs(kept.astype(int) - pixels).mean() < 4  # as near as a JPEG is
        (frames,) = [p for p in drawing.all("path") if p.attributes["class"] == "frame"]
        corners = {(float(x), float(y)) for x, y in re.findall(r"M(\S+) (\S+?)h", str(frames.attributes["d"]))}
        assert corners == {(x * 48 / 4, y * 30 / 3) for y, x in np.argwhere(mask)}
        assert drawing.attributes["aria-label"] == drawing.all("title")[0].text


def test_maps_and_curves_are_those_of_the_run(tmp_path: Path) -> None:
    scan = pictured_run.scan()
    page, share_YX = page_of(scan, tmp_path), scan.images["massive_share"]
    assert tells(page.root.text, (share_YX > 0).sum().item(), share_YX.size)
    y, x = np.unravel_index(share_YX.argmax(), share_YX.shape)
    assert tells(page.root.text, f"patch ({y}, {x})", percent(share_YX.max()))
    assert np.allclose(figure(page, "Where patches")["data"][0]["z"], share_YX)
    maps = figure(page, "Norm of every")
    shown = np.array(maps["data"][0]["z"], float)
    for layer, norms in zip(pictured_run.LAYERS, scan.images["norms"][1], strict=True):  # the first with massive ones
        (name,) = [a for a in maps["layout"]["annotations"] if a["text"] == str(layer)]
        y, x = round(name["y"] + 0.5), round(name["x"] + 0.5)
        assert np.allclose(10 ** shown[y : y + 3, x : x + 4], norms, rtol=2e-3)
    assert np.isfinite(shown).sum() == 4 * 12 and maps["data"][0]["text"][y][x].startswith("layer 3, patch (0, 0): 800")
    trace = figure(page, "Share of patches by norm")["data"][0]
    share = scan.patch_norms["share"].to_numpy().reshape(4, 6)
    z = np.array(trace["z"], float)
    assert np.allclose(np.where(np.isnan(z), 0, 10**z), share, rtol=2e-3) and trace["zmin"] < np.nanmin(z)
    assert np.allclose(trace["x"], 10 ** np.linspace(0, 3, 7), rtol=1e-5)
    curves = [t for t in figure(page, "Cosine of patches")["data"] if "name" in t]
    assert [t["name"] for t in curves] == ["massive patches", "other patches"]
    assert np.allclose(curves[0]["y"], [0.2, 0.1, 0.0, -0.1])


def test_the_massive_dim_is_mapped_with_file_and_layer_and_what_was_not_kept_is_named(tmp_path: Path) -> None:
    scan = pictured_run.scan()
    page = page_of(scan, tmp_path)
    ((title, maps),) = [(t, f) for t, f in page.figures().items() if "at dim 2533, layer 3" in t]
    assert "cat.png" in title and "dog.png" not in title  # the first one's is not known
    names = {a["text"]: a for a in maps["layout"]["annotations"]}
    assert set(names) == {"dog.png", "Image 2"}
    shown = np.array(maps["data"][0]["z"], float)
    for name, size_YX in zip(("dog.png", "Image 2"), scan.images["dim_size"][1:], strict=True):
        y, x = round(names[name]["y"] + 0.5), round(names[name]["x"] + 0.5)
        assert np.allclose(10 ** shown[y : y + 3, x : x + 4], size_YX, rtol=2e-3)
    assert np.isfinite(shown).sum() == 2 * 12


def test_nothing_of_a_run_of_images_speaks_of_prompts(tmp_path: Path) -> None:
    page = page_of(pictured_run.scan(), tmp_path)
    assert not [title for title in page.figures() if re.search("prompt|token", title, re.I)]
    titles = [h.text for h in page.root.all("h2")]
    assert tells(titles, "image", "dimensions") and not [t for t in titles if "prompt" in t.lower()]


def test_attention_between_groups(tmp_path: Path) -> None:
    page = page_of(explained(), tmp_path)
    for title in ("What the class token attends to", "What the other patches attend to"):
        curves = {t["name"]: t for t in figure(page, title)["data"]}
        assert set(curves) == {"class token", "massive patches", "other patches"}
        assert np.allclose(curves["massive patches"]["y"], [0.6, 0.3, 0.2], rtol=1e-5)
        assert len({t["marker"]["symbol"] for t in curves.values()}) == 3  # not by colour alone
    assert page.table("Attention between")["query"][2].text == "class"


def test_a_run_without_pictures_says_so_and_a_run_of_text_says_nothing(tmp_path: Path) -> None:
    page = page_of(pictured_run.scan(pictures=False), tmp_path)
    assert "keeps no pictures" in section(page, "patches").text and not page.root.all("svg")
    assert "patches" not in {s.attributes["id"] for s in page_of(synthetic.massive(), tmp_path).root.all("section")}


def _bad(scan: ScanResult, how: str) -> ScanResult:
    if how == "not finite":
        scan.images["norms"][:] = np.nan
        scan.patch_norms, scan.patch_cosines = frame("patch_norms", []), frame("patch_cosines", [])
    elif how == "nothing massive":
        scan.images["massive"][:], scan.images["massive_share"][:] = False, 0
    elif how == "none kept":
        scan.images |= {name: scan.images[name][:0] for name in ("massive", "norms", "pictures")}
    elif how == "all alike":
        scan.images["norms"][:], scan.images["norms"][0, 0] = 7.0, np.inf
        scan.images["massive"][:], scan.images["massive_share"][:] = True, 1
    return scan


@pytest.mark.parametrize("how", ["not finite", "nothing massive", "none kept", "all alike", "hostile names"])
def test_runs_of_images_that_are_out_to_break_a_page(how: str, tmp_path: Path) -> None:
    stack = "</script><img src=x onerror=alert(1)>" if how == "hostile names" else ""
    page = page_of(_bad(pictured_run.scan(stack=stack), how), tmp_path)
    text = section(page, "patches").text
    assert bool(tells(text, "No patch", "finding")) == (how == "nothing massive") and stack in text
    assert "NaN" not in "".join(s.text for s in page.root.all("script") if "type" in s.attributes)
    assert any("Norm of every" in t for t in page.figures()) == (how not in ("not finite", "none kept"))


def test_modality_and_padding_are_told_where_there_are_any(tmp_path: Path) -> None:
    scan = synthetic.massive()
    assert "modality" not in page_of(scan, tmp_path).table("Findings")
    peak = scan.findings["layer"] == 30
    scan.findings.loc[peak, "modality"] = "text"
    scan.findings.loc[scan.findings.index[peak][:2], ["modality", "position_class"]] = ["image", "padding"]
    page = page_of(scan, tmp_path)
    assert tells(page.root.text, "modality", "layer 30", f"{peak.sum() - 2} on text", "2 on image")
    assert "modality" in page.table("Findings")
    assert "purple: padding" in page.root.text
    colors = figure(page, "Tokens with findings")["data"][0]["marker"]["color"]
    assert "--s4" in colors


@pytest.mark.parametrize(
    ("record", "said", "flag"),
    [
        ({"kind": "zero-shot", "templates": ["a <b>{}</b>", "x" * 500], "n_classes": 2, "classes": ["cat", "dog"],
          "classes_sha256": "abc"}, ("a <b>{}</b>; xxx", "cat; dog", "zero-shot"), "--zero-shot"),
        ({"kind": "linear", "file": "head.pth", "sha256": "def", "reads": "[CLS]", "n_classes": 5},
         ("head.pth", "[CLS]", "def"), "--head head.pth"),
        (None, (), ""),
    ],
)  # fmt: skip
def test_the_head_of_a_model_without_one_is_told(
    record: dict | None, said: tuple[str, ...], flag: str, tmp_path: Path
) -> None:
    e = hostile_run.intervention(["zero"])
    e.info.config["head"] = record
    text = section(page_of(e, tmp_path), "interventions").text
    assert all(s in text for s in said) and bool(re.search(r"\bHead\b", text)) == (record is not None)
    assert flag in command_of("intervene", e.info)


def test_the_command_of_a_scan_of_images(tmp_path: Path) -> None:
    config = {"preprocess": {"resize": [20, 30], "mean": [0.5, 0.25, 0.5], "resample": None}, "pictures": False}
    words = command_of("scan", Sidecar(config=config)).split()
    given = [value for option, value in zip(words, words[1:], strict=False) if option == "--preprocess"]
    assert given == ["resize=20x30", "mean=0.5,0.25,0.5", "resample=none"]
    assert "--no-pictures" in words and "pictures" not in command_of("scan", Sidecar(config={"pictures": True}))


@pytest.mark.parametrize(("name", "what"), [("lab_1", "a toy lab"), ("stepped_1", "a scan of several checkpoints")])
def test_what_holds_several_models_is_not_put_beside_runs(name: str, what: str, tmp_path: Path) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.quiet())
    with pytest.raises(UserError, match=each(name, what, "several models", "alone")):
        report([run, GOLDEN / name], tmp_path / "x.html")
    with pytest.raises(UserError, match=f"is {what}"):
        open_compared([GOLDEN / name, run])
