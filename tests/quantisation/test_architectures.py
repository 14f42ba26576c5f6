"""Losses of other architectures, by hooks written out: parallel blocks, grouped keys, padding, two stacks, experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.models import with_attention
from massact.quantisation import quantise
from massact.quantisation.rotations import rotation
from massact.records.errors import UserError, WorkError
from massact.records.kinds.quantisation import Quantisation
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.quantisation import READING
from tests.facts import tells
from tests.families import build

T, MASSIVE = 24, 2
IN_BLOCKS = (".h.", ".layers.", ".layer.", ".block.", ".albert_layers.")
Round = Callable[[Tensor], Tensor]


def planted(name: str, **options: Any) -> nn.Module:
    """A tiny random model whose logits differ between tokens; the embedding of token 2 is made large by hand."""
    module = build(name, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p + 0.15 * torch.randn_like(p) if p.ndim > 1 else p)
        module.get_input_embeddings().weight[MASSIVE, 7] = 900.0
    return module.to(**options)


def text(n: int = 3, length: int = T) -> Tensor:
    ids = torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = MASSIVE
    return ids


def int8(x: Tensor) -> Tensor:
    """Of one scale for all of it."""
    s = x.abs().amax() / 127.5
    return (x / s).round().clamp(-128, 127) * s


def linears(module: nn.Module) -> list[nn.Module]:
    return [m for n, m in module.named_modules() if any(b in f"{n}." for b in IN_BLOCKS)
            and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")]  # fmt: skip


def by_hand(module: nn.Module, rows: list[dict[str, Tensor]], round_: Round, spared: Any = None) -> np.ndarray:
    """nll of each sequence, run alone and without padding; the input of every Linear of the blocks is rounded."""

    def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].reshape(-1, args[0].shape[-1]).clone()
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[[] if spared is None else spared[at[0]]] = False
        x[rest] = round_(x[rest])
        return (x.reshape(args[0].shape), *args[1:])

    out: list[float] = []
    at = [0]
    with ExitStack() as stack, torch.no_grad():
        for m in linears(module):
            handle = m.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        for at[0], row in enumerate(rows):
            logits = module(**row).logits.float()[0, :-1]
            out.append(float(torch.nn.functional.cross_entropy(logits, row["input_ids"][0, 1:])))
    return np.array(out)


def scanned(module: Any, inputs: Any) -> tuple[ma.Model, Any, ScanResult]:
    model, corpus = module if isinstance(module, ma.Model) else ma.load(module), ma.corpus(inputs)
    return model, corpus, ma.scan(model, corpus, null=False, bos_contrast=False, rank_sequences=0)


def losses(q: Quantisation) -> dict[str, float]:
    rows = q.quantised[q.quantised["metric"] == "nll"]
    return dict(zip(rows["scheme"], rows["quantised"], strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gptj", "cohere", "gpt_neox", "olmo2", "opt_post_norm"])
def test_every_linear_is_rounded_once(name: str) -> None:
    """Also where attention and MLP read the same norm: a second rounding would have another scale."""
    module, ids = planted(name), text()
    spared = [[0]] * 3
    done = quantise(*scanned(module, ids), schemes=("int8-tensor", "int8-tensor+exempt", "int8-tensor+hadamard"),
                    guilty="none")  # fmt: skip
    rows, mine = [{"input_ids": i[None]} for i in ids], losses(done)

    def rotated(x: Tensor) -> Tensor:
        turn = rotation(x.shape[-1], 0)
        return turn.back(int8(turn(x)))

    for scheme, want in (("int8-tensor", by_hand(module, rows, int8)),
                         ("int8-tensor+exempt", by_hand(module, rows, int8, spared)),
                         ("int8-tensor+hadamard", by_hand(module, rows, rotated))):  # fmt: skip
        assert mine[scheme] == pytest.approx(want.mean(), abs=5e-3), scheme
    assert abs(mine["int8-tensor"] - done.quantised["baseline"].iloc[0]) > 0.02
    sites = done.quantised_sites
    assert sites.groupby(["scheme", "layer", "site"]).size().max() == 1


@pytest.mark.parametrize("name", ["falcon", "cohere"])
def test_a_tensor_that_two_sublayers_read_is_one_site(name: str) -> None:
    done = quantise(*scanned(planted(name), text()), schemes=("int8-tensor",), guilty="int8-tensor")
    assert set(done.quantised_sites["site"]) == {"attn_in", "o_in", "mlp_act"}
    assert tells(done.info.notes, "mlp_in", "attn_in")
    assert done.guilty_sites["left_out"].max() == 9
    with pytest.raises(UserError):
        quantise(*scanned(planted(name), text()), schemes=("mlp_in:int8-tensor",))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_padding_is_in_no_scale(left: bool, batch_size: int) -> None:
    """Texts of different lengths: each as if it were alone. Padding is the massive token, so that it would be seen."""
    module, ids, lengths = planted("llama"), text(), (T, 13, 18)
    mask = torch.zeros(3, T, dtype=torch.long)
    padded = torch.full((3, T), MASSIVE)
    for row, n in enumerate(lengths):
        at = slice(T - n, T) if left else slice(0, n)
        mask[row, at], padded[row, at] = 1, ids[row, :n]
    done = quantise(*scanned(module, {"input_ids": padded, "attention_mask": mask}), guilty="none",
                    batch_size=batch_size,
                    schemes=("int8-tensor", "int8-tensor+exempt", "int8-channel", "kv:int4-token"))  # fmt: skip
    rows, mine = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate(lengths)], losses(done)
    assert done.info.massive["tokens"] == 3
    for scheme, want in (("int8-tensor", by_hand(module, rows, int8)),
                         ("int8-tensor+exempt", by_hand(module, rows, int8, [[0]] * 3))):  # fmt: skip
        assert mine[scheme] == pytest.approx(want.mean(), abs=5e-3), scheme


def test_massive_tokens_of_several_clusters_anywhere() -> None:
    """A second token is massive at another dim, in the middle; both are spared."""
    module, ids = planted("llama"), text()
    with torch.no_grad():
        module.get_input_embeddings().weight[97, 11] = -700.0
    ids[0, 9], ids[1, 20], ids[1, 4] = 97, 97, MASSIVE
    spared = [[0, 9], [0, 20, 4], [0]]
    done = quantise(*scanned(module, ids), schemes=("int8-tensor+exempt", "int8-tensor+insert"), guilty="none")
    assert done.info.massive["tokens"] == 6 and len(done.info.massive["clusters"]) >= 2
    rows = [{"input_ids": i[None]} for i in ids]
    assert losses(done)["int8-tensor+exempt"] == pytest.approx(by_hand(module, rows, int8, spared).mean(), abs=5e-3)


def test_keys_and_values_of_grouped_heads() -> None:
    """int4 by token, of each key-value head, behind rotary: by a wrapper of the attention function."""
    module, ids = planted("llama"), text()
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def int4(x: Tensor) -> Tensor:
        s = x.abs().amax(-1, keepdim=True) / 7.5
        return (x / s).round().clamp(-8, 7) * s

    def wrapped(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(k.shape[1])
        return attend(q, int4(k), int4(v), *rest, **more)

    done = quantise(*scanned(module, ids), schemes=("kv:int4-token", "kv:int4-token+hadamard"), guilty="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrapped)
        want = by_hand(module, [{"input_ids": i[None]} for i in ids], lambda x: x)
    assert seen
    mine, base = losses(done), done.quantised["baseline"].iloc[0]
    assert mine["kv:int4-token"] == pytest.approx(want.mean(), abs=5e-3) and abs(want.mean() - base) > 0.02
    assert abs(mine["kv:int4-token+hadamard"] - mine["kv:int4-token"]) > 1e-3  # it does something


def test_groups_of_a_head_that_do_not_divide_are_refused() -> None:
    inputs = scanned(planted("llama"), text())
    for name in ("kv:int4-group7", "kv:mxfp4", "W4A16", "int4-group32/kv:int4-group3"):
        with pytest.raises(UserError) as refused:
            quantise(*inputs, schemes=(name,))
        assert "divide" in refused.value.what


@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_keys_that_cannot_be_reached(name: str) -> None:
    """Attention is written out: asked for by name it is refused; of the table the rest is run."""
    inputs = scanned(planted(name), text())
    with pytest.raises(UserError):
        quantise(*inputs, schemes=("int8-token", "kv:int4-token"))
    done = quantise(*inputs, guilty="none")
    assert not any("kv" in s or "k:" in s for s in done.quantised["scheme"]) and "int8-token" in set(
        done.quantised["scheme"])  # fmt: skip
    assert tells(done.info.notes, "kv:int4-token")


def test_the_table_leaves_out_what_a_width_cannot_have() -> None:
    """56 entries have no groups of 32 or 16."""
    done = quantise(*scanned(planted("llama"), text()), guilty="none")
    schemes = set(done.quantised["scheme"])
    assert {"int8-tensor", "int8-tensor+hadamard+exempt", "kv:int4-token", "W8A8"} <= schemes
    assert not {"int4-group32", "mxfp4", "nvfp4"} & schemes and tells(done.info.notes, "int4-group32", "mxfp4")


def test_an_encoder_with_a_decoder_has_its_own_keys() -> None:
    """Keys of cross-attention are of the other sequence: they stay, also where both are of one length.

    Ranges of the decoder are of the whole model: alone it would read the wrong text.
    """
    ids = text()
    module = planted("t5")
    data = {"input_ids": ids, "decoder_input_ids": ids.flip(1).contiguous()}
    model = ma.load(module, inputs=data)
    scan = ma.scan(model, data, null=False)
    cross = [p.module for s, p in with_attention(model).anatomy.attentions.items() if s.point == "cross_attention"]
    assert cross == [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
    for stack in ("encoder", "decoder"):
        done = quantise(model, data, scan, schemes=("int8-tensor", "kv:int4-token"), stack=stack, guilty="none")
        seen: list[Tensor] = []
        q = module.get_submodule(f"{stack}.block.1.layer.0.SelfAttention.q")
        handle = q.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].abs().max()))
        with torch.no_grad():
            module(**data)
        handle.remove()
        sites = done.quantised_sites.set_index(["scheme", "layer", "site"])
        assert sites.loc[("int8-tensor", 2, "attn_in"), "amax"] == pytest.approx(float(seen[0]), rel=1e-5)
        assert set(done.quantised_sites["stack"]) == {stack} and {"k", "v"} <= set(done.quantised_sites["site"])
    with pytest.raises(UserError):
        quantise(model, data, scan, schemes=("int8-tensor",), stack="tower")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_that_stay_are_named(name: str) -> None:
    done = quantise(*scanned(planted(name), text()), schemes=("weights:int8-channel",), guilty="none")
    assert tells(done.info.notes, "model.layers.0.mlp.experts.gate_up_proj")


def test_a_model_in_bfloat16() -> None:
    module, ids = planted("llama", dtype=torch.bfloat16), text()
    done = quantise(*scanned(module, ids), schemes=("int8-tensor", "W8A8", "int8-tensor-static+hadamard"),
                    guilty="none")  # fmt: skip

    def rounded(x: Tensor) -> Tensor:
        return int8(x.float()).to(x.dtype)

    want = by_hand(module, [{"input_ids": i[None]} for i in ids], rounded)
    assert losses(done)["int8-tensor"] == pytest.approx(want.mean(), abs=0.05)
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "vit"])
def test_a_model_without_a_loss_is_told_by_how_far_it_moves(name: str) -> None:
    module = planted(name) if name != "vit" else build(name, seed=3)
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(4))
    data = {"pixel_values": images} if name == "vit" else {"input_ids": text()}
    model = ma.load(module, inputs=data)
    scan = ma.scan(model, data, null=False)
    done = quantise(model, data, scan, schemes=("int4-tensor", "weights:int4-channel"), guilty="none")
    kl = done.quantised[done.quantised["metric"] == "kl"].set_index("scheme")["delta"]
    assert (kl > 0).all() and set(kl.index) == {"int4-tensor", "weights:int4-channel"}
    assert tells(READING.words(done), "int4-tensor", float(kl["int4-tensor"]))
    with torch.no_grad(), ExitStack() as stack:
        clean = module(**data).logits.double().log_softmax(-1)
        for m in linears(module):
            stack.callback(m.register_forward_pre_hook(each_int4).remove)
        low = module(**data).logits.double().log_softmax(-1)
    want = (clean.exp() * (clean - low)).sum(-1).mean()
    assert kl["int4-tensor"] == pytest.approx(float(want), rel=0.1)


def each_int4(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One scale for each sequence."""
    s = args[0].abs().amax(tuple(range(1, args[0].ndim)), keepdim=True) / 7.5
    return ((args[0] / s).round().clamp(-8, 7) * s, *args[1:])


def test_weights_alone_have_two_columns_too() -> None:
    module, ids = planted("llama"), text()
    done = quantise(*scanned(module, ids), schemes=("weights:int4-channel",), guilty="none")
    sites = done.quantised_sites
    assert set(sites["site"]) == {"weights"} and list(sites["layer"]) == [1, 2, 3]

    def ends() -> Tensor:
        held: list[Tensor] = []
        handle = module.model.layers[1].register_forward_hook(
            lambda *x: held.append((x[2] if isinstance(x[2], Tensor) else x[2][0]).clone())
        )
        with torch.no_grad():
            module(input_ids=ids)
        handle.remove()
        return held[0].double()

    clean = ends()
    kept = {m: m.weight.data for m in linears(module)}
    for m, w in kept.items():
        s = w.abs().amax(1, keepdim=True) / 7.5
        m.weight.data = (w / s).round().clamp(-8, 7) * s
    off = ends() - clean
    for m, w in kept.items():
        m.weight.data = w
    for column, at in (("error_massive", slice(0, 1)), ("error_rest", slice(1, None))):
        want = float(off[:, at].norm() / clean[:, at].norm())
        assert sites[sites["layer"] == 2][column].iloc[0] == pytest.approx(want, rel=2e-2), column


def test_a_cluster_that_the_calibration_did_not_see_is_named() -> None:
    module, ids = planted("llama"), text(8)
    with torch.no_grad():
        module.get_input_embeddings().weight[97, 11] = -700.0
    ids[6, 9], ids[7, 3] = 97, 97
    done = quantise(*scanned(module, ids), schemes=("int8-tensor+insert",), guilty="none")
    assert tells(done.info.notes, "11@other")


def test_sequences_of_one_massive_token_have_no_range_of_others() -> None:
    inputs = scanned(planted("llama"), text(3, 1))
    for name in ("int8-tensor-static+exempt", "int8-tensor+smooth-all+exempt"):
        with pytest.raises(WorkError):
            quantise(*inputs, schemes=(name,))
