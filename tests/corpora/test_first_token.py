"""The same text with a first token and without it."""

from __future__ import annotations

import pytest
import torch

import massact as ma
from massact.corpora.batch import Corpus
from massact.corpora.first_token import both_ways
from massact.records.errors import UserError

IDS = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])  # the first begins with token 0 already


@pytest.mark.parametrize(("rows", "context", "without"), [
    (IDS[1:], None, [[8, 9, 10, 11]]), (IDS[:1], None, [[5, 6, 7]]), (IDS, None, [[5, 6, 7], [8, 9, 10]]),
    (IDS[1:], 4, [[8, 9, 10]]), (IDS, 3, [[5, 6], [8, 9]]),
])  # fmt: skip
def test_both_ways_hold_the_same_text(rows: torch.Tensor, context: int | None, without: list[list[int]]) -> None:
    both = both_ways(Corpus("x", "tokens", {"input_ids": rows}), 0, context)
    assert both["without"].inputs["input_ids"].tolist() == without
    assert both["with"].inputs["input_ids"].tolist() == [[0, *row] for row in without]
    assert both["with"].mask is None and both["without"].mask is None


def test_padding_stays_masked_and_no_text_is_refused() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]) != 0
    both = both_ways(Corpus("x", "tokens", {"input_ids": IDS}, mask), 0)
    assert both["without"].mask.tolist() == [[True] * 3, [True, True, False]]
    assert both["with"].mask.tolist() == [[True] * 4, [True, True, True, False]]
    with pytest.raises(UserError, match="no text"):
        both_ways(Corpus("x", "tokens", {"input_ids": IDS[:1, :1]}), 0)


@pytest.mark.parametrize("always", [True, False])
def test_the_scan_itself_is_one_side_of_its_contrast(always: bool) -> None:
    """The text has BOS in front, or not: either way one side is the beginnings of the scan's first four sequences."""
    model = ma.load()
    model.tokenizer.bos_token = model.tokenizer.convert_ids_to_tokens(0)
    rule = {"null": False, "thresholds": {"magnitude": 1.0, "ratio": 10.0}}
    source = ma.corpus(seq_len=32, n_sequences=6, bos="always" if always else "never")
    both = ma.scan(model, source, **rule).info.answer["bos"]
    assert both["with"]["n_sequences"] == both["without"]["n_sequences"] == 4
    mine = both["with" if always else "without"]
    begins = source.encode(model.tokenizer).head(4).inputs["input_ids"][:, : mine["n_tokens"]]
    alone = ma.scan(model, {"input_ids": begins}, bos_contrast=False, **rule)
    assert mine["n_findings"] == len(alone.findings) > 0
