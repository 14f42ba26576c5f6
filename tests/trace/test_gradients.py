"""The gradient of a loss by attention outputs, and by every probability, against eager attention in the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from massact.corpora import Batch
from massact.models import Model, load, with_attention
from massact.records.anatomy import AttentionPlace
from massact.records.errors import WorkError
from massact.records.sites import Site
from massact.trace.gradients import attention_gradients, sequences_with_gradients
from tests.families import build

IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(3))
FAMILIES = ("gpt2", "llama", "bert", "gpt_oss", "t5", "mpt")  # fused, grouped, both ways, a learned sink, written out


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: with_attention(load(build(name))) for name in FAMILIES}


def places_of(model: Model) -> dict[Site, AttentionPlace]:
    places = {s: p for s, p in model.anatomy.attentions.items() if not p.cross}
    assert places
    return places


def forward(model: Model) -> Any:
    more = {"decoder_input_ids": IDS} if model.module.config.is_encoder_decoder else {}
    return model.module(input_ids=IDS, **more, use_cache=False) if more else model.module(input_ids=IDS)


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten()) * 10


def eager_gradients(model: Model) -> list[Tensor]:
    """dL/dP (B, H, T, S) of every self-attention, by autograd through the returned probabilities, in float64."""
    eager = copy.deepcopy(model.module).double()
    eager.set_attn_implementation("eager")
    more = {"decoder_input_ids": IDS} if eager.config.is_encoder_decoder else {}
    out = eager(input_ids=IDS, output_attentions=True, **more)
    maps = [*out.encoder_attentions, *out.decoder_attentions] if more else list(out.attentions)
    return list(torch.autograd.grad(loss_of(out.logits), maps))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_gradient_of_every_probability_is_that_of_eager_attention(models: dict[str, Model], name: str) -> None:
    model, places = models[name], places_of(models[name])
    batch = Batch({"input_ids": IDS}, (0, 1), (None, None))
    wanted = eager_gradients(model)
    with attention_gradients(model.module, places.values()) as graph:
        graph.begin()
        found = graph.gradients(loss_of(forward(model).logits))
        assert len(wanted) == len(places)
        for place, want in zip(places.values(), wanted, strict=True):
            n = 0
            for a, g_HTF, where in sequences_with_gradients(graph.calls[place], found[place], place, batch):
                dp_HTS = g_HTF @ a.values(torch.arange(a.shape[2])).transpose(1, 2)
                truth = want[where.sequence].float()
                assert truth.abs().max() > 1e-4
                seen = torch.ones(11, 11, dtype=torch.bool).tril() if a.forward else torch.ones(11, 11).bool()
                torch.testing.assert_close(dp_HTS[:, seen], truth[:, seen], rtol=1e-3, atol=1e-5 * truth.abs().max())
                n += 1
            assert n == 2


def test_positions_that_do_not_count_are_cut_from_both(models: dict[str, Model]) -> None:
    model, places = models["bert"], places_of(models["bert"])
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    batch = Batch({"input_ids": IDS, "attention_mask": mask}, (4, 5), (None, slice(0, 7)))
    place = next(iter(places.values()))
    with attention_gradients(model.module, [place]) as graph:
        graph.begin()
        logits = model.module(**batch.inputs).logits
        given = graph.gradients(loss_of(logits))[place]
        found = list(sequences_with_gradients(graph.calls[place], given, place, batch))
    assert [w.sequence for _, _, w in found] == [4, 5]
    assert found[1][0].shape == (4, 7, 7) and found[1][1].shape == (4, 7, 8)
    assert torch.equal(found[1][1], given[1, :, :7])


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_flags_and_weights_are_as_before(models: dict[str, Model], name: str) -> None:
    module = models[name].module
    flags = {n: i % 3 != 0 for i, (n, _) in enumerate(module.named_parameters())}
    for n, p in module.named_parameters():
        p.requires_grad_(flags[n])
    weights = {n: x.clone() for n, x in module.state_dict().items()}
    with torch.no_grad():
        before = forward(models[name]).logits
    places = places_of(models[name])
    with attention_gradients(module, places.values()) as graph:
        assert not any(p.requires_grad for p in module.parameters())
        graph.begin()
        inside = forward(models[name]).logits
        found = graph.gradients(loss_of(inside))
        assert all(bool(g.abs().max() > 0) for g in found.values())
        assert not any(x.requires_grad for call in graph.calls.values() for x in vars(call).values()
                       if isinstance(x, Tensor))  # fmt: skip
    with torch.no_grad():
        after = forward(models[name]).logits
    assert torch.equal(before, inside) and torch.equal(before, after)
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert all(p.grad is None for p in module.parameters()) and not module.training
    assert all(torch.equal(x, weights[n]) for n, x in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_an_error_leaves_everything_restored(models: dict[str, Model]) -> None:
    module = models["gpt2"].module
    for p in module.parameters():
        p.requires_grad_(True)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):  # noqa: PT012
        with attention_gradients(module, places_of(models["gpt2"]).values()) as graph:
            graph.begin()
            forward(models["gpt2"])
            raise ZeroDivisionError
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not graph.calls


def test_gradient_modes_around_it_do_not_matter(models: dict[str, Model]) -> None:
    place = next(iter(places_of(models["llama"]).values()))

    def run() -> Tensor:
        with attention_gradients(models["llama"].module, [place]) as graph:
            graph.begin()
            return graph.gradients(loss_of(forward(models["llama"]).logits))[place].clone()

    plain = run()
    with torch.no_grad():
        assert torch.equal(run(), plain)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
        assert torch.equal(run(), plain)


def test_what_is_not_in_the_graph_is_refused(models: dict[str, Model]) -> None:
    model = models["gpt2"]
    with attention_gradients(model.module, places_of(model).values()) as graph:
        graph.begin()
        with pytest.raises(WorkError, match="not reached"):
            graph.gradients(torch.zeros((), requires_grad=True))
        out = forward(model).logits
        with pytest.raises(WorkError, match="does not depend"):
            graph.gradients(out.detach().sum())
        last = graph.gradients(out[0].sum() * 0 + out[1, 3].logsumexp(-1))
    top = list(last.values())[-1]
    assert bool((top[0] == 0).all()) and bool((top[1, :, 3] != 0).any()) and bool((top[1, :, 4:] == 0).all())
