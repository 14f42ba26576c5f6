"""What cannot be folded is refused in a sentence, with the reason."""

from __future__ import annotations

import pytest
import torch

import massact as ma
from massact.corpora import corpus
from massact.models import with_attention
from massact.prefixes.construction import build
from massact.prefixes.position_shift import positions_of
from massact.prefixes.refusals import check_foldable, check_ids
from massact.records.errors import UserError
from massact.variants.application import apply_variant
from tests.families import build as family
from tests.prefixes.planted import texts


def checked(name: str) -> None:
    model = ma.load(family(name))
    given = torch.stack(texts()) if model.main_input == "input_ids" else dict(model.example)
    check_foldable(with_attention(model), corpus(given))
    build(model, (5,), positions_of(model))


@pytest.mark.parametrize(("name", "reason"), [
    ("gemma2", "soft-capped"), ("gpt_oss", "sinks"), ("bloom", "no keys"), ("falcon", "interface"),
    ("lfm2", "layers 1, 3 "), ("bert", "next token"), ("t5", "encoder"), ("vit", "text"), ("clip", "2 stacks"),
])  # fmt: skip
def test_the_reason_is_told(name: str, reason: str) -> None:
    with pytest.raises(UserError, match="folded") as told:
        checked(name)
    assert reason in told.value.why


def test_a_folded_model_is_not_folded_again() -> None:
    model = ma.load(apply_variant(family("llama"), "kv-bias"))
    with pytest.raises(UserError, match="kv-bias"):
        check_foldable(with_attention(model), corpus(torch.stack(texts())))


@pytest.mark.parametrize("ids", [(), (1, 2, 3, 4, 5), (99,), (-1,)])
def test_ids_that_there_are_not(ids: tuple[int, ...]) -> None:
    with pytest.raises(UserError):
        check_ids(ids, ma.load(family("llama")))
