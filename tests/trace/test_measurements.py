"""measure(): what fires, what is masked, what an edit does, and what happens when memory or patience runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import massact as ma
from massact.corpora import Batch
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.stats import HiddenStats, Keep, Where
from massact.trace import Edit, Measurements, Probe, measure
from tests.facts import each
from tests.families import build

KEEP = Probe("keep", "*.resid_post", Keep)


@pytest.fixture(scope="module")
def llama() -> Model:
    return ma.load(build("llama"))


def ids(n: int = 6, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], left: bool = False) -> tuple[Tensor, Tensor]:
    tokens, mask = ids(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(-n, None) if left else slice(0, n)] = 1
    return tokens, mask


# ------------------------------------------------------------------------------------------------- selection
def test_unknown_site_names_near_ones(llama: Model) -> None:
    with pytest.raises(UserError, match="resid_post"):
        measure(llama, ma.corpus(ids()), [Probe("x", "*.resid_pots", Keep)])


def test_unavailable_site_says_why() -> None:
    model = ma.load(build("phi"))
    with pytest.raises(UserError, match="parallel"):
        measure(model, ma.corpus(ids()), [Probe("x", "*.resid_mid", Keep)])


def test_two_probes_of_one_name_are_refused(llama: Model) -> None:
    with pytest.raises(UserError, match="called 'keep'"):
        measure(llama, ma.corpus(ids()), [KEEP, Probe("keep", "2.*", Keep)])


def test_logits_run_the_head_and_nothing_else_does(llama: Model) -> None:
    calls: list[int] = []
    handle = llama.module.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        measure(llama, ma.corpus(ids()), [KEEP])
        assert not calls
        got = measure(llama, ma.corpus(ids()), [Probe("keep", "logits", Keep)], batch_size=2)
    finally:
        handle.remove()
    assert len(calls) == 3
    with torch.no_grad():
        wanted = llama.module(input_ids=ids()).logits
    values = got.result("keep", Site("", 0, "logits")).values
    np.testing.assert_allclose(np.stack(values), wanted.numpy(), atol=1e-6)


def test_forward_ends_at_the_last_site_asked_for(llama: Model) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(llama.module.model.layers)]
    try:
        measure(llama, ma.corpus(ids(1)), [Probe("keep", "2.attn_out", Keep)])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


# --------------------------------------------------------------------------------------------------- masking
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_counts_for_nothing(name: str, left: bool) -> None:
    """The statistics of a padded sequence are those of its real tokens, at their places in the padded row."""
    model = ma.load(build(name))
    lengths = [12, 7, 9]
    tokens, mask = padded(lengths, left)
    corpus = ma.corpus({"input_ids": tokens, "attention_mask": mask})
    together = measure(model, corpus, [Probe("hidden", "*.resid_post", lambda: HiddenStats(top_k=3))], batch_size=3)
    for row, n in enumerate(lengths):
        keep = mask[row].bool()
        with torch.no_grad():
            out = model.module(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer in (0, 1, 2):
            got = together.result("hidden", Site("", layer, "resid_post"))
            alone = out[layer][row, keep].double().numpy()
            assert got.n_tokens[row] == n
            assert got.max[row] == pytest.approx(np.abs(alone).max(), rel=1e-6)
            assert got.median[row] == pytest.approx(np.sort(np.abs(alone).ravel())[(alone.size - 1) // 2], rel=1e-6)
            pos, dim = got.top_pos[row, 0], got.top_dim[row, 0]
            assert keep[got.top_pos[row]].all()
            assert out[layer][row, pos, dim].item() == pytest.approx(got.top_value[row, 0], rel=1e-6)


def test_holes_in_the_mask_are_left_out(llama: Model) -> None:
    tokens, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, [2, 5]] = 0
    got = measure(
        llama, ma.corpus({"input_ids": tokens, "attention_mask": mask}), [Probe("hidden", "2.resid_post", HiddenStats)]
    ).result("hidden", Site("", 2, "resid_post"))
    positions, _, _ = got.tokens(0)
    assert positions.tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    assert got.n_tokens.tolist() == [8, 10]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batch_size_changes_nothing(llama: Model, batch_size: int) -> None:
    probe, site = Probe("hidden", "*.resid_post", HiddenStats), Site("", 2, "resid_post")
    one = measure(llama, ma.corpus(ids()), [probe], batch_size=6).result("hidden", site)
    other = measure(llama, ma.corpus(ids()), [probe], batch_size=batch_size).result("hidden", site)
    np.testing.assert_allclose(other.top_value, one.top_value, rtol=1e-5)
    np.testing.assert_allclose(other.dim_std, one.dim_std, rtol=1e-4)
    assert other.sequence.tolist() == [0, 1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------------------------- edits
def zero(pos: int, dim: int) -> Callable[[Tensor, Batch], Tensor]:
    def apply(h: Tensor, batch: Batch) -> Tensor:
        h = h.clone()
        h[:, pos, dim] = 0
        return h

    return apply


def test_edit_changes_what_comes_after_and_is_counted(llama: Model) -> None:
    plain = measure(llama, ma.corpus(ids()), [KEEP])
    edited = measure(llama, ma.corpus(ids()), [KEEP], [Edit("zero", "1.resid_post", zero(3, 7))], batch_size=2)
    assert (edited.edits[0].n_calls, edited.edits[0].n_elements) == (3, 6)

    def at(m: Measurements, layer: int) -> np.ndarray:
        return np.stack(m.result("keep", Site("", layer, "resid_post")).values)

    np.testing.assert_allclose(at(edited, 0), at(plain, 0), atol=1e-6)
    assert (at(edited, 1)[:, 3, 7] == 0).all()
    changed = np.abs(at(edited, 2) - at(plain, 2)).max((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * 9  # causal: only from the edited position on


@pytest.mark.parametrize("site", ["1.resid_post", "2.resid_pre", "2.attn_out", "2.mlp_act", "2.attn_in"])
def test_edit_reaches_the_next_layers_from_any_kind_of_place(llama: Model, site: str) -> None:
    """Outputs that are tuples, inputs of modules, keyword inputs."""
    last = Site("", 3, "resid_post")
    plain = measure(llama, ma.corpus(ids()), [KEEP]).result("keep", last).values[0]
    edited = measure(llama, ma.corpus(ids()), [KEEP], [Edit("double", site, lambda h, batch: h * 2)])
    assert not np.allclose(edited.result("keep", last).values[0], plain)
    assert np.array_equal(measure(llama, ma.corpus(ids()), [KEEP]).result("keep", last).values[0], plain)


def test_edit_that_changes_nothing_is_an_error(llama: Model) -> None:
    with pytest.raises(WorkError, match="changed nothing"):
        measure(llama, ma.corpus(ids()), [KEEP], [Edit("nothing", "1.resid_post", lambda h, batch: h.clone())])


def test_edit_of_another_shape_is_an_error(llama: Model) -> None:
    with pytest.raises(WorkError, match="shape"):
        measure(llama, ma.corpus(ids()), [KEEP], [Edit("cut", "1.resid_post", lambda h, batch: h[:, 1:])])


# ------------------------------------------------------------------------------- memory, exceptions, interrupts
class Flaky:
    """A model whose second block fails for batches above a limit."""

    def __init__(self, model: Model, limit: int, error: BaseException) -> None:
        self.model, self.limit, self.error = model, limit, error
        self.sizes: list[int] = []

    def install(self) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
            self.sizes.append(output.shape[0])
            if output.shape[0] > self.limit:
                raise self.error

        return self.model.module.model.layers[1].register_forward_hook(hook)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_out_of_memory_halves_the_batch(llama: Model, error: Exception) -> None:
    """The failed pass had already fed layers 0 and 1: they must not be counted twice."""
    probe = Probe("hidden", "*.resid_post", HiddenStats)
    wanted = measure(llama, ma.corpus(ids(7)), [probe], batch_size=2)
    flaky = Flaky(llama, 2, error)
    handle = flaky.install()
    try:
        got = measure(llama, ma.corpus(ids(7)), [probe], batch_size=7)
    finally:
        handle.remove()
    assert max(flaky.sizes) == 7 and got.batch_size <= 2 and got.n_sequences == 7
    for layer in range(4):
        a, b = (m.result("hidden", Site("", layer, "resid_post")) for m in (got, wanted))
        assert a.sequence.tolist() == list(range(7)) and a.n_tokens_total == 84
        np.testing.assert_allclose(a.dim_mean, b.dim_mean, atol=1e-7)


def test_one_sequence_that_does_not_fit_is_an_error(llama: Model) -> None:
    handle = Flaky(llama, 0, MemoryError("out of memory")).install()
    try:
        with pytest.raises(WorkError, match=each("One sequence", "fit")):
            measure(llama, ma.corpus(ids(4)), [KEEP])
    finally:
        handle.remove()


def test_other_errors_pass_and_leave_no_hook(llama: Model) -> None:
    handle = Flaky(llama, 0, RuntimeError("shape mismatch")).install()
    try:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            measure(llama, ma.corpus(ids(4)), [KEEP])
    finally:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.module.modules())


def test_interrupted_work_goes_on_where_it_stopped(llama: Model) -> None:
    probe, site = Probe("hidden", "*.resid_post", HiddenStats), Site("", 2, "resid_post")
    kept: list[Measurements] = []

    def stop(done: Measurements) -> None:
        kept.append(done)
        if done.n_sequences >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(llama, ma.corpus(ids()), [probe], batch_size=2, on_batch=stop)
    resumed = measure(llama, ma.corpus(ids()), [probe], batch_size=2, resume=kept[-1]).result("hidden", site)
    whole = measure(llama, ma.corpus(ids()), [probe], batch_size=2).result("hidden", site)
    assert resumed.sequence.tolist() == whole.sequence.tolist()
    assert np.array_equal(resumed.dim_std, whole.dim_std) and np.array_equal(resumed.top_value, whole.top_value)


def test_site_that_does_not_fire_is_an_error() -> None:
    """A model that takes another path than when it was proved is reported, not counted as empty."""
    module = build("llama")
    model = ma.load(module)
    module.config.num_hidden_layers = 2  # transformers runs only the first two blocks now
    with pytest.raises(WorkError, match=r"3\.resid_post did not fire"):
        measure(model, ma.corpus(ids()), [KEEP])


class _Watchdog(TorchDispatchMode):
    """Fails on every operation that waits for the device: reading a value, shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.split("::")[1]
        assert name not in self.WAITS, f"{name} synchronises"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_synchronises_inside_a_hook(dtype: torch.dtype) -> None:
    """The path of accelerators, run here under a mode that refuses every operation that would wait."""
    h = torch.randn(40, 64, dtype=dtype)
    for statistic in (HiddenStats(blocked=False), HiddenStats(blocked=False, mad=True), Keep()):
        with _Watchdog():
            statistic.update(h, Where(0))
