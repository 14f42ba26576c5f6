"""What an edit leaves as it is: sharing the blocks before it changes no bit, wherever it is, and is told truly."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Batch, Corpus
from massact.interventions import cut_attention, drop_first
from massact.interventions.effects import evaluate
from massact.interventions.reach import prefixes_of, reach_of
from massact.interventions.sinks import Sinks
from massact.interventions.watchers import Whole
from massact.models import Model, with_attention
from massact.records.sites import Site
from massact.stats.attention_call import Attended
from massact.stats.protocol import PerSequence, Where
from massact.trace import AttentionEdit, Edit, KeyValueEdit, Probe, Together, observing
from massact.trace.edits import AnyEdit
from tests.families import build

FAMILIES = ["gpt2", "llama", "gemma3", "bert", "albert", "falcon", "gpt_neox", "gptj", "phi", "bloom", "gpt_oss",
            "qwen3_next", "lfm2", "t5", "bart"]  # fmt: skip
SEEN = {"h": "resid_post", "a": "attention"}
IDS = torch.randint(5, 90, (2, 13), generator=torch.Generator().manual_seed(2))


@cache
def model_of(name: str) -> Model:
    module = build(name)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2 and name != "t5":
                parameter.mul_(2)
    return with_attention(ma.load(module))


def corpus_of(name: str) -> Corpus:
    return ma.corpus({"input_ids": IDS} | ({"decoder_input_ids": IDS[:, 2:]} if name in ("t5", "bart") else {}))


def waved(h: Tensor, _: object) -> Tensor:
    return h * 1.25 + 0.3 * torch.sin(torch.arange(h.shape[-1]))


def everywhere(model: Model) -> list[AnyEdit]:
    """One edit at each site of the model, one of the output and one of the keys of each attention call."""
    edits: list[AnyEdit] = [Edit(str(site), str(site), waved) for site in model.anatomy.sites()]
    for site, place in model.anatomy.attentions.items():
        edits.append(AttentionEdit(f"out {site}", str(site), lambda a: a.out_HTF * 1.5))  # type: ignore[operator]
        if place.via != "softmax":
            edits.append(KeyValueEdit(f"keys {site}", str(site), lambda k, v, b: (waved(k, b), v * 1.5)))
    return edits


@pytest.mark.parametrize("name", FAMILIES)
def test_sharing_changes_no_bit_wherever_the_edit_is(name: str) -> None:
    model, corpus = model_of(name), corpus_of(name)
    edits = everywhere(model)
    shared, whole = (
        evaluate(model, corpus, edits, batch_size=2, sinks=Sinks(), watcher=watcher) for watcher in (None, Whole())
    )
    n_layers = sum(s.n_layers for s in model.anatomy.stacks)
    assert len(prefixes_of(model, edits, True)) == (1 if name == "albert" else n_layers)  # its blocks are one module
    for edit in edits:
        assert shared.fired[edit.name] == whole.fired[edit.name]
        for of in ("edited", "baseline_of"):
            mine, wanted = getattr(shared, of).get(edit.name, {}), getattr(whole, of).get(edit.name, {})
            assert set(mine) == set(wanted)
            for metric, values in wanted.items():
                np.testing.assert_array_equal(mine[metric], values, err_msg=f"{edit.name}: {metric}")


class Kept(PerSequence):
    """What passed, of every sequence: a hidden state, or what an attention call weighs its keys with."""

    def update(self, seen: Any, where: Where) -> None:
        if isinstance(seen, Attended):
            seen = seen.scores_HTS if seen.q_HTE is None else torch.cat([seen.q_HTE.flatten(), seen.k_KSE.flatten()])
        self.rows[where.sequence] = seen.clone()


def passed(model: Model, batch: Batch, *edits: AnyEdit) -> dict[tuple[str, Site], dict[int, Tensor]]:
    probes = [Probe("h", "*.resid_post", Kept), Probe("a", "*.attention", Kept)]
    with torch.inference_mode(), observing(model, probes, edits, batch=batch) as seen:
        model.module(**batch.inputs)
    return {key: statistic.rows for key, statistic in seen.statistics.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_edit_reaches_is_what_changes(name: str) -> None:
    """Block by block and call by call, beside a pass without it; also where sublayers in parallel read one tensor."""
    model = model_of(name)
    batch = next(iter(corpus_of(name).batches(2)))
    plain = passed(model, batch)
    for edit in everywhere(model):
        reach, now = reach_of(model, edit), passed(model, batch, edit)
        if edit.name == "logits":
            assert reach is None
            continue
        assert reach is not None
        for kind, first in (("h", reach.before + 1), ("a", reach.attends)):
            mine = {site.layer: rows for (k, site), rows in now.items() if (k, site.stack) == (kind, reach.stack)}
            changed = [n for n, rows in mine.items() if n > 0 and any(
                not torch.equal(rows[i], plain[kind, Site(reach.stack, n, SEEN[kind])][i]) for i in rows)]  # fmt: skip
            assert changed == [n for n in mine if n >= _as_seen(model, edit, kind, first)], (edit.name, kind)


def _as_seen(model: Model, edit: AnyEdit, kind: str, first: int) -> int:
    """A block after which the edit itself lies counts as changed; a call is seen before its own output is edited."""
    site = Site(*_parts(edit.site))
    if kind == "a":
        return first + isinstance(edit, AttentionEdit) * (site.point == "attention")
    shared = len({b.module for b in model.anatomy.stack(site.stack).blocks}) == 1
    return max(1, site.layer) if shared or site.point == "resid_post" else first


def _parts(site: str) -> tuple[str, int, str]:
    stack, _, rest = site.rpartition("/")
    layer, _, point = rest.partition(".")
    return stack, int(layer), point


def test_several_edits_reach_what_the_first_of_them_does() -> None:
    model = model_of("llama")
    halve = Edit("halve", "3.mlp_act", waved)
    for other, wanted in (
        (Edit("x", "2.attn_in", waved), (1, 2)), (Edit("x", "2.o_in", waved), (1, 3)),
        (Edit("x", "*.resid_post", waved), (0, 1)), (cut_attention([0], "2.*"), (1, 2)), (drop_first(), None),
        (Edit("x", "logits", waved), None),
    ):  # fmt: skip
        reach = reach_of(model, Together("both", (halve, other)))  # type: ignore[arg-type]
        assert (None if reach is None else (reach.before, reach.attends)) == wanted


def test_blocks_before_an_edit_inside_a_block_do_no_work() -> None:
    model, calls = model_of("llama"), []
    handle = model.module.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    edits = [Edit(f"e{i}", f"3.{point}", waved) for i, point in enumerate(("attn_in", "o_in", "mlp_act"))]
    evaluate(model, corpus_of("llama"), edits, batch_size=2)
    evaluate(model, corpus_of("llama"), [Edit("e", "2.attn_in", waved)], batch_size=2)
    handle.remove()
    assert len(calls) == 1 + 2
