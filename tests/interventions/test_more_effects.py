"""Attention on the first position, repetition of greedy samples, and edits at several layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import massact as ma
from massact.interventions import cut_attention, evaluate, everywhere, intervene, mean, zero
from massact.interventions.effects import effects_of
from massact.interventions.repetition import evaluate_repetition, repeated
from massact.interventions.sinks import Sinks
from massact.models import with_attention
from massact.records.errors import UserError
from massact.trace import Edit, Together
from tests.facts import each
from tests.families import build
from tests.interventions.test_paired import planted, tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "bloom"])
def test_attention_on_the_first_position_is_that_of_eager_attention(name: str) -> None:
    """Behind layer 1, without an edit and with one, against `output_attentions` of an eager copy.

    Of the queries that can see it: gpt_oss has a window of 8 keys in layers 1 and 3.
    """
    module, ids = build(name), tokens(3)
    shift = torch.linspace(-2, 2, 32)
    edit = Edit("shift", "1.resid_post", lambda h, b: h + shift)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(ids), [edit], sinks=Sinks())
    eager = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager").eval()
    eager.load_state_dict(module.state_dict())
    first = next(m for n, m in eager.named_modules() if n.endswith(("h.0", "layers.0")))

    def mass() -> np.ndarray:
        with torch.no_grad():
            given = eager(ids, output_attentions=True).attentions[1:]
        windows = [8 if name == "gpt_oss" and layer == 3 else None for layer in (2, 3)]
        return torch.stack([a[:, :, 1:w, 0].mean((1, 2)) for a, w in zip(given, windows, strict=True)]).mean(0).numpy()

    np.testing.assert_allclose(paired.baseline_of["shift"]["attention_first"], mass(), atol=1e-5)
    handle = first.register_forward_hook(
        lambda m, i, out: out + shift if isinstance(out, torch.Tensor) else (out[0] + shift, *out[1:])
    )
    np.testing.assert_allclose(paired.edited["shift"]["attention_first"], mass(), atol=1e-5)
    handle.remove()


def test_without_the_first_position_nothing_goes_there() -> None:
    """The call is looked at before its output is changed, so its own mass stays; later layers see another stream."""
    model = with_attention(ma.load(build("llama")))
    paired = evaluate(model, ma.corpus(tokens(2)), [cut_attention([0])])
    assert (paired.edited["positions [0] not attended to"]["kl"] > 0).all()


def test_repetition_counts_four_grams() -> None:
    assert repeated(torch.tensor([1, 2, 3, 4, 5, 6, 7])) == 0
    assert repeated(torch.tensor([1, 2, 3, 4] * 3)) == pytest.approx(1 - 4 / 9)
    assert repeated(torch.tensor([5] * 20)) == pytest.approx(1 - 1 / 17)
    assert repeated(torch.tensor([1, 2])) == 0


def test_samples_are_those_of_generate() -> None:
    module, ids = build("llama"), tokens(3)
    edit = Edit("shift", "2.resid_post", lambda h, b: h + torch.linspace(-3, 3, 32))
    paired = evaluate_repetition(ma.load(module), ma.corpus(ids), [edit])
    assert not isinstance(paired, str)
    with torch.no_grad():
        out = module.generate(
            ids[:, :16], attention_mask=torch.ones(3, 16), do_sample=False, max_new_tokens=32, min_new_tokens=32,
            pad_token_id=0,
        )  # fmt: skip
    np.testing.assert_array_equal(paired.baseline["repetition"], [repeated(row[16:]) for row in out])
    assert paired.fired["shift"].n_calls == 32
    told = evaluate_repetition(ma.load(build("vit")), ma.corpus({"pixel_values": torch.rand(2, 3, 20, 20)}), [edit])
    assert isinstance(told, str)


def test_an_edit_at_all_layers_counts_as_one() -> None:
    """Zeroed at the first layer with findings, a spike that nobody writes again is gone at the later ones."""
    model, scan, ids = planted(read=True)
    edits = everywhere(zero, scan.findings)
    assert len(edits) == scan.findings.layer.nunique() > 1
    paired = evaluate(model, ma.corpus(ids), [Together("zero all", tuple(edits))])
    assert paired.fired["zero all"].n_elements == len(ids)
    assert paired.fired["zero all"].n_calls == len(ids) * len(edits)
    again = evaluate(model, ma.corpus(ids), [Together("mean all", tuple(everywhere(mean, scan.findings)))])
    assert again.fired["mean all"].n_elements == len(ids) * len(edits)
    done = intervene(model, ids, scan, layer="all", sets=("zero",), repetition=False)
    assert list(done.effects.edit.unique()) == [f"zero, {len(edits)} layers"]
    assert "attention_first" in set(done.effects.metric)


def _wave(h: torch.Tensor, batch: object) -> torch.Tensor:
    return h + 3 * torch.sin(torch.arange(h.shape[-1]).float())


def test_what_a_model_predicts_decides_its_loss() -> None:
    """T5's decoder predicts the token it is about to read; BERT predicts none, so it has no perplexity."""
    ids = tokens(3)
    edit = Edit("shift", "decoder/2.resid_post", lambda h, b: h + 1)
    module = build("t5")
    started = torch.cat([torch.zeros(3, 1, dtype=torch.long), ids[:, :-1]], dim=1)  # 0 is where T5 begins
    with torch.no_grad():
        logits = module(input_ids=ids, decoder_input_ids=started).logits
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)
    paired = evaluate(ma.load(module), ma.corpus(ids), [edit])
    np.testing.assert_allclose(paired.baseline["nll"], loss.numpy(), rtol=1e-5)
    masked = evaluate(ma.load(build("bert")), ma.corpus(ids), [Edit("e", "2.resid_post", _wave)])
    assert "nll" not in masked.baseline and (masked.edited["e"]["kl"] > 0).all()


def test_a_prompt_of_one_token_has_no_numbers() -> None:
    model, ids = ma.load(build("llama")), tokens(2)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 1:] = 0
    paired = evaluate(
        model, ma.corpus({"input_ids": ids, "attention_mask": mask}), [Edit("e", "2.resid_post", lambda h, b: h * 2)]
    )
    assert paired.n_targets.tolist() == [23, 0] and np.isnan(paired.baseline["nll"][1])
    assert {e.n_sequences for e in effects_of(paired, "e", np.ones(2, bool))} == {1}


def test_labels_of_another_length_are_refused() -> None:
    model, scan, ids = planted(read=True)
    with pytest.raises(UserError, match=each("parity", "5 entries", 12)):
        intervene(model, ids, scan, layer=1, groups={"parity": ["a"] * 5})
