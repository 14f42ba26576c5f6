"""What a prompt shows of models, corpora and results: one short line without tensors; notes in reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import massact as ma
from massact.models import load
from tests.anatomy.test_several_streams import streams
from tests.families import build

IDS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(0))
OFF: dict[str, Any] = dict(null=False, bos_contrast=False)


def short(thing: Any, *facts: object) -> bool:
    text = repr(thing)
    return "\n" not in text and len(text) < 200 and "tensor(" not in text and all(str(f) in text for f in facts)


def test_a_model_is_told_in_a_line() -> None:
    model = load(build("llama"))
    (stack,) = model.anatomy.stacks
    assert short(model, "LlamaForCausalLM", f"{len(stack.blocks)} layers", stack.d_model, "float32", "cpu")
    assert short(model.anatomy, stack.d_model)


def test_streams_of_a_model_are_told_together() -> None:
    assert short(load(streams("hy_v4")), "stream_0 to stream_3", "collapsed")


def test_a_corpus_is_told_by_its_shapes() -> None:
    corpus = ma.corpus(IDS)
    assert short(corpus, "4 sequences", "input_ids", tuple(IDS.shape))
    assert short(next(corpus.batches(2, start=1)), "1-2", (2, 12))


@pytest.mark.parametrize("verb", ["scan", "explain"])
def test_a_result_has_its_notes(verb: str) -> None:
    model, corpus = load(streams("hy_v4")), ma.corpus(IDS)
    result: Any = ma.scan(model, corpus, **OFF)
    result = result if verb == "scan" else ma.explain(model, corpus, result)
    assert result.notes == result.info.notes and result.notes
    result.notes.clear()
    assert result.notes


@pytest.mark.parametrize("name", ["deepseek_v4", "gemma3n"])
def test_a_note_on_streams_names_all_of_them_once(name: str) -> None:
    notes = [note for note in load(streams(name)).anatomy.notes if "resid_scaled" in note]
    assert len(notes) == 1 and "stream_0 to stream_3" in notes[0]
