"""Blocks that keep the rows and columns of an image apart (SAM, ViTDet), or hold windows or frames of it as rows."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import massact as ma
from massact.corpora import Corpus
from massact.models import load
from massact.records.errors import ProofError
from massact.stats import Keep
from massact.trace import Edit, Probe, measure

ROWS, D = 8, 32


def tower() -> nn.Module:
    """Four blocks over 8 x 8 patches; the first and the third attend in windows of 3 x 3, which overhang."""
    torch.manual_seed(0)
    config = transformers.SamVisionConfig(
        hidden_size=D, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, mlp_dim=56,
        output_channels=16, window_size=3, global_attn_indexes=[1, 3], initializer_range=0.1,
    )  # fmt: skip
    module = transformers.SamVisionModel(config).eval()
    module.vision_encoder.pos_embed.data.normal_()
    return module


@pytest.fixture(scope="module")
def images() -> Corpus:
    return ma.corpus({"pixel_values": torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))})


def test_positions_are_patches_row_by_row(images: Corpus) -> None:
    """Planted at row 2, column 5 of what an MLP gives; found there, and shown there in the map of patches."""
    module = tower()

    def put(_: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 2, 5, 7] += 1e4
        return out

    module.vision_encoder.layers[1].mlp.register_forward_hook(put)
    scan = ma.scan(load(module), images, null=False)
    assert set(scan.findings["pos"]) == {2 * ROWS + 5} and set(scan.findings["dim"]) == {7}
    assert scan.images["massive_share"][2, 5] == 1 and scan.images["massive_share"].sum() == 1


def test_sums_hold_for_attention_in_windows(images: Corpus) -> None:
    """What attention adds in windows is put back to where its patches are: middle minus start, on other images."""
    module = tower()
    model = load(module)
    sites = ["1.resid_pre", "1.attn_out", "1.resid_mid"]
    measured = measure(model, images, [Probe(s, s, Keep) for s in sites], batch_size=3)
    pre, attn, mid = (torch.stack([torch.from_numpy(x) for x in measured.result(s, measured.sites(s)[0]).values])
                      for s in sites)  # fmt: skip
    assert pre.shape == (3, ROWS * ROWS, D) and float(attn.abs().max()) > 0
    assert torch.allclose(pre + attn, mid, atol=1e-6)
    taken = []
    handle = module.vision_encoder.layers[0].register_forward_pre_hook(lambda m, args: taken.append(args[0]))
    with torch.no_grad():
        module(images.inputs["pixel_values"])
    handle.remove()
    assert torch.equal(pre, taken[0].flatten(1, 2))


def test_an_edit_reaches_the_patch(images: Corpus) -> None:
    module = tower()
    model = load(module)

    def zero(h_BTD: torch.Tensor, _: object) -> torch.Tensor:
        h_BTD = h_BTD.clone()
        h_BTD[:, 2 * ROWS + 5] = 0
        return h_BTD

    seen = []
    handle = module.vision_encoder.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(), ma.edited(model, Edit("zero", "2.resid_post", zero)):
        module(images.inputs["pixel_values"])
    handle.remove()
    assert (seen[0][:, 2, 5] == 0).all() and (seen[0][:, 2, 4] != 0).any()


def channels_first() -> nn.Module:
    """Blocks that take and give (batch, width, rows, columns), and attend in windows of 3 x 3, which overhang."""
    torch.manual_seed(0)
    config = transformers.VitDetConfig(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8, mlp_ratio=2,
        window_block_indices=[0, 2], window_size=3, initializer_range=0.1,
    )  # fmt: skip
    return transformers.VitDetModel(config).eval()


def test_channels_first(images: Corpus) -> None:
    """Every site is (batch, tokens, width), on other images than were proved, and an edit reaches its patch."""
    module = channels_first()
    model, seen = load(module), []
    handle = module.encoder.layer[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        module(images.inputs["pixel_values"])
    sites = ["1.resid_pre", "1.attn_out", "1.resid_mid", "1.mlp_out", "1.resid_post"]
    measured = measure(model, images, [Probe(s, s, Keep) for s in sites], batch_size=3)
    pre, attn, mid, mlp, post = (
        torch.stack([torch.from_numpy(x) for x in measured.result(s, measured.sites(s)[0]).values]) for s in sites
    )
    assert torch.equal(post, seen[0].flatten(2).transpose(1, 2))
    assert torch.allclose(pre + attn, mid, atol=1e-6) and torch.allclose(mid + mlp, post, atol=1e-6)
    assert model.anatomy.stacks[0].d_model == D

    def zero(h_BTD: torch.Tensor, _: object) -> torch.Tensor:
        return h_BTD.index_fill(1, torch.tensor([2 * ROWS + 5]), 0)

    with torch.no_grad(), ma.edited(model, Edit("zero", "1.resid_post", zero)):
        module(images.inputs["pixel_values"])
    handle.remove()
    zeroed = seen[-1].abs().amax(1) == 0
    assert bool(zeroed[:, 2, 5].all()) and int(zeroed.sum()) == 3


def test_windows_as_rows(images: Corpus) -> None:
    """Four windows of an image are four rows between blocks, and one in every second attention (LW-DETR)."""
    torch.manual_seed(0)
    config = transformers.LwDetrViTConfig(
        hidden_size=D, num_hidden_layers=4, num_attention_heads=4, image_size=64, pretrain_image_size=64, patch_size=8,
        window_block_indices=[0, 2], num_windows=4, initializer_range=0.1, cae_init_values=0.5, out_indices=[4],
    )  # fmt: skip
    module = transformers.LwDetrViTBackbone(config).eval()
    model, seen = load(module), []
    handle = module.encoder.layer[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        module(images.inputs["pixel_values"])
    handle.remove()
    sites = ["2.resid_pre", "2.attn_out", "2.resid_mid", "2.resid_post"]
    measured = measure(model, images, [Probe(s, s, Keep) for s in sites], batch_size=3)
    pre, attn, mid, post = (
        torch.stack([torch.from_numpy(x) for x in measured.result(s, measured.sites(s)[0]).values]) for s in sites
    )
    assert seen[0].shape == (12, 16, D) and torch.equal(post, seen[0].reshape(3, 64, D))
    assert torch.allclose(pre + attn, mid, atol=1e-6) and float(attn.abs().max()) > 0


def test_attention_over_frames_and_over_patches() -> None:
    """Two attentions write, one in rows of frames, one in rows of patches, where the first token is a mean over frames:
    what each adds is seen at its tokens, for other numbers of videos than were proved (TimeSformer)."""
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, num_frames=3,
        intermediate_size=48, initializer_range=0.1,
    )  # fmt: skip
    module = transformers.TimesformerModel(config).eval()
    model = load(module)
    videos = ma.corpus({"pixel_values": torch.rand(3, 3, 3, 32, 32)})
    block = model.anatomy.stacks[0].blocks[0]
    writes = block.sums[0].writes
    assert writes == ("attn_out", "attn_out_2")
    sites = [f"1.{name}" for name in ("resid_pre", *writes, "resid_mid")]
    measured = measure(model, videos, [Probe(s, s, Keep) for s in sites], batch_size=3)
    pre, *added, mid = (
        torch.stack([torch.from_numpy(x) for x in measured.result(s, measured.sites(s)[0]).values]) for s in sites
    )
    assert torch.allclose(pre + sum(added), mid, atol=1e-5)
    assert sorted(float(x[:, 0].abs().max()) > 0 for x in added) == [False, True]  # time is not attended to by it
    assert len(ma.scan(model, videos, null=False, bos_contrast=False).layers) == 3


def small(config: type, model: type, **sizes: object) -> nn.Module:
    torch.manual_seed(0)
    return model(config(image_size=64, hidden_sizes=[16, 24, 32, 40], **sizes)).eval()


def test_stages_of_images_that_are_read_as_tokens() -> None:
    """Lists of a hybrid pyramid (SwiftFormer) are stacks, those of convolutions and pooling alone are none."""
    module = small(
        transformers.SwiftFormerConfig, transformers.SwiftFormerModel,
        depths=[1, 2, 2, 1], embed_dims=[16, 24, 32, 40], layer_scale_init_value=0.5,
    )  # fmt: skip
    model = load(module)
    assert [stack.n_layers for stack in model.anatomy.stacks] == [1, 2, 2, 1]
    second = model.anatomy.stacks[1]
    images = ma.corpus({"pixel_values": torch.rand(3, 3, 64, 64)})
    sums = second.blocks[1].sums
    names = dict.fromkeys(name for s in sums for name in (s.start, *s.writes, s.end))
    sites = {name: f"{second.name}/2.{name}" for name in names}
    measured = measure(model, images, [Probe(s, s, Keep) for s in sites.values()], batch_size=3)
    h = {n: torch.stack([torch.from_numpy(x) for x in measured.result(s, measured.sites(s)[0]).values])
         for n, s in sites.items()}  # fmt: skip
    for one in sums:
        assert torch.allclose(h[one.start] + sum(h[w] for w in one.writes), h[one.end], atol=1e-5)
    pooled = small(transformers.PoolFormerConfig, transformers.PoolFormerModel, depths=[2, 2, 2, 2])
    with pytest.raises(ProofError, match="No stack"):
        load(pooled)
