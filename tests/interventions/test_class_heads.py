"""Linear heads from files: logits as written out by hand on the model's own last hidden states, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import massact as ma
from massact.corpora import Corpus
from massact.interventions import intervene
from massact.interventions.class_heads import linear_head
from massact.interventions.labels import labels_of
from massact.models import Model
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from tests.cli.test_cli import run
from tests.facts import tells
from tests.families import V, build

PREFIX = {"dinov2": 1, "dinov2_with_registers": 4, "vit": 1, "vit_mae": 1}
WIDTH, CLASSES = 32, 5


def images(n: int = 6) -> Corpus:
    made = ma.corpus({"pixel_values": torch.randn(n, 3, 20, 20, generator=torch.Generator().manual_seed(2))})
    assert isinstance(made, Corpus)
    return made


def weights(width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (CLASSES, width), "bias": (CLASSES,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def built(name: str) -> nn.Module:
    module = build(name)
    if name == "vit_mae":
        module.config.mask_ratio = 0.0
    return module


def features(module: nn.Module, pixels: Tensor) -> Tensor:
    """The last hidden state of the backbone, as transformers gives it."""
    whole = {"noise": torch.arange(25.0).expand(len(pixels), 25)} if hasattr(module, "decoder") else {}
    with torch.no_grad():
        return module.base_model(pixel_values=pixels, **whole).last_hidden_state


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", PREFIX)
def test_logits_by_hand(name: str, parts: int, tmp_path: Path) -> None:
    model, corpus, known = ma.load(built(name)), images(), weights(parts * WIDTH)
    file = tmp_path / ("head.pth" if parts == 2 else "head.safetensors")
    torch.save(known, file) if parts == 2 else save_file(known, file)
    head = linear_head(model, corpus, file)
    with torch.no_grad():
        ours = head(model, corpus.inputs)
    hidden = features(model.module, corpus.inputs["pixel_values"])
    read = torch.cat([hidden[:, 0], hidden[:, PREFIX[name] :].mean(1)], -1) if parts == 2 else hidden[:, 0]
    torch.testing.assert_close(ours, read @ known["weight"].T + known["bias"], rtol=1e-4, atol=1e-5)
    first, *mean = head.record["reads"].split(", ")
    assert first == "[CLS]" and len(mean) == parts - 1 and all(tells([m], "mean", "patches") for m in mean)


@pytest.mark.parametrize("name", PREFIX)
def test_edits_and_accuracy(name: str, tmp_path: Path) -> None:
    """Labels that are what the model says: all right without an edit, and with one what was written out by hand."""
    model, corpus, known = ma.load(built(name)), images(10), weights(2 * WIDTH)
    save_file({"head.weight": known["weight"]}, tmp_path / "head.safetensors")
    result = ma.scan(model, corpus, thresholds={"magnitude": 0.0, "ratio": 1.5}, null=False)
    hidden = features(model.module, corpus.inputs["pixel_values"])
    said = (torch.cat([hidden[:, 0], hidden[:, PREFIX[name] :].mean(1)], -1) @ known["weight"].T).argmax(1).tolist()
    stack = "vit" if name == "vit_mae" else None
    done = intervene(model, corpus, result, labels=said, head=tmp_path / "head.safetensors", hold_out=False,
                     sets=("zero", "scale=1.0001"), layer=2, stack=stack, sinks=False, batch_size=4)  # fmt: skip
    rows = done.effects[done.effects.metric == "accuracy"].set_index("edit")
    assert (rows.baseline == 1.0).all() and rows.edited["scale 1.0001"] == 1.0
    kl = done.effects[done.effects.metric == "kl"].set_index("edit").edited
    assert kl["zero"] > 100 * max(kl["scale 1.0001"], 1e-9)
    assert done.info.config["head"]["file"] == "head.safetensors" and len(done.info.config["head"]["sha256"]) == 64


def test_a_head_has_numbers_and_no_names(tmp_path: Path) -> None:
    torch.save(weights(WIDTH), tmp_path / "h.pt")
    model, corpus = ma.load(build("dinov2")), images(3)
    model.head = linear_head(model, corpus, tmp_path / "h.pt")
    assert labels_of(model, corpus, [0, 1, 4]) == [0, 1, 4]
    with pytest.raises(UserError, match="classes 0 to 4"):
        labels_of(model, corpus, [0, 1, 5])


def clip_tower() -> Model:
    torch.manual_seed(0)
    return ma.load(CLIPVisionModel(CLIPVisionConfig(**V, projection_dim=16)).eval())


def test_what_is_refused(tmp_path: Path) -> None:
    model, corpus = ma.load(build("dinov2")), images(2)

    def file(content: object) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(content, path)
        return path

    good = file(weights(WIDTH))
    nan = weights(WIDTH)
    nan["bias"][2] = torch.nan
    (tmp_path / "text.safetensors").write_text("no tensors", encoding="utf-8")
    for loaded, head, says in (
        (model, file(weights(33)), "reads 33 numbers, and the model is 32 wide"),
        (model, file(weights(3 * WIDTH)), "reads 96 numbers"),
        (model, file({"a": torch.ones(5, 32), "b": torch.ones(5, 32)}), "is no linear head"),
        (model, file({"weight": torch.ones(5, 32), "bias": torch.ones(4)}), "is no linear head"),
        (model, file(torch.ones(5, 32)), "is no linear head"),
        (model, file(nan), "NaN or Inf"),
        (model, file(nn.Linear(32, 5)), "cannot be read"),  # a pickled module could run code
        (model, tmp_path / "text.safetensors", "cannot be read"),
        (model, tmp_path / "nowhere.pt", "no file"),
        (ma.load(build("siglip")), good, r"no \[CLS\]"),
        (ma.load(build("vit_mae")), good, "drawn at random"),
        (clip_tower(), good, "without a final norm"),
    ):
        with pytest.raises(UserError, match=says):
            linear_head(loaded, corpus, head)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from tests.interventions.test_zero_shot import class_folders

    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    photos = class_folders(tmp_path, ("0", "3"))
    build("dinov2").save_pretrained(tmp_path / "model")
    save_file(weights(2 * WIDTH), tmp_path / "head.safetensors")
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    rows = [f"{name},{name[0]}" for name in names]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    out = str(tmp_path / "run")
    steps = [x for name in ("resize=20x20", "mean=0.5", "std=0.5") for x in ("--preprocess", name)]
    steps += ["--threshold", "magnitude=0", "--threshold", "ratio=1.5", "--no-null", "-q"]
    assert run(monkeypatch, "scan", str(tmp_path / "model"), "--corpus", str(photos), "--out", out, *steps) == 0
    asked = ["intervene", out, "--labels", str(tmp_path / "labels.csv"), "--set", "zero", "--no-hold-out", "-q"]
    assert run(monkeypatch, *asked) == 2
    assert "--head" in capsys.readouterr().err
    assert run(monkeypatch, *asked, "--head", str(tmp_path / "head.safetensors")) == 0
    saved = Intervention.open(tmp_path / "run")
    assert saved is not None and "accuracy" in set(saved.effects.metric) and saved.info.config["head"]["n_classes"] == 5
    assert run(monkeypatch, *asked, "--zero-shot", "--head", str(tmp_path / "head.safetensors")) == 2
    assert "exclude" in capsys.readouterr().err
