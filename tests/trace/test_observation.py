"""`observing` under loops of one's own: a training step, a generation, several passes; what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import massact as ma
from massact.models import Model, with_attention
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.stats import Keep, TokenMax
from massact.trace import AttentionEdit, Edit, InputEdit, Probe, measure, observing
from tests.families import build

HIDDEN = Probe("h", "*.resid_post", Keep)


@pytest.fixture
def model() -> Model:
    return with_attention(ma.load(build("gpt2")))


def ids(n: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def as_before(model: Model) -> Iterator[None]:
    """Hooks and weights."""
    modules = list(model.module.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    weights = [p.detach().clone() for p in model.module.parameters()]
    yield
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.module.parameters(), strict=True))


def test_a_pass_of_ones_own_sees_what_measure_sees(model: Model) -> None:
    with as_before(model), observing(model, [HIDDEN]) as seen, torch.no_grad():
        model.module(input_ids=ids())
    wanted = measure(model, ma.corpus(ids()), [HIDDEN])
    assert seen.sites("h") == wanted.sites("h") and len(seen.sites("h")) > 2
    for site in seen.sites("h"):
        for a, b in zip(seen.result("h", site).values, wanted.result("h", site).values, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_training_step_is_seen_and_not_disturbed(model: Model) -> None:
    def gradient() -> torch.Tensor:
        model.module.zero_grad()
        model.module(input_ids=ids(), labels=ids()).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])

    wanted = gradient()
    with as_before(model), observing(model, [HIDDEN]) as seen:
        found = gradient()
    assert torch.equal(found, wanted)
    assert not any(np.isnan(v).any() for site in seen.sites("h") for v in seen.result("h", site).values)


def test_a_generation_updates_once_for_every_pass(model: Model) -> None:
    """With a cache, each pass is of the tokens behind those before."""
    probe = Probe("max", "1.resid_post", TokenMax)
    with observing(model, [probe]) as seen:
        model.module.generate(ids(1), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    result = seen.result("max", Site("", 1, "resid_post"))
    assert result.sequence.tolist() == [0] * 4 and result.token_pos.tolist() == [*range(9), 9, 10, 11]


def test_edits_come_before_probes_and_count(model: Model) -> None:
    site = Site("", 1, "resid_post")
    edit = Edit("zero", "1.resid_post", lambda h, batch: torch.zeros_like(h))
    other = InputEdit("ones", lambda inputs: inputs | {"input_ids": torch.ones_like(inputs["input_ids"])})
    with as_before(model), observing(model, [HIDDEN], [edit, other]) as seen, torch.no_grad():
        model.module(input_ids=ids())
        model.module(input_ids=ids())
    assert not any(v.any() for v in seen.result("h", site).values) and len(seen.result("h", site).values) == 6
    first = seen.result("h", Site("", 0, "resid_post")).values
    np.testing.assert_array_equal(first[0], first[1])
    assert [e.n_calls for e in seen.edits] == [2, 2] and all(e.n_elements > 0 for e in seen.edits)


def test_attention_is_seen_before_it_is_changed(model: Model) -> None:
    class Outputs:
        def __init__(self) -> None:
            self.out: list[torch.Tensor] = []

        def update(self, a, where):  # type: ignore[no-untyped-def]
            self.out.append(a.out_HTF.clone())

        def merge(self, other):  # type: ignore[no-untyped-def]
            self.out += other.out

        def result(self) -> list[torch.Tensor]:
            return self.out

    probe, edit = Probe("out", "1.attention", Outputs), AttentionEdit("none", "1.attention", lambda a: a.out_HTF * 0)
    results = []
    for edits in ((), (edit,)):
        with observing(model, [probe], edits) as seen, torch.no_grad():
            logits = model.module(input_ids=ids()).logits
        results.append((torch.stack(seen.result("out", Site("", 1, "attention"))), logits))
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][1], results[1][1])


def test_only_the_first_pass_that_counts(model: Model) -> None:
    site = Site("", 1, "resid_post")
    with observing(model, [HIDDEN], first=torch.is_grad_enabled) as seen:
        with torch.no_grad():
            model.module(input_ids=ids(seed=1))
        for seed in (0, 2):
            model.module(input_ids=ids(seed=seed))
    with torch.no_grad(), observing(model, [HIDDEN]) as wanted:
        model.module(input_ids=ids())
    a, b = seen.result("h", site), wanted.result("h", site)
    assert len(a.values) == 3
    for one, other in zip(a.values, b.values, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_some_rows(model: Model) -> None:
    probes = [Probe("h", "*.resid_post", Keep, rows=2), Probe("all", "1.resid_post", Keep)]
    with observing(model, probes) as seen, torch.no_grad():
        model.module(input_ids=ids())
    site = Site("", 1, "resid_post")
    assert [len(seen.result(name, site).values) for name in ("h", "all")] == [2, 3]


def test_what_is_refused(model: Model) -> None:
    nothing = Edit("same", "1.resid_post", lambda h, batch: h.clone())
    with pytest.raises(UserError, match="No site matches"), observing(model, [Probe("h", "*.resid_pots", Keep)]):
        pass
    with pytest.raises(UserError, match="Two probes"), observing(model, [HIDDEN, HIDDEN]):
        pass
    with as_before(model), pytest.raises(WorkError, match="did not fire"), observing(model, [HIDDEN]):
        pass
    with as_before(model), pytest.raises(WorkError, match="changed nothing"), observing(model, (), [nothing]):
        model.module(input_ids=ids())
    with pytest.raises(WorkError, match="0 calls"), observing(model, (), [nothing], lenient=("edits", "sites")):
        pass
    with observing(model, [HIDDEN], [nothing], lenient=("edits", "sites")) as seen:
        model.module(input_ids=ids())
    assert seen.edits[0].n_elements == 0
    with as_before(model), pytest.raises(RuntimeError, match="own"), observing(model, [HIDDEN]):
        raise RuntimeError("an error of the body's own")
