"""A vocabulary small enough to check by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["[UNK]", "[PAD]", "<s>", "</s>", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", ".", ",", "x", "y", "z"]
IDS = {word: number for number, word in enumerate(WORDS)}


def word_tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Words to ids, one to one; `template` is what it adds to a sequence, for example '<s> $A'."""
    core = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        added = [(word, IDS[word]) for word in template.split() if word in IDS]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)
