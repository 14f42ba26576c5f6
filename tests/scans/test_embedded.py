"""What README and card say of the embedded model, on the embedded text, which it was not trained on."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.records.kinds.scan import ScanResult
from massact.records.sites import Site
from massact.stats import Keep
from massact.trace import Edit, Probe, measure


@pytest.fixture(scope="module")
def model() -> Model:
    return ma.load()


@pytest.fixture(scope="module")
def text(model: Model) -> Corpus:
    made = ma.corpus(None, tokenizer=model.tokenizer, seq_len=128, n_sequences=24)
    assert isinstance(made, Corpus)
    return made


@pytest.fixture(scope="module")
def result(model: Model, text: Corpus) -> ScanResult:
    return ma.scan(model, text, rank_sequences=0)


def loss(model: Model, text: Corpus, edits: tuple[Edit, ...] = ()) -> np.ndarray:
    """Nats per token of the predictions made at positions >= 1, of each sequence."""
    kept = measure(model, text, [Probe("logits", "logits", Keep)], edits).result("logits", Site("", 0, "logits"))
    ids = text.inputs["input_ids"]
    logits = torch.tensor(np.stack(kept.values))[:, 1:-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 2:], reduction="none").mean(1).numpy()


def test_one_dim_of_the_first_token_passes_in_every_sequence(result: ScanResult, text: Corpus) -> None:
    found = result.findings
    assert set(found.dim) == {99} and set(found.pos) == {0}
    for layer in (2, 3, 4, 5):
        here = found[found.layer == layer]
        assert sorted(here.sequence) == list(range(text.n_sequences))
        assert here.value.std(ddof=0) / here.value.mean() < 0.03
    assert len({text.token_id(s, 0) for s in range(text.n_sequences)}) > 15, "first tokens must differ"
    assert result.info.answer["stacks"][0]["onset"] == 2
    assert result.info.answer["null"]["n_findings"] == 0


def test_zeroing_the_first_tokens_dims_hurts_and_their_mean_does_not(model: Model, text: Corpus) -> None:
    site = Site("", 2, "resid_post")
    states = np.stack(measure(model, text, [Probe("h", str(site), Keep)]).result("h", site).values)
    mean = torch.tensor(states[:, 0].mean(0))
    dims = mean.abs().topk(5).indices
    ordinary = (torch.tensor(states[:, 20:30]).abs() - 0.06).abs().amax((0, 1)).topk(5, largest=False).indices

    def at(pos: int, which: Tensor, values: Tensor) -> tuple[Edit, ...]:
        def apply(h: Tensor, batch: Batch) -> Tensor:
            h = h.clone()
            h[:, pos, which] = values
            return h

        return (Edit("edit", str(site), apply),)

    plain = loss(model, text)
    zero = loss(model, text, at(0, dims, torch.zeros(5))) - plain
    to_mean = loss(model, text, at(0, dims, mean[dims])) - plain
    control = loss(model, text, at(25, ordinary, torch.zeros(5))) - plain
    assert zero.mean() > 0.8 and (zero > 0).all()
    assert abs(to_mean.mean()) < 0.005
    assert abs(control.mean()) < 0.01


def test_heads_put_their_attention_on_the_first_token(model: Model, text: Corpus) -> None:
    """Mean over queries >= 8 of the attention on position 0; uniform attention gives about 0.02."""
    eager = model.module
    eager.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = eager(input_ids=text.inputs["input_ids"][:8], output_attentions=True).attentions
    finally:
        eager.set_attn_implementation("sdpa")
    mass = torch.stack([a[:, :, 8:, 0].mean((0, 2)) for a in maps])
    assert int((mass > 0.9).sum()) >= 14 and float(mass[0].max()) < 0.5


def test_controls_read_in_proportion_and_say_what(model: Model, text: Corpus) -> None:
    """The twin and both ways of BOS read an eighth of the scan's tokens together; what they find is found there."""
    first = int(text.inputs["input_ids"][0, 0])
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(first)
    result = ma.scan(replace(model, tokenizer=tokenizer), None, seq_len=128, n_sequences=24, rank_sequences=0)
    null, bos = (result.info.answer[name] for name in ("null", "bos"))
    read = null["n_sequences"] * null["n_tokens"] + sum(s["n_sequences"] * s["n_tokens"] for s in bos.values())
    assert 0.1 <= read / (24 * 128) <= 0.13
    begins = text.head(null["n_sequences"]).cut(null["n_tokens"])
    assert begins is not None and begins.inputs["input_ids"].shape == (4, null["n_tokens"])
    twin = ma.models.random_twin(model, seed=0)
    assert not isinstance(twin, str)
    alone = ma.scan(twin, begins, null=False, bos_contrast=False, rank_sequences=0)
    assert null["n_findings"] == len(alone.findings)
    assert null["largest_magnitude"] == pytest.approx(float(alone.layers["max"].max()), rel=1e-5)
    without = ma.scan(model, {"input_ids": begins.inputs["input_ids"][:, 1:]}, null=False, bos_contrast=False)
    assert bos["without"]["n_findings"] == len(without.findings)
