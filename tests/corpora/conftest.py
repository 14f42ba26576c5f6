"""Tokenizers built here, small enough to check by hand: no file and no network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from corpus_words import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from massact.records.errors import UserError


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """GPT-2's kind: has no BOS of its own and adds nothing."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def llama() -> PreTrainedTokenizerFast:
    """Llama's kind: '<s>' in front."""
    return word_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bert() -> PreTrainedTokenizerFast:
    """BERT's kind: '[CLS] ... [SEP]'."""
    return word_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


@pytest.fixture(scope="session")
def bytes_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE, with a short context that warns."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eot>"], show_progress=False
    )
    core.train_from_iterator(["the cat and the hat\n\nand the dog. " * 4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<eot>", model_max_length=16)


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: '\u2581' for a space, bytes as '<0x0A>'."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "\u2581", "\u2581the", "the", ".", "\u2581.", "a"]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture()
def refused() -> Callable[..., UserError]:
    """Call something that must refuse, check that all three parts are there, and return the error."""

    def call(function: Callable[..., object], *args: object, **kwargs: object) -> UserError:
        with pytest.raises(UserError) as caught:
            function(*args, **kwargs)
        error = caught.value
        assert error.what and error.why and error.do, (error.what, error.why, error.do)
        assert error.exit_code == 2
        return error

    return call
