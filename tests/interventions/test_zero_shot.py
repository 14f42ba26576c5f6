"""Zero-shot heads of CLIP and SigLIP against the models' own logits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import massact as ma
from massact.interventions import ZeroShot, evaluate, intervene, massive, zero
from massact.interventions.zero_shot import BATCH, TEMPLATES, zero_shot_head
from massact.models import Model
from massact.records.errors import UserError
from massact.records.kinds.intervention import Intervention
from tests.cli.test_cli import run
from tests.families import build

WORDS = [w for t in TEMPLATES for w in t.replace("{}", "").replace(".", " . ").split()]
NAMES = ("grey cat", "dog", "red fox")
PAD, START, END = 0, 97, 98


def tokenizer(mask: bool = True) -> PreTrainedTokenizerFast:
    """Words to ids, a start and an end token around; SigLIP's own tokenizers give no mask."""
    words = ["<pad>", "<unk>", *dict.fromkeys([*WORDS, *" ".join(NAMES).split(), "long"])]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)} | {"<s>": START, "</s>": END}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_input_names=names)


def model(family: str) -> Model:
    module = build(family)
    module.logit_scale.data.fill_(3.0)  # SigLIP's is drawn at random, and may be so small that nothing matters
    return ma.load(module, tokenizer=tokenizer(family == "clip"))


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 20, 20, generator=torch.Generator().manual_seed(2))


def by_hand(loaded: Model, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own logits for one prompt after another, and its embeddings of images and texts."""
    siglip = loaded.module.config.model_type == "siglip"
    rows, texts = [], []
    for prompt in prompts:
        ids = loaded.tokenizer(prompt)["input_ids"]
        ids = ids + [PAD] * (64 - len(ids)) if siglip else ids
        with torch.no_grad():
            out = loaded.module(input_ids=torch.tensor([ids]), pixel_values=pixels)
        rows.append(out.logits_per_image[:, 0])
        texts.append(out.text_embeds[0])
    return torch.stack(rows, 1), out.image_embeds, torch.stack(texts)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_head_is_the_models_own_logits(family: str) -> None:
    loaded, pixels = model(family), images(4)
    one = zero_shot_head(loaded, ZeroShot(NAMES, ("a photo of a {}.",)), None)
    theirs, image, _ = by_hand(loaded, pixels, [f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(one(loaded, {"pixel_values": pixels}), theirs, rtol=1e-4, atol=1e-4)
    several = zero_shot_head(loaded, ZeroShot(), NAMES)
    rows = []
    for name in NAMES:
        mean = sum(by_hand(loaded, pixels, [t.replace("{}", name)])[2][0] for t in TEMPLATES) / len(TEMPLATES)
        rows.append(mean / mean.norm())
    own = loaded.module
    wanted = image @ torch.stack(rows).T * own.logit_scale.exp() + getattr(own, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(several(loaded, {"pixel_values": pixels}), wanted.detach(), rtol=1e-4, atol=1e-4)
    assert (wanted - theirs).abs().max() > 1e-3  # several templates are another head than one
    assert several.record["templates"] == list(TEMPLATES) and several.record["n_classes"] == 3


def test_many_prompts_are_read_in_parts() -> None:
    loaded = model("clip")
    words = [*dict.fromkeys(WORDS)]
    many = tuple(f"{a} {b} {c}" for a in words[:8] for b in NAMES for c in words)
    head = zero_shot_head(loaded, ZeroShot(many), None)
    assert len(head.classes) > BATCH + 5
    at = BATCH + 5
    alone = zero_shot_head(loaded, ZeroShot((head.classes[at], head.classes[0])), None)
    torch.testing.assert_close(head.text[at], alone.text[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_edits_change_what_is_classified(family: str) -> None:
    """Accuracy with and without an edit is that of the model's own logits, with the hidden state changed by hand."""
    loaded, pixels = model(family), images(12)
    corpus = ma.corpus({"pixel_values": pixels})
    result = ma.scan(loaded, corpus, thresholds={"magnitude": 0.0, "ratio": 1.5}, null=False)
    spec = ZeroShot(NAMES, ("a photo of a {}.",))
    labels = [i % 3 for i in range(12)]
    rest = {"layer": 2, "hold_out": False, "sinks": False, "batch_size": 5}
    done = intervene(loaded, corpus, result, labels=labels, head=spec, **rest)
    rows = done.effects[done.effects.metric == "accuracy"].set_index("edit")
    assert set(rows.index) == {"zero", "mean", "random", "shuffle"}
    assert done.info.config["head"]["templates"] == ["a photo of a {}."]
    truth = torch.tensor(labels)
    prompts = [f"a photo of a {name}." for name in NAMES]
    plain, _, _ = by_hand(loaded, pixels, prompts)
    assert rows.baseline["zero"] == pytest.approx(float((plain.argmax(1) == truth).float().mean()))
    target = massive(result.findings, 2)
    block = loaded.module.get_submodule(f"{loaded.anatomy.stack('vision_model').path}.{target.site.layer - 1}")

    def without(_: object, __: object, out: object) -> object:
        h = out if isinstance(out, Tensor) else out[0]  # type: ignore[index]
        cuts = dict(zip(target.dims, target.cuts, strict=True))
        for dim, where in target.pairs:  # of a class of tokens without findings nothing is edited
            part = h[:, :1, dim] if where == "start" else h[:, 1:, dim]
            part.masked_fill_(part.abs() >= cuts[dim], 0.0)
        return out

    hook = block.register_forward_hook(without)
    edited, _, _ = by_hand(loaded, pixels, prompts)
    hook.remove()
    assert rows.edited["zero"] == pytest.approx(float((edited.argmax(1) == truth).float().mean()))
    kl = done.effects[(done.effects.metric == "kl") & (done.effects.edit == "zero")].edited.iloc[0]
    before, after = plain.log_softmax(1), edited.log_softmax(1)
    assert kl == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-2) and kl > 1e-4


def class_folders(folder: Path, names: tuple[str, ...]) -> Path:
    """Three images of noise in a folder for each class."""
    random = np.random.default_rng(0)
    for i in range(3 * len(names)):
        path = folder / "photos" / names[i % len(names)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return folder / "photos"


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    photos = str(class_folders(tmp_path, ("red_fox", "dog")))
    build("clip").save_pretrained(tmp_path / "model")
    out, folder = str(tmp_path / "run"), str(tmp_path / "model")
    steps = [x for name in ("resize=20x20", "mean=0.5", "std=0.5") for x in ("--preprocess", name)]
    limits = ["--threshold", "magnitude=0", "--threshold", "ratio=1.5"]
    assert run(monkeypatch, "scan", folder, "--corpus", photos, "--out", out, *steps, *limits, "--no-null", "-q") == 0
    asked = ["intervene", out, "--labels", "auto", "--zero-shot", "--set", "zero", "--no-hold-out", "-q"]
    assert run(monkeypatch, *asked) == 2
    assert "no tokenizer" in capsys.readouterr().err
    tokenizer().save_pretrained(tmp_path / "model")
    assert run(monkeypatch, *asked) == 0
    saved = Intervention.open(tmp_path / "run")
    assert saved is not None and saved.info.config["head"]["classes"] == ["dog", "red fox"]
    assert "accuracy" in set(saved.effects.metric)
    (tmp_path / "names.txt").write_text("dog\ngrey cat\nred fox\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a picture of a {}.\n", encoding="utf-8")
    more = ["--classes", str(tmp_path / "names.txt"), "--prompts", str(tmp_path / "prompts.txt")]
    assert run(monkeypatch, *asked, *more) == 0
    again = Intervention.open(tmp_path / "run")
    assert again is not None and again.info.config["head"]["classes"] == ["dog", "grey cat", "red fox"]
    assert again.info.config["head"]["templates"] == ["a picture of a {}."]
    loaded = ma.load(folder)
    corpus = ma.corpus(photos, preprocess={"resize": "20x20", "mean": 0.5, "std": 0.5}).encode(None)
    theirs, _, _ = by_hand(loaded, corpus.inputs["pixel_values"], [f"a picture of a {n}." for n in NAMES])
    truth = torch.tensor([1, 1, 1, 2, 2, 2])  # dog, then red fox, as NAMES number them
    row = again.effects[again.effects.metric == "accuracy"].iloc[0]
    assert row.baseline == pytest.approx(float((theirs.argmax(1) == truth).float().mean()))
    assert run(monkeypatch, *asked[:4], *more, "-q") == 2
    assert "--zero-shot" in capsys.readouterr().err
    for text, says in (("dog\nred wolf\nred fox", "do not fit|not know them all"), ("dog\n\nred fox", "Line 2"),
                       ("dog\nred fox\ndog", "Two classes")):  # fmt: skip
        (tmp_path / "names.txt").write_text(text if "wolf" not in text else "dog\nwolf\nfox", encoding="utf-8")
        assert run(monkeypatch, *asked, *more) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert any(part in error for part in says.split("|")), error


def test_what_is_refused() -> None:
    loaded = model("clip")
    for make, says in (
        (lambda: ZeroShot(templates=("a photo",)), "no single {}"),
        (lambda: ZeroShot(templates=("{} and {}",)), "no single {}"),
        (lambda: ZeroShot(templates=()), "no prompt"),
        (lambda: zero_shot_head(loaded, ZeroShot(), None), "no class names"),
        (lambda: zero_shot_head(loaded, ZeroShot(("dog", "dog")), None), "Two classes are called 'dog'"),
        (lambda: zero_shot_head(loaded, ZeroShot(("dog",)), None), "one class"),
        (lambda: zero_shot_head(loaded, ZeroShot(("dog", "long " * 70)), None), "tokens"),
        (lambda: zero_shot_head(ma.load(build("clip")), ZeroShot(NAMES), None), "no tokenizer"),
        (lambda: zero_shot_head(ma.load(build("vit")), ZeroShot(NAMES), None), "cannot classify"),
    ):
        with pytest.raises(UserError, match=says):
            make()
    with pytest.raises(UserError, match="cannot be read"):
        ZeroShot.read(Path("nowhere.txt"))


def test_a_model_that_compares_otherwise_is_refused() -> None:
    loaded = model("clip")
    own = loaded.module.forward

    def other(*args: object, **kwargs: object) -> object:
        out = own(*args, **kwargs)
        out.logits_per_image = out.logits_per_image * 1.01
        return out

    loaded.module.forward = other  # type: ignore[method-assign]
    with pytest.raises(UserError, match="scaled cosine"):
        zero_shot_head(loaded, ZeroShot(NAMES), None)


def test_evaluate_takes_the_head() -> None:
    """Without labels: how far predictions move, no accuracy."""
    loaded, corpus = model("siglip"), ma.corpus({"pixel_values": images(3)})
    result = ma.scan(loaded, corpus, thresholds={"magnitude": 0.0, "ratio": 1.5}, null=False)
    done = intervene(loaded, corpus, result, head=ZeroShot(NAMES), sets=("zero",), sinks=False)
    assert set(done.effects.metric) >= {"kl", "top1_agreement", "top1_probability"}
    assert "accuracy" not in set(done.effects.metric)
    with pytest.raises(UserError, match="--zero-shot"):
        evaluate(loaded, corpus, [zero(massive(result.findings))])
