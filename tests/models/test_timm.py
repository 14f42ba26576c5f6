"""Models of timm, by name, from a folder and live: tokens, attention, preprocessing, heads, and every verb.

They need the extra `vision` (timm, torchvision); `make test-vision` installs it and runs these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import massact as ma
from massact.anatomy.examples import timm_cfg
from massact.corpora.preprocessing import recipe_of
from massact.explanations import explain
from massact.interventions import intervene
from massact.interventions.class_heads import linear_head
from massact.models import with_attention
from massact.positions import place_names
from massact.records.errors import MassactError, UserError
from massact.records.kinds.intervention import Intervention
from tests.cli.test_cli import run
from tests.photographs import photographs

try:  # torchvision of another build than torch fails in many ways
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import save_for_hf
except Exception as error:
    pytest.skip(f"timm and torchvision cannot be used: {error}", allow_module_level=True)

SMALL: dict[str, Any] = dict(depth=3, embed_dim=48, num_heads=4)
REG = [f"reg{i}" for i in range(1, 5)]
# name -> (side of the image, tokens in front of the patches, patch)
VITS: dict[str, tuple[int, list[str], int]] = {
    "vit_tiny_patch16_224": (64, ["[CLS]"], 16),
    "vit_base_patch16_224.mae": (64, ["[CLS]"], 16),
    "vit_base_patch16_clip_224.openai": (64, ["[CLS]"], 16),
    "vit_small_patch14_dinov2": (56, ["[CLS]"], 14),
    "vit_small_patch14_reg4_dinov2": (56, ["[CLS]", *REG], 14),
    "vit_small_patch16_dinov3": (64, ["[CLS]", *REG], 16),
    "vit_base_patch16_siglip_224": (64, [], 16),
    "deit_tiny_distilled_patch16_224": (64, ["[CLS]", "[DIST]"], 16),
    "deit3_small_patch16_224": (64, ["[CLS]"], 16),
    "eva02_tiny_patch14_224": (56, ["[CLS]"], 14),
    "beit_base_patch16_224": (64, ["[CLS]"], 16),
}
LOW = {"thresholds": {"magnitude": 0.0, "ratio": 3.0}, "null": False}


def tiny(name: str, **more: Any) -> torch.nn.Module:
    """A model of that architecture, three narrow blocks deep, with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, img_size=VITS[name][0], **SMALL, **more).eval()


def images(side: int, n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, name: str, **more: Any) -> str:
    args = SMALL | {"img_size": VITS[name][0]} | more
    save_for_hf(tiny(name, **more), str(folder), model_args=args, safe_serialization=True)
    return f"timm:local-dir:{folder}"


@pytest.mark.parametrize("name", VITS)
def test_every_verb_on_a_live_model(name: str) -> None:
    side, prefix, patch = VITS[name]
    module = tiny(name)
    model = with_attention(ma.load(module))  # no example input is given: its own size is known
    assert model.anatomy.stacks[0].n_layers == 3 and model.image_input == "x"
    assert model.example["x"].shape == (2, 3, side, side)
    assert not model.anatomy.no_attention and len(model.anatomy.attentions) == 3
    corpus = ma.corpus({"x": images(side)})
    grid = side // patch
    patches = [f"patch ({r}, {c})" for r in range(grid) for c in range(grid)]
    assert place_names(model, corpus, "") == (*prefix, *patches)
    result = ma.scan(model, corpus, **LOW)
    block: list[torch.Tensor] = []
    hook = module.blocks[1].register_forward_hook(lambda _, __, out: block.append(out))
    with torch.no_grad():
        logits = module(corpus.inputs["x"])
    hook.remove()
    row = result.layers[result.layers.layer == 2].iloc[0]  # against one's own hook
    assert row.top1 == pytest.approx(float(block[0].abs().amax((1, 2)).mean()), rel=1e-5)
    assert len(result.findings) and set(result.findings.token) <= {*prefix, *patches}
    why = explain(model, corpus, result)
    assert len(why.heads) and why.heads.entropy_nats.notna().all()
    rest: dict[str, Any] = {"layer": 2, "hold_out": False, "batch_size": 3}
    if module.num_classes:
        labels = logits.argmax(1).tolist()
        done = intervene(model, corpus, result, labels=labels, **rest)
        accuracy = done.effects[done.effects.metric == "accuracy"]
        assert set(accuracy.edit) == {"zero", "mean", "random", "shuffle"} and (accuracy.baseline == 1.0).all()
    else:
        with pytest.raises(UserError, match="--head"):
            intervene(model, corpus, result, **rest)


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_224.mae"]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_linear_head(name: str, parts: int, tmp_path: Path) -> None:
    """timm's own features after the norm, [CLS] and the mean of all but prefix tokens; DINOv2 in timm has no head."""
    module = tiny(name)
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(7, parts * 48, generator=generator), torch.randn(7, generator=generator)
    save_file({"weight": weight, "bias": bias}, tmp_path / "h.safetensors")
    model, corpus = ma.load(module), ma.corpus({"x": images(VITS[name][0])})
    with torch.no_grad():
        ours = linear_head(model, corpus, tmp_path / "h.safetensors")(model, corpus.inputs)
        hidden = module.forward_features(corpus.inputs["x"])
    read = [hidden[:, 0], hidden[:, module.num_prefix_tokens :].mean(1)][:parts]
    torch.testing.assert_close(ours, torch.cat(read, -1) @ weight.T + bias, rtol=1e-4, atol=1e-5)
    result = ma.scan(model, corpus, **LOW)
    done = intervene(model, corpus, result, labels=ours.argmax(1).tolist(), head=tmp_path / "h.safetensors",
                     layer=2, hold_out=False, sets=("zero",))  # fmt: skip
    assert (done.effects[done.effects.metric == "accuracy"].baseline == 1.0).all()


def test_in_transformers_wrapping(tmp_path: Path) -> None:
    """What AutoModel makes of a timm repository on the Hub: the same model under another name."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    half = [0.5] * 3
    config = TimmWrapperConfig.from_dict({
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": SMALL | {"img_size": 64},
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": half, "std": half, "crop_pct": 0.9},
    })  # fmt: skip
    torch.manual_seed(0)
    bare, whole = (ma.load(cls(config).eval()) for cls in (TimmWrapperModel, TimmWrapperForImageClassification))
    corpus = ma.corpus({"pixel_values": images(64)})
    weight = torch.randn(3, 96, generator=torch.Generator().manual_seed(3))
    save_file({"weight": weight}, tmp_path / "h.safetensors")
    head = linear_head(bare, corpus, tmp_path / "h.safetensors")
    with torch.no_grad():
        hidden = bare.module.timm_model.forward_features(corpus.inputs["pixel_values"])
        read = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], -1)
        torch.testing.assert_close(head(bare, corpus.inputs), read @ weight.T, rtol=1e-4, atol=1e-5)
    done = intervene(whole, corpus, ma.scan(whole, corpus, **LOW), labels=[0, 1, 2, 0], layer=2, sets=("zero",))
    assert "accuracy" in set(done.effects.metric)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_a_norm_behind_the_pool_is_not_taken_for_one_before(name: str, tmp_path: Path) -> None:
    """These normalise the mean of the patches: their features have not been through it."""
    model, corpus = ma.load(tiny(name)), ma.corpus({"x": images(VITS[name][0])})
    save_file({"weight": torch.ones(7, 48)}, tmp_path / "h.safetensors")
    with pytest.raises(UserError, match="final norm"):
        linear_head(model, corpus, tmp_path / "h.safetensors")


@pytest.mark.parametrize(
    "name, more",
    [("swin_tiny_patch4_window7_224", dict(img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4))),
     ("samvit_base_patch16", dict(SMALL, img_size=64)), ("resnet18", {})],
)  # fmt: skip
def test_models_without_a_row_of_tokens_are_refused(name: str, more: dict[str, Any]) -> None:
    with pytest.raises(MassactError, match="No stack"):
        ma.load(timm.create_model(name, pretrained=False, **more))


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("size", [(90, 70), (61, 300), (223, 225)])
def test_preprocessing_is_timms_own(name: str, size: tuple[int, int]) -> None:
    module = timm.create_model(name, pretrained=False, **SMALL)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = create_transform(**resolve_model_data_config(module), is_training=False)(image).numpy()
    ours = recipe_of(timm_cfg(module)).apply(image)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5


def test_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    random = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "photos" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(path)
    spec = saved(tmp_path / "model", "vit_small_patch14_reg4_dinov2", num_classes=2)
    out, photos = str(tmp_path / "run"), str(tmp_path / "photos")
    limits = ["--threshold", "magnitude=0", "--threshold", "ratio=3", "-q"]
    assert run(monkeypatch, "scan", spec, "--corpus", photos, "--out", out, *limits) == 0
    assert run(monkeypatch, "explain", out, "-q") == 0
    assert run(monkeypatch, "intervene", out, "--labels", "auto", "--layer", "2", "-q") == 0
    found = ma.open_run(out)
    kept = found.info.corpus["source"]["preprocess"]
    assert kept["processor"] == "timm pretrained_cfg" and kept["crop"] == [56, 56]
    assert set(found.findings.token) <= {"[CLS]", *REG, *(f"patch ({r}, {c})" for r in range(4) for c in range(4))}
    done = Intervention.open(tmp_path / "run")
    assert done is not None and "accuracy" in set(done.effects.metric)
    capsys.readouterr()
    assert run(monkeypatch, "scan", str(tmp_path / "model")) == 2
    assert "timm:local-dir:" in capsys.readouterr().err


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    spec = saved(tmp_path / "model", "vit_tiny_patch16_224")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors")
    for name, says in (
        (spec, "cannot be read"), ("timm:vit_tiny_patch16_225", "Did you mean 'vit_tiny_patch16_224'"),
        (f"timm:local-dir:{tmp_path}", "Config file not found"), ("timm:nowhere:x", "Unknown model source"),
        ("timm:vit_tiny_patch16_224", "not in the cache"), ("timm:", "no model ''"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            ma.load(name)
    with pytest.raises(UserError, match="no --revision"):
        ma.load(spec, revision="main")


def test_random_weights_by_name_only_where_asked_for() -> None:
    options = {"pretrained": False, **SMALL, "img_size": 64}
    model = ma.load("timm:vit_tiny_patch16_224", options=options, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.name == "timm:vit_tiny_patch16_224"


def test_real_vit_is_the_same_in_timm(real_data: Path, tmp_path: Path) -> None:
    """The weights of the real ViT under timm's names: the same hidden states, so the same findings, and Table 4."""
    folder = real_data / "models" / "vit-tiny-imagenet"
    theirs = load_file(folder / "model.safetensors")
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    inside = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
              "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
    ours = {}
    for end in ("weight", "bias"):
        ours |= {f"patch_embed.proj.{end}": theirs[f"vit.embeddings.patch_embeddings.projection.{end}"],
                 f"norm.{end}": theirs[f"vit.layernorm.{end}"], f"head.{end}": theirs[f"classifier.{end}"]}  # fmt: skip
        for i in range(12):
            block = f"vit.encoder.layer.{i}"
            ours |= {f"blocks.{i}.{to}.{end}": theirs[f"{block}.{name}.{end}"] for to, name in inside.items()}
            parts = [theirs[f"{block}.attention.attention.{x}.{end}"] for x in ("query", "key", "value")]
            ours[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(parts)
    ours |= {"cls_token": theirs["vit.embeddings.cls_token"], "pos_embed": theirs["vit.embeddings.position_embeddings"]}
    module.load_state_dict(ours)
    pixels, labels = photographs(real_data, 40)
    one, two = ma.load(module), ma.load(str(folder))
    kept = {"thresholds": {"ratio": 500.0}, "null": False}
    mine = ma.scan(one, ma.corpus({"x": pixels}), **kept)
    other = ma.scan(two, ma.corpus({"pixel_values": pixels}), **kept)
    columns = ["sequence", "layer", "pos", "dim", "token"]
    assert len(mine.findings) and mine.findings[columns].equals(other.findings[columns])
    np.testing.assert_allclose(mine.findings.value, other.findings.value, rtol=1e-3)
    done = intervene(one, ma.corpus({"x": pixels}), mine, labels=labels.tolist(), sets=("zero", "mean"),
                     hold_out=False, batch_size=10, sinks=False)  # fmt: skip
    top1 = done.effects[done.effects.metric == "accuracy"].set_index("edit")
    assert top1.baseline["zero"] > 0.8 and top1.delta["zero"] < -0.1 and abs(top1.delta["mean"]) <= 0.05
