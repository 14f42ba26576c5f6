"""Masks are 0 and 1; everything else is refused at every door, with what was seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from massact.corpora import Batch, Corpus, corpus
from massact.corpora.masks import first_kept, is_mask, kept_of, zero_one
from massact.interventions.catalogue import drop_first, replace_first
from massact.interventions.massive_entries import starts
from massact.records.errors import UserError

IDS = torch.arange(6, 22).reshape(2, 8)
ROW = [1, 1, 1, 1, 1, 0, 0, 0]
OTHER_VALUES = {
    "minus infinity": [0.0 if x else -math.inf for x in ROW],
    "minus 1e9": [0.0 if x else -1e9 for x in ROW],
    "least": [0.0 if x else torch.finfo(torch.float32).min for x in ROW],
    "two": [2] * 8,
    "half": [0.5] * 8,
    "NaN": [math.nan] * 8,
    "one NaN": [1, 1, 1, 1, 1, 0, 0, math.nan],
    "segments": [1, 1, 1, 2, 2, 2, 0, 0],
    "minus one": [-1 if x else 0 for x in ROW],
    "nearly one": [1 - 1e-6 if x else 0 for x in ROW],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.long, torch.float16, torch.float64])
def test_zero_and_one_of_any_dtype(dtype: torch.dtype) -> None:
    given = torch.tensor([ROW, ROW]).to(dtype)
    assert zero_one("mask", given).tolist() == [[bool(x) for x in ROW]] * 2
    made = corpus({"input_ids": IDS, "attention_mask": given})
    assert made.n_tokens == 10 and made.mask.dtype == torch.bool
    assert corpus({"input_ids": IDS, "attention_mask": given.numpy()}).sha256 == made.sha256


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_other_values_are_refused(name: str, refused) -> None:
    values = torch.tensor([OTHER_VALUES[name]] * 2)
    error = refused(corpus, {"input_ids": IDS, "attention_mask": values})
    held = {float(x) for x in values.flatten()}
    assert all(f"{x:g}" in error.why for x in held)  # what was seen
    additive = name.startswith(("minus inf", "minus 1e9", "least"))
    assert ("additive" in error.why) == additive == ("mask == 0" in error.do)
    if additive:  # the advice, followed, gives what was meant
        assert kept_of(values == 0, IDS)[0].tolist() == [bool(x) for x in ROW]


def test_many_values_are_not_all_listed(refused) -> None:
    error = refused(zero_one, "attention_mask", torch.linspace(0, 1, 500))
    assert "495 others" in error.why and len(error.why) < 200


@pytest.mark.parametrize("name", ["pixel_attention_mask", "pixel_mask", "bool_masked_pos", "encoder_attention_mask"])
@pytest.mark.parametrize("values", [[0.0, -math.inf], [1, 2], [1.0, math.nan]])
def test_other_masks_are_checked_too(name: str, values: list[float], refused) -> None:
    parts = {"pixel_values": torch.zeros(2, 3, 4, 4), name: torch.tensor([values] * 2)}
    assert name in refused(corpus, parts).what
    parts[name] = torch.tensor([[1, 0]] * 2)
    assert corpus(parts).n_sequences == 2
    parts["head_mask"] = torch.tensor([[0.5, 2.0]] * 2)  # factors of heads, no mask of positions
    assert corpus(parts).n_sequences == 2 and not is_mask("head_mask")


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 7), (8,), (2, 8, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...], refused) -> None:
    with pytest.raises(UserError, match="corpus|does not fit"):
        corpus({"input_ids": IDS, "attention_mask": torch.ones(shape)})
    if shape[0] == 2:
        assert str(shape) in refused(kept_of, torch.ones(shape), IDS).why


def test_a_row_without_a_token(refused) -> None:
    mask = torch.tensor([[1] * 8, [0] * 8])
    assert "Sequence 1" in refused(corpus, {"input_ids": IDS, "attention_mask": mask}).what


def test_what_a_decoder_reads(refused) -> None:
    parts = {
        "input_ids": IDS,
        "decoder_input_ids": IDS[:, :5],
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
    }
    made = corpus(parts)
    (batch,) = made.batches(2)
    assert batch.rows_of(5) == (slice(0, 3), None) and batch.rows_of(8) == (None, None)
    parts["decoder_attention_mask"] = torch.tensor([[0.0, 0, 0, -math.inf, -math.inf]] * 2)
    assert "decoder_attention_mask" in refused(corpus, parts).what
    parts |= {"decoder_input_ids": IDS, "decoder_attention_mask": torch.tensor([ROW] * 2)}
    assert "8 positions" in refused(corpus, parts).why  # which of the two stacks is it about?
    more = {k: nn.functional.pad(parts[k], (0, 1)) for k in ("decoder_input_ids", "decoder_attention_mask")}
    (batch,) = corpus(parts | more).batches(2)  # as the message says
    assert batch.rows_of(9) == (slice(0, 5),) * 2 and batch.rows_of(8) == (None, None)


class TestLiveModels:
    """Edits on a live model read the mask that its user gives it."""

    @pytest.mark.parametrize("name", [n for n in OTHER_VALUES if n != "two"])
    def test_refused_where_an_edit_asks_for_the_first_token(self, name: str) -> None:
        given = {"input_ids": IDS, "attention_mask": torch.tensor([OTHER_VALUES[name]] * 2)}
        for use in (
            lambda: starts(torch.zeros(2, 8, 3), Batch(given, (0, 1), (None, None))),
            lambda: drop_first().apply(dict(given)),
            lambda: replace_first(3).apply(dict(given)),
        ):
            with pytest.raises(UserError, match="0 and 1"):
                use()

    def test_where_rows_begin(self) -> None:
        left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        assert first_kept(left, 4).tolist() == [2, 0] == first_kept(left.bool(), 4).tolist()
        assert first_kept(left, 5) is None and first_kept(None, 4) is None
        causal = torch.ones(4, 4).tril().bool()[None, None].expand(2, 1, 4, 4)
        assert first_kept(causal, 4) is None
        assert first_kept(torch.where(causal, 0.0, -math.inf), 4) is None
        padded = causal & left[:, None, None].bool()
        for mask in (padded, torch.where(padded, 0.0, -1e9)):
            with pytest.raises(UserError, match="where"):
                first_kept(mask, 4)

    def test_drop_first_of_a_mask_of_queries_and_keys(self) -> None:
        causal = np.tril(np.ones((8, 8), bool))
        given = {"input_ids": IDS, "attention_mask": torch.from_numpy(causal)[None, None].expand(2, 1, 8, 8)}
        with pytest.raises(UserError, match="queries and keys"):
            drop_first().apply(given)


def test_a_corpus_of_masks_alone(refused) -> None:
    assert isinstance(corpus({"input_ids": IDS}), Corpus)
    assert refused(corpus, {"attention_mask": torch.ones(2, 8)})
