"""Windows and prompts against oracles written out naively; BOS policies; every refusal."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from corpus_words import IDS, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.ctrl.tokenization_ctrl import CTRLTokenizer

from massact.corpora import corpus, packing
from massact.corpora.packing import Request, pack_prompts, pack_windows, resolve_specials
from massact.corpora.sources import Source
from massact.records.errors import UserError
from tests.facts import tells

TEXT = "a b c . d e a b , c d e a b c d ."  # 17 tokens
LETTERS = [IDS[word] for word in TEXT.split()]


def text_source(*documents: str, **fields: object) -> Source:
    return Source("text", lambda seed: documents, **fields)


def ids_of(made: object) -> list[list[int]]:
    return [row.tolist() for batch in made.batches(3) for row in batch.inputs["input_ids"]]


def paper_windows(tokenizer, documents, seq_len, join="\n\n", special=False) -> list[list[int]]:
    """The official loader, written out: join, tokenise once, slice, drop the tail."""
    ids = tokenizer(join.join(documents), add_special_tokens=special)["input_ids"]
    return [ids[i * seq_len : (i + 1) * seq_len] for i in range(len(ids) // seq_len)]


class TestWindows:
    @pytest.mark.parametrize("seq_len", [1, 2, 5, 17])
    def test_are_the_papers(self, llama, seq_len):
        documents = ("a b c . d e", "a b , c", "d e a b c d .")
        made = text_source(*documents).encode(llama, seq_len=seq_len, bos="never")
        assert ids_of(made) == paper_windows(llama, documents, seq_len)
        assert made.seq_len == seq_len and made.info()["bos"] == "never"

    def test_of_every_preset_protocol(self, llama):
        documents = ("a b c", "d e a", "b c d e")
        stream = text_source(*documents, join=" ", protocol="stream").encode(llama, seq_len=3)
        assert ids_of(stream) == paper_windows(llama, documents, 3, join=" ", special=True)
        assert ids_of(stream)[0][0] == IDS["<s>"] and IDS["<s>"] not in sum(ids_of(stream)[1:], [])
        assert stream.info()["bos"] == "stream"
        never = text_source(*documents, protocol="never").encode(llama, seq_len=3)
        assert ids_of(never) == paper_windows(llama, documents, 3)

    def test_a_protocol_gives_way_to_an_explicit_policy(self, llama):
        made = text_source(TEXT, protocol="never").encode(llama, seq_len=4, bos="always")
        assert [row[0] for row in ids_of(made)] == [IDS["<s>"]] * 5

    def test_the_first_n_are_taken(self, plain):
        assert ids_of(text_source(TEXT).encode(plain, seq_len=4, n_sequences=2)) == [
            LETTERS[:4],
            LETTERS[4:8],
        ]
        assert len(ids_of(text_source("a " * 100).encode(plain, seq_len=2))) == 32
        assert len(ids_of(text_source("a " * 100).encode(plain, seq_len=2, n_sequences="all"))) == 50

    @given(n=st.integers(1, 60), seq_len=st.integers(1, 20), bos=st.sampled_from(["auto", "always", "never"]))
    def test_tile_the_token_stream(self, n, seq_len, bos):
        tokenizer = word_tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>")
        words = [list("abcdexyz")[i % 8] for i in range(n)]
        specials = resolve_specials(tokenizer, bos)
        room = seq_len - specials.size
        if room < 1 or n < room:
            return
        rows = ids_of(text_source(" ".join(words)).encode(tokenizer, seq_len=seq_len, bos=bos, n_sequences="all"))
        assert {len(row) for row in rows} == {seq_len}
        front, back = len(specials.prefix), len(specials.suffix)
        stream = sum((row[front : seq_len - back] for row in rows), [])
        assert stream == [IDS[word] for word in words][: n // room * room]

    @pytest.mark.parametrize(
        ("context", "words", "expected"),
        [(None, 2000, 1024), (8, 2000, 8), (8, 5, 5), (None, 5, 5), (2048, 2000, 1024)],
    )
    def test_default_length(self, plain, context, words, expected):
        assert text_source("a " * words).encode(plain, context=context).seq_len == expected

    def test_default_length_counts_special_tokens(self, bert):
        made = text_source("a b c").encode(bert)
        assert ids_of(made) == [[IDS[word] for word in ("[CLS]", "a", "b", "c", "[SEP]")]]

    def test_default_length_knows_the_tokenizers_own_limit(self, bytes_bpe):
        assert text_source("the cat " * 50).encode(bytes_bpe).seq_len == 16

    def test_a_very_long_text_is_read_as_far_as_needed(self, bytes_bpe, monkeypatch):
        documents = ["the cat and the hat. ", "the dog\n"] * 400
        whole = text_source(*documents).encode(bytes_bpe, seq_len=16, n_sequences=20)
        monkeypatch.setattr(packing, "WHOLE_TEXT_CHARACTERS", 500)
        monkeypatch.setattr(packing, "MARGIN_TOKENS", 50)
        part = text_source(*documents).encode(bytes_bpe, seq_len=16, n_sequences=20)
        assert ids_of(part) == ids_of(whole) and part.sha256 == whole.sha256
        assert whole.info()["packing"]["text_complete"] and not part.info()["packing"]["text_complete"]
        everything = text_source(*documents).encode(bytes_bpe, seq_len=16, n_sequences="all")
        assert everything.info()["packing"]["text_complete"]

    @pytest.mark.parametrize("size", [40, 41, 42, 43])
    def test_what_is_kept_of_a_prefix_is_what_the_whole_gives(self, bytes_bpe, monkeypatch, size):
        text = "the cat and the hat, the dog. " * 40
        monkeypatch.setattr(packing, "WHOLE_TEXT_CHARACTERS", size)
        monkeypatch.setattr(packing, "MARGIN_TOKENS", 4)
        kept, complete = packing._stream(bytes_bpe, text, 2, special=False)
        assert not complete and 2 <= len(kept) and kept == packing.token_ids(bytes_bpe, text)[: len(kept)]

    def test_the_end_token_of_a_prefix_is_not_kept(self, bert, monkeypatch):
        monkeypatch.setattr(packing, "WHOLE_TEXT_CHARACTERS", 60)
        monkeypatch.setattr(packing, "MARGIN_TOKENS", 4)
        kept, complete = packing._stream(bert, TEXT * 30, 5, special=True)
        assert not complete and kept[0] == IDS["[CLS]"] and IDS["[SEP]"] not in kept

    def test_no_warning_about_long_text(self, bytes_bpe, caplog, recwarn):
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            text_source("the cat " * 200).encode(bytes_bpe, seq_len=8, context=16)
        finally:
            logger.removeHandler(caplog.handler)
        assert not caplog.records and not recwarn.list


class TestBos:
    @pytest.mark.parametrize(
        ("kind", "bos", "policy", "prefix", "suffix"),
        [
            ("plain", "auto", "never", [], []),
            ("llama", "auto", "tokenizer", ["<s>"], []),
            ("bert", "auto", "tokenizer", ["[CLS]"], ["[SEP]"]),
            ("llama", "always", "always", ["<s>"], []),
            ("bert", "always", "always", ["[CLS]"], []),
            ("bytes_bpe", "auto", "never", [], []),
            ("bytes_bpe", "always", "always", ["<eot>"], []),
            ("llama", "never", "never", [], []),
            ("bert", "never", "never", [], []),
        ],
    )
    def test_policy(self, request, kind, bos, policy, prefix, suffix):
        made = text_source("a b c the cat " * 9).encode(request.getfixturevalue(kind), seq_len=6, bos=bos)
        info = made.info()
        assert (info["bos"], info["bos_requested"]) == (policy, bos)
        assert info["special_tokens"] == {"prefix": prefix, "suffix": suffix}
        for row in range(made.n_sequences):
            tokens = [made.token(row, pos) for pos in range(6)]
            assert tokens[: len(prefix)] == prefix
            assert tokens[6 - len(suffix) :] == suffix

    def test_auto_window_is_what_the_tokenizer_makes_of_its_text(self, bert):
        row = ids_of(text_source(TEXT).encode(bert, seq_len=7))[0]
        assert row == bert(" ".join(TEXT.split()[:5]))["input_ids"]

    def test_only_an_end_token_is_not_a_bos(self):
        t5 = word_tokenizer("$A </s>", eos_token="</s>")
        assert text_source(TEXT).encode(t5, seq_len=4).info()["bos"] == "never"

    def test_a_letter_without_tokens(self):
        class Odd:
            bos_token_id, cls_token_id = 7, None

            def __call__(self, text, add_special_tokens, verbose):
                return {"input_ids": [7, 8] if add_special_tokens else []}

        assert resolve_specials(Odd(), "auto") == packing.Specials("tokenizer", (7,), (8,))

    def test_always_without_a_bos(self, plain, refused):
        error = refused(text_source(TEXT).encode, plain, seq_len=4, bos="always")
        assert "bos='always'" in error.what and tells([error.why], "BOS", "CLS") and "--bos never" in error.do

    def test_unknown_policy(self, plain, refused):
        error = refused(corpus, ["a"], tokenizer=plain, bos="alway")
        assert "'alway'" in error.what and "'always'" in error.do


class TestRefusals:
    def test_text_too_short(self, llama, refused):
        error = refused(text_source(TEXT).encode, llama, seq_len=64)
        assert "64" in error.what and "17 tokens" in error.why and "--seq-len 18" in error.do
        assert text_source(TEXT).encode(llama, seq_len=18).n_sequences == 1

    def test_more_sequences_than_there_are(self, plain, refused):
        error = refused(text_source(TEXT).encode, plain, seq_len=4, n_sequences=5)
        assert "5 sequences of 4" in error.what and "enough for 4" in error.why
        assert "--n-sequences 4" in error.do and "--seq-len 3" in error.do
        assert text_source(TEXT).encode(plain, seq_len=3, n_sequences=5).n_sequences == 5

    def test_far_more_sequences_than_tokens(self, plain, refused):
        error = refused(text_source("a b c").encode, plain, seq_len=1, n_sequences=50)
        assert "--seq-len" not in error.do

    def test_longer_than_the_context(self, plain, refused):
        error = refused(text_source(TEXT).encode, plain, seq_len=12, context=8)
        assert "--seq-len 12" in error.what and "8 positions" in error.why and "--seq-len 8" in error.do

    def test_exactly_the_context_is_fine(self, plain):
        assert text_source(TEXT).encode(plain, seq_len=8, context=8).seq_len == 8
        assert corpus(["a b"]).encode(plain, context=2).seq_len == 2

    def test_no_room_beside_special_tokens(self, bert, refused):
        error = refused(text_source(TEXT).encode, bert, seq_len=2)
        assert "--seq-len 2" in error.what and "--seq-len 3" in error.do

    @pytest.mark.parametrize("text", ["", "  \n "])
    def test_empty_text(self, plain, refused, text):
        assert "empty" in refused(text_source(text).encode, plain).what

    def test_text_without_tokens(self, refused):
        class Deaf(word_tokenizer().__class__):
            def __call__(self, text, **options):
                return {"input_ids": []}

        deaf = Deaf(tokenizer_object=word_tokenizer().backend_tokenizer)
        assert "no token" in refused(text_source("a").encode, deaf).why
        assert "Prompt 0" in refused(corpus, ["a"], tokenizer=deaf).what

    @pytest.mark.parametrize("bad", [0, -3, 2.5, True, "many"])
    def test_counts(self, plain, refused, bad):
        assert repr(bad) in refused(corpus, ["a"], tokenizer=plain, seq_len=bad).what
        assert repr(bad) in refused(corpus, ["a"], tokenizer=plain, n_sequences=bad).what

    def test_seed(self, refused):
        assert "-1" in refused(corpus, ["a"], seed=-1).what

    def test_no_tokenizer(self, refused):
        error = refused(text_source(TEXT).encode, None)
        assert "no tokenizer" in error.why and "pixel_values" in error.do


class TestPrompts:
    def test_one_sequence_each_padded_on_the_right(self, llama):
        made = corpus(["a b c", "d", "e ."], tokenizer=llama)
        assert made.seq_len is None and made.n_sequences == 3 and made.n_tokens == 9
        (batch,) = made.batches(8)
        assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
        assert batch.rows == (None, slice(0, 2), slice(0, 3))
        for row, prompt in enumerate(["a b c", "d", "e ."]):
            ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
            assert ids.tolist() == llama(prompt)["input_ids"]

    def test_no_mask_without_padding(self, llama):
        (batch,) = corpus(["a b", "c d"], tokenizer=llama).batches(2)
        assert set(batch.inputs) == {"input_ids"} and batch.rows == (None, None)
        assert corpus(["a b", "c d"], tokenizer=llama).seq_len == 3
        for batch in corpus(["a b c", "d"], tokenizer=llama).batches(1):
            assert set(batch.inputs) == {"input_ids"}

    def test_all_are_kept_however_many(self, plain):
        assert corpus(["a b"] * 40, tokenizer=plain).n_sequences == 40
        assert corpus(["a b"] * 40, tokenizer=plain, n_sequences=3).n_sequences == 3

    def test_are_packed_if_a_length_is_asked_for(self, plain):
        made = corpus(["a b c", "d e"], tokenizer=plain, seq_len=2)
        assert ids_of(made) == [[IDS["a"], IDS["b"]], [IDS["c"], IDS["d"]]]
        assert made.info()["packing"]["method"] == "windows"

    def test_hash_does_not_depend_on_the_padding_token(self, plain, bert):
        one = pack_prompts("p", ["a b", "c"], plain, Request(bos="never"))
        two = pack_prompts("p", ["a b", "c"], bert, Request(bos="never"))
        assert one.inputs["input_ids"][1, 1] != two.inputs["input_ids"][1, 1]
        assert one.sha256 == two.sha256

    def test_refusals(self, plain, refused):
        source = corpus(["a b", "c d e"])
        error = refused(source.encode, plain, context=2)
        assert "Prompt 1 is 3 tokens" in error.what and "at most 2" in error.why
        assert "Prompt 1" in refused(corpus, ["a", ""], tokenizer=plain).what
        assert "There are 2" in refused(source.encode, plain, n_sequences=5).why


def test_slow_tokenizer(tmp_path: Path):
    """A tokenizer in plain Python (CTRL is BPE over words, end marked by '@@')."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "<unk>": 2, ".": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=4)
    assert isinstance(slow, PreTrainedTokenizerBase) and not slow.is_fast
    made = text_source("a b . a b . a b").encode(slow, seq_len=3)
    assert [made.token(0, pos) for pos in range(3)] == ["a", "b", "."]
    assert [made.position_class(0, pos) for pos in range(3)] == ["start", "other", "delimiter"]
    assert made.info()["tokenizer"]["class"] == "CTRLTokenizer"


def test_real_tokenizer(monkeypatch):
    """A SentencePiece-like tokenizer of a published model on the embedded text, against the naive loader."""
    data = os.environ.get("MASSACT_TEST_DATA")
    if not data:
        pytest.skip("MASSACT_TEST_DATA is not set (a folder with models/stories260k)")
    tokenizer = AutoTokenizer.from_pretrained(Path(data) / "models" / "stories260k")
    source = corpus()
    made = source.encode(tokenizer, seq_len=128, bos="never", context=512)
    assert ids_of(made) == paper_windows(tokenizer, source.documents(), 128)[:32]
    text = "".join(made.token(0, pos) for pos in range(128))
    assert text.strip() and "\n\n".join(source.documents()).startswith(text.lstrip(" "))
    auto = source.encode(tokenizer, context=512)
    assert auto.seq_len == 512 and auto.token(0, 0) == "<s>" and auto.info()["bos"] == "tokenizer"
    monkeypatch.setattr(packing, "WHOLE_TEXT_CHARACTERS", 20_000)
    part = source.encode(tokenizer, seq_len=128, n_sequences=16, bos="never")
    assert not part.info()["packing"]["text_complete"]
    assert ids_of(part) == ids_of(made)[:16]


def test_windows_are_long_tensors(plain):
    made = pack_windows("t", [TEXT], plain, Request(seq_len=4))
    assert made.inputs["input_ids"].dtype == torch.long


@pytest.mark.parametrize("made", [{"prompts": True}, {}])
def test_half_a_character_is_refused(plain, made):
    with pytest.raises(UserError, match="not Unicode"):
        text_source("a b \ud800 c", **made).encode(plain)
