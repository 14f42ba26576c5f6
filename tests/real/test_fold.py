"""Folding SmolLM2: which token takes the massive activation over, on which texts it fails, what super weights are for.

The pattern of a measurement by hand, with keys and values of a prefix in a cache (4 x 192 tokens of a novel, the
greatest |h| at layer 12): nothing 23,856; '\\n' 13,711, because one text begins with ','; <|im_start|> 136, perplexity
as before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import massact as ma
from massact.corpora.packing import token_ids
from massact.interventions import super_weights
from massact.prefixes.equality import prove_equal
from massact.prefixes.position_shift import positions_of
from massact.prefixes.search import Bench, Judge
from massact.prefixes.starts import Texts, rows_of, together
from massact.prefixes.ways import Way, compare

pytestmark = pytest.mark.minutes
WORDS = (
    "The river rises in the hills above the town and runs for forty miles before it meets the sea at a small harbour.",
    "In the spring of that year the council met twice, and neither meeting came to any decision about the old bridge.",
    "She had kept the letters in a box under the stairs, where nobody had looked for them since the end of the war.",
    "Most of the houses on the north side were built of grey stone, with slate roofs and narrow windows to the street.",
)
COMMAS = (", and when the rain had stopped they went on", ", which was not what the others had hoped for")
DOWN, SUPER = "model.layers.11.mlp.down_proj.weight", [(507, 1229), (507, 1487)]


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Bench:
    model = ma.load(smollm2)
    corpus = ma.corpus(list(WORDS), tokenizer=model.tokenizer)
    scan = ma.scan(model, corpus, rank_sequences=0, null=False, bos_contrast=False)
    assert positions_of(model).way == "relative"
    return Bench(model, positions_of(model), Judge.of(scan))


@pytest.fixture(scope="module")
def texts(bench: Bench) -> Texts:
    like = ma.corpus(list(WORDS), tokenizer=bench.model.tokenizer)
    rows = [torch.tensor(token_ids(bench.model.tokenizer, text)) for text in (*WORDS, *COMMAS)]
    return Texts(together(rows, like), ("text",) * 4 + ("','",) * 2)  # type: ignore[arg-type]


def test_which_token_clears_which_text(bench: Bench, texts: Texts) -> None:
    tokenizer = bench.model.tokenizer
    newline = tuple(token_ids(tokenizer, "\n"))
    bare, line, start = (bench.reading(ids, texts) for ids in ((), newline, (tokenizer.bos_token_id,)))
    assert (bare.n_findings > 0).all() and bare.greatest.min() > 10_000
    assert not line.n_findings[:4].any() and line.n_findings[4:].all()  # ',' is massive behind a newline
    assert line.greatest[:4].max() < 2_000 and line.greatest[4:].min() > 10_000
    assert not start.n_findings.any() and start.greatest.max() < 2_000
    assert abs(float(np.mean((start.nll - bare.nll)[:4]))) < 0.3
    comma = tuple(token_ids(tokenizer, ","))
    assert comma[0] in line.tokens


def test_slots_are_the_prefix_in_front_and_super_weights_are_for_nothing_else(bench: Bench, texts: Texts) -> None:
    ids = (bench.model.tokenizer.bos_token_id,)
    folded = bench.folded(ids)
    proof = prove_equal(bench.model, folded, rows_of(texts.corpus)[:4])
    assert proof.error < 1e-4 and proof.n_generated == 32
    edit = (super_weights(DOWN, SUPER),)
    ways = [Way("front", bench.model, ids), Way("slots", folded.model), Way("bare", bench.model, (), edit),
            Way("both", folded.model, (), edit)]  # fmt: skip
    paired = compare(Way("", bench.model), ways, together(rows_of(texts.corpus)[:4], texts.corpus), 4, lambda *_: None)
    nll = {name: float(np.mean(of["nll"] - paired.baseline["nll"])) for name, of in paired.edited.items()}
    assert nll["slots"] == pytest.approx(nll["front"], abs=1e-4)
    assert nll["bare"] > 3 and abs(nll["both"] - nll["slots"]) < 0.02
