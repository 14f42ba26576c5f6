"""Transcripts as the decoders of models of sound were trained on them."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import transformers

from massact.corpora.audio_source import Prompt, _decoder_ids
from massact.corpora.recordings import Recordings

TEXT = "low high low"


def trained(model: tokenizers.Tokenizer, trainer: object, **rest: object) -> transformers.PreTrainedTokenizerFast:
    model.train_from_iterator([f" {TEXT} rises and falls"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **rest)


def byte_level(add_prefix_space: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Like Whisper's: a space belongs to the word behind it, and none is added."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return trained(made, tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))


def metaspace() -> transformers.PreTrainedTokenizerFast:
    """Like SentencePiece: marks the first word as well."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return trained(made, tokenizers.trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>"], show_progress=False))


def read(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
    recordings = Recordings(("a.wav",), texts=(text,), sounds=(np.zeros(1),), form="file")
    ids, counts, _ = _decoder_ids(recordings, tokenizer, Prompt((300, 301), "test"))
    row = ids[0][counts[0]].tolist()
    assert row[:2] == [300, 301]  # the model's own start, language and task come first
    return row[2:]


@pytest.mark.parametrize("text", [TEXT, f" {TEXT}", "zigzag"])
def test_a_byte_level_decoder_reads_a_space_first(text: str) -> None:
    tokenizer = byte_level()
    wanted = tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
    assert read(tokenizer, text) == wanted
    assert wanted != tokenizer(text.strip(), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("made", [metaspace, lambda: byte_level(add_prefix_space=True)])
def test_a_tokenizer_that_marks_the_first_word_is_left_alone(made: object) -> None:
    tokenizer = made()  # type: ignore[operator]
    assert read(tokenizer, TEXT) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(read(tokenizer, TEXT)).strip() == TEXT
