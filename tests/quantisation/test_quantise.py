"""The whole of `quantise`: losses and deviations against passes by hand, remedies, guilt, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.quantisation import quantise
from massact.quantisation.deviations import local_deviations
from massact.quantisation.roundings import Prepared, site_edit
from massact.quantisation.schemes import scheme
from massact.records.errors import UserError
from massact.records.kinds.quantisation import Quantisation
from massact.records.sites import Site
from massact.reports.kinds.quantisation import READING
from massact.scans.earlier_scan import Reopened
from massact.trace import observing
from tests.facts import tells

SCHEMES = ("int8-tensor", "int8-tensor+exempt", "int8-tensor+hadamard", "int8-tensor+hadamard+exempt", "int8-token",
           "int8-token+exempt", "kv:int4-token", "kv:int4-token+exempt", "weights:int8-channel")  # fmt: skip


@pytest.fixture(scope="module")
def done(scanned: Reopened) -> Quantisation:
    found: Quantisation = scanned.run(quantise, schemes=SCHEMES)
    return found


def nll(model: ma.Model, ids: Tensor, *edits: Any) -> np.ndarray:
    """Mean loss of each sequence, targets 1 on."""
    with torch.inference_mode(), ma.edited(model, *edits, sequences=range(len(ids))):
        logits = model.module(input_ids=ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1).numpy()


def row(q: Quantisation, name: str, metric: str = "nll") -> Any:
    return q.quantised[(q.quantised["scheme"] == name) & (q.quantised["metric"] == metric)].iloc[0]


def test_losses_are_those_of_a_run_by_hand(scanned: Reopened, done: Quantisation) -> None:
    """int8 by tensor written out as hooks on every Linear of the blocks, over the second half of the sequences."""
    module, ids = scanned.model.module, scanned.corpus.inputs["input_ids"][4:]
    clean = nll(scanned.model, ids)

    def rounded(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        s = x.abs().amax((1, 2), keepdim=True) / 127.5
        return ((x / s).round().clamp(-128, 127) * s,)

    linears = [m for n, m in module.named_modules() if ".h." in n and type(m).__name__ == "Conv1D"]
    handles = [m.register_forward_pre_hook(rounded) for m in linears]
    try:
        low = nll(scanned.model, ids)
    finally:
        for handle in handles:
            handle.remove()
    mine = row(done, "int8-tensor")
    assert mine["baseline"] == pytest.approx(clean.mean(), abs=1e-5)
    assert mine["quantised"] == pytest.approx(low.mean(), abs=2e-3)  # a tie may go to either side
    d = low - clean
    half = 3.182446 * d.std(ddof=1) / 2  # t of 3 degrees of freedom, four sequences
    assert mine["nats_low"] == pytest.approx(d.mean() - half, abs=5e-3)


def test_what_massive_tokens_cost_has_an_interval_of_its_own(done: Quantisation) -> None:
    saved = done.remedies.set_index(["scheme", "remedy"])
    for name in ("int8-tensor", "int8-token"):
        a, b = row(done, name), row(done, f"{name}+exempt")
        assert saved.loc[(name, "exempt"), "saved_nats"] == pytest.approx(a["delta_nats"] - b["delta_nats"], abs=1e-9)
    assert saved.loc[("int8-tensor", "exempt"), "saved_low"] > 0.01
    assert abs(saved.loc[("int8-token", "exempt"), "saved_nats"]) < 0.01
    assert ("int8-tensor+hadamard", "exempt") in saved.index and ("int8-tensor+exempt", "hadamard") in saved.index


def test_two_columns_and_the_exempt_one_is_zero(done: Quantisation) -> None:
    sites = done.quantised_sites
    spared = sites[sites["scheme"] == "int8-tensor+exempt"]
    assert (spared["local_massive"] == 0).all() and (spared["error_massive"] < 1e-5).all()
    assert (sites.loc[sites["scheme"] == "int8-tensor", "local_rest"] > 0).all()
    layers = scanned_layers(sites)
    assert set(sites.loc[sites["scheme"] == "int8-tensor", "layer"]) == layers
    known = sites[sites["zeroed_rate"].notna() & sites["zeroed_measured"].notna()]
    assert len(known) and ((known["zeroed_rate"] - known["zeroed_measured"]).abs() < 0.05).all()


def scanned_layers(sites: Any) -> set[int]:
    return set(range(1, int(sites["layer"].max()) + 1))


@pytest.mark.parametrize("point", ["attn_in", "o_in", "mlp_in", "mlp_act"])
def test_local_errors_are_those_of_one_site_alone(scanned: Reopened, prepared: Prepared, point: str) -> None:
    """For every block a pass of its own in which that site alone is quantised."""
    one, head = scheme("int8-tensor"), scanned.corpus.head(1)
    batch = next(iter(head.batches(1)))
    found = local_deviations(prepared, head, [one], lambda: None)

    def ends(*edits: Any) -> dict[int, Tensor]:
        held: dict[int, Tensor] = {}
        looks = [ma.Edit("look", f"{n}.resid_post", lambda h, _, n=n: (held.__setitem__(n, h.clone()), h)[1])
                 for n in range(1, 7)]  # fmt: skip
        with torch.inference_mode(), observing(scanned.model, (), [*edits, *looks], batch=batch, lenient=("edits",)):
            scanned.model.module(**batch.inputs)
        return held

    clean = ends()
    for layer in (1, 3, 6):
        site = Site("", layer, point)
        edit = site_edit(prepared, one, site)
        off = (ends(edit)[layer] - clean[layer])[0].double()
        size = clean[layer][0].double()
        mine = found["int8-tensor", site].deviation
        assert mine.massive.error == pytest.approx(float(off[0].norm() / size[0].norm()), rel=1e-4, abs=1e-9)
        assert mine.rest.error == pytest.approx(float(off[1:].norm() / size[1:].norm()), rel=1e-4)


def test_the_worst_site_is_named_and_leaving_it_out_helps(done: Quantisation) -> None:
    run = done.guilty_sites[done.guilty_sites["delta_nats"].notna()]
    first = done.guilty_sites[done.guilty_sites["left_out"] == 1].iloc[0]
    mine = done.quantised_sites[done.quantised_sites["scheme"] == first["scheme"]]
    worst = mine.loc[mine["local_rest"].idxmax()]
    assert (first["layer"], first["site"]) == (worst["layer"], worst["site"])
    assert run["delta_nats"].iloc[-1] < run["delta_nats"].iloc[0] / 4
    assert run["left_out"].iloc[0] == 0
    assert (
        not run["nats_low"].iloc[-1] > done.info.goal or run["left_out"].iloc[-1] == done.guilty_sites["left_out"].max()
    )


def test_words_say_what_it_costs_where_and_what_to_do(done: Quantisation) -> None:
    said = READING.words(done)
    cost = done.remedies.set_index(["scheme", "remedy"]).loc[("int8-tensor", "exempt")]
    assert tells(said, "cost", "int8-tensor", float(cost["saved_nats"]), float(cost["saved_low"]))
    assert tells(said, "Contained", "int8-token")
    assert tells(said, "Guilty", "mlp_act")
    assert tells(said, "What to do", "int8-token")


def test_a_scan_without_massive_activations_runs_and_says_so(scanned: Reopened) -> None:
    from dataclasses import replace

    empty = replace(scanned.scan, findings=scanned.scan.findings.iloc[:0], 
                    near_misses=scanned.scan.near_misses.iloc[:0],
                    clusters=scanned.scan.clusters.iloc[:0])  # fmt: skip
    q = quantise(scanned.model, scanned.corpus, empty, schemes=("int8-tensor", "int8-tensor+exempt"), guilty="none")
    assert set(q.quantised["scheme"]) == {"int8-tensor"} and not len(q.guilty_sites)
    assert tells(q.info.notes, "no massive activations")
    assert np.isnan(q.quantised_sites["local_massive"]).all()
    with pytest.raises(UserError):
        quantise(scanned.model, scanned.corpus, empty, schemes=("int8-tensor+exempt",))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"schemes": ("int4-group25",)}, "divide"), ({"schemes": ("int8-tensor", "int8-tensor")}, "twice"),
        ({"sites": ("attn_out",)}, "site"), ({"guilty": "int8-tenser"}, "tenser"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(scanned: Reopened, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as refused:
        quantise(scanned.model, scanned.corpus, scanned.scan, **options)
    assert word in str(refused.value)


def test_a_result_is_what_was_saved(done: Quantisation, tmp_path: Any) -> None:
    done.save(tmp_path)
    again = Quantisation.open(tmp_path)
    assert again is not None and again.info.massive == done.info.massive
    for name, rows in done.tables().items():
        assert getattr(again, name).equals(rows), name
