"""Batches, positions, token strings, hashes, given ids and tensors."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from corpus_words import IDS, WORDS, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from massact.corpora import corpus
from massact.corpora.batch import content_sha256, counted
from tests.facts import tells

IDS_23 = torch.tensor([[6, 7, 8], [9, 10, 11]])


def read(made: object, batch_size: int, start: int = 0) -> list[tuple[int, list[int]]]:
    """Every counted id of every sequence, whatever the batches."""
    out = []
    for batch in made.batches(batch_size, start):
        for row, sequence in enumerate(batch.sequences):
            which = slice(None) if batch.rows[row] is None else batch.rows[row]
            out.append((sequence, batch.inputs["input_ids"][row][which].tolist()))
    return out


class TestBatches:
    @given(
        lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
        batch_size=st.integers(1, 9),
        start=st.integers(0, 9),
    )
    def test_any_batch_size_reads_the_same(self, lengths, batch_size, start):
        made = corpus([" ".join(["a", "b", "c", "d", "e", "x"][:n]) for n in lengths], tokenizer=word_tokenizer())
        expected = [(i, list(range(6, 6 + min(n, 5))) + [IDS["x"]] * (n == 6)) for i, n in enumerate(lengths)]
        assert read(made, batch_size, start) == expected[start:]
        for batch in made.batches(batch_size):
            padded = len({lengths[i] for i in batch.sequences}) > 1
            assert ("attention_mask" in batch.inputs) == padded
            assert batch.inputs["input_ids"].shape[1] == max(lengths[i] for i in batch.sequences)

    def test_part_of_a_batch(self):
        (batch,) = corpus(["a", "a b c", "a b"], tokenizer=word_tokenizer()).batches(3)
        part = batch.part(1, 3)
        assert part.sequences == (1, 2) and part.rows == (None, slice(0, 2))
        assert {tensor.shape for tensor in part.inputs.values()} == {(2, 3)}

    def test_start_past_the_end(self):
        assert list(corpus(IDS_23).batches(2, start=2)) == []

    def test_refusals(self, refused):
        assert "batch size is 0" in refused(corpus(IDS_23).batches, 0).what
        assert "-1" in refused(corpus(IDS_23).batches, 1, start=-1).what

    def test_to_moves_everything(self):
        mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
        (batch,) = corpus({"input_ids": IDS_23, "attention_mask": mask}).batches(2)
        moved = batch.to("meta")
        assert {tensor.device.type for tensor in moved.inputs.values()} == {"meta"}
        assert moved.rows[0].device.type == "meta" and moved.rows[1] is None
        assert batch.to("cpu").sequences == (0, 1)

    def test_a_corpus_cannot_be_changed_through_its_batches_or_its_input(self):
        given_ids = IDS_23.clone()
        made = corpus(given_ids)
        before = made.sha256
        given_ids += 1
        for batch in made.batches(2):
            batch.inputs["input_ids"].zero_()
        assert content_sha256(made.inputs, made.mask) == before


class TestMasks:
    @pytest.mark.parametrize(
        ("mask", "expected"),
        [([1, 1, 1], None), ([1, 1, 0], slice(0, 2)), ([0, 1, 1], slice(1, 3)), ([0, 1, 0], slice(1, 2))],
    )
    def test_runs(self, mask, expected):
        assert counted(torch.tensor(mask, dtype=torch.bool)) == expected

    def test_any_other_set(self):
        positions = counted(torch.tensor([True, False, True]))
        assert positions.dtype == torch.long and positions.tolist() == [0, 2]

    def test_left_padding_starts_where_counting_starts(self):
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        made = corpus({"input_ids": IDS_23, "attention_mask": mask})
        (batch,) = made.batches(2)
        assert batch.inputs["attention_mask"].tolist() == mask.tolist() and batch.rows == (slice(1, 3), None)
        assert [made.position_class(0, pos) for pos in range(3)] == ["other", "start", "other"]
        assert made.n_tokens == 5 and made.seq_len is None

    def test_a_mask_of_ones_is_no_mask(self):
        made = corpus({"input_ids": IDS_23, "attention_mask": torch.ones(2, 3)})
        assert made.mask is None and made.seq_len == 3 and made.sha256 == corpus(IDS_23).sha256

    def test_other_inputs_keep_their_width(self):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        parts = {"input_ids": IDS_23, "token_type_ids": torch.zeros(2, 3), "attention_mask": mask}
        (batch,) = corpus(parts).batches(2)
        assert {tuple(tensor.shape) for tensor in batch.inputs.values()} == {(2, 3)}

    def test_refusals(self, refused):
        error = refused(corpus, {"input_ids": IDS_23, "attention_mask": torch.ones(2, 4)})
        assert "(2, 4)" in error.why and "(2, 3)" in error.do
        error = refused(corpus, {"input_ids": IDS_23, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])})
        assert "Sequence 1" in error.what


class TestGivenIds:
    @pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, ">i4"])
    def test_arrays(self, dtype):
        made = corpus(IDS_23.numpy().astype(dtype))
        assert made.kind == "tokens" and made.name == "ids" and made.seq_len == 3 and made.n_tokens == 6
        assert made.sha256 == corpus(IDS_23).sha256
        assert made.inputs["input_ids"].dtype == torch.long and made.token(1, 0) == "id 9"

    def test_with_tokenizer(self, plain):
        assert corpus(IDS_23, tokenizer=plain).token(0, 0) == "a"
        bare = corpus(IDS_23)
        named = bare.with_tokenizer(plain)
        assert named.token(1, 2) == "." and named.position_class(1, 2) == "delimiter"
        assert bare.position_class(1, 2) == "other" and named.sha256 == bare.sha256

    def test_none_are_dropped_unless_asked(self):
        ids = torch.zeros(50, 2, dtype=torch.long)
        assert corpus(ids).n_sequences == 50 and corpus(ids, n_sequences=4).n_sequences == 4

    @pytest.mark.parametrize(
        ("ids", "what", "why"),
        [
            (torch.tensor([1, 2]), "two-dimensional", "(2,)"),
            (torch.ones(2, 2), "not integers", "float32"),
            (torch.ones(2, 2, dtype=torch.bool), "not integers", "bool"),
            (torch.tensor([[1, -100]]), "-100", "labels"),
            (torch.zeros(0, 4, dtype=torch.long), "do not form", "(0, 4)"),
            (np.array([["a"]]), "no tensor", "ndarray"),
        ],
    )
    def test_refused(self, refused, ids, what, why):
        error = refused(corpus, ids)
        assert what in error.what and why in error.why

    def test_outside_the_vocabulary(self, plain, refused):
        error = refused(corpus, torch.tensor([[1, 2], [3, 99]]), tokenizer=plain)
        assert "99 (sequence 1, position 1)" in error.what and f"0 to {len(WORDS) - 1}" in error.why

    def test_a_vocabulary_with_gaps(self, refused):
        core = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
        gaps = PreTrainedTokenizerFast(tokenizer_object=core)
        assert corpus(torch.tensor([[0, 7]]), tokenizer=gaps).token(0, 1) == "b"
        assert "0 to 7" in refused(corpus, torch.tensor([[8]]), tokenizer=gaps).why

    def test_requests_that_cannot_be_met(self, refused):
        error = refused(corpus, IDS_23, seq_len=2)
        assert "3 tokens long" in error.why and "ids[:, :2]" in error.do
        assert "There are 2" in refused(corpus, IDS_23, n_sequences=3).why
        assert "bos='always'" in refused(corpus, IDS_23, bos="always").what
        assert "split" in refused(corpus, IDS_23, split="test").what

    def test_require(self, refused):
        made = corpus(IDS_23)
        made.require(vocabulary=12, context=3)
        assert tells([refused(made.require, vocabulary=11).what], "11", "sequence 1", "position 2")
        assert "--seq-len 2" in refused(made.require, context=2).do


class TestTensors:
    def test_images(self):
        pixels = torch.randn(5, 3, 4, 4)
        made = corpus({"pixel_values": pixels})
        assert (made.kind, made.name, made.seq_len, made.n_sequences, made.n_tokens) == ("tensors",) * 2 + (
            None,
            5,
            None,
        )
        batches = list(made.batches(2))
        assert [batch.sequences for batch in batches] == [(0, 1), (2, 3), (4,)]
        assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in batches]), pixels)
        assert made.token(0, 17) == "token 17" and made.token_id(0, 17) == -1
        assert made.position_class(0, 0) == "start" and made.position_class(4, 9) == "other"
        made.require(vocabulary=1, context=1)

    def test_mask(self):
        made = corpus({"input_values": torch.randn(2, 8), "attention_mask": np.array([[1] * 5 + [0] * 3, [1] * 8])})
        (batch,) = made.batches(2)
        assert batch.inputs["input_values"].shape == (2, 8) and batch.rows == (slice(0, 5), None)
        assert made.n_tokens == 13

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool])
    def test_hash_of_any_type(self, dtype):
        one = torch.zeros(2, 3).to(dtype)
        assert corpus({"x": one}).sha256 == corpus({"x": one.clone()}).sha256
        assert corpus({"x": one}).sha256 != corpus({"y": one}).sha256
        assert corpus({"x": one}).sha256 != corpus({"x": one.reshape(3, 2)}).sha256
        assert corpus({"x": one}).sha256 != corpus({"x": one.T}).sha256

    def test_refused(self, refused):
        assert "no input" in refused(corpus, {}).why
        assert "a (2, 1), b (3, 1)" in refused(corpus, {"a": torch.ones(2, 1), "b": torch.ones(3, 1)}).why
        assert "list" in refused(corpus, {"a": [1, 2]}).why
        assert "no tokens" in refused(corpus, {"a": torch.ones(2, 1)}, seq_len=4).why


class TestHash:
    def test_written_out(self):
        digest = hashlib.sha256(b"input_ids int64 (2, 3)\n" + IDS_23.numpy().astype("<i8").tobytes())
        assert corpus(IDS_23).sha256 == digest.hexdigest()

    def test_written_out_with_a_mask(self):
        mask = np.array([[1, 1, 1], [1, 1, 0]], dtype=np.uint8)
        made = corpus({"input_ids": IDS_23, "attention_mask": mask})
        digest = hashlib.sha256(b"attention_mask bool (2, 3)\n" + mask.tobytes())
        digest.update(b"input_ids int64 (2, 3)\n" + (IDS_23.numpy() * mask).astype("<i8").tobytes())
        assert made.sha256 == digest.hexdigest()

    def test_head_equals_a_shorter_corpus(self, llama, refused):
        prompts = ["a b", "c", "a b c d e"]
        made = corpus(prompts, tokenizer=llama)
        assert made.head(2).sha256 == corpus(prompts[:2], tokenizer=llama).sha256
        assert made.head(1).mask is None and made.head(3).sha256 == made.sha256
        assert corpus(IDS_23).head(1).n_sequences == 1
        assert "has 3" in refused(made.head, 4).why
        assert "1 to 3" in refused(made.head, 0).do


class TestSpelling:
    def test_byte_level(self, bytes_bpe):
        text = "the cat\n\nand caf\u00e9, \u201cso\u201d."
        made = corpus([text], tokenizer=bytes_bpe)
        tokens = [made.token(0, pos) for pos in range(made.seq_len)]
        assert tokens[0] == "the" and " cat" in tokens and "," in tokens
        assert "\\xc3" in tokens and "\\xa9" in tokens
        whole = [token for token in tokens if "\\x" not in token]
        assert "".join(whole) == text.replace("\u00e9", "").replace("\u201c", "").replace("\u201d", "")
        classes = {made.token(0, pos): made.position_class(0, pos) for pos in range(made.seq_len)}
        assert classes["the"] == "start" and classes[" cat"] == "other" and classes[","] == "delimiter"
        assert all(classes[token] == "delimiter" for token in tokens if token.strip("\n") == "")

    def test_sentencepiece(self, metaspace):
        ids = torch.tensor([[1, 6, 7, 3, 5, 9, 8, 4, 2]])
        made = corpus(ids, tokenizer=metaspace)
        tokens = [made.token(0, pos) for pos in range(9)]
        assert tokens == ["<s>", " the", "the", "\n", " ", " .", ".", "<0xC3>", "</s>"]
        classes = [made.position_class(0, pos) for pos in range(9)]
        assert classes == ["start", *["other"] * 2, "delimiter", "other", *["delimiter"] * 2, *["other"] * 2]

    def test_separator_and_unknown_ids(self, bert):
        made = corpus(torch.tensor([[4, 6, 5]]), tokenizer=bert)
        assert [made.token(0, pos) for pos in range(3)] == ["[CLS]", "a", "[SEP]"]
        assert [made.position_class(0, pos) for pos in range(3)] == ["start", "other", "delimiter"]
        assert corpus(torch.tensor([[500]])).with_tokenizer(bert).token(0, 0) == "<id 500>"

    def test_bytes_pieces(self):
        class Tiktoken:
            sep_token_id = None

            def convert_ids_to_tokens(self, token_id):
                return [b" the", b"\xe2\x80"][token_id]

        made = corpus(torch.tensor([[0, 1]])).with_tokenizer(Tiktoken())
        assert [made.token(0, 0), made.token(0, 1)] == [" the", "\\xe2\\x80"]

    @pytest.mark.parametrize(("sequence", "pos"), [(-1, 0), (0, -1), (2, 0), (0, 3)])
    def test_outside(self, sequence, pos):
        for read_one in (corpus(IDS_23).token, corpus(IDS_23).token_id, corpus(IDS_23).position_class):
            with pytest.raises(IndexError):
                read_one(sequence, pos)


def test_info_is_json(bert):
    for made in (
        corpus(["a b", "c"], tokenizer=bert),
        corpus(IDS_23, n_sequences=np.int64(1), seed=np.int64(3)),
        corpus({"pixel_values": torch.zeros(2, 3)}),
        corpus(None, tokenizer=bert, seq_len=64, n_sequences=2),
    ):
        info = json.loads(json.dumps(made.info()))
        assert {"name", "kind", "sha256", "bos", "seq_len", "n_sequences", "n_tokens", "seed"} <= set(info)
        assert {"tokenizer", "packing"} <= set(info) and len(info["sha256"]) == 64 and len(made) == made.n_sequences
